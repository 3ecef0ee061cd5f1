"""The map between the two models' unembeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ..adapters.aligned_states import Head
from ..evaluation.effect import FEWEST
from ..models.checkpoint import Checkpoint
from ..models.unembedding import gained_rows
from .memory import WEIGHED

OUTPUT_RIDGE = 1e-2
"""Of the output map, as a share of the mean diagonal."""


ROWS = 8192


@dataclass(frozen=True)
class ChunkedHead(Head):
    """A head whose rows stay as they are stored, on a CPU in the mapped file; products are float32.

    Attributes:
        weight: (V, d), of all tokens. tokens: (s,), the chosen ones. rows: how many are there in float32 at a time.
    """

    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    rows: int = ROWS

    @property
    def size(self) -> int:
        return len(self.tokens)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive chosen tokens and their rows times the scale, (at most `rows`, d) float32."""
        for start in range(0, self.size, self.rows):
            part = slice(start, start + self.rows)
            rows = self.weight[self.tokens[part]].float()
            yield part, rows if self.scale == 1 else rows * self.scale

    def logits(self, last: Tensor) -> Tensor:
        logits = last.new_empty(len(last), self.size)
        for part, rows in self.parts():
            logits[:, part] = functional.linear(last, rows, None if self.bias is None else self.bias[part])
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True)
class OutputMap:
    """U (d_n, d_o) float32; the metric (d_n, d_n) float64 in which a change of the new stream counts; R² of U.

    The metric is `Un^T diag(w) Un`, centred: the weighted variance of the logits a change brings about.
    """

    U: Tensor
    metric: Tensor
    r2: float


def fit_output_map(heads: tuple[ChunkedHead, ChunkedHead], new: Checkpoint, weights: Tensor) -> OutputMap:
    """Ridge regression `Un U ≈ Eo` over the shared tokens, weighted, rows centred by the weighted mean.

    Args:
        weights: (s,), ≥ 0.

    R² is measured on every 20th token, with a map fitted on the others.
    """
    w = weights.double() / weights.double().sum()
    held = torch.zeros(len(w), dtype=torch.bool, device=w.device)
    held[19::20] = True

    def rows() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for (part, old), (_, gainless) in zip(heads[0].parts(), heads[1].parts(), strict=True):
            yield part, old.double(), gained_rows(gainless, new).double()

    d_o, d_n = heads[0].weight.shape[1], heads[1].weight.shape[1]
    mean_o, mean_n = (torch.zeros(d, dtype=torch.float64, device=w.device) for d in (d_o, d_n))
    for part, old, gained in rows():
        mean_o += w[part] @ old
        mean_n += w[part] @ gained

    def centred() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for part, old, gained in rows():
            scale = w[part, None].sqrt()
            yield part, (old - mean_o) * scale, (gained - mean_n) * scale

    grams = [torch.zeros(d_n, d_n, dtype=torch.float64, device=w.device) for _ in range(2)]
    crosses = [torch.zeros(d_n, d_o, dtype=torch.float64, device=w.device) for _ in range(2)]
    for part, x_o, x_n in centred():
        for k, chosen in enumerate((~held[part], held[part])):
            grams[k] += x_n[chosen].T @ x_n[chosen]
            crosses[k] += x_n[chosen].T @ x_o[chosen]

    def solve(gram: Tensor, cross: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.solve(ridged(gram, OUTPUT_RIDGE), cross)
        return solution

    trained = solve(grams[0], crosses[0])
    error = spread = 0.0
    for part, x_o, x_n in centred():
        error += float((x_o - x_n @ trained)[held[part]].square().sum())
        spread += float(x_o[held[part]].square().sum())
    metric = grams[0] + grams[1]
    return OutputMap(solve(metric, crosses[0] + crosses[1]).float(), metric, 1 - error / spread if spread else 0.0)


def ridged(gram: Tensor, ridge: float) -> Tensor:
    mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    return gram + ridge * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def chosen_rows(rows: Sequence[Tensor], chosen: Sequence[Tensor]) -> Tensor:
    """The rows a mask by micro-batch names, one after another."""
    return torch.cat([part[mask] for part, mask in zip(rows, chosen, strict=True)])


def token_weights(
    head: ChunkedHead,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    held: Sequence[Tensor],
    elements: int,
    seed: int,
) -> Tensor:
    """(s,) summed probability of each token at a sample of the positions fitted on, with and without the adapter."""
    positions = torch.nonzero(~torch.cat(list(held))).flatten()
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    sampled = torch.zeros(sum(map(len, held)), dtype=torch.bool)
    sampled[positions[order[:WEIGHED]]] = True
    sample = sampled.split([len(part) for part in held])
    device = head.weight.device
    total = torch.zeros(head.size, dtype=torch.float64, device=device)
    for states in (before, after):
        for part in chosen_rows(states, sample).split(max(FEWEST, elements // head.size)):
            total += head.log_probs(part.to(device)).exp().double().sum(0)
    return total
