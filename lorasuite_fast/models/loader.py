"""One decoder layer of a checkpoint at a time, the next one fetched in the background while this one is used.

On a CPU a layer's tensors are views of the memory map; their pages are asked for before use and dropped behind it, so
that the resident set does not grow with the file. For a GPU the file is read into one of two pinned staging buffers and
copied from there on a stream of its own: a copy straight out of a map would wait for page faults, one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..io.tensor_files import DTYPES, Entry, TensorFiles
from .checkpoint import Checkpoint
from .layouts import READING

_ALIGN = 256


class Layer:
    """The tensors of one decoder layer, as stored, on one device.

    Attributes:
        checkpoint: where they come from. index: of the layer. tensors: by full name; some may be left out.
    """

    def __init__(self, checkpoint: Checkpoint, index: int, tensors: dict[str, Tensor], device: torch.device) -> None:
        self.checkpoint, self.index, self.tensors, self.device = checkpoint, index, tensors, device
        self.prefix = f"{checkpoint.layer(index)}."

    @classmethod
    def of(cls, checkpoint: Checkpoint, index: int, roles: tuple[str, ...] | None = None) -> Layer:
        """One layer alone, on the CPU."""
        names = checkpoint.layer_tensors(index, roles)
        return cls(checkpoint, index, {n: checkpoint.tensors.view(n) for n in names}, torch.device("cpu"))

    @property
    def inside(self) -> dict[str, Tensor]:
        """The tensors by their names inside the layer."""
        return {name.removeprefix(self.prefix): tensor for name, tensor in self.tensors.items()}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor by its name inside the layer, in the given dtype; without a copy where it is stored so.

        Raises:
            LoraSuiteError: if it holds NaN or infinity.
        """
        full = self.prefix + name
        stored = self.tensors[full]
        tensor = stored.to(dtype)
        self.checkpoint.check_finite(tensor, full)
        if tensor is not stored and self.device.type == "cpu":
            self.checkpoint.tensors.release([full])
        return tensor

    def weight(self, role: str, dtype: torch.dtype) -> Tensor:
        """(out, in) weight of one projection; its rows of a fused one."""
        family = self.checkpoint.family
        weight = self.module_weight(family.projections[role].module, dtype)
        rows = family.rows(role, self.checkpoint.shape)
        return weight if rows is None else weight[rows.to(weight.device)]

    def module_weight(self, module: str, dtype: torch.dtype) -> Tensor:
        """(out, in) weight of a module, fused or not."""
        weight = self.read(f"{module}.weight", dtype)
        return weight.T if self.checkpoint.family.transposed else weight

    def gain(self, role: str, dtype: torch.dtype) -> Tensor:
        """(d,) gain of the norm a projection reads through; 1 where the norm has none."""
        norm = self.checkpoint.family.projections[role].norm
        if norm is None:
            raise ValueError(f"{role} reads no norm of the residual stream")
        return self._gain(norm, dtype)

    def _gain(self, norm: str, dtype: torch.dtype) -> Tensor:
        family = self.checkpoint.family
        if "weight" not in family.stored_norm:
            return torch.ones(self.checkpoint.shape.d, dtype=dtype, device=self.device)
        return self.read(f"{norm}.weight", dtype) + family.gain_offset

    def shift(self, role: str, dtype: torch.dtype) -> Tensor | None:
        """(d,) bias of the LayerNorm a projection reads through, 0 where it has none; None where there is no such."""
        family = self.checkpoint.family
        norm = family.projections[role].norm
        if norm is None or not family.layer_norm:
            return None
        if "bias" not in family.stored_norm:
            return torch.zeros(self.checkpoint.shape.d, dtype=dtype, device=self.device)
        return self.read(f"{norm}.bias", dtype)

    def gain_after(self, role: str, dtype: torch.dtype) -> Tensor | None:
        """(d,) gain on a projection's output before it joins the residual stream: of a norm, or a multiplier."""
        family = self.checkpoint.family
        norm = family.projections[role].after
        if norm is not None:
            return self._gain(norm, dtype)
        if not family.multipliers or role in READING:
            return None
        return torch.full((self.checkpoint.shape.d,), self.checkpoint.residual_factor, dtype=dtype, device=self.device)

    def release(self) -> None:
        """Lets go of the tensors; views of them must not be used any more."""
        if self.device.type == "cpu":
            self.checkpoint.tensors.release(self.tensors)
        self.tensors = {}


