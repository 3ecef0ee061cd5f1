"""Kernel of `shared_gram`: a transposed product whose rows are gathered while reading."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import SUMMED_ROWS, choose, precision
from .shared_gram import check_rows, mirror_upper
from .tiles import load_tile, multiply_add, packed_tile


@triton.jit
def shared_gram_kernel(
    left,
    right,
    left_index,
    right_index,
    total,
    left_row_stride,
    left_column_stride,
    right_row_stride,
    right_column_stride,
    first,
    stop,
    left_width,
    right_width,
    SYMMETRIC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one tile of left[left_index]^T right[right_index], over pairs first..stop, to the float64 total.

    With SYMMETRIC both sides are one table and only tiles of the upper triangle are launched.
    """
    if SYMMETRIC:
        row_block, column_block = packed_tile(tl.program_id(0))
    else:
        blocks = tl.cdiv(right_width, TILE)
        row_block, column_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows, columns = row_block * TILE + tl.arange(0, TILE), column_block * TILE + tl.arange(0, TILE)
    row_mask, column_mask = rows < left_width, columns < right_width
    partial = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in range(first, stop, BLOCK_K):
        pairs = k + tl.arange(0, BLOCK_K)
        inside = pairs < stop
        left_rows = tl.load(left_index + pairs, mask=inside, other=0)
        right_rows = tl.load(right_index + pairs, mask=inside, other=0)
        a = load_tile(left, left_rows, left_row_stride, inside, rows, left_column_stride, row_mask)
        b = load_tile(right, right_rows, right_row_stride, inside, columns, right_column_stride, column_mask)
        partial = multiply_add(tl.trans(a), b, partial, PRECISION)
    cells = total + rows[:, None].to(tl.int64) * right_width + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(cells, tl.load(cells, mask=mask, other=0.0) + partial.to(tl.float64), mask=mask)


def _add_products(total: Tensor, left: Tensor, right: Tensor, left_index: Tensor, right_index: Tensor) -> None:
    symmetric = left is right
    dtype = torch.promote_types(left.dtype, right.dtype)
    config = choose("shared_gram", dtype, total.device)
    rows, columns = (triton.cdiv(width, config.blocks["TILE"]) for width in total.shape)
    tiles = rows * (rows + 1) // 2 if symmetric else rows * columns
    if tiles == 0:
        return
    for first in range(0, left_index.shape[0], SUMMED_ROWS):
        shared_gram_kernel[(tiles,)](
            left,
            right,
            left_index,
            right_index,
            total,
            *left.stride(),
            *right.stride(),
            first,
            min(first + SUMMED_ROWS, left_index.shape[0]),
            *total.shape,
            SYMMETRIC=symmetric,
            **precision(dtype, total.device),
            **config.keywords,
        )


def shared_gram(
    e_o: Tensor, e_n: Tensor, idx_o: Tensor, idx_n: Tensor, both: bool, single: bool, chunk: int
) -> tuple[Tensor, ...]:
    """Kernel of `shared_gram.shared_gram`; `single` and `chunk` are the twin's."""
    check_rows(e_o, idx_o)
    check_rows(e_n, idx_n)
    if e_o.dtype != e_n.dtype:
        e_o, e_n = e_o.float(), e_n.float()
    idx_o, idx_n = idx_o.to(e_o.device).contiguous(), idx_n.to(e_o.device).contiguous()
    d_o, d_n = e_o.shape[1], e_n.shape[1]
    oo, on = (e_o.new_zeros(d_o, width, dtype=torch.float64) for width in (d_o, d_n))
    nn = e_o.new_zeros(d_n if both else 0, d_n if both else 0, dtype=torch.float64)
    _add_products(oo, e_o, e_o, idx_o, idx_o)
    mirror_upper(oo)
    _add_products(on, e_o, e_n, idx_o, idx_n)
    if both:
        _add_products(nn, e_n, e_n, idx_n, idx_n)
        mirror_upper(nn)
    return oo, on, nn
