"""Carrying the per-head factor of a low-rank update from matched old heads to new heads.

For a matched pair (old head a, new head b) the block is `C_b = left[a] right[b]^T`, (h_o, h_n), and the factor is
carried as `x_n[b] = C_b^T x_o[a]`. Both projections have this form:

    Eq. (3) of LoRASuite (arXiv 2505.13515):  left = W_o W_h,           right = W_n           (q, k, v: x = B)
                                              left = O_o^T W_h,         right = O_n^T         (o:       x = A^T)
    least squares:                            left = (M M^T)^{-1} M,    right = W_n           (q, k, v: x = B)
                                              left = M_V,               right = (N N^T)^{-1} N, N = W_nV  (o: x = A^T)
"""

from __future__ import annotations

from torch import Tensor


def _check(left: Tensor, right: Tensor, match: Tensor, blocks: tuple[int, int]) -> None:
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(f"left and right must share their width; got {tuple(left.shape)} and {tuple(right.shape)}")
    for name, weight, count in (("left", left, blocks[0]), ("right", right, blocks[1])):
        if count < 1 or weight.shape[0] % count:
            raise ValueError(f"{name} {tuple(weight.shape)} does not split into {count} heads")
    if match.ndim != 1 or match.shape[0] % blocks[1]:
        raise ValueError(f"match {tuple(match.shape)} must hold a whole number of query heads for {blocks[1]} heads")


def head_blocks(left: Tensor, right: Tensor, match: Tensor, *, blocks: tuple[int, int], old_share: int = 1) -> Tensor:
    """The blocks `C_b = left[match[b] // old_share] right[b // new_share]^T` of the matched pairs.

    Args:
        left: (blocks[0]·h_o, d), right: (blocks[1]·h_n, d): one block of rows per head (per key/value head for k, v).
        match: (H_n,) int64, the old query head of each new query head, -1 where there is none.
        blocks: heads in `left` and in `right`. old_share: old query heads per block of `left` (1 for q and o).

    Returns:
        (H_n, h_o, h_n), zero for unmatched heads.
    """
    _check(left, right, match, blocks)
    new_share = match.shape[0] // blocks[1]
    old = (match.clamp_min(0) // old_share).to(left.device)
    left = left.view(blocks[0], -1, left.shape[1])[old]
    right = right.view(blocks[1], -1, right.shape[1]).repeat_interleave(new_share, 0)
    c = left @ right.transpose(1, 2)
    return c * (match >= 0).to(c.device, c.dtype)[:, None, None]


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
    H_n, h_o, h_n = c.shape
    if x.ndim != 2 or x.shape[0] != blocks[0] * h_o:
        raise ValueError(f"x must be ({blocks[0]}·{h_o}, r) for blocks {tuple(c.shape)}; got {tuple(x.shape)}")
    old = (match.clamp_min(0) // old_share).to(x.device)
    x = x.view(blocks[0], h_o, -1)[old]
    y = c.to(x.dtype).transpose(1, 2) @ x * weight.to(x)[:, None, None]
    return y.view(blocks[1], H_n // blocks[1], h_n, -1).sum(1).flatten(0, 1)


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
    """`head_blocks` and `apply_head_blocks` in one step, for callers that do not keep the blocks."""
    c = head_blocks(left, right, match, blocks=blocks, old_share=old_share)
    return apply_head_blocks(c, x, match, weight, blocks=blocks, old_share=old_share)
