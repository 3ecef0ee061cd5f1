"""Normal equations of a least-squares map between the rows two tables share, gathered while reading."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import check_one_device, define

_CHUNK_ROWS = 4096


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
        SharedGram, float64 and on the tables' device. The twin sums in float64; its peak memory is the sums and
        one chunk of both tables in the products' dtype. The kernel takes products in the tables' dtype and sums 8,192
        rows at a time in float32, then in float64; it copies no row. Pass float64 tables to a GPU where the sums are to
        be solved to better than float32's relative error.

    Raises:
        ValueError: on shapes that do not fit. IndexError: on an index past a table's rows.
    """
    if idx_o.shape != idx_n.shape or idx_o.ndim != 1:
        raise ValueError(f"idx_o and idx_n must pair rows; got {tuple(idx_o.shape)} and {tuple(idx_n.shape)}")
    if e_o.ndim != 2 or e_n.ndim != 2:
        raise ValueError(f"e_o and e_n must be (rows, width); got {tuple(e_o.shape)} and {tuple(e_n.shape)}")
    if idx_o.is_floating_point() or idx_n.is_floating_point():
        raise ValueError(f"idx_o and idx_n must be integer; got {idx_o.dtype} and {idx_n.dtype}")
    if products not in (torch.float32, torch.float64):
        raise ValueError(f"products must be torch.float32 or torch.float64; got {products}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")
    check_one_device(e_o=e_o, e_n=e_n)
    oo, on, nn = _shared_gram_op(e_o, e_n, idx_o, idx_n, both, products == torch.float32, chunk)
    return SharedGram(oo, on, nn if both else None)


def _twin(
    e_o: Tensor, e_n: Tensor, idx_o: Tensor, idx_n: Tensor, both: bool, single: bool, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(e_o, idx_o)
    check_rows(e_n, idx_n)
    d_o, d_n = e_o.shape[1], e_n.shape[1]
    wide = e_o.new_empty(0, dtype=torch.float64)
    products = torch.float32 if single else torch.float64
    oo, on, nn = (
        wide.new_zeros(d_o, d_o),
        wide.new_zeros(d_o, d_n),
        wide.new_zeros(d_n if both else 0, d_n if both else 0),
    )
    for start in range(0, idx_o.shape[0], chunk):
        x = e_o[idx_o[start : start + chunk]].to(products)
        y = e_n[idx_n[start : start + chunk]].to(products)
        _add_upper(oo, x)
        _add_product(on, x.T, y)
        if both:
            _add_upper(nn, y)
    mirror_upper(oo)
    mirror_upper(nn)
    return oo, on, nn


def check_rows(table: Tensor, index: Tensor) -> None:
    """Raises IndexError unless every index is a row of the table."""
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < table.shape[0]):
        raise IndexError(f"indices must be in 0 … {table.shape[0] - 1}; got {int(index.min())} … {int(index.max())}")


def _fake(
    e_o: Tensor, e_n: Tensor, idx_o: Tensor, idx_n: Tensor, both: bool, single: bool, chunk: int
) -> tuple[Tensor, ...]:
    d_o, d_n = e_o.shape[1], e_n.shape[1]
    # Not `d_n * both`: with symbolic sizes that is no size in torch 2.11.
    d_nn = d_n if both else 0
    shapes = (d_o, d_o), (d_o, d_n), (d_nn, d_nn)
    return tuple(e_o.new_empty(shape, dtype=torch.float64) for shape in shapes)


_shared_gram_op = define(
    "shared_gram(Tensor e_o, Tensor e_n, Tensor idx_o, Tensor idx_n, bool both, bool single, int chunk)"
    " -> (Tensor, Tensor, Tensor)",
    twin=_twin,
    fake=_fake,
    kernel=("shared_gram_kernels", "shared_gram"),
)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _add_upper(total: Tensor, x: Tensor, blocks: int = 8) -> None:
    """Adds the block upper triangle of x^T x."""
    step = max(1, -(-x.shape[1] // blocks))
    for start in range(0, x.shape[1], step):
        _add_product(total[start : start + step, start:], x[:, start : start + step].T, x[:, start:])


def mirror_upper(total: Tensor, blocks: int = 8) -> None:
    """Copies the strict upper triangle onto the lower, in place."""
    step = max(1, -(-total.shape[0] // blocks))
    for start in range(0, total.shape[0], step):
        part = slice(start, start + step)
        total[part, :start] = total[:start, part].T
        square = total[part, part]
        square.copy_(square.triu() + square.triu(1).T)
