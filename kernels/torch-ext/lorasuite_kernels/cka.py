"""Minibatch CKA through the unbiased HSIC estimator, for all pairs of layers at once.

HSIC1 (Song et al. 2012, "Feature selection via dependence maximization", eq. 5), with `K~ = X X^T` and its diagonal
set to zero:

    HSIC1(K, L) = [ tr(K~ L~) + (1^T K~ 1)(1^T L~ 1) / ((m-1)(m-2)) - 2/(m-2) 1^T K~ L~ 1 ] / (m (m-3))

It does not change when one vector is subtracted from every row of X, but its rounding error does: hidden states of
language models carry a few channels thousands of times larger than the rest. X is therefore centred before K is formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .configs import PACKED_TILE
from .dispatch import check_one_device, define, wide

_TILE_ROWS = 256
_DIAGONAL = 32
_LAYERS_CENTRED = 2
_CHUNK_TILES = 16


class Gram(NamedTuple):
    """Centred Gram matrices of L layers over m examples, as `gram` makes them.

    packed (L, T, 128, 128): the tiles of each strict upper triangle, tile (row r, column c) of the triangle at index
    c (c + 1) / 2 + r, zero on and below the diagonal and past the last example. rows (L, m): row sums of the full
    symmetric matrix with zero diagonal. totals (L,): their sums.
    """

    packed: Tensor
    rows: Tensor
    totals: Tensor


class HSICTerms(NamedTuple):
    """HSIC1 of one minibatch, float64: every cross pair, and every layer with itself."""

    xy: Tensor  # (L_x, L_y)
    xx: Tensor  # (L_x,)
    yy: Tensor  # (L_y,)


def _check_stack(name: str, x: Tensor) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"{name} must be floating, (layers, examples, width); got {x.dtype} {tuple(x.shape)}")


def _check(x: Tensor, y: Tensor) -> None:
    _check_stack("x", x)
    _check_stack("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must hold the same examples; got m = {x.shape[1]} and {y.shape[1]}")
    if x.shape[1] < 4:
        raise ValueError(f"the unbiased HSIC needs at least 4 examples; got m = {x.shape[1]}")
    check_one_device(x=x, y=y)


def _centred(x: Tensor) -> Tensor:
    """x minus its mean over the examples, in at least float32."""
    x = x if x.dtype == torch.float64 else x.float()
    return x - x.mean(dim=1, keepdim=True)


def hsic_terms(x: Tensor, y: Tensor) -> HSICTerms:
    """HSIC1 of all (L_x, L_y) pairs of one minibatch, and of each layer with itself.

    Only the upper triangle of each Gram matrix is computed, one row of tiles at a time: no Gram matrix is stored.

    Args:
        x: (L_x, m, d_x), m >= 4. y: (L_y, m, d_y). Any floating dtype and strides. The twin takes products in float32
            (float64 for float64 input) and sums over rows in float64; the kernel takes them in the input's dtype
            after centring in float32, and sums in float32.

    Raises:
        ValueError: on shapes that do not fit, fewer than 4 examples, or two devices.
    """
    _check(x, y)
    return HSICTerms(*_cka_terms_op(x, y))


def _estimate(trace: Tensor, totals: Tensor, rows: Tensor, m: int) -> Tensor:
    """HSIC1 from half the trace, the product of the totals and the product of the row sums."""
    return (2 * trace + totals / ((m - 1) * (m - 2)) - 2 / (m - 2) * rows) / (m * (m - 3))


def _terms(
    xy: Tensor, xx: Tensor, yy: Tensor, rows_x: Tensor, rows_y: Tensor, totals_x: Tensor, totals_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    m = rows_x.shape[1]
    return (
        _estimate(xy, torch.outer(totals_x, totals_y), rows_x @ rows_y.T, m),
        _estimate(xx, totals_x * totals_x, torch.linalg.vecdot(rows_x, rows_x), m),
        _estimate(yy, totals_y * totals_y, torch.linalg.vecdot(rows_y, rows_y), m),
    )


def _zero_terms(like: Tensor, L_x: int, L_y: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(like.new_zeros(shape, dtype=torch.float64) for shape in ((L_x, L_y), (L_x,), (L_y,)))  # type: ignore[return-value]


def cka_terms_twin(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch twin of the terms behind `cka`, all float64."""
    (L_x, m, _), L_y = x.shape, y.shape[0]
    mean_x, mean_y = x.mean(1, keepdim=True, dtype=wide(x)), y.mean(1, keepdim=True, dtype=wide(y))
    xy, xx, yy = _zero_terms(x, L_x, L_y)
    rows_x, rows_y = xx.new_zeros(L_x, m), yy.new_zeros(L_y, m)
    dtype = wide(x, y)
    for start in range(0, m, _TILE_ROWS):
        blocks_x, blocks_y = _upper_blocks(x, mean_x, start, rows_x), _upper_blocks(y, mean_y, start, rows_y)
        for kx, ky in zip(blocks_x, blocks_y, strict=True):
            # One product per run of entries; the runs are summed in float64.
            products = torch.bmm(kx.transpose(0, 1).to(dtype), ky.permute(1, 2, 0).to(dtype))
            xy += products.sum(0, dtype=torch.float64)
            xx += torch.linalg.vecdot(kx, kx).sum(1, dtype=torch.float64)
            yy += torch.linalg.vecdot(ky, ky).sum(1, dtype=torch.float64)
    return _terms(xy, xx, yy, rows_x, rows_y, rows_x.sum(1), rows_y.sum(1))


