"""Minibatch CKA through the unbiased HSIC estimator, for all pairs of layers at once.

HSIC1 (Song et al. 2012, "Feature selection via dependence maximization", eq. 5), with `K~ = X X^T` and its diagonal
set to zero:

    HSIC1(K, L) = [ tr(K~ L~) + (1^T K~ 1)(1^T L~ 1) / ((m-1)(m-2)) - 2/(m-2) 1^T K~ L~ 1 ] / (m (m-3))

It does not change when one vector is subtracted from every row of X, but its rounding error does: hidden states of
language models carry a few channels thousands of times larger than the rest. X is therefore centred before K is formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_TILE_ROWS = 128


class HSICTerms(NamedTuple):
    """HSIC1 of one minibatch, float64: every cross pair, and every layer with itself."""

    xy: Tensor  # (L_x, L_y)
    xx: Tensor  # (L_x,)
    yy: Tensor  # (L_y,)


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 3 or y.ndim != 3:
        raise ValueError(f"x and y must be (layers, examples, width); got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must hold the same examples; got m = {x.shape[1]} and {y.shape[1]}")
    if x.shape[1] < 4:
        raise ValueError(f"the unbiased HSIC needs at least 4 examples; got m = {x.shape[1]}")
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device; got {x.device} and {y.device}")


def _centred(x: Tensor) -> Tensor:
    """x minus its mean over the examples, in at least float32."""
    x = x if x.dtype == torch.float64 else x.float()
    return x - x.mean(dim=1, keepdim=True)


def hsic_terms(x: Tensor, y: Tensor) -> HSICTerms:
    """HSIC1 of all (L_x, L_y) pairs of one minibatch, and of each layer with itself.

    Only the upper triangle of each Gram matrix is computed, one row of tiles at a time: no Gram matrix is stored.

    Args:
        x: (L_x, m, d_x), m >= 4. y: (L_y, m, d_y). Any floating dtype; products are taken in float32 (float64 for
            float64 input) and summed over entries in float64.
    """
    _check(x, y)
    x, y = _centred(x), _centred(y)
    m = x.shape[1]
    L_x, L_y = x.shape[0], y.shape[0]
    wide = x.new_empty(0, dtype=torch.float64)
    xy, xx, yy = wide.new_zeros(L_x, L_y), wide.new_zeros(L_x), wide.new_zeros(L_y)
    rows_x, rows_y = wide.new_zeros(L_x, m), wide.new_zeros(L_y, m)
    for start in range(0, m, _TILE_ROWS):
        stop = min(start + _TILE_ROWS, m)
        kx = _upper_rows(x, start, stop, rows_x)
        ky = _upper_rows(y, start, stop, rows_y)
        xy += kx @ ky.T
        xx += torch.linalg.vecdot(kx, kx)
        yy += torch.linalg.vecdot(ky, ky)
    tx, ty = rows_x.sum(1), rows_y.sum(1)

    def estimate(trace: Tensor, totals: Tensor, rows: Tensor) -> Tensor:
        return (2 * trace + totals / ((m - 1) * (m - 2)) - 2 / (m - 2) * rows) / (m * (m - 3))

    return HSICTerms(
        estimate(xy, torch.outer(tx, ty), rows_x @ rows_y.T),
        estimate(xx, tx * tx, torch.linalg.vecdot(rows_x, rows_x)),
        estimate(yy, ty * ty, torch.linalg.vecdot(rows_y, rows_y)),
    )


def _upper_rows(x: Tensor, start: int, stop: int, rows: Tensor) -> Tensor:
    """Entries right of the diagonal in rows start..stop of each X X^T, flattened; adds them to both row sums."""
    k = torch.bmm(x[:, start:stop], x[:, start:].transpose(1, 2)).double().triu_(1)
    rows[:, start:stop] += k.sum(2)
    rows[:, start:] += k.sum(1)
    return k.flatten(1)


def _ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """HSIC_ij / sqrt(HSIC_ii HSIC_jj); 0 where a layer has no spread to compare (HSIC_ii <= 0)."""
    scale = torch.outer(xx.clamp_min(0).sqrt(), yy.clamp_min(0).sqrt())
    return torch.where(scale > 0, xy / torch.where(scale > 0, scale, 1), 0).float()


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased linear CKA of all pairs of layers over one minibatch.

    Args:
        x: (L_x, m, d_x), y: (L_y, m, d_y); m >= 4 examples, row e of both belonging to the same example.

    Returns:
        (L_x, L_y) float32. Unbiased, hence not confined to [0, 1]; 0 where a layer gives every example the same vector.

    Raises:
        ValueError: on shapes that do not fit, or fewer than 4 examples.
    """
    return _ratio(*hsic_terms(x, y))


@dataclass
class StreamingCKA:
    """CKA over many minibatches: each HSIC term is averaged over minibatches first, the ratio is taken last.

    (Nguyen, Raghu and Kornblith 2021, "Do wide and deep networks learn the same things?", eq. 3.)

    >>> stream = StreamingCKA(n_x=12, n_y=24)
    >>> stream.update(x, y)  # (12, m, d_x), (24, m, d_y), once per minibatch
    >>> stream.compute()     # (12, 24)
    """

    n_x: int
    n_y: int

    def __post_init__(self) -> None:
        self.minibatches = 0
        self._sums = HSICTerms(
            torch.zeros(self.n_x, self.n_y, dtype=torch.float64),
            torch.zeros(self.n_x, dtype=torch.float64),
            torch.zeros(self.n_y, dtype=torch.float64),
        )

    def _add(self, terms: HSICTerms, minibatches: int) -> None:
        device = terms.xy.device
        self._sums = HSICTerms(*(total.to(device) + term for total, term in zip(self._sums, terms, strict=True)))
        self.minibatches += minibatches

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds one minibatch: x (n_x, m, d_x), y (n_y, m, d_y), m >= 4."""
        if x.shape[0] != self.n_x or y.shape[0] != self.n_y:
            raise ValueError(f"expected {self.n_x} and {self.n_y} layers; got {tuple(x.shape)} and {tuple(y.shape)}")
        self._add(hsic_terms(x, y), 1)

    def merge(self, other: StreamingCKA) -> None:
        """Adds the minibatches another instance has seen (shards of one data set)."""
        if (other.n_x, other.n_y) != (self.n_x, self.n_y):
            raise ValueError(f"cannot merge ({other.n_x}, {other.n_y}) layers into ({self.n_x}, {self.n_y})")
        self._add(other._sums, other.minibatches)

    def compute(self) -> Tensor:
        """(n_x, n_y) float32. Raises RuntimeError before the first update."""
        if not self.minibatches:
            raise RuntimeError("StreamingCKA.compute() before any update()")
        return _ratio(*self._sums)
