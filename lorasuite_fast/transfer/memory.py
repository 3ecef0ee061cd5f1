"""What may be resident on the device at once: micro-batch and chunk sizes follow from it, before any work starts.

Every estimate is an upper bound on what the phases of a build allocate, from the shapes alone. On a CPU it counts the
whole process (the interpreter and its libraries as they stand, mapped weight pages, what is allocated); on a GPU what
the allocator hands out there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import parse_memory as parse_memory
from ..errors import LoraSuiteError
from ..io.tensor_files import DTYPES
from ..models.checkpoint import Checkpoint
from ..models.families import ATTENTION, MLP
from ..models.hidden_states import MICRO_BATCH
from .embeddings import CHUNK_ROWS

_LEAST_CHUNK = 256
LIBRARIES = 160 << 20
"""What transformers' model code and the products' own buffers add once a forward pass runs."""
PER_TOKEN = 700
"""Bytes of the tables that say which token of one vocabulary is which of the other, per token."""
_NEURON_PRODUCTS = 8_000_000
_CANDIDATE_BYTES = 16 * 120
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Sizes a build works with, and the peak it should reach in each phase, in bytes (None: not predicted)."""

    micro_batch: int
    chunk_rows: int
    predicted: dict[str, int]
    budget: int | None = None

    @property
    def peak(self) -> int:
        return max(self.predicted.values())


