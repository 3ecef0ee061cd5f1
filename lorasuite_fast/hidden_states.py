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


def _padded(checkpoint: Checkpoint, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (examples, longest), padded on the right."""
    highest = max(map(max, rows))
    if highest >= checkpoint.shape.V:
        raise LoraSuiteError(
            f"{checkpoint.folder}: its tokenizer gives token {highest}, beyond the embedding's {checkpoint.shape.V} "
            "rows; the tokenizer belongs to another model"
        )
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        mask[n, : len(row)] = 1
    return ids, mask


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
    rows: list[list[int]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch: int = _MICRO_BATCH,
    trust_remote_code: bool = False,
    progress: LayerProgress | None = None,
) -> Tensor:
    """Mean over the non-padding tokens of every layer's output, (L, examples, d) float32 on the CPU.

    Args:
        rows: the token ids of each example, none empty.
        dtype: of weights and activations in the forward pass.
        micro_batch: examples that pass through a layer together.
        progress: called with (layers done, L).
    """
    ids, masks = _padded(checkpoint, rows)
    model = _empty_model(checkpoint, trust_remote_code=trust_remote_code)
    family, L = checkpoint.family, checkpoint.shape.L
    layers = list(model.get_submodule(family.layers))
    if len(layers) != L:
        raise LoraSuiteError(f"{checkpoint.folder}: transformers builds {len(layers)} layers, the checkpoint holds {L}")
    embedding = model.get_submodule(family.embedding)
    table = checkpoint.tensors.view(checkpoint.embedding_name)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    pooled = torch.empty(L, len(rows), checkpoint.shape.d)
    with torch.inference_mode():
        hidden, calls, weights = [], [], []
        for start in range(0, len(rows), micro_batch):
            mask = masks[start : start + micro_batch].to(device)
            embedded = embedding(ids[start : start + micro_batch]).to(device=device, dtype=dtype)
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
