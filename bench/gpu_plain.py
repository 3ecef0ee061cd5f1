"""Fair PyTorch forms of the kernels' operations, and the published ones; any dtype, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 8192


def full_grams(x: Tensor) -> Tensor:
    """Centred Gram matrices with zero diagonal, (L, m, m), in the dtype of x."""
    centred = x - x.mean(1, keepdim=True)
    k = centred @ centred.mT
    k.diagonal(dim1=1, dim2=2).zero_()
    return k


def _sums(k: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums (L, m) and their sums (L,), in at least float32."""
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    rows = k.sum(2, dtype=wide)
    return rows, rows.sum(1)


def _estimate(trace: Tensor, totals: Tensor, rows: Tensor, m: int) -> Tensor:
    return (trace + totals / ((m - 1) * (m - 2)) - 2 / (m - 2) * rows) / (m * (m - 3))


def hsic_of(k: Tensor, l: Tensor) -> Tensor:
    """HSIC1 of all pairs of layers from their full matrices."""
    (rows_k, totals_k), (rows_l, totals_l) = _sums(k), _sums(l)
    trace = (k.flatten(1) @ l.flatten(1).T).to(rows_k.dtype)
    return _estimate(trace, torch.outer(totals_k, totals_l), rows_k @ rows_l.T, k.shape[1])


def _own(k: Tensor) -> Tensor:
    """HSIC1 of each layer with itself."""
    rows, totals = _sums(k)
    squares = torch.linalg.vector_norm(k.flatten(1), dim=1, dtype=rows.dtype).square()
    return _estimate(squares, totals.square(), rows.square().sum(1), k.shape[1])


def cka(x: Tensor, y: Tensor) -> Tensor:
    """CKA of all pairs of layers, from two stacks of matrices."""
    k, l = full_grams(x), full_grams(y)
    return hsic_of(k, l) / torch.outer(_own(k).clamp_min(0).sqrt(), _own(l).clamp_min(0).sqrt())


def _blocks(q_o: Tensor, q_n: Tensor, k_o: Tensor, k_n: Tensor, H: tuple[int, int], G: tuple[int, int]) -> Tensor:
    """(H_o, H_n): sums of (q_a q_b^T) ∘ (k_a k_b^T); key/value heads are not repeated."""
    h_o, h_n = q_o.shape[0] // H[0], q_n.shape[0] // H[1]
    q = (q_o @ q_n.T).view(G[0], H[0] // G[0], h_o, G[1], H[1] // G[1], h_n)
    k = (k_o @ k_n.T).view(G[0], 1, h_o, G[1], 1, h_n)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (q * k).sum((2, 5), dtype=wide).view(H)


def _squares(q: Tensor, k: Tensor, heads: int, groups: int) -> Tensor:
    """(H,): sums of (q_a q_a^T) ∘ (k_a k_a^T)."""
    q, k = q.reshape(heads, -1, q.shape[1]), k.reshape(groups, -1, k.shape[1])
    q, k = (q @ q.mT).view(groups, heads // groups, q.shape[1], q.shape[1]), (k @ k.mT)[:, None]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (q * k).sum((2, 3), dtype=wide).flatten()


def heads(old: list[Tensor], new: list[Tensor], H: tuple[int, int], G: tuple[int, int]) -> Tensor:
    """Cosine similarity of all pairs of heads: four full products and small batched ones for the norms."""
    (q_o, k_o, v_o, o_o), (q_n, k_n, v_n, o_n) = old, new
    inner = _blocks(q_o, q_n, k_o, k_n, H, G) + _blocks(o_o.T, o_n.T, v_o, v_n, H, G)
    norms = [
        (_squares(q, k, h, g) + _squares(o.T, v, h, g)).clamp_min(0).sqrt()
        for (q, k, v, o), h, g in zip((old, new), H, G, strict=True)
    ]
    return inner / torch.outer(*norms)


def published_pair(old: list[Tensor], new: list[Tensor], size: int, W_h: Tensor) -> Tensor:
    """One pair of heads through d × d interaction matrices, the old ones carried by W_h."""
    a = slice(0, size)
    qk, vo = old[0][a].T @ old[1][a], old[2][a].T @ old[3][:, a].T
    carried = torch.cat([(W_h.T @ w @ W_h).flatten() for w in (qk, vo)])
    qk, vo = new[0][a].T @ new[1][a], new[2][a].T @ new[3][:, a].T
    return torch.nn.functional.cosine_similarity(carried, torch.cat([qk.flatten(), vo.flatten()]), dim=0)


def projection(left: Tensor, right: Tensor, x: Tensor, match: Tensor, weight: Tensor, G: tuple[int, int]) -> Tensor:
    """Blocks of matched heads written out, then applied."""
    share_o, share_n = match.shape[0] // G[0], match.shape[0] // G[1]
    old = match // max(share_o, 1)
    c = left.view(G[0], -1, left.shape[1])[old] @ right.view(G[1], -1, right.shape[1]).repeat_interleave(share_n, 0).mT
    y = c.mT @ x.view(G[0], -1, x.shape[1])[old] * weight[:, None, None].to(x)
    return y.view(G[1], share_n, -1, x.shape[1]).sum(1).flatten(0, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b with sums of at least float32."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return a.T @ b


def shared_gram(e_o: Tensor, e_n: Tensor, idx_o: Tensor, idx_n: Tensor) -> list[Tensor]:
    """Gathered rows, full products a chunk at a time, float64 sums of the chunks."""
    sums: list[Tensor] = []
    for part_o, part_n in zip(idx_o.split(_CHUNK), idx_n.split(_CHUNK), strict=True):
        x, y = e_o[part_o], e_n[part_n]
        found = [_product(a, b).double() for a, b in ((x, x), (x, y), (y, y))]
        sums = found if not sums else [total.add_(one) for total, one in zip(sums, found, strict=True)]
    return sums
