"""Kernels of `gram`, `hsic` and `cka`: centred upper triangles, and a split-K product over their packed entries."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cka import cka_terms_twin, hsic_terms_twin, packed_dtype
from .configs import PACKED_TILE, choose, precision
from .tiles import load_tile, multiply_add, packed_tile, rounded, row_products

_PROGRAMS = 264  # two per multiprocessor of an H100, so that a split-K product of one output tile fills the device


@triton.jit
def _centred_tile(x, rows, row_stride, row_mask, columns, column_stride, column_mask, mean, SCALE: tl.constexpr):
    """Rows of x minus the mean, as read: in float32, then back to the dtype of x for the matrix units."""
    values = load_tile(x, rows, row_stride, row_mask, columns, column_stride, column_mask).to(tl.float32)
    values = tl.where(row_mask[:, None], (values - mean[None, :]) * SCALE, 0.0)
    return rounded(values, x.dtype.element_ty)


@triton.jit
def gram_kernel(
    x,
    mean,
    packed,
    row_parts,
    layer_stride,
    example_stride,
    width_stride,
    examples,
    width,
    first_tile,
    blocks,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the strict upper triangle of one layer's centred Gram matrix, and the row sums it contributes to.

    packed (L, tiles of this launch, TILE, TILE); row_parts (L, blocks, examples): entry [l, p, e] is what the tile that
    pairs the block of example e with block p adds to the row sum of e. Each entry has exactly one writer.
    """
    tile, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_block, column_block = packed_tile(first_tile + tile)
    within = tl.arange(0, TILE)
    rows, columns = row_block * TILE + within, column_block * TILE + within
    row_mask, column_mask = rows < examples, columns < examples
    x += layer * layer_stride
    mean += layer * width
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        channels = k + tl.arange(0, BLOCK_K)
        inside = channels < width
        mu = tl.load(mean + channels, mask=inside, other=0.0)
        a = _centred_tile(x, rows, example_stride, row_mask, channels, width_stride, inside, mu, SCALE)
        b = _centred_tile(x, columns, example_stride, column_mask, channels, width_stride, inside, mu, SCALE)
        total = multiply_add(a, tl.trans(b), total, PRECISION)
    total *= 1.0 / (SCALE * SCALE)
    upper = tl.where(rows[:, None] < columns[None, :], total, 0.0)
    packed += (layer * tl.num_programs(0) + tile) * TILE * TILE
    tl.store(packed + within[:, None] * TILE + within[None, :], rounded(upper, packed.dtype.element_ty))
    # A tile on the diagonal holds both halves: its rows alone give the whole sum, and its columns would give it again.
    off_diagonal = tl.where(rows[:, None] != columns[None, :], total, 0.0)
    row_parts += layer * blocks * examples
    tl.store(row_parts + column_block * examples + rows, tl.sum(off_diagonal, axis=1), mask=row_mask)
    mirrored = column_mask & (row_block != column_block)
    tl.store(row_parts + row_block * examples + columns, tl.sum(off_diagonal, axis=0), mask=mirrored)


