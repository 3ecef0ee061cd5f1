"""Kernels of `gram`, `hsic` and `cka`: centred upper triangles, and a split-K product over their packed entries."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cka import cka_terms_twin, cka_twin, hsic_terms_twin, packed_dtype
from .configs import PACKED_TILE, choose, precision
from .tiles import load_tile, multiply_add, packed_tile, rounded

_PROGRAMS = 264  # two per multiprocessor of an H100, so that a split-K product of one output tile fills the device
_PACKED_BYTES = (
    256 * 2**20
)  # of Gram tiles `cka` holds at a time; starting a kernel takes longer than its work below that


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
def _row_sums(rows, layers, layer_mask, parts, examples, inner, inside, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_L, BLOCK_K) float64: row sums of some layers' matrices over a stretch of examples, their parts added."""
    total = tl.zeros((BLOCK_L, BLOCK_K), dtype=tl.float32)
    for part in range(parts):
        total += load_tile(rows + part * examples, layers, parts * examples, layer_mask, inner, 1, inside)
    return total.to(tl.float64)


@triton.jit
def _estimate(trace, total_x, total_y, rows, examples):
    """HSIC1 from half the trace, the totals and the product of the row sums; float64."""
    m = examples.to(tl.float64)
    corrections = total_x * total_y / ((m - 1.0) * (m - 2.0)) - rows * (2.0 / (m - 2.0))
    return (2.0 * trace + corrections) / (m * (m - 3.0))


