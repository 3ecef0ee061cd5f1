"""The closed-form fit of one projection: ridge regression of a bounded rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.factors import Factors
from .output_map import ridged

NORM_PENALTY = 0.1
"""Of changes in front of a norm, as a share of the mean diagonal of the metric there."""


def reduced_rank_ridge(gram: Tensor, cross: Tensor, rank: int, ridge: float, metric: Tensor | None = None) -> Factors:
    """The rank-r map from x to t, `t ≈ B A x`, from the sums over positions alone.

    With the ridge solution W, V holds the top eigenvectors of the fitted values' covariance in the metric L^T L:
    `B = L^{-1} V`, `A = V^T L W` (L = I without a metric).

    Args:
        gram: (d_in, d_in), Σ x x^T. cross: (d_out, d_in), Σ t x^T. Both float64.
        ridge: a share of gram's mean diagonal.
        metric: (d_out, d_out), in which errors of t are measured; a thousandth of its mean diagonal is added to it.

    Returns:
        B (d_out, r), A (r, d_in), float32.
    """
    W = torch.cholesky_solve(cross.T, torch.linalg.cholesky(ridged(gram, ridge))).T
    fitted = W @ gram @ W.T
    r = min(rank, len(cross), len(gram))
    if metric is None:
        V = torch.linalg.eigh(fitted).eigenvectors[:, -r:]
        return Factors(V.float(), (V.T @ W).float())
    L = torch.linalg.cholesky(ridged(metric, 1e-3)).T
    V = torch.linalg.eigh(L @ fitted @ L.T).eigenvectors[:, -r:]
    return Factors(torch.linalg.solve_triangular(L, V, upper=True).float(), (V.T @ L @ W).float())


def in_front_of_norm(metric: Tensor, gain: Tensor, penalty: float = NORM_PENALTY) -> tuple[Tensor, Tensor]:
    """The best change in front of a norm for a wanted change behind it, and the metric its errors count in.

    A change u in front, in units of what the norm divides by, becomes `gain ∘ u` behind, as long as u is small: a large
    one drowns what the projection said. Gains differ by orders of magnitude (Gemma 3 270M: 0.004 to 407 in one norm),
    so `t / gain` is large. Minimised is `(t - G u)^T M (t - G u) + λ |u|²`, G = diag(gain); up to a constant that is
    `(u - P t)^T N (u - P t)` with `N = G M G + λ I` and `P = N^{-1} G M`.

    Args:
        metric: M (d, d) float64. gain: (d,). penalty: λ as a share of the mean diagonal of G M G.

    Returns:
        P, N, both (d, d) float64.
    """
    G = gain.double()
    weighted = G[:, None] * metric
    N = ridged(weighted * G, penalty)
    return torch.linalg.solve(N, weighted), N


class ProjectionSums:
    """Σ x x^T and Σ t x^T over training positions."""

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        self.gram = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.cross = torch.zeros(d_out, d_in, dtype=torch.float64, device=device)

    def add(self, x: Tensor, t: Tensor) -> None:
        self.gram += x.T @ x
        self.cross += t.T @ x