@triton.jit
def hsic_kernel(
    packed_x,
    packed_y,
    part_xy,
    part_xx,
    part_yy,
    layers_x,
    layers_y,
    entries,
    split_entries,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split's share of packed_x packed_y^T, (L_x, L_y), and of both rows' squared norms.

    packed_x (L_x, entries), packed_y (L_y, entries); part_xy (splits, L_x, L_y), part_xx (splits, L_x), part_yy alike.
    """
    split = tl.program_id(0)
    rows, columns = (
        tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X),
        tl.program_id(2) * BLOCK_Y + tl.arange(0, BLOCK_Y),
    )
    row_mask, column_mask = rows < layers_x, columns < layers_y
    xy = tl.zeros((BLOCK_X, BLOCK_Y), dtype=tl.float32)
    xx = tl.zeros((BLOCK_X,), dtype=tl.float32)
    yy = tl.zeros((BLOCK_Y,), dtype=tl.float32)
    start = split.to(tl.int64) * split_entries
    for k in range(start, tl.minimum(start + split_entries, entries), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        inside = inner < entries
        a = load_tile(packed_x, rows, entries, row_mask, inner, 1, inside)
        b = load_tile(packed_y, columns, entries, column_mask, inner, 1, inside)
        xy = multiply_add(a, tl.trans(b), xy, PRECISION)
        a, b = a.to(tl.float32), b.to(tl.float32)
        xx += tl.sum(a * a, axis=1)
        yy += tl.sum(b * b, axis=1)
    part_xy += split * layers_x * layers_y
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(part_xy + rows[:, None] * layers_y + columns[None, :], xy, mask=mask)
    tl.store(part_xx + split * layers_x + rows, xx, mask=row_mask & (tl.program_id(2) == 0))
    tl.store(part_yy + split * layers_y + columns, yy, mask=column_mask & (tl.program_id(1) == 0))


@triton.jit
def hsic_finish_kernel(
    part_xy,
    rows_x,
    rows_y,
    totals_x,
    totals_y,
    out,
    layers_x,
    layers_y,
    examples,
    splits,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums the splits, applies the two rank-one corrections of HSIC1 and its normalisation: out (L_x, L_y)."""
    x, y = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X), tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x_mask, y_mask = x < layers_x, y < layers_y
    mask = x_mask[:, None] & y_mask[None, :]
    cells = x[:, None] * layers_y + y[None, :]
    trace = tl.zeros((BLOCK_X, BLOCK_Y), dtype=tl.float32)
    for split in range(splits):
        trace += tl.load(part_xy + split * layers_x * layers_y + cells, mask=mask, other=0.0)
    # The corrections nearly cancel the trace for unrelated layers: no TF32 here.
    rows = row_products(
        rows_x, x, examples, 1, x_mask, rows_y, y, examples, 1, y_mask, 0, examples, BLOCK_K, PRECISION="ieee"
    )
    total_x = tl.load(totals_x + x, mask=x_mask, other=0.0)
    total_y = tl.load(totals_y + y, mask=y_mask, other=0.0)
    m = examples.to(tl.float32)
    # Divide each total first: their product may pass the float32 range.
    totals = (total_x / (m - 1.0))[:, None] * (total_y / (m - 2.0))[None, :]
    hsic = (2.0 * trace + totals - rows * (2.0 / (m - 2.0))) / (m * (m - 3.0))
    tl.store(out + cells, hsic, mask=mask)


def _means(x: Tensor) -> Tensor:
    return x.mean(dim=1, dtype=torch.float32)


def _launch_gram(x: Tensor, means: Tensor, packed: Tensor, row_parts: Tensor, first_tile: int) -> None:
    """Fills packed (L, tiles, TILE, TILE) with tiles first_tile … and the row_parts they touch."""
    layers, examples, width = x.shape
    tiles = packed.shape[1]
    if layers * tiles == 0:
        return
    gram_kernel[(tiles, layers)](
        x,
        means,
        packed,
        row_parts,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        examples,
        width,
        first_tile,
        row_parts.shape[1],
        # The difference of two float16 values may be twice the float16 range.
        SCALE=0.5 if x.dtype == torch.float16 else 1.0,
        TILE=PACKED_TILE,
        **precision(x.dtype),
        **choose("gram", x.dtype, x.device).keywords,
    )


