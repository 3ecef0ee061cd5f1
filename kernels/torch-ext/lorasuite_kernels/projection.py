"""Carrying the per-head factor of a low-rank update from matched old heads to new heads.

For a matched pair (old head a, new head b) the block is `C_b = left[a] right[b]^T`, (h_o, h_n), and the factor is
carried as `x_n[b] = C_b^T x_o[a]`. Both projections have this form:

    Eq. (3) of LoRASuite (arXiv 2505.13515):  left = W_o W_h,           right = W_n           (q, k, v: x = B)
                                              left = O_o^T W_h,         right = O_n^T         (o:       x = A^T)
    least squares:                            left = (M M^T)^{-1} M,    right = W_n           (q, k, v: x = B)
                                              left = M_V,               right = (N N^T)^{-1} N, N = W_nV  (o: x = A^T)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import define, wide


def _check(left: Tensor, right: Tensor, match: Tensor, blocks: tuple[int, int], old_share: int) -> None:
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(f"left and right must share their width; got {tuple(left.shape)} and {tuple(right.shape)}")
    if not (left.is_floating_point() and right.is_floating_point()):
        raise ValueError(f"left and right must be floating; got {left.dtype} and {right.dtype}")
    for name, weight, count in (("left", left, blocks[0]), ("right", right, blocks[1])):
        if count < 1 or weight.shape[0] % count:
            raise ValueError(f"{name} {tuple(weight.shape)} does not split into {count} heads")
    if match.ndim != 1 or match.shape[0] % blocks[1]:
        raise ValueError(f"match {tuple(match.shape)} must hold a whole number of query heads for {blocks[1]} heads")
    if match.dtype not in (torch.int64, torch.int32) or old_share < 1:
        raise ValueError(f"match must be integer and old_share at least 1; got {match.dtype} and {old_share}")


def head_blocks(left: Tensor, right: Tensor, match: Tensor, *, blocks: tuple[int, int], old_share: int = 1) -> Tensor:
    """The blocks `C_b = left[match[b] // old_share] right[b // new_share]^T` of the matched pairs.

    Args:
        left: (blocks[0]·h_o, d), right: (blocks[1]·h_n, d): one block of rows per head (per key/value head for k, v).
        match: (H_n,) int64, the old query head of each new query head, -1 where there is none.
        blocks: heads in `left` and in `right`. old_share: old query heads per block of `left` (1 for q and o).

    Returns:
        (H_n, h_o, h_n), zero for unmatched heads.
    """
    _check(left, right, match, blocks, old_share)
    result: Tensor = _head_blocks_op(left, right, match, *blocks, old_share)
    return result


def partners(match: Tensor, blocks_o: int, old_share: int) -> Tensor:
    """The old block of each new query head, 0 where there is none. Raises IndexError on a match past the last."""
    if match.numel() and int(match.max()) >= blocks_o * old_share:
        raise IndexError(f"match points to query head {int(match.max())} of {blocks_o * old_share}")
    return match.clamp_min(0) // old_share


def _blocks(left: Tensor, right: Tensor, match: Tensor, blocks_o: int, blocks_n: int, old_share: int) -> Tensor:
    """The matched blocks in the dtype the twin computes in."""
    dtype = wide(left, right)
    (rows, d), H_n = left.shape, match.shape[0]
    h_o, h_n = rows // blocks_o, right.shape[0] // blocks_n
    old = partners(match, blocks_o, old_share).to(left.device)
    # The query heads of one new group stand below each other, so that the group's rows are read where they are.
    matched = left.reshape(blocks_o, h_o, d)[old].to(dtype).view(blocks_n, H_n // blocks_n * h_o, d)
    c = (matched @ right.reshape(blocks_n, h_n, d).to(dtype).transpose(1, 2)).view(H_n, h_o, h_n)
    return c * (match >= 0).to(c.device, c.dtype)[:, None, None]


_head_blocks_op = define(
    "head_blocks(Tensor left, Tensor right, Tensor match, int blocks_o, int blocks_n, int old_share) -> Tensor",
    twin=lambda left, *rest: _blocks(left, *rest).to(left.dtype),
    fake=lambda left, right, match, o, n, _: left.new_empty(match.shape[0], left.shape[0] // o, right.shape[0] // n),
)


def apply_head_blocks(
    c: Tensor, x: Tensor, match: Tensor, weight: Tensor, *, blocks: tuple[int, int], old_share: int = 1
) -> Tensor:
    """`x_n[g] = sum over the query heads b of g of weight[b] · C_b^T x[match[b] // old_share]`.

    Args:
        c: (H_n, h_o, h_n). x: (blocks[0]·h_o, r); the columns of several adapters may stand side by side.
        weight: (H_n,), 0 for unmatched heads; 1 without grouped attention, 1 / (heads in the group) for a mean.

    Returns:
        (blocks[1]·h_n, r) in the dtype of x.
    """
    if min(blocks) < 1 or c.ndim != 3 or c.shape[0] != match.shape[0] or match.shape[0] % blocks[1]:
        raise ValueError(f"c {tuple(c.shape)} must hold one block per entry of match {tuple(match.shape)}")
    _check_factor(x, match, weight, blocks[0], c.shape[1])
    result: Tensor = _apply_head_blocks_op(c, x, match, weight, *blocks, old_share)
    return result


def _check_factor(x: Tensor, match: Tensor, weight: Tensor, blocks_o: int, h_o: int) -> None:
    if x.ndim != 2 or x.shape[0] != blocks_o * h_o:
        raise ValueError(f"x must be ({blocks_o}·{h_o}, r) for blocks of {h_o} rows; got {tuple(x.shape)}")
    if weight.shape != match.shape:
        raise ValueError(f"weight and match must have one entry per query head; got {weight.shape} and {match.shape}")


def _apply(c: Tensor, x: Tensor, match: Tensor, weight: Tensor, blocks_o: int, blocks_n: int, old_share: int) -> Tensor:
    H_n, h_o, h_n = c.shape
    dtype = wide(x)
    old = partners(match, blocks_o, old_share).to(x.device)
    factors = x.reshape(blocks_o, h_o, x.shape[1])[old].to(dtype)
    y = c.to(dtype).transpose(1, 2) @ factors * weight.to(x.device, dtype)[:, None, None]
    return y.view(blocks_n, H_n // blocks_n, h_n, x.shape[1]).sum(1).flatten(0, 1).to(x.dtype)


_apply_head_blocks_op = define(
    "apply_head_blocks(Tensor c, Tensor x, Tensor match, Tensor weight, int blocks_o, int blocks_n, int old_share)"
    " -> Tensor",
    twin=_apply,
    fake=lambda c, x, match, weight, blocks_o, blocks_n, old_share: x.new_empty(blocks_n * c.shape[2], x.shape[1]),
)


def project_heads(
    left: Tensor,
    right: Tensor,
    x: Tensor,
    match: Tensor,
    weight: Tensor,
    *,
    blocks: tuple[int, int],
    old_share: int = 1,
) -> Tensor:
    """`head_blocks` and `apply_head_blocks` in one step, for callers that do not keep the blocks.

    The columns of many adapters may stand side by side in x and share one computation of the blocks. PyTorch on every
    device: its two batched products take as long as the weights take to read.

    Args:
        left: (blocks[0]·h_o, d), right: (blocks[1]·h_n, d), any floating dtype and strides.
        x: (blocks[0]·h_o, r).
        match: (H_n,) int64, -1 where there is no partner. weight: (H_n,).
        blocks: heads in `left` and in `right`. old_share: old query heads per block of `left`.

    Returns:
        (blocks[1]·h_n, r) in the dtype of x; accumulated in float32 (float64 for float64).

    Raises:
        ValueError: on shapes that do not fit. IndexError: on a match that points past the old heads.
    """
    _check(left, right, match, blocks, old_share)
    _check_factor(x, match, weight, blocks[0], left.shape[0] // blocks[0])
    result: Tensor = _project_heads_op(left, right, x, match, weight, *blocks, old_share)
    return result


def _project_twin(
    left: Tensor, right: Tensor, x: Tensor, match: Tensor, weight: Tensor, blocks_o: int, blocks_n: int, old_share: int
) -> Tensor:
    c = _blocks(left, right, match, blocks_o, blocks_n, old_share)
    return _apply(c, x, match, weight, blocks_o, blocks_n, old_share)


_project_heads_op = define(
    "project_heads(Tensor left, Tensor right, Tensor x, Tensor match, Tensor weight, int blocks_o, int blocks_n,"
    " int old_share) -> Tensor",
    twin=_project_twin,
    fake=lambda left, right, x, *_: x.new_empty(right.shape[0], x.shape[1]),
)