class _Views:
    """Fetches a layer as views of the memory map."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files

    def fetch(self, names: list[str]) -> dict[str, Tensor]:
        self._files.fetch(names)
        return {name: self._files.view(name) for name in names}

    def ready(self) -> None:
        """Called by the consumer once a fetch is over, before the next one starts."""


class _Buffers:
    """Reads layers into two host buffers in turn: a layer's tensors last until the one after the next is fetched."""

    def __init__(self, files: TensorFiles, largest: int, *, pinned: bool = False) -> None:
        self._files = files
        self._buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._turn = 0

    def fetch(self, names: list[str]) -> dict[str, Tensor]:
        self._turn = 1 - self._turn
        return self._read(names, self._buffers[self._turn])[1]

    def _read(self, names: list[str], buffer: Tensor) -> tuple[int, dict[str, Tensor]]:
        """Bytes used, and the tensors as views of the buffer."""
        end, tensors, data = 0, {}, buffer.numpy().data
        for name in names:
            entry = self._files.entry(name)
            file = self._files.file(entry)
            file.check_unchanged()
            file.read_into(data[end : end + entry.size], entry.start)
            self._files.bytes_read += entry.size
            tensors[name] = _typed(buffer, end, entry)
            end += _aligned(entry.size)
        return end, tensors

    def ready(self) -> None:
        pass


class _Staged(_Buffers):
    """Reads layers into the two buffers, pinned where the device is a GPU, and copies them on a stream of its own."""

    def __init__(self, files: TensorFiles, largest: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        super().__init__(files, largest, pinned=self._cuda)
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        self._copied: list[Any] = [None, None]

    def fetch(self, names: list[str]) -> dict[str, Tensor]:
        self._turn = 1 - self._turn
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        buffer = self._buffers[self._turn]
        end, staged = self._read(names, buffer)
        with torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            self._on_device = torch.empty(end, dtype=torch.uint8, device=self._device)
            self._on_device.copy_(buffer[:end], non_blocking=True)
            if self._cuda:
                self._copied[self._turn] = torch.cuda.Event()
                self._copied[self._turn].record(self._stream)
        start = buffer.data_ptr()
        return {
            name: _typed(self._on_device, tensor.data_ptr() - start if tensor.numel() else 0, self._files.entry(name))
            for name, tensor in staged.items()
        }

    def ready(self) -> None:
        if self._cuda:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._copied[self._turn])
            # The allocator must not hand the memory out again before work queued on this stream is done.
            self._on_device.record_stream(current)


def _typed(buffer: Tensor, start: int, entry: Entry) -> Tensor:
    return buffer[start : start + entry.size].view(DTYPES[entry.dtype]).view(entry.shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


_Source = _Views | _Buffers


def stream_layers(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    layers: Iterable[int] | None = None,
    roles: tuple[str, ...] | None = None,
) -> Iterator[Layer]:
    """Yields a checkpoint's layers in order, at most two of them resident: the one yielded and the next.

    A layer's tensors are valid until the next one is asked for.

    Args:
        device: where the tensors are wanted.
        layers: which, in this order; all if None.
        roles: only these projections' tensors and the norms they read through; everything if None.

    Raises:
        LoraSuiteError: a file that changed, ended early or could not be read.
    """
    order = list(range(checkpoint.shape.L)) if layers is None else list(layers)
    names = [checkpoint.layer_tensors(i, roles) for i in order]
    files = checkpoint.tensors
    source: _Source
    if device.type == "cpu" and files.mapped:
        source = _Views(files)
    else:
        largest = max((sum(_aligned(files.entry(n).size) for n in layer) for layer in names), default=0)
        source = _Buffers(files, largest) if device.type == "cpu" else _Staged(files, largest, device)
    yield from _prefetched(checkpoint, device, source, list(zip(order, names, strict=True)))


def _prefetched(
    checkpoint: Checkpoint, device: torch.device, source: _Source, plan: list[tuple[int, list[str]]]
) -> Iterator[Layer]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="layer-loader")
    coming: Future[dict[str, Tensor]] | None = None
    try:
        for position, (index, names) in enumerate(plan):
            tensors = (coming or pool.submit(source.fetch, names)).result()
            source.ready()
            checkpoint.tensors.check_unchanged()
            # The thread takes what is submitted next only once this layer's fetch is over.
            coming = pool.submit(source.fetch, plan[position + 1][1]) if position + 1 < len(plan) else None
            layer = Layer(checkpoint, index, tensors, device)
            del tensors
            yield layer
            layer.release()
            checkpoint.tensors.check_unchanged()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
