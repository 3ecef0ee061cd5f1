"""What a distillation needs in memory, by phase, and the sizes a budget leaves."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ..errors import LoraSuiteError
from ..evaluation.effect import COPIES, FEWEST, chunk_size
from ..models.checkpoint import Checkpoint
from ..transfer.memory import LIBRARIES, MIB, PER_TOKEN, forward_bytes


@dataclass(frozen=True)
class Scratch:
    """Sizes of the chunks in which distillation works: rows of an unembedding, elements of the logits."""

    rows: int
    elements: int


_SCRATCHES = (Scratch(8192, 2**24), Scratch(4096, 2**23), Scratch(1024, 2**22))


_WASTE = 0.125


_FEW = 4
"""Examples in a micro-batch below which states go into files, and chunks get smaller, first."""


_LOGITS_COPIES = 10
"""Logits, probabilities and their differences that are there at once, in float32."""


WEIGHED = 4096
"""Positions at which the tokens' probabilities are sampled."""


@dataclass(frozen=True)
class DistillLimits:
    """Sizes a distillation works with, and the peak it should reach in each phase, in bytes.

    Attributes:
        away: states between the layers lie in files (for a GPU: in the host's memory) and not on the device.
    """

    micro_batch: int
    scratch: Scratch
    away: bool
    predicted: dict[str, int]


@dataclass(frozen=True)
class DistillDemand:
    """What a distillation is asked to do, as far as memory is concerned.

    Attributes:
        shared: tokens both vocabularies have. examples, held: texts in all, and held out. tokens: of the longest text,
            for each model. positions, held_positions: aligned ones. roles: the projections that are fitted. sizes: how
            many factors on the updates are tried. base: bytes resident before the work starts. gathered: whether all
            targets have to be in memory at once. judged: whether other adapters are judged, and the
            targets kept for them.
    """

    old: Checkpoint
    new: Checkpoint
    shared: int
    examples: int
    held: int
    tokens: tuple[int, int]
    positions: int
    held_positions: int
    roles: tuple[str, ...]
    sizes: int
    dtype: torch.dtype
    device: torch.device
    base: int
    gathered: bool = False
    judged: bool = False

    def predict(self, micro_batch: int, scratch: Scratch, *, away: bool) -> dict[str, int]:
        """Peak bytes by phase."""
        d_o, d_n = self.old.shape.d, self.new.shape.d
        on_cpu = self.device.type == "cpu"
        common = self.base + (LIBRARIES + PER_TOKEN * (self.old.shape.V + self.new.shape.V) if on_cpu else 0)
        # States at the aligned positions lie on the host: of all of them, and of those held out.
        rows, held_rows = (4 * n if on_cpu else 0 for n in (0 if away else self.positions, self.held_positions))
        copies = 0 if away else 2
        together = min(micro_batch, self.examples) * max(self.tokens)
        passing = 3 * 4 * together * max(d_o, d_n)
        metric = 8 * d_n * d_n + 4 * d_n * d_o
        entering = 0 if away else self.held * self.tokens[1] * d_n * self.dtype.itemsize
        chunk = min(scratch.rows, self.shared)
        cast = 2 * 4 * chunk * max(d_o, d_n)

        effect = self._forward(self.old, self.examples, self.tokens[0], micro_batch, copies) + passing
        effect += 2 * rows * d_o

        regression = 8 * (5 * d_n * d_n + 5 * d_n * d_o + 4 * chunk * (d_o + d_n))
        output = self._heads() + max(regression, self._logits(WEIGHED, scratch) + cast + 2 * 4 * WEIGHED * d_o)
        output += rows * (2 * d_o + d_n) + 2 * held_rows * d_o
        output += 2 * 4 * self.positions * d_n if self.gathered else 0

        fit = self._forward(self.new, self.examples, self.tokens[1], micro_batch, copies) + passing
        fit += metric + entering + self._regression(together) + rows * d_n + 2 * held_rows * d_o

        agreement = self._forward(self.new, self.held, self.tokens[1], micro_batch, 0 if away else self.sizes + 1)
        compared = 4 * COPIES * self.shared * min(self.held_positions, chunk_size(self.shared, scratch.elements // 2))
        agreement += passing + metric + entering + self._heads() + cast
        agreement += max(compared, self._logits(self.held_positions, scratch))
        agreement += 2 * held_rows * (d_o + d_n) + (0 if away else held_rows * self.sizes * d_n)
        agreement += rows * d_n if self.judged else 0
        fit += rows * d_n if self.judged else 0
        # Of lists of many tensors that come and go the allocator wastes some.
        wasted = 0 if away else _WASTE * (copies * self.examples * self.tokens[1] * self.dtype.itemsize + rows) * d_n
        return {
            "adapter's effect": common + effect,
            "output map": common + output,
            "fit": common + fit + int(wasted),
            "held-out agreement": common + agreement,
        }

    def fit(self, budget: int | None, micro_batch: int) -> DistillLimits:
        """What the budget allows: the largest chunks, then states in memory, then the largest micro-batch up to the
        given one; less than four examples only where nothing else would do.

        Raises:
            LoraSuiteError: if nothing fits; names the phase and the smallest budget that would do.
        """
        if budget is None:
            found = self.predict(micro_batch, _SCRATCHES[0], away=False)
            return DistillLimits(micro_batch, _SCRATCHES[0], False, found)
        few = min(_FEW, micro_batch)
        choices = itertools.chain(
            itertools.product(_SCRATCHES, (False, True), range(micro_batch, few - 1, -1)),
            itertools.product(_SCRATCHES[-1:], (True,), range(few - 1, 0, -1)),
        )
        for scratch, away, size in choices:
            found = self.predict(size, scratch, away=away)
            if max(found.values()) <= budget:
                return DistillLimits(size, scratch, away, found)
        least = self.predict(1, _SCRATCHES[-1], away=True)
        phase = max(least, key=lambda name: least[name])
        enough = -(-least[phase] // MIB)
        raise LoraSuiteError(
            f"`memory={budget / MIB:.0f}MiB`: distillation needs {enough} MiB in its phase '{phase}' at the smallest "
            f"micro-batch; the smallest budget that would do is `memory={enough}MiB`"
        )

    def _forward(self, model: Checkpoint, examples: int, tokens: int, micro_batch: int, copies: int) -> int:
        return forward_bytes(model, examples, tokens, micro_batch, self.dtype, self.device, copies=copies)

    def _heads(self) -> int:
        """The unembeddings: on a CPU the mapped tables, on a GPU the rows of the shared tokens as stored."""
        sizes = []
        for model in (self.old, self.new):
            entry = model.tensors.entry(model.head() or model.embedding_name)
            sizes.append(entry.size if self.device.type == "cpu" else entry.size * self.shared // model.shape.V)
        return sum(sizes)

    def _logits(self, positions: int, scratch: Scratch) -> int:
        together = max(1, min(positions, max(FEWEST, scratch.elements // self.shared)))
        return 4 * _LOGITS_COPIES * self.shared * together

    def _regression(self, together: int) -> int:
        """Sums of one projection, and the ridge solution with its factors."""
        most = 0
        for role in self.roles:
            out, into = self.new.shape.expected(role)
            sums = 8 * (into * into + out * into)
            products = 4 * (into * into + out * into) + 4 * together * (2 * into + 4 * out)
            solving = 8 * (2 * into * into + 3 * out * into + 9 * out * out)
            most = max(most, sums + max(products, solving))
        return most
