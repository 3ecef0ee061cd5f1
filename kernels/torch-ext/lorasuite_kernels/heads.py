"""Similarity of attention heads by their input-independent interaction matrices, without forming them.

Head a has `W_QK = Q_a^T K_a` and `W_VO = V_a^T O_a^T`, both d × d. For two heads

    <Q_a^T K_a, Q_b^T K_b> = sum of (Q_a Q_b^T) ∘ (K_a K_b^T)

a sum over one h_a × h_b block, so all pairs cost four matrix products. (LoRASuite, arXiv 2505.13515, section 3.3, gives
the similarity: the cosine of the concatenation [QK; VO].)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import check_one_device, define, wide

_CHUNK_ELEMENTS = 4_000_000


def head_similarity(
    q_o: Tensor,
    k_o: Tensor,
    v_o: Tensor,
    o_o: Tensor,
    q_n: Tensor,
    k_n: Tensor,
    v_n: Tensor,
    o_n: Tensor,
    *,
    heads: tuple[int, int],
    kv_heads: tuple[int, int],
) -> Tensor:
    """Cosine similarity of every old query head with every new one.

    Args:
        q_o, q_n: (H·h, d) query weights, the old ones already carried to the new width d.
        k_o, v_o, k_n, v_n: (G·h, d); query head a uses key/value head a // (H / G).
        o_o, o_n: (d, H·h). Any floating dtype and strides; products are accumulated in float32 (float64 for float64).
        heads: (H_o, H_n). kv_heads: (G_o, G_n). Head sizes follow from the shapes and may differ.

    Returns:
        (H_o, H_n) in float32 (float64 for float64 input). A head whose interaction matrices are zero has similarity 0.

    Raises:
        ValueError: on weights that do not split into these heads, widths that differ, or several devices.
    """
    _check(q_o, k_o, v_o, o_o, heads[0], kv_heads[0], "old")
    _check(q_n, k_n, v_n, o_n, heads[1], kv_heads[1], "new")
    if q_o.shape[1] != q_n.shape[1]:
        raise ValueError(f"old and new weights must have one width; got {q_o.shape[1]} and {q_n.shape[1]}")
    check_one_device(q_o=q_o, k_o=k_o, v_o=v_o, o_o=o_o, q_n=q_n, k_n=k_n, v_n=v_n, o_n=o_n)
    if q_o.shape[1] < max(q_o.shape[0] // heads[0], q_n.shape[0] // heads[1]):
        return _narrow(q_o, k_o, v_o, o_o, q_n, k_n, v_n, o_n, heads, kv_heads)
    result: Tensor = _head_similarity_op(q_o, k_o, v_o, o_o, q_n, k_n, v_n, o_n, *heads, *kv_heads)
    return result


def _narrow(
    q_o: Tensor,
    k_o: Tensor,
    v_o: Tensor,
    o_o: Tensor,
    q_n: Tensor,
    k_n: Tensor,
    v_n: Tensor,
    o_n: Tensor,
    heads: tuple[int, int],
    kv_heads: tuple[int, int],
) -> Tensor:
    """The definition itself, for a width below a head's size.

    There the sums over the block cancel: at width 1 a norm is (q·k)², which they get from terms of size |q|²|k|².
    """

    def interactions(q: Tensor, k: Tensor, v: Tensor, o: Tensor, H: int, G: int) -> Tensor:
        q, k, v, o = (w.double().reshape(n, -1, w.shape[1]) for w, n in ((q, H), (k, G), (v, G), (o.T, H)))
        k, v = (w.repeat_interleave(H // G, 0) for w in (k, v))
        return torch.cat([(q.mT @ k).flatten(1), (v.mT @ o).flatten(1)], 1)

    old = interactions(q_o, k_o, v_o, o_o, heads[0], kv_heads[0])
    new = interactions(q_n, k_n, v_n, o_n, heads[1], kv_heads[1])
    scale = torch.outer(torch.linalg.vector_norm(old, dim=1), torch.linalg.vector_norm(new, dim=1))
    similarity = torch.where(scale > 0, old @ new.T / torch.where(scale > 0, scale, 1), 0)
    return similarity.to(wide(q_o, k_o, v_o, o_o, q_n, k_n, v_n, o_n))


def _twin(
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
    heads, kv_heads = (H_o, H_n), (G_o, G_n)
    dtype = wide(q_o, k_o, v_o, o_o, q_n, k_n, v_n, o_n)
    q_o, k_o, v_o, o_o, q_n, k_n, v_n, o_n = (w.to(dtype) for w in (q_o, k_o, v_o, o_o, q_n, k_n, v_n, o_n))
    inner = _paired_blocks(q_o, q_n, k_o, k_n, heads, kv_heads)
    inner += _paired_blocks(o_o.T, o_n.T, v_o, v_n, heads, kv_heads)
    old = _squared_norms(q_o, k_o, heads[0], kv_heads[0]) + _squared_norms(o_o.T, v_o, heads[0], kv_heads[0])
    new = _squared_norms(q_n, k_n, heads[1], kv_heads[1]) + _squared_norms(o_n.T, v_n, heads[1], kv_heads[1])
    scale = torch.outer(old.clamp_min(0).sqrt(), new.clamp_min(0).sqrt())
    return torch.where(scale > 0, inner / torch.where(scale > 0, scale, 1), 0)


_head_similarity_op = define(
    "head_similarity(Tensor q_o, Tensor k_o, Tensor v_o, Tensor o_o, Tensor q_n, Tensor k_n, Tensor v_n, Tensor o_n,"
    " int H_o, int H_n, int G_o, int G_n) -> Tensor",
    twin=_twin,
    fake=lambda *a: a[0].new_empty(a[8], a[9], dtype=wide(*a[:8])),
    kernel=("heads_kernels", "head_similarity"),
)


def _check(q: Tensor, k: Tensor, v: Tensor, o: Tensor, heads: int, kv_heads: int, side: str) -> None:
    if any(w.ndim != 2 or not w.is_floating_point() for w in (q, k, v, o)):
        raise ValueError(
            f"{side}: weights must be floating matrices; got {[(w.dtype, tuple(w.shape)) for w in (q, k, v, o)]}"
        )
    shapes = f"{side}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, o {tuple(o.shape)}"
    if min(heads, kv_heads) < 1 or heads % kv_heads:
        raise ValueError(f"{side}: {heads} query heads cannot share {kv_heads} key/value heads")
    if q.shape[0] % heads or k.shape[0] % kv_heads or q.shape[0] // heads != k.shape[0] // kv_heads:
        raise ValueError(f"query and key head sizes do not fit {heads} and {kv_heads} heads; {shapes}")
    if o.shape[1] % heads or v.shape[0] % kv_heads or o.shape[1] // heads != v.shape[0] // kv_heads:
        raise ValueError(f"value and output head sizes do not fit {heads} and {kv_heads} heads; {shapes}")
    if len({q.shape[1], k.shape[1], v.shape[1], o.shape[0]}) != 1:
        raise ValueError(f"the four weights must have one width; {shapes}")


def _paired_blocks(
    per_head_o: Tensor,
    per_head_n: Tensor,
    per_group_o: Tensor,
    per_group_n: Tensor,
    heads: tuple[int, int],
    kv_heads: tuple[int, int],
) -> Tensor:
    """(H_o, H_n): for every pair of heads the sum of (q_a q_b^T) ∘ (k_a k_b^T).

    A few old key/value groups at a time, so that no full (H_o·h_o, H_n·h_n) product is held.
    """
    (H_o, H_n), (G_o, G_n) = heads, kv_heads
    h_o, h_n = per_head_o.shape[0] // H_o, per_head_n.shape[0] // H_n
    share_o, share_n = H_o // G_o, H_n // G_n
    step = max(1, _CHUNK_ELEMENTS // max(1, share_o * h_o * per_head_n.shape[0]))
    out = per_head_o.new_empty(H_o, H_n)
    for g in range(0, G_o, step):
        groups = min(step, G_o - g)
        q = per_head_o[g * share_o * h_o : (g + groups) * share_o * h_o] @ per_head_n.T
        k = per_group_o[g * h_o : (g + groups) * h_o] @ per_group_n.T
        q = q.view(groups, share_o, h_o, G_n, share_n, h_n)
        k = k.view(groups, 1, h_o, G_n, 1, h_n)
        out[g * share_o : (g + groups) * share_o] = (q * k).sum((2, 5)).view(groups * share_o, H_n)
    return out


def _squared_norms(per_head: Tensor, per_group: Tensor, heads: int, kv_heads: int) -> Tensor:
    """(H,): sum of (q_a q_a^T) ∘ (k_a k_a^T), from the (h, h) Gram matrices."""
    size, width = per_head.shape[0] // heads, per_head.shape[1]
    q, k = per_head.reshape(heads, size, width), per_group.reshape(kv_heads, size, width)
    q, k = q @ q.transpose(1, 2), k @ k.transpose(1, 2)
    return (q.view(kv_heads, heads // kv_heads, *q.shape[1:]) * k[:, None]).sum((2, 3)).flatten()