def _upper_blocks(x: Tensor, mean: Tensor, start: int, rows: Tensor) -> list[Tensor]:
    """The strict upper triangle of each centred Gram matrix, rows `start` to `start` + _TILE_ROWS, as (L, runs, run).

    First what lies right of the tile on the diagonal, then that tile by halves: its upper right quarter, those of its
    two diagonal quarters, and so on; last the smallest diagonal blocks, in full. All blocks of one size are one batched
    product, over a few layers at a time that are centred in memory that stays in cache. Adds the entries to `rows`.
    """
    L, m, d = x.shape
    n = min(_TILE_ROWS, m - start)
    side = max(_DIAGONAL, 1 << (n - 1).bit_length())
    halves = [side >> i for i in range(1, side.bit_length()) if side >> i >= _DIAGONAL]
    right = mean.new_empty(L, side, m - start - n)
    quarters = [mean.new_empty(L, side // (2 * half), half, half) for half in halves]
    diagonal = mean.new_empty(L, side // _DIAGONAL, _DIAGONAL, _DIAGONAL)
    # Rows past the last example stay zero.
    tile, beyond = mean.new_zeros(_LAYERS_CENTRED, side, d), mean.new_empty(_LAYERS_CENTRED, m - start - n, d)
    for first in range(0, L, _LAYERS_CENTRED):
        part = slice(first, min(first + _LAYERS_CENTRED, L))
        count = part.stop - first
        centred = tile[:count]
        torch.sub(x[part, start : start + n], mean[part], out=centred[:, :n])
        torch.sub(x[part, start + n :], mean[part], out=beyond[:count])
        torch.bmm(centred, beyond[:count].mT, out=right[part])
        for half, quarter in zip(halves, quarters, strict=True):
            pairs = centred.view(count * quarter.shape[1], 2, half, d)
            torch.bmm(pairs[:, 0], pairs[:, 1].mT, out=quarter[part].flatten(0, 1))
        blocks = centred.view(count * diagonal.shape[1], _DIAGONAL, d)
        torch.bmm(blocks, blocks.mT, out=diagonal[part].flatten(0, 1))
    diagonal.triu_(1)

    sums = rows.new_zeros(L, side)
    sums += right.sum(2)
    for half, quarter in zip(halves, quarters, strict=True):
        pair = sums.view(L, quarter.shape[1], 2, half)
        pair[:, :, 0] += quarter.sum(3)
        pair[:, :, 1] += quarter.sum(2)
    sums.view(diagonal.shape[:3]).add_(diagonal.sum(3)).add_(diagonal.sum(2))
    rows[:, start : start + n] += sums[:, :n]
    rows[:, start + n :] += right.sum(1)
    run = _DIAGONAL**2
    return [right, *(k.view(L, k.shape[1:].numel() // run, run) for k in (*quarters, diagonal))]


_cka_terms_op = define(
    "cka_terms(Tensor x, Tensor y) -> (Tensor, Tensor, Tensor)",
    twin=cka_terms_twin,
    fake=lambda x, y: _empty_terms(x, x.shape[0], y.shape[0]),
    kernel=("cka_kernels", "cka_terms"),
)


def _empty_terms(like: Tensor, L_x: int, L_y: int) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape, dtype=torch.float64) for shape in ((L_x, L_y), (L_x,), (L_y,)))


def packed_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Storage of packed triangles: bfloat16 for bfloat16 layers, where it costs CKA less than 1e-3; else float32.

    float16 would overflow: entries of a Gram matrix are sums of squares.
    """
    if torch.float64 in dtypes:
        return torch.float64
    return torch.bfloat16 if set(dtypes) == {torch.bfloat16} else torch.float32


def _tiles(m: int) -> int:
    blocks = -(-m // PACKED_TILE)
    return blocks * (blocks + 1) // 2


def gram(x: Tensor) -> Gram:
    """Centred Gram matrices with zero diagonal, their upper triangles, row sums and totals, in one pass over x.

    Args:
        x: (L, m, d), m >= 1, any floating dtype and strides. Centred while reading, with means in float32 (float64 for
            float64): no centred copy exists on the kernel's path.

    Returns:
        Gram: packed (L, T, 128, 128) with T = n (n + 1) / 2, n = ceil(m / 128), in bfloat16 for bfloat16 input, else
        float32 (float64 for float64); rows (L, m) and totals (L,) in float32 (float64).

    Raises:
        ValueError: if x is not floating and 3-dimensional, or holds no example.
    """
    _check_stack("x", x)
    if x.shape[1] < 1:
        raise ValueError(f"x must hold at least one example; got {tuple(x.shape)}")
    return Gram(*_gram_op(x))


def _gram_twin(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    L, m, _ = x.shape
    centred = torch.nn.functional.pad(_centred(x), (0, 0, 0, -m % PACKED_TILE))
    packed = x.new_empty(L, _tiles(m), PACKED_TILE, PACKED_TILE, dtype=packed_dtype(x.dtype))
    rows = x.new_zeros(L, centred.shape[1], dtype=torch.float64)
    for start in range(0, m, PACKED_TILE):
        stop, column = start + PACKED_TILE, start // PACKED_TILE
        k = torch.bmm(centred[:, :stop], centred[:, start:stop].transpose(1, 2)).triu_(1 - start)
        rows[:, :stop] += k.sum(2, dtype=torch.float64)
        rows[:, start:stop] += k.sum(1, dtype=torch.float64)
        first = column * (column + 1) // 2
        packed[:, first : first + column + 1] = k.view(L, column + 1, PACKED_TILE, PACKED_TILE)
    rows = rows[:, :m].to(wide(x)).contiguous()
    return packed, rows, rows.sum(1)


def _gram_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    L, m, _ = x.shape
    packed = x.new_empty(L, _tiles(m), PACKED_TILE, PACKED_TILE, dtype=packed_dtype(x.dtype))
    return packed, x.new_empty(L, m, dtype=wide(x)), x.new_empty(L, dtype=wide(x))


_gram_op = define(
    "gram(Tensor x) -> (Tensor, Tensor, Tensor)", twin=_gram_twin, fake=_gram_fake, kernel=("cka_kernels", "gram")
)


def full_gram(packed: Gram) -> Tensor:
    """(L, m, m) float64: the symmetric matrices behind packed triangles, their diagonals included.

    A centred Gram matrix's rows sum to zero, so its diagonal is the negative of the others' sums.
    """
    L, m = packed.rows.shape
    blocks = -(-m // PACKED_TILE)
    full = packed.packed.new_zeros(L, blocks * PACKED_TILE, blocks * PACKED_TILE, dtype=torch.float64)
    for column in range(blocks):
        first, stop = column * (column + 1) // 2, (column + 1) * PACKED_TILE
        tiles = packed.packed[:, first : first + column + 1]
        full[:, :stop, stop - PACKED_TILE : stop] = tiles.flatten(1, 2)
    full = full[:, :m, :m]
    full = full + full.mT
    full.diagonal(dim1=1, dim2=2).copy_(-full.sum(2))
    return full


def hsic(gx: Gram, gy: Gram) -> Tensor:
    """HSIC1 of all pairs of layers, from their packed triangles.

    Args:
        gx, gy: from `gram`, over the same m >= 4 examples.

    Returns:
        (L_x, L_y) float32 (float64 if either side is).

    Raises:
        ValueError: on triangles of different numbers of examples or devices, or fewer than 4 examples.
    """
    _check_grams(gx, gy)
    result: Tensor = _hsic_terms_op(*gx, *gy)[0]
    return result.to(wide(gx.rows, gy.rows))


def _check_grams(gx: Gram, gy: Gram) -> None:
    m = gx.rows.shape[1]
    if gy.rows.shape[1] != m or gx.packed.shape[1:] != gy.packed.shape[1:]:
        raise ValueError(f"both sides must hold the same examples; got m = {m} and {gy.rows.shape[1]}")
    if m < 4:
        raise ValueError(f"the unbiased HSIC needs at least 4 examples; got m = {m}")
    check_one_device(gx=gx.packed, gy=gy.packed)


def hsic_terms_twin(
    packed_x: Tensor, rows_x: Tensor, totals_x: Tensor, packed_y: Tensor, rows_y: Tensor, totals_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch twin of the terms behind `hsic`, all float64."""
    xy, xx, yy = _zero_terms(packed_x, packed_x.shape[0], packed_y.shape[0])
    for start in range(0, packed_x.shape[1], _CHUNK_TILES):
        kx = packed_x[:, start : start + _CHUNK_TILES].double().flatten(1)
        ky = packed_y[:, start : start + _CHUNK_TILES].double().flatten(1)
        xy += kx @ ky.T
        xx += torch.linalg.vecdot(kx, kx)
        yy += torch.linalg.vecdot(ky, ky)
    return _terms(xy, xx, yy, rows_x.double(), rows_y.double(), totals_x.double(), totals_y.double())


_hsic_terms_op = define(
    "hsic_terms(Tensor packed_x, Tensor rows_x, Tensor totals_x, Tensor packed_y, Tensor rows_y, Tensor totals_y)"
    " -> (Tensor, Tensor, Tensor)",
    twin=hsic_terms_twin,
    fake=lambda px, rx, tx, py, ry, ty: _empty_terms(px, px.shape[0], py.shape[0]),
    kernel=("cka_kernels", "hsic_terms"),
)


def _ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """HSIC_ij / sqrt(HSIC_ii HSIC_jj); 0 where a layer has no spread to compare (HSIC_ii <= 0)."""
    scale = torch.outer(xx.clamp_min(0).sqrt(), yy.clamp_min(0).sqrt())
    return torch.where(scale > 0, xy / torch.where(scale > 0, scale, 1), 0).float()


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased linear CKA of all pairs of layers over one minibatch.

    Args:
        x: (L_x, m, d_x), y: (L_y, m, d_y); m >= 4 examples, row e of both belonging to the same example.

    Returns:
        (L_x, L_y) float32. Unbiased, hence not confined to [0, 1]; 0 where a layer has no spread (HSIC_ii <= 0).

    Raises:
        ValueError: on shapes that do not fit, or fewer than 4 examples.
    """
    _check(x, y)
    result: Tensor = _cka_op(x, y)
    return result


def cka_twin(x: Tensor, y: Tensor) -> Tensor:
    """PyTorch twin of `cka`."""
    return _ratio(*cka_terms_twin(x, y))


_cka_op = define(
    "cka(Tensor x, Tensor y) -> Tensor",
    twin=cka_twin,
    fake=lambda x, y: x.new_empty(x.shape[0], y.shape[0], dtype=torch.float32),
    kernel=("cka_kernels", "cka"),
)


@dataclass
class StreamingCKA:
    """CKA over many minibatches: each HSIC term is averaged over minibatches first, the ratio is taken last.

    (Nguyen, Raghu and Kornblith 2021, "Do wide and deep networks learn the same things?", eq. 3.)

    >>> stream = StreamingCKA(n_x=12, n_y=24)
    >>> stream.update(x, y)  # (12, m, d_x), (24, m, d_y), once per minibatch
    >>> stream.compute()     # (12, 24)
    """

    n_x: int
    n_y: int

    def __post_init__(self) -> None:
        self.minibatches = 0
        self._sums = HSICTerms(
            torch.zeros(self.n_x, self.n_y, dtype=torch.float64),
            torch.zeros(self.n_x, dtype=torch.float64),
            torch.zeros(self.n_y, dtype=torch.float64),
        )

    def _add(self, terms: HSICTerms, minibatches: int) -> None:
        device = terms.xy.device
        self._sums = HSICTerms(*(total.to(device) + term for total, term in zip(self._sums, terms, strict=True)))
        self.minibatches += minibatches

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds one minibatch: x (n_x, m, d_x), y (n_y, m, d_y), m >= 4."""
        if x.shape[0] != self.n_x or y.shape[0] != self.n_y:
            raise ValueError(f"expected {self.n_x} and {self.n_y} layers; got {tuple(x.shape)} and {tuple(y.shape)}")
        self._add(hsic_terms(x, y), 1)

    def update_grams(self, gx: Gram, gy: Gram) -> None:
        """Adds one minibatch from its packed Gram matrices, as `gram` makes them: n_x and n_y layers, m >= 4.

        A Gram matrix can be made as soon as its layer has run, and is smaller than the hidden states where m < 2 d.
        """
        if gx.packed.shape[0] != self.n_x or gy.packed.shape[0] != self.n_y:
            raise ValueError(
                f"expected {self.n_x} and {self.n_y} layers; got {gx.packed.shape[0]} and {gy.packed.shape[0]}"
            )
        _check_grams(gx, gy)
        self._add(HSICTerms(*_hsic_terms_op(*gx, *gy)), 1)

    def merge(self, other: StreamingCKA) -> None:
        """Adds the minibatches another instance has seen (shards of one data set)."""
        if (other.n_x, other.n_y) != (self.n_x, self.n_y):
            raise ValueError(f"cannot merge ({other.n_x}, {other.n_y}) layers into ({self.n_x}, {self.n_y})")
        self._add(other._sums, other.minibatches)

    def compute(self) -> Tensor:
        """(n_x, n_y) float32. Raises RuntimeError before the first update."""
        if not self.minibatches:
            raise RuntimeError("StreamingCKA.compute() before any update()")
        return _ratio(*self._sums)