def _splits(layers_x: int, layers_y: int, entries: int, blocks: dict[str, int]) -> tuple[int, int]:
    """(splits, entries per split): enough programs to fill a device, each with at least 16 steps."""
    outputs = triton.cdiv(layers_x, blocks["BLOCK_X"]) * triton.cdiv(layers_y, blocks["BLOCK_Y"])
    steps = triton.cdiv(entries, blocks["BLOCK_K"])
    splits = max(1, min(_PROGRAMS // outputs, steps // 16))
    per_split = triton.cdiv(steps, splits) * blocks["BLOCK_K"]
    return triton.cdiv(entries, per_split), per_split


def _launch_hsic(packed_x: Tensor, packed_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums over the entries of two packed stacks: (splits, L_x, L_y), (splits, L_x), (splits, L_y)."""
    layers_x, layers_y, entries = packed_x.shape[0], packed_y.shape[0], packed_x[0].numel()
    config = choose("hsic", packed_x.dtype, packed_x.device)
    splits, per_split = _splits(layers_x, layers_y, entries, config.blocks)
    part_xy = packed_x.new_empty(splits, layers_x, layers_y, dtype=torch.float32)
    part_xx = packed_x.new_empty(splits, layers_x, dtype=torch.float32)
    part_yy = packed_x.new_empty(splits, layers_y, dtype=torch.float32)
    grid = (splits, triton.cdiv(layers_x, config.blocks["BLOCK_X"]), triton.cdiv(layers_y, config.blocks["BLOCK_Y"]))
    hsic_kernel[grid](
        packed_x,
        packed_y,
        part_xy,
        part_xx,
        part_yy,
        layers_x,
        layers_y,
        entries,
        per_split,
        **precision(packed_x.dtype),
        **config.keywords,
    )
    return part_xy, part_xx, part_yy


def _finish(part_xy: Tensor, rows_x: Tensor, rows_y: Tensor, totals_x: Tensor, totals_y: Tensor) -> Tensor:
    splits, layers_x, layers_y = part_xy.shape
    out = torch.empty_like(part_xy[0])
    config = choose("hsic_finish", torch.float32, out.device)
    grid = (triton.cdiv(layers_x, config.blocks["BLOCK_X"]), triton.cdiv(layers_y, config.blocks["BLOCK_Y"]))
    hsic_finish_kernel[grid](
        part_xy,
        rows_x,
        rows_y,
        totals_x,
        totals_y,
        out,
        layers_x,
        layers_y,
        rows_x.shape[1],
        splits,
        **config.keywords,
    )
    return out


def _self_terms(squares: Tensor, rows: Tensor, totals: Tensor) -> Tensor:
    """HSIC1 of each layer with itself, float64: one number per layer, not worth a launch."""
    m = rows.shape[1]
    rows, totals = rows.double(), totals.double()
    corrections = totals.square() / ((m - 1) * (m - 2)) - 2 / (m - 2) * rows.square().sum(1)
    return (2 * squares.double().sum(0) + corrections) / (m * (m - 3))


def gram(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of `cka.gram`."""
    layers, examples, _ = x.shape
    blocks = triton.cdiv(examples, PACKED_TILE)
    shape = layers, blocks * (blocks + 1) // 2, PACKED_TILE, PACKED_TILE
    packed = x.new_empty(shape, dtype=packed_dtype(x.dtype))
    row_parts = x.new_empty(layers, blocks, examples, dtype=torch.float32)
    _launch_gram(x, _means(x), packed, row_parts, 0)
    rows = row_parts.sum(1)
    return packed, rows, rows.sum(1)


def hsic_terms(
    packed_x: Tensor, rows_x: Tensor, totals_x: Tensor, packed_y: Tensor, rows_y: Tensor, totals_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of the terms behind `cka.hsic`."""
    if packed_x.shape[0] * packed_y.shape[0] == 0:
        return hsic_terms_twin(packed_x, rows_x, totals_x, packed_y, rows_y, totals_y)
    if packed_x.dtype != packed_y.dtype:
        packed_x, packed_y = packed_x.float(), packed_y.float()
    part_xy, part_xx, part_yy = _launch_hsic(packed_x.contiguous(), packed_y.contiguous())
    xy = _finish(part_xy, rows_x.contiguous(), rows_y.contiguous(), totals_x.contiguous(), totals_y.contiguous())
    return xy.double(), _self_terms(part_xx, rows_x, totals_x), _self_terms(part_yy, rows_y, totals_y)


def cka_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of the terms behind `cka.cka`: a tile row's worth of tiles at a time."""
    if x.shape[0] * y.shape[0] == 0:
        return cka_terms_twin(x, y)
    examples = x.shape[1]
    blocks = triton.cdiv(examples, PACKED_TILE)
    tiles = blocks * (blocks + 1) // 2
    sides = []
    for side in (x, y):
        tile_row = side.new_empty(side.shape[0] * blocks * PACKED_TILE**2, dtype=packed_dtype(x.dtype, y.dtype))
        parts = side.new_empty(side.shape[0], blocks, examples, dtype=torch.float32)
        sides.append((side, _means(side), tile_row, parts))
    partial = []
    for first in range(0, tiles, blocks):
        count = min(blocks, tiles - first)
        packed = []
        for side, means, tile_row, parts in sides:
            shape = side.shape[0], count, PACKED_TILE, PACKED_TILE
            packed.append(tile_row[: math.prod(shape)].view(shape))
            _launch_gram(side, means, packed[-1], parts, first)
        partial.append(_launch_hsic(*packed))
    part_xy, part_xx, part_yy = (torch.cat(parts) for parts in zip(*partial, strict=True))
    rows_x, rows_y = (parts.sum(1) for *_, parts in sides)
    totals_x, totals_y = rows_x.sum(1), rows_y.sum(1)
    xy = _finish(part_xy, rows_x, rows_y, totals_x, totals_y)
    return xy.double(), _self_terms(part_xx, rows_x, totals_x), _self_terms(part_yy, rows_y, totals_y)
