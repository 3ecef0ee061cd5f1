"""One pooled vector per example and layer from a model that is never in memory as a whole.

transformers builds the model from its config without weights; each layer's weights are read from the memory map as the
forward pass reaches it and freed behind it. All examples go through in one batch, so every weight is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import LoraSuiteError

MAX_TOKENS = 128

LayerProgress = Callable[[int, int], None]


def _empty_model(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with init_empty_weights(include_buffers=False):
            model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraSuiteError(f"{checkpoint.folder}: transformers cannot build this model ({first})") from None
    return model.eval()


def _tokenize(checkpoint: Checkpoint, texts: list[str], max_tokens: int, trust_remote_code: bool) -> Any:
    tokenizer = checkpoint.tokenizer(trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:  # the id does not matter: padding is masked
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    if int(batch["attention_mask"].sum(1).min()) == 0:
        raise LoraSuiteError(f"{checkpoint.folder}: its tokenizer gives no token for a calibration example")
    if int(batch["input_ids"].max()) >= checkpoint.shape.V:
        raise LoraSuiteError(
            f"{checkpoint.folder}: its tokenizer gives token {int(batch['input_ids'].max())}, beyond the embedding's "
            f"{checkpoint.shape.V} rows; the tokenizer belongs to another model"
        )
    return batch


def pooled_hidden_states(
    checkpoint: Checkpoint,
    texts: list[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int = MAX_TOKENS,
    trust_remote_code: bool = False,
    progress: LayerProgress | None = None,
) -> Tensor:
    """Mean over the non-padding tokens of every layer's output, (L, examples, d) float32 on the CPU.

    Args:
        texts: calibration examples, cut to `max_tokens` tokens each.
        dtype: of weights and activations in the forward pass.
        progress: called with (layers done, L).
    """
    batch = _tokenize(checkpoint, texts, max_tokens, trust_remote_code)
    model = _empty_model(checkpoint, trust_remote_code=trust_remote_code)
    family, L = checkpoint.family, checkpoint.shape.L
    layers = model.get_submodule(family.layers)
    if len(layers) != L:
        raise LoraSuiteError(f"{checkpoint.folder}: transformers builds {len(layers)} layers, the checkpoint holds {L}")
    mask = batch["attention_mask"].to(device)
    weights = (mask / mask.sum(1, keepdim=True)).to(torch.float32)
    pooled = torch.empty(L, len(texts), checkpoint.shape.d)

    def load(module: nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters():
            value = checkpoint.read(f"{prefix}{name}", dtype, device)
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=parameter.requires_grad))

    def enter(i: int) -> Callable[..., None]:
        return lambda module, *_: load(module, f"{family.layer(i)}.")

    def leave(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            pooled[i] = torch.einsum("nt,ntd->nd", weights, hidden.float()).cpu()
            module.to("meta")
            if progress:
                progress(i + 1, L)

        return hook

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(i))
        layer.register_forward_hook(leave(i))
    embedding = model.get_submodule(family.embedding)
    table = checkpoint.tensors.view(checkpoint.embedding_name)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    embedding.register_forward_hook(lambda module, inputs, output: output.to(device=device, dtype=dtype))
    for name, child in model.named_children():
        if name not in (family.embedding, family.layers):
            load(child, f"{family.prefix}{name}.")
            child.to(device)
    with torch.inference_mode():
        model(
            inputs_embeds=embedding(batch["input_ids"]),
            attention_mask=mask,
            use_cache=False,
        )
    if not torch.isfinite(pooled).all():
        layer_index = int((~torch.isfinite(pooled)).any(2).any(1).nonzero()[0])
        raise LoraSuiteError(
            f"{checkpoint.folder}: layer {layer_index} gives NaN or infinity on the calibration text in {dtype}; "
            "try --dtype float32"
        )
    return pooled
