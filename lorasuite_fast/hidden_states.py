"""One pooled vector per example and layer from a model that is never in memory as a whole.

transformers builds the model from its config without weights. A first pass over every micro-batch, in which the layers
do nothing, records what transformers hands each of them (masks, position embeddings); then the layers run one by one
over all micro-batches, each with its weights read from the memory map once and freed behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import LoraSuiteError

MAX_TOKENS = 128
_MICRO_BATCH = 16

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


class _Recorded(Exception):
    """Ends the recording pass behind the last layer."""


def _record_calls(
    model: Any, layers: list[nn.Module], embedded: Tensor, mask: Tensor
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The hidden states entering layer 0 and the keyword arguments transformers calls each layer with."""
    calls: list[dict[str, Any]] = []
    entering: list[Tensor] = []

    def stand_in(hidden: Tensor, **arguments: Any) -> Tensor:
        if not calls:
            entering.append(hidden)
        calls.append(arguments)
        if len(calls) == len(layers):
            raise _Recorded
        return hidden

    for layer in layers:
        layer.forward = stand_in
    try:
        model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    except _Recorded:
        pass
    finally:
        for layer in layers:
            del layer.forward
    return entering[0], calls


def pooled_hidden_states(
    checkpoint: Checkpoint,
    texts: list[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int = MAX_TOKENS,
    micro_batch: int = _MICRO_BATCH,
    trust_remote_code: bool = False,
    progress: LayerProgress | None = None,
) -> Tensor:
    """Mean over the non-padding tokens of every layer's output, (L, examples, d) float32 on the CPU.

    Args:
        texts: calibration examples, cut to `max_tokens` tokens each.
        dtype: of weights and activations in the forward pass.
        micro_batch: examples that pass through a layer together.
        progress: called with (layers done, L).
    """
    batch = _tokenize(checkpoint, texts, max_tokens, trust_remote_code)
    model = _empty_model(checkpoint, trust_remote_code=trust_remote_code)
    family, L = checkpoint.family, checkpoint.shape.L
    layers = list(model.get_submodule(family.layers))
    if len(layers) != L:
        raise LoraSuiteError(f"{checkpoint.folder}: transformers builds {len(layers)} layers, the checkpoint holds {L}")
    embedding = model.get_submodule(family.embedding)
    table = checkpoint.tensors.view(checkpoint.embedding_name)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    pooled = torch.empty(L, len(texts), checkpoint.shape.d)
    with torch.inference_mode():
        hidden, calls, weights = [], [], []
        for start in range(0, len(texts), micro_batch):
            mask = batch["attention_mask"][start : start + micro_batch].to(device)
            embedded = embedding(batch["input_ids"][start : start + micro_batch]).to(device=device, dtype=dtype)
            entering, recorded = _record_calls(model, layers, embedded, mask)
            hidden.append(entering)
            calls.append(recorded)
            weights.append((mask / mask.sum(1, keepdim=True)).float())
        for i, layer in enumerate(layers):
            _load(checkpoint, layer, f"{family.layer(i)}.", dtype, device)
            start = 0
            for n, weight in enumerate(weights):
                output = layer(hidden[n], **calls[n][i])
                hidden[n] = output if isinstance(output, Tensor) else output[0]
                means = torch.einsum("nt,ntd->nd", weight, hidden[n].float())
                pooled[i, start : start + len(means)] = means.cpu()
                start += len(means)
            layer.to("meta")
            if progress:
                progress(i + 1, L)
    if not torch.isfinite(pooled).all():
        layer_index = int((~torch.isfinite(pooled)).any(2).any(1).nonzero()[0])
        raise LoraSuiteError(
            f"{checkpoint.folder}: layer {layer_index} gives NaN or infinity on the calibration text in {dtype}; "
            "try --dtype float32"
        )
    return pooled


def _load(checkpoint: Checkpoint, module: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a module on the meta device its weights."""
    for name, _ in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        value = checkpoint.read(f"{prefix}{name}", dtype, device)
        setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