def layer_bytes(model: Checkpoint, dtype: torch.dtype, roles: tuple[str, ...] | None = None) -> tuple[int, int]:
    """Bytes of the largest layer as stored, and of its copy in the compute dtype where it needs one."""
    stored = cast = 0
    for i in range(model.shape.L):
        entries = [model.tensors.entry(n) for n in model.layer_tensors(i, roles)]
        stored = max(stored, sum(e.size for e in entries))
        copies = (e.size // DTYPES[e.dtype].itemsize for e in entries if DTYPES[e.dtype] != dtype)
        cast = max(cast, dtype.itemsize * sum(copies))
    return stored, cast


def forward_bytes(
    model: Checkpoint,
    examples: int,
    tokens: int,
    micro_batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    copies: int,
) -> int:
    """What a streamed forward pass over (examples, tokens) holds, with `copies` of all hidden states on the device."""
    s, e = model.shape, dtype.itemsize
    stored, cast = layer_bytes(model, dtype)
    # A mapped tensor's pages go as its copy comes: the next layer and the copy are what is there at once.
    on_cpu = device.type == "cpu"
    mapped = model.tensors.mapped
    weights = stored + cast if on_cpu and cast and mapped else 2 * stored + cast
    if on_cpu and not mapped:
        weights += model.tensors.entry(model.embedding_name).size
    hidden = copies * examples * tokens * s.d * e
    widest = max(4 * s.f, 4 * (s.H + s.G) * s.h) + 6 * s.d
    together = min(micro_batch, examples) * tokens
    # Masks are kept for all micro-batches; scores of attention only where a fused kernel does not apply.
    masks = examples * tokens * tokens * 4
    scores = min(micro_batch, examples) * tokens * tokens * s.H * e
    return weights + hidden + together * widest * e + masks + scores


@dataclass(frozen=True)
class Demand:
    """What a build is asked to do, as far as memory is concerned.

    Attributes:
        examples, tokens: of the calibration pass, tokens as padded. base: bytes resident before the work starts.
    """

    old: Checkpoint
    new: Checkpoint
    roles: tuple[str, ...]
    examples: int
    tokens: int
    dtype: torch.dtype
    device: torch.device
    base: int

    def predict(self, micro_batch: int, chunk_rows: int) -> dict[str, int]:
        """Peak bytes by phase."""
        carried = self._carried()
        libraries = LIBRARIES if self.device.type == "cpu" else 0
        return {
            "transfer matrix": self.base + (self._transfer(chunk_rows) if self.device.type == "cpu" else 0),
            "old hidden states": self.base + libraries + carried + self._forward(self.old, micro_batch),
            "new hidden states": self.base + libraries + carried + self._forward(self.new, micro_batch),
            "heads and projections": self.base + libraries + carried + self._pair() + self._stored(),
        }

    def fit(self, budget: int | None) -> Limits:
        """The largest micro-batch (up to 16) and chunk (up to 4,096 rows) the budget allows.

        Raises:
            LoraSuiteError: if nothing fits; names the phase and the smallest budget that would do.
        """
        if budget is None:
            return Limits(MICRO_BATCH, CHUNK_ROWS, self.predict(MICRO_BATCH, CHUNK_ROWS))
        least = self.predict(1, _LEAST_CHUNK)
        phase = max(least, key=lambda name: least[name])
        if least[phase] > budget:
            enough = -(-least[phase] // MIB)
            raise LoraSuiteError(
                f"`memory={budget / MIB:.0f}MiB`: the phase '{phase}' needs {enough} MiB at the smallest micro-batch; "
                f"the smallest budget that would do is `memory={enough}MiB`"
            )
        micro_batch = max(
            b for b in range(1, MICRO_BATCH + 1) if b == 1 or max(self.predict(b, _LEAST_CHUNK).values()) <= budget
        )
        chunk = CHUNK_ROWS
        while chunk > _LEAST_CHUNK and max(self.predict(micro_batch, chunk).values()) > budget:
            chunk //= 2
        return Limits(micro_batch, chunk, self.predict(micro_batch, chunk), budget)

    def _carried(self) -> int:
        """W_h and S in float32, and on the device in the compute dtype."""
        both = 2 * self.old.shape.d * self.new.shape.d
        if self.device.type != "cpu":
            return both * self.dtype.itemsize
        return both * (4 + (0 if self.dtype == torch.float32 else self.dtype.itemsize)) + self._vocabularies()

    def _vocabularies(self) -> int:
        return PER_TOKEN * (self.old.shape.V + self.new.shape.V)

    def _transfer(self, chunk_rows: int) -> int:
        """Sums in float64 twice (the held-out tokens apart), one solution with its factor, a chunk of both tables."""
        d_o, d_n = self.old.shape.d, self.new.shape.d
        sums = 8 * (d_o * d_o + d_o * d_n + d_n * d_n)
        widest = max(d_o, d_n)
        # An ill-conditioned Gram matrix is decomposed: eigenvectors, their scaled copy, and LAPACK's own workspace.
        solve = 8 * (5 * widest * widest + 2 * d_o * d_n)
        chunk = 2 * 8 * chunk_rows * (d_o + d_n)
        tables = sum(m.tensors.entry(m.embedding_name).size for m in (self.old, self.new))
        results = 2 * 4 * d_o * d_n
        return sums + max(sums, solve) + chunk + tables + results + self._vocabularies()

    def _layer_bytes(self, model: Checkpoint, roles: tuple[str, ...] | None = None) -> tuple[int, int]:
        return layer_bytes(model, self.dtype, roles)

    def _forward(self, model: Checkpoint, micro_batch: int) -> int:
        return forward_bytes(model, self.examples, self.tokens, micro_batch, self.dtype, self.device, copies=1)

    def _pair(self) -> int:
        """Both layers of a pair in the compute dtype with the old one carried, and the workspaces of the matching."""
        o, n, e = self.old.shape, self.new.shape, self.dtype.itemsize
        attention = mlp = 0
        stored = 0
        if set(self.roles) & set(ATTENTION):
            rows_o, rows_n = 2 * (o.H + o.G) * o.h, 2 * (n.H + n.G) * n.h
            weights = e * (rows_o * (o.d + n.d) + 2 * rows_n * n.d)
            products = e * 3 * (o.H * o.h * n.H * n.h)
            whitened = 3 * 8 * max(o.H * o.h, n.H * n.h) * n.d
            attention = weights + max(products, whitened) + e * max(rows_o, rows_n) * n.d
            stored += sum(self._layer_bytes(m, ATTENTION)[0] for m in (self.old, self.new))
        if set(self.roles) & set(MLP):
            mlp = e * (2 * o.f * o.d + 3 * o.f * n.d + 5 * n.f * n.d)
            mlp += 3 * e * min(_NEURON_PRODUCTS, o.f * n.f) + _CANDIDATE_BYTES * (o.f + n.f)
            stored += sum(self._layer_bytes(m, MLP)[0] for m in (self.old, self.new))
        return max(attention, mlp) + 2 * stored

    def _stored(self) -> int:
        """What the plan itself holds, in the host's memory."""
        if self.device.type != "cpu":
            return 0
        o, n = self.old.shape, self.new.shape
        per_layer = 4 * 4 * n.H * n.h * o.h + 4 * 5 * n.f + 8 * 4 * (o.d + n.d)
        return min(o.L, n.L) * per_layer