@triton.jit
def _self_term(part, rows, out, layer, layers, parts, examples, splits, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr):
    """HSIC1 of one layer with itself, from its share of each split's squared norms (splits, layers)."""
    trace = tl.zeros((BLOCK_S,), dtype=tl.float64)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        trace += tl.load(part + split * layers + layer, mask=split < splits, other=0.0).to(tl.float64)
    squares = tl.zeros((BLOCK_K,), dtype=tl.float64)
    totals = tl.zeros((BLOCK_K,), dtype=tl.float64)
    one = layer + tl.arange(0, 1)
    for first in range(0, examples, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        sums = _row_sums(rows, one, one >= 0, parts, examples, inner, inner < examples, 1, BLOCK_K)
        sums = tl.sum(sums, axis=0)
        squares += sums * sums
        totals += sums
    total = tl.sum(totals, axis=0)
    tl.store(out + layer, _estimate(tl.sum(trace, axis=0), total, total, tl.sum(squares, axis=0), examples))


@triton.jit
def hsic_finish_kernel(
    part_xy,
    part_xx,
    part_yy,
    rows_x,
    rows_y,
    xy,
    xx,
    yy,
    layers_x,
    layers_y,
    examples,
    splits,
    parts,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums the splits and applies the two rank-one corrections of HSIC1, in float64; one program per layer.

    The first L_x programs make a row of xy (L_x, L_y) and an entry of xx each, the others an entry of yy. rows_x
    (L_x, parts, examples), rows_y alike: parts whose sums are the row sums. The corrections nearly cancel the trace for
    unrelated layers, hence float64.
    """
    program = tl.program_id(0)
    if program >= layers_x:
        _self_term(
            part_yy, rows_y, yy, program - layers_x, layers_y, parts, examples, splits, BLOCK_S=BLOCK_S, BLOCK_K=BLOCK_K
        )
    else:
        _self_term(part_xx, rows_x, xx, program, layers_x, parts, examples, splits, BLOCK_S=BLOCK_S, BLOCK_K=BLOCK_K)
        own = program + tl.arange(0, 1)
        for first_y in range(0, layers_y, BLOCK_L):
            y = first_y + tl.arange(0, BLOCK_L)
            y_mask = y < layers_y
            trace = tl.zeros((BLOCK_L,), dtype=tl.float64)
            for first in range(0, splits, BLOCK_S):
                split = first + tl.arange(0, BLOCK_S)
                base = part_xy + program * layers_y
                shares = load_tile(base, split, layers_x * layers_y, split < splits, y, 1, y_mask)
                trace += tl.sum(shares.to(tl.float64), axis=0)
            rows = tl.zeros((BLOCK_L,), dtype=tl.float64)
            total_x = tl.zeros((1,), dtype=tl.float64)
            total_y = tl.zeros((BLOCK_L,), dtype=tl.float64)
            for first in range(0, examples, BLOCK_K):
                inner = first + tl.arange(0, BLOCK_K)
                inside = inner < examples
                of_x = _row_sums(rows_x, own, own >= 0, parts, examples, inner, inside, 1, BLOCK_K)
                of_y = _row_sums(rows_y, y, y_mask, parts, examples, inner, inside, BLOCK_L, BLOCK_K)
                rows += tl.sum(of_x * of_y, axis=1)
                total_x += tl.sum(of_x, axis=1)
                total_y += tl.sum(of_y, axis=1)
            tl.store(xy + program * layers_y + y, _estimate(trace, total_x, total_y, rows, examples), mask=y_mask)


@triton.jit
def ratio_kernel(xy, xx, yy, out, layers_y, BLOCK_L: tl.constexpr):
    """One row of HSIC_ij / sqrt(HSIC_ii HSIC_jj), float32; 0 where a layer has no spread."""
    x = tl.program_id(0)
    own = tl.sqrt(tl.maximum(tl.load(xx + x), 0.0))
    for first in range(0, layers_y, BLOCK_L):
        y = first + tl.arange(0, BLOCK_L)
        mask = y < layers_y
        scale = own * tl.sqrt(tl.maximum(tl.load(yy + y, mask=mask, other=0.0), 0.0))
        inner = tl.load(xy + x * layers_y + y, mask=mask, other=0.0)
        ratio = tl.where(scale > 0, inner / tl.where(scale > 0, scale, 1.0), 0.0)
        tl.store(out + x * layers_y + y, ratio.to(tl.float32), mask=mask)


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
        **precision(x.dtype, x.device),
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
        **precision(packed_x.dtype, packed_x.device),
        **config.keywords,
    )
    return part_xy, part_xx, part_yy


def _finish(
    part_xy: Tensor, part_xx: Tensor, part_yy: Tensor, rows_x: Tensor, rows_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(xy, xx, yy) in float64 from the splits' shares and the parts (L, parts, m) of the row sums, in one launch."""
    splits, layers_x, layers_y = part_xy.shape
    xy, xx, yy = (
        part_xy.new_empty(size, dtype=torch.float64) for size in ((layers_x, layers_y), (layers_x,), (layers_y,))
    )
    config = choose("hsic_finish", torch.float32, part_xy.device)
    hsic_finish_kernel[(layers_x + layers_y,)](
        part_xy,
        part_xx,
        part_yy,
        rows_x,
        rows_y,
        xy,
        xx,
        yy,
        layers_x,
        layers_y,
        rows_x.shape[2],
        splits,
        rows_x.shape[1],
        **config.keywords,
    )
    return xy, xx, yy


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
    """Kernel of the terms behind `cka.hsic`, in two launches. The totals are summed again, in float64."""
    if packed_x.shape[0] * packed_y.shape[0] == 0:
        return hsic_terms_twin(packed_x, rows_x, totals_x, packed_y, rows_y, totals_y)
    if packed_x.dtype != packed_y.dtype:
        packed_x, packed_y = packed_x.float(), packed_y.float()
    shares = _launch_hsic(packed_x.contiguous(), packed_y.contiguous())
    return _finish(*shares, rows_x.contiguous()[:, None], rows_y.contiguous()[:, None])


def _tiles_at_a_time(layers: int, blocks: int, dtype: torch.dtype) -> int:
    """All tiles of the triangles where they fit _PACKED_BYTES, else as many as do, but at least a row of tiles."""
    bytes_each = layers * PACKED_TILE**2 * dtype.itemsize
    return max(blocks, min(blocks * (blocks + 1) // 2, _PACKED_BYTES // bytes_each))


def cka_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of the terms behind `cka.cka`: six launches, and three for each further stretch of tiles."""
    if x.shape[0] * y.shape[0] == 0:
        return cka_terms_twin(x, y)
    examples = x.shape[1]
    blocks = triton.cdiv(examples, PACKED_TILE)
    tiles = blocks * (blocks + 1) // 2
    dtype = packed_dtype(x.dtype, y.dtype)
    step = _tiles_at_a_time(x.shape[0] + y.shape[0], blocks, dtype)
    sides = []
    for side in (x, y):
        stretch = side.new_empty(side.shape[0] * step * PACKED_TILE**2, dtype=dtype)
        parts = side.new_empty(side.shape[0], blocks, examples, dtype=torch.float32)
        sides.append((side, _means(side), stretch, parts))
    shares = []
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        packed = []
        for side, means, stretch, parts in sides:
            shape = side.shape[0], count, PACKED_TILE, PACKED_TILE
            packed.append(stretch[: math.prod(shape)].view(shape))
            _launch_gram(side, means, packed[-1], parts, first)
        shares.append(_launch_hsic(*packed))
    if len(shares) > 1:
        xy, xx, yy = (torch.cat(stretches) for stretches in zip(*shares, strict=True))
        shares = [(xy, xx, yy)]
    return _finish(*shares[0], *(parts for *_, parts in sides))


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Kernel of `cka.cka`: the terms, and their ratio in one launch more."""
    if x.shape[0] * y.shape[0] == 0:
        return cka_twin(x, y)
    xy, xx, yy = cka_terms(x, y)
    out = torch.empty_like(xy, dtype=torch.float32)
    config = choose("ratio", torch.float32, out.device)
    ratio_kernel[(xy.shape[0],)](xy, xx, yy, out, xy.shape[1], **config.keywords)
    return out
