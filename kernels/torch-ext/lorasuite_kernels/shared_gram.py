"""Normal equations of a least-squares map between the rows two tables share, gathered while reading."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_ROWS = 2048


class SharedGram(NamedTuple):
    """float64 sums over the shared rows: E_o^T E_o (d_o, d_o), E_o^T E_n (d_o, d_n), E_n^T E_n (d_n, d_n) if asked."""

    oo: Tensor
    on: Tensor
    nn: Tensor | None


def shared_gram(
    e_o: Tensor,
    e_n: Tensor,
    idx_o: Tensor,
    idx_n: Tensor,
    *,
    both: bool = False,
    products: torch.dtype = torch.float64,
    chunk: int = _CHUNK_ROWS,
) -> SharedGram:
    """Sums the normal equations of `E_o W = E_n` over pairs of rows, a chunk of rows at a time.

    Args:
        e_o: (V_o, d_o), e_n: (V_n, d_n), any floating dtype; memory-mapped tables are read once, chunk by chunk.
        idx_o, idx_n: (s,) int64, the paired rows.
        both: also sum E_n^T E_n, for the map in the other direction.
        products: float64, or float32: half the time, each chunk's sum rounded to float32 before it is added in float64.
            Products of bfloat16 or float16 entries are themselves exact in float32.
        chunk: rows gathered at a time.

    Returns:
        SharedGram, sums in float64. Peak memory: the sums, and one chunk of both tables in float64.
    """
    if idx_o.shape != idx_n.shape or idx_o.ndim != 1:
        raise ValueError(f"idx_o and idx_n must pair rows; got {tuple(idx_o.shape)} and {tuple(idx_n.shape)}")
    d_o, d_n = e_o.shape[1], e_n.shape[1]
    wide = e_o.new_empty(0, dtype=torch.float64)
    oo, on = wide.new_zeros(d_o, d_o), wide.new_zeros(d_o, d_n)
    nn = wide.new_zeros(d_n, d_n) if both else None
    for start in range(0, idx_o.shape[0], chunk):
        x = e_o[idx_o[start : start + chunk]].to(products)
        y = e_n[idx_n[start : start + chunk]].to(products)
        _add_upper(oo, x)
        _add_product(on, x.T, y)
        if nn is not None:
            _add_upper(nn, y)
    _mirror(oo)
    if nn is not None:
        _mirror(nn)
    return SharedGram(oo, on, nn)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _add_upper(total: Tensor, x: Tensor, blocks: int = 4) -> None:
    """Adds the block upper triangle of x^T x."""
    step = -(-x.shape[1] // blocks)
    for start in range(0, x.shape[1], step):
        _add_product(total[start : start + step, start:], x[:, start : start + step].T, x[:, start:])


def _mirror(total: Tensor) -> None:
    lower = torch.tril_indices(total.shape[0], total.shape[1], offset=-1, device=total.device)
    total[lower[0], lower[1]] = total[lower[1], lower[0]]
