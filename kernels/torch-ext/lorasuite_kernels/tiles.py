"""Tile helpers the kernels share. Imports Triton; nothing imports this before a kernel is launched."""

from __future__ import annotations

import triton
import triton.language as tl

from .dispatch import interpreting

_INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def multiply_add(a, b, total, PRECISION: tl.constexpr):
    """total + a b in float32, from operands of one dtype."""
    if _INTERPRETED:
        # Triton's interpreter (3.7) multiplies bfloat16 operands as the integers that store them.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values in another dtype, to nearest even: the interpreter truncates unless told."""
    if dtype == tl.float32:
        return values
    return values.to(dtype, fp_downcast_rounding="rtne")


@triton.jit
def packed_tile(index):
    """(row, column) of tile `index` in an upper triangle of tiles packed column by column: index = c(c+1)/2 + r."""
    column = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The float32 root may be off by one near a perfect square.
    column = tl.where(column * (column + 1) // 2 > index, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= index, column + 1, column)
    return index - column * (column + 1) // 2, column


@triton.jit
def load_tile(base, rows, row_stride, row_mask, columns, column_stride, column_mask):
    """(rows, columns) of a strided matrix, zero where masked. 64-bit offsets: stacks of layers pass 2^31 elements."""
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    return tl.load(base + offsets, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def row_products(
    left,
    left_rows,
    left_row_stride,
    left_column_stride,
    left_mask,
    right,
    right_rows,
    right_row_stride,
    right_column_stride,
    right_mask,
    start,
    stop,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left[left_rows] right[right_rows]^T over columns start..stop, in float32; masked rows count as zero."""
    total = tl.zeros((left_rows.shape[0], right_rows.shape[0]), dtype=tl.float32)
    for k in range(start, stop, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns < stop
        a = load_tile(left, left_rows, left_row_stride, left_mask, columns, left_column_stride, inside)
        b = load_tile(right, right_rows, right_row_stride, right_mask, columns, right_column_stride, inside)
        total = multiply_add(a, tl.trans(b), total, PRECISION)
    return total
