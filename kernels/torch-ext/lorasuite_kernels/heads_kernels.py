"""Kernel of `head_similarity`: blockwise Hadamard sums of two products, one key/value group pair per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose, precision
from .tiles import row_products


@triton.jit
def pair_sums_kernel(
    heads_o,
    heads_n,
    groups_o,
    groups_n,
    out,
    heads_o_row_stride,
    heads_o_column_stride,
    heads_n_row_stride,
    heads_n_column_stride,
    groups_o_row_stride,
    groups_o_column_stride,
    groups_n_row_stride,
    groups_n_column_stride,
    size_o,
    size_n,
    width,
    count_groups_n,
    share_o,
    share_n,
    PAIRED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For one pair of groups and one tile of their head blocks: sum of (q_a q_b^T) ∘ (k_a k_b^T) for each pair (a, b).

    The key product is formed once and kept in registers for all query heads of the two groups. out (tiles of a head
    block, H_o, H_n); with PAIRED both sides are one model, only a = b is wanted, and out is (tiles, H).
    """
    pair, tile = tl.program_id(0), tl.program_id(1)
    tiles_n = tl.cdiv(size_n, BLOCK_N)
    if PAIRED:
        group_o, group_n = pair, pair
    else:
        group_o, group_n = pair // count_groups_n, pair % count_groups_n
    within_o = (tile // tiles_n) * BLOCK_O + tl.arange(0, BLOCK_O)
    within_n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_o, mask_n = within_o < size_o, within_n < size_n
    keys = row_products(
        groups_o,
        group_o * size_o + within_o,
        groups_o_row_stride,
        groups_o_column_stride,
        mask_o,
        groups_n,
        group_n * size_n + within_n,
        groups_n_row_stride,
        groups_n_column_stride,
        mask_n,
        0,
        width,
        BLOCK_K,
        PRECISION,
    )
    pairs = share_o if PAIRED else share_o * share_n
    for index in range(pairs):
        if PAIRED:
            a = group_o * share_o + index
            b = a
        else:
            a, b = group_o * share_o + index // share_n, group_n * share_n + index % share_n
        queries = row_products(
            heads_o,
            a * size_o + within_o,
            heads_o_row_stride,
            heads_o_column_stride,
            mask_o,
            heads_n,
            b * size_n + within_n,
            heads_n_row_stride,
            heads_n_column_stride,
            mask_n,
            0,
            width,
            BLOCK_K,
            PRECISION,
        )
        # Reduced as one flat vector: two nested reductions of this tile abort the compiler for sm_100.
        total = tl.sum(tl.reshape(queries * keys, (BLOCK_O * BLOCK_N,)), axis=0)
        if PAIRED:
            cell = tile * (tl.num_programs(0) * share_o) + a
        else:
            heads_n_total = count_groups_n * share_n
            heads_o_total = (tl.num_programs(0) // count_groups_n) * share_o
            cell = (tile * heads_o_total + a) * heads_n_total + b
        tl.store(out + cell, total)


def _pair_sums(
    heads_o: Tensor,
    heads_n: Tensor,
    groups_o: Tensor,
    groups_n: Tensor,
    heads: tuple[int, int],
    kv_heads: tuple[int, int],
    paired: bool,
) -> Tensor:
    """(H_o, H_n), or (H,) of a = b with `paired`; rows are head by head, any strides."""
    size_o, size_n = heads_o.shape[0] // heads[0], heads_n.shape[0] // heads[1]
    config = choose("heads", heads_o.dtype, heads_o.device, max(size_o, size_n))
    tiles = triton.cdiv(size_o, config.blocks["BLOCK_O"]) * triton.cdiv(size_n, config.blocks["BLOCK_N"])
    out = heads_o.new_empty(tiles, *(heads[:1] if paired else heads), dtype=torch.float32)
    if out.numel() == 0:
        return out.sum(0)
    pair_sums_kernel[(kv_heads[0] * (1 if paired else kv_heads[1]), tiles)](
        heads_o,
        heads_n,
        groups_o,
        groups_n,
        out,
        *heads_o.stride(),
        *heads_n.stride(),
        *groups_o.stride(),
        *groups_n.stride(),
        size_o,
        size_n,
        heads_o.shape[1],
        kv_heads[1],
        heads[0] // kv_heads[0],
        heads[1] // kv_heads[1],
        PAIRED=paired,
        **precision(heads_o.dtype, heads_o.device),
        **config.keywords,
    )
    return out.sum(0)


def head_similarity(
    q_o: Tensor,
    k_o: Tensor,
    v_o: Tensor,
    o_o: Tensor,
    q_n: Tensor,
    k_n: Tensor,
    v_n: Tensor,
    o_n: Tensor,
    H_o: int,
    H_n: int,
    G_o: int,
    G_n: int,
) -> Tensor:
    """Kernel of `heads.head_similarity`: the inner products of all pairs, then both sides' norms."""
    dtype = q_o.dtype
    if any(w.dtype != dtype for w in (k_o, v_o, o_o, q_n, k_n, v_n, o_n)):
        q_o, k_o, v_o, o_o, q_n, k_n, v_n, o_n = (w.float() for w in (q_o, k_o, v_o, o_o, q_n, k_n, v_n, o_n))
    inner = _pair_sums(q_o, q_n, k_o, k_n, (H_o, H_n), (G_o, G_n), False)
    inner += _pair_sums(o_o.T, o_n.T, v_o, v_n, (H_o, H_n), (G_o, G_n), False)
    norms = []
    for q, k, v, o, H, G in ((q_o, k_o, v_o, o_o, H_o, G_o), (q_n, k_n, v_n, o_n, H_n, G_n)):
        squared = _pair_sums(q, q, k, k, (H, H), (G, G), True) + _pair_sums(o.T, o.T, v, v, (H, H), (G, G), True)
        norms.append(squared.clamp_min(0).sqrt())
    scale = torch.outer(*norms)
    return torch.where(scale > 0, inner / torch.where(scale > 0, scale, 1), 0)
