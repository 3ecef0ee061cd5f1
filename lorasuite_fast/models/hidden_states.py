"""The forward pass of a model that is never in memory as a whole.

transformers builds the model from its config without weights. A first pass over every micro-batch, in which the layers
do nothing, records what transformers hands each of them (masks, position embeddings); then the layers run one by one
over all micro-batches, each with its weights read once and freed behind it. The head is never loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import finite_hint
from ..errors import LoraSuiteError
from ..io.phases import release_memory
from .checkpoint import Checkpoint
from .experts import composed
from .loader import Layer, stream_layers
from .loading import loading
from .pretrained import load_config

MICRO_BATCH = 16
"""Examples that pass through a layer together, where nothing else is asked for."""

LayerProgress = Callable[[int, int], None]


def _empty_model(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModel

    config = load_config(checkpoint.folder, trust_remote_code=trust_remote_code)
    if checkpoint.family.wrapper:
        config = config.get_text_config()
    what = f"{checkpoint.folder}: transformers cannot build this model"
    with loading(what, trust_remote_code=trust_remote_code), init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    return model.eval()


def padded(checkpoint: Checkpoint, rows: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (examples, longest) int64, padded on one side.

    Raises:
        LoraSuiteError: a token beyond the embedding's rows.
    """
    highest = max(map(max, rows))
    if highest >= checkpoint.shape.V:
        raise LoraSuiteError(
            f"{checkpoint.folder}: its tokenizer gives token {highest}, beyond the embedding's {checkpoint.shape.V} "
            "rows; the tokenizer belongs to another model"
        )
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
        ids[n, place] = torch.tensor(row)
        mask[n, place] = 1
    return ids, mask


class _Recorded(Exception):
    """Ends the recording pass behind the last layer."""


