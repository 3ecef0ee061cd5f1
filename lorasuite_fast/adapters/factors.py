"""The two factors of an update, their size, and their balance."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lorasuite_kernels import balance


class Factors(NamedTuple):
    """One low-rank update: B (out, r), A (r, in)."""

    b: Tensor
    a: Tensor


def update_norm(update: Factors) -> float:
    """Frobenius norm of B A."""
    b, a = (factor.double() for factor in update)
    return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())


def balanced(update: Factors) -> tuple[Factors, Tensor]:
    """The factors an SVD would give, and the singular values."""
    b, a, sigma = balance(update.b, update.a)
    return Factors(b, a), sigma
