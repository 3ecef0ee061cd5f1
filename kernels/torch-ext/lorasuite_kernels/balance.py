"""The factors a singular value decomposition of B A would give, without forming B A."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import define, wide


def balance(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrites `B A` as `(U √Σ)(√Σ V^T)` through two thin QR decompositions and one r × r SVD: O(d r²).

    Args:
        b: (..., out, r). a: (..., r, in). Computed in at least float32; leading dimensions are batched.

    Returns:
        (b, a, sigma) with the same shapes and dtype as given, sigma (..., r) in descending order. Where out or in is
        smaller than r, the surplus columns of b, rows of a and singular values are zero.

    Raises:
        ValueError: if b and a do not share their rank and leading dimensions.
    """
    if min(b.ndim, a.ndim) < 2 or b.shape[:-2] != a.shape[:-2] or b.shape[-1] != a.shape[-2]:
        raise ValueError(f"b (..., out, r) and a (..., r, in) do not fit; got {tuple(b.shape)} and {tuple(a.shape)}")
    result: tuple[Tensor, Tensor, Tensor] = _balance_op(b, a)
    return result


def _twin(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, r = b.dtype, b.shape[-1]
    q_b, r_b = torch.linalg.qr(b.to(wide(b, a)))
    q_a, r_a = torch.linalg.qr(a.to(wide(b, a)).mT)
    u, sigma, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = sigma.sqrt()[..., None, :]
    b_out, a_out = (q_b @ u) * root, ((q_a @ v.mT) * root).mT
    short = r - sigma.shape[-1]
    if short:
        b_out = torch.nn.functional.pad(b_out, (0, short))
        a_out = torch.nn.functional.pad(a_out, (0, 0, 0, short))
        sigma = torch.nn.functional.pad(sigma, (0, short))
    return b_out.to(dtype).contiguous(), a_out.to(dtype).contiguous(), sigma.to(dtype)


_balance_op = define(
    "balance(Tensor b, Tensor a) -> (Tensor, Tensor, Tensor)",
    twin=_twin,
    fake=lambda b, a: (b.new_empty(b.shape), b.new_empty(a.shape), b.new_empty(b.shape[:-2] + b.shape[-1:])),
)