@dataclass(frozen=True)
class _Call:
    """What transformers hands a layer besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def _record_calls(model: Any, layers: list[nn.Module], embedded: Tensor, mask: Tensor) -> tuple[Tensor, list[_Call]]:
    """The hidden states entering layer 0, and the call of every layer."""
    try:
        return _recorded(model, layers, embedded, mask, as_tuple=False)
    except (IndexError, TypeError, RuntimeError, ValueError):
        # Layers of some architectures return a tuple.
        return _recorded(model, layers, embedded, mask, as_tuple=True)


def _recorded(
    model: Any, layers: list[nn.Module], embedded: Tensor, mask: Tensor, *, as_tuple: bool
) -> tuple[Tensor, list[_Call]]:
    calls: list[_Call] = []
    entering: list[Tensor] = []

    def stand_in(hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if not calls:
            entering.append(hidden)
        calls.append(_Call(arguments, keywords))
        if len(calls) == len(layers):
            raise _Recorded
        return (hidden,) if as_tuple else hidden

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


class StreamedLayer:
    """One layer with its weights in place, ready to run over micro-batches.

    Attributes:
        index: of the layer. module: transformers' own, for hooks; its weights are gone after the next layer is asked
            for.
    """

    def __init__(self, index: int, module: nn.Module, calls: list[_Call], device: torch.device) -> None:
        self.index, self.module, self._calls, self._device = index, module, calls, device

    def run(self, hidden: MutableSequence[Tensor], *, keep: bool = True) -> Iterator[Tensor]:
        """Passes every micro-batch through the layer and yields the layer's output, (examples, tokens, d) each.

        Args:
            keep: replace each micro-batch in `hidden` by the output.
        """
        for n, call in enumerate(self._calls):
            entering = hidden[n]
            with torch.no_grad():
                output = self.module(entering.to(self._device), *call.arguments, **call.keywords)
            output = output if isinstance(output, Tensor) else output[0]
            if keep:
                hidden[n] = output.to(entering.device)
            yield output


class LayerStream:
    """A forward pass over all examples, layer by layer.

    Iterating gives each layer once, in order, with its weights loaded; what runs it is the caller's choice:

    >>> stream = LayerStream(checkpoint, ids, mask, device=device, dtype=torch.float32)
    >>> for layer in stream:
    ...     for output in layer.run(stream.hidden):  # (micro-batch, tokens, d), the layer's output
    ...         ...

    Attributes:
        hidden: the hidden states entering the next layer, one tensor (micro-batch, tokens, d) each; may be replaced to
            go on from saved ones. A list, or what was given for it.
        masks: the attention masks, (micro-batch, tokens), on the device.

    Args:
        ids, mask: (examples, tokens) int64; `padded` makes them.
        micro_batch: examples that pass through a layer together.
        first, last: the layers to run, first … last - 1; all by default.
        keep: where the hidden states lie between layers; the device itself by default. hidden: an empty list of
            another kind for them, such as one that keeps them in files.

    Raises:
        LoraSuiteError: a model transformers cannot build, or that does not have the checkpoint's layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Tensor,
        mask: Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch: int = MICRO_BATCH,
        first: int = 0,
        last: int | None = None,
        keep: torch.device | None = None,
        hidden: MutableSequence[Tensor] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        family, L = checkpoint.family, checkpoint.shape.L
        self.first, self.last = first, L if last is None else last
        model = _empty_model(checkpoint, trust_remote_code=trust_remote_code)
        self._layers = list(model.get_submodule(family.layers))
        if len(self._layers) != L:
            raise LoraSuiteError(
                f"{checkpoint.folder}: transformers builds {len(self._layers)} layers, the checkpoint holds {L}"
            )
        embedding = model.get_submodule(family.embedding)
        embedding.padding_idx = None
        table = checkpoint.tensors.view(checkpoint.embedding_name)
        self._load_ends(model)
        self.hidden: MutableSequence[Tensor] = [] if hidden is None else hidden
        self.masks: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        with torch.no_grad():
            for start in range(0, len(ids), micro_batch):
                part = mask[start : start + micro_batch].to(device)
                # Only the rows that are read, in the dtype of the pass: some families scale them in it.
                used, place = ids[start : start + micro_batch].unique(return_inverse=True)
                rows = table[used].to(dtype)
                checkpoint.check_finite(rows, checkpoint.embedding_name)
                embedding.weight = nn.Parameter(rows, requires_grad=False)
                embedded = embedding(place).to(device)
                entering, calls = _record_calls(model, self._layers, embedded, part)
                self.hidden.append(entering.to(keep or device))
                self.masks.append(part)
                self._calls.append(calls)
        checkpoint.tensors.release([checkpoint.embedding_name])

    def _load_ends(self, model: nn.Module) -> None:
        """Weights outside the layers that hidden states pass through before the first one (a norm, positions)."""
        family = self.checkpoint.family
        outside = (f"{family.layers}.", f"{family.embedding}.", f"{family.final_norm}.")
        for name, _ in list(model.named_parameters()):
            if not name.startswith(outside):
                stored = f"{self.checkpoint.prefix}{name}"
                value = self.checkpoint.tensors.view(stored).to(self.device, self.dtype)
                self.checkpoint.check_finite(value, stored)
                _set(model, name, value)
        for name, buffer in list(model.named_buffers()):
            # The embedding itself stays on the CPU, on the memory map.
            if not name.startswith(f"{family.embedding}."):
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, buffer.to(self.device))

    def __iter__(self) -> Iterator[StreamedLayer]:
        order = range(self.first, self.last)
        for layer in stream_layers(self.checkpoint, self.device, layers=order):
            module = self._layers[layer.index]
            _load(layer, module, self.dtype)
            yield StreamedLayer(layer.index, module, [calls[layer.index] for calls in self._calls], self.device)
            module.to("meta")
            if self.device.type == "cpu":
                # Freed hidden states are not taken up again by every allocator: without this memory grows with depth.
                release_memory()


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the non-padding tokens: hidden (examples, tokens, d), mask (examples, tokens) -> (examples, d) float32.

    Padding may hold anything, NaN included.
    """
    weight = (mask / mask.sum(1, keepdim=True)).float()
    kept = hidden.float().masked_fill(mask[:, :, None] == 0, 0)
    return torch.einsum("nt,ntd->nd", weight, kept)


def pooled_layers(stream: LayerStream, progress: LayerProgress | None = None) -> Iterator[tuple[int, Tensor]]:
    """Runs a forward pass and yields, for each layer, its index and the pooled output of all examples, (examples, d).

    Raises:
        LoraSuiteError: a layer that gives NaN or infinity.
    """
    for layer in stream:
        means = [pooled(output, mask) for output, mask in zip(layer.run(stream.hidden), stream.masks, strict=True)]
        result = torch.cat(means)
        if not torch.isfinite(result).all():
            raise LoraSuiteError(
                f"{stream.checkpoint.folder}: layer {layer.index} gives NaN or infinity on the calibration text in "
                f"{stream.dtype}; {finite_hint(stream.dtype)}"
            )
        if progress:
            progress(layer.index + 1, stream.checkpoint.shape.L)
        yield layer.index, result


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def _load(layer: Layer, module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a module on the meta device its weights."""
    if layer.checkpoint.family.experts:
        for name, value in composed(layer, module, dtype).items():
            _set(module, name, value)
        for name, buffer in list(module.named_buffers()):
            if name in layer.inside:
                owner, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(owner), attribute, layer.read(name, buffer.dtype))
        return
    for name, _ in list(module.named_parameters()):
        _set(module, name, layer.read(name, dtype))
