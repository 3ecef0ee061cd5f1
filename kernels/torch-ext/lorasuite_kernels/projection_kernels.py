"""Kernel of `project_heads`: each matched pair's block lives in registers, between two matrix products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose, precision
from .projection import partners
from .tiles import load_tile, multiply_add, rounded, row_products

_PROGRAMS = 264  # two per multiprocessor of an H100
_SPLIT_STEPS = 8  # fewer steps over the width than this per program do not pay for another partial result


@triton.jit
def project_heads_kernel(
    left,
    right,
    x,
    match,
    weight,
    out,
    left_row_stride,
    left_column_stride,
    right_row_stride,
    right_column_stride,
    x_row_stride,
    x_column_stride,
    size_o,
    size_n,
    width,
    ranks,
    share_o,
    share_n,
    split_width,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum over the query heads b of a new group of weight[b] · (left[a] right[g]^T)^T x[a], over a share of the width.

    One program per (tile of a new group's rows, tile of x's columns, split of the width); out (splits, G_n·h_n, ranks).
    C^T is accumulated directly, so that it becomes the left operand of the second product without leaving registers.
    """
    tiles_n = tl.cdiv(size_n, BLOCK_N)
    group, tile = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    within_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = within_n < size_n
    rows_n = group * size_n + within_n
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_mask = columns < ranks
    start = tl.program_id(2) * split_width
    stop = tl.minimum(start + split_width, width)
    y = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for member in range(share_n):
        head = group * share_n + member
        partner, share = tl.load(match + head), tl.load(weight + head)
        old = tl.maximum(partner, 0) // share_o
        for first_o in range(0, size_o, BLOCK_O):
            within_o = first_o + tl.arange(0, BLOCK_O)
            # A head without a partner reads nothing and adds exact zeros.
            mask_o = (within_o < size_o) & (partner >= 0)
            rows_o = old * size_o + within_o
            block = row_products(
                right,
                rows_n,
                right_row_stride,
                right_column_stride,
                mask_n,
                left,
                rows_o,
                left_row_stride,
                left_column_stride,
                mask_o,
                start,
                stop,
                BLOCK_K,
                PRECISION,
            )
            factor = load_tile(x, rows_o, x_row_stride, mask_o, columns, x_column_stride, column_mask)
            y = multiply_add(rounded(block * share, factor.dtype), factor, y, PRECISION)
    out += tl.program_id(2).to(tl.int64) * (tl.num_programs(0) // tiles_n) * size_n * ranks
    mask = mask_n[:, None] & column_mask[None, :]
    tl.store(out + rows_n[:, None] * ranks + columns[None, :], y, mask=mask)


def project_heads(
    left: Tensor, right: Tensor, x: Tensor, match: Tensor, weight: Tensor, blocks_o: int, blocks_n: int, old_share: int
) -> Tensor:
    """Kernel of `projection.project_heads`."""
    partners(match, blocks_o, old_share)
    if left.dtype != right.dtype:
        left, right = left.float(), right.float()
    size_o, size_n, width, ranks = left.shape[0] // blocks_o, right.shape[0] // blocks_n, left.shape[1], x.shape[1]
    # One precision constant serves both products: float32 anywhere sets it.
    dtype = torch.promote_types(left.dtype, x.dtype)
    factor = x.to(dtype)
    config = choose("project", dtype, x.device, ranks)
    sizes = config.blocks
    tiles_n, tiles_r = triton.cdiv(size_n, sizes["BLOCK_N"]), triton.cdiv(ranks, sizes["BLOCK_R"])
    steps = triton.cdiv(width, sizes["BLOCK_K"])
    if right.shape[0] * ranks == 0:
        return x.new_empty(right.shape[0], ranks)
    splits = max(1, min(_PROGRAMS // (blocks_n * tiles_n * tiles_r), steps // _SPLIT_STEPS))
    split_width = max(1, triton.cdiv(steps, splits)) * sizes["BLOCK_K"]
    splits = max(1, triton.cdiv(width, split_width))
    out = x.new_empty(splits, right.shape[0], ranks, dtype=torch.float32)
    project_heads_kernel[(blocks_n * tiles_n, tiles_r, splits)](
        left,
        right,
        factor,
        match.to(x.device),
        weight.to(x.device, torch.float32),
        out,
        *left.stride(),
        *right.stride(),
        *factor.stride(),
        size_o,
        size_n,
        width,
        ranks,
        old_share,
        match.shape[0] // blocks_n,
        split_width,
        **precision(dtype),
        **config.keywords,
    )
    return out.sum(0).to(x.dtype)
