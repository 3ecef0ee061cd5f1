"""Literal float64 versions of the kernels' operations: loops and dense matrices, independent of the product.

Shapes and notation are METHOD.md's. Every function takes tensors of any dtype and returns float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def centred_gram(x: Tensor) -> Tensor:
    """(m, m) for one layer (m, d): inner products of the centred examples, zero on the diagonal."""
    x = x.double()
    x = x - x.mean(0)
    k = torch.stack([x @ row for row in x])
    for i in range(k.shape[0]):
        k[i, i] = 0
    return k


def hsic1(k: Tensor, l: Tensor) -> float:
    """The unbiased estimator of Song et al. (2012), equation 5, from two (m, m) matrices with zero diagonal."""
    m = k.shape[0]
    one = torch.ones(m, dtype=torch.float64)
    trace = float(torch.trace(k @ l))
    totals = float(one @ k @ one) * float(one @ l @ one) / ((m - 1) * (m - 2))
    return (trace + totals - 2 / (m - 2) * float(one @ k @ l @ one)) / (m * (m - 3))


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """(L_x, L_y) of all pairs of layers of x (L_x, m, d_x) and y (L_y, m, d_y)."""
    grams_x, grams_y = [centred_gram(layer) for layer in x], [centred_gram(layer) for layer in y]
    return torch.tensor([[hsic1(k, l) for l in grams_y] for k in grams_x], dtype=torch.float64)


def cka(batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(L_x, L_y): HSIC terms averaged over the minibatches, then the ratio; 0 where a layer has no spread."""
    cross = sum(hsic(x, y) for x, y in batches)
    own_x = sum(torch.stack([hsic(layer[None], layer[None])[0, 0] for layer in x]) for x, _ in batches)
    own_y = sum(torch.stack([hsic(layer[None], layer[None])[0, 0] for layer in y]) for _, y in batches)
    assert isinstance(cross, Tensor)
    out = torch.zeros_like(cross)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            if own_x[i] > 0 and own_y[j] > 0:
                out[i, j] = cross[i, j] / math.sqrt(own_x[i] * own_y[j])
    return out


def head_similarity(
    old: Sequence[Tensor], new: Sequence[Tensor], heads: tuple[int, int], kv_heads: tuple[int, int]
) -> Tensor:
    """(H_o, H_n): cosine of the concatenated d × d matrices [Q^T K; V^T O^T]; old and new are (q, k, v, o)."""

    def interactions(weights: Sequence[Tensor], count: int, groups: int) -> list[Tensor]:
        q, k, v, o = (w.double() for w in weights)
        size, out = q.shape[0] // count, []
        for head in range(count):
            own = slice(head * size, (head + 1) * size)
            group = head // (count // groups)
            shared = slice(group * size, (group + 1) * size)
            out.append(torch.cat([(q[own].T @ k[shared]).flatten(), (v[shared].T @ o[:, own].T).flatten()]))
        return out

    rows, columns = interactions(old, heads[0], kv_heads[0]), interactions(new, heads[1], kv_heads[1])
    similarity = torch.zeros(heads[0], heads[1], dtype=torch.float64)
    for a, left in enumerate(rows):
        for b, right in enumerate(columns):
            norms = float(left.norm() * right.norm())
            similarity[a, b] = float(left @ right) / norms if norms > 0 else 0.0
    return similarity


def project_heads(
    left: Tensor, right: Tensor, x: Tensor, match: Tensor, weight: Tensor, blocks: tuple[int, int], old_share: int
) -> Tensor:
    """(blocks[1]·h_n, r): for every new query head with a partner, weight · (left[a] right[g]^T)^T x[a], by group."""
    left, right, x, weight = left.double(), right.double(), x.double(), weight.double()
    h_o, h_n = left.shape[0] // blocks[0], right.shape[0] // blocks[1]
    share = match.shape[0] // blocks[1]
    out = torch.zeros(right.shape[0], x.shape[1], dtype=torch.float64)
    for b, a in enumerate(match.tolist()):
        if a < 0:
            continue
        old = slice(a // old_share * h_o, (a // old_share + 1) * h_o)
        new = slice(b // share * h_n, (b // share + 1) * h_n)
        out[new] += weight[b] * (left[old] @ right[new].T).T @ x[old]
    return out


def shared_gram(e_o: Tensor, e_n: Tensor, idx_o: Tensor, idx_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E_o^T E_o, E_o^T E_n and E_n^T E_n over the pairs of rows, one outer product at a time."""
    e_o, e_n = e_o.double(), e_n.double()
    d_o, d_n = e_o.shape[1], e_n.shape[1]
    oo, on, nn = (torch.zeros(a, b, dtype=torch.float64) for a, b in ((d_o, d_o), (d_o, d_n), (d_n, d_n)))
    for i, j in zip(idx_o.tolist(), idx_n.tolist(), strict=True):
        oo += torch.outer(e_o[i], e_o[i])
        on += torch.outer(e_o[i], e_n[j])
        nn += torch.outer(e_n[j], e_n[j])
    return oo, on, nn


def neuron_similarity(rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]) -> Tensor:
    """(f_rows, f_columns): cosine of (gate, up, down), up and down free to change sign together if there is a gate."""
    (gate_r, up_r, down_r), (gate_c, up_c, down_c) = rows, columns
    assert up_r is not None
    assert up_c is not None
    out = torch.zeros(up_r.shape[0], up_c.shape[0], dtype=torch.float64)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            left = [w[i].double() for w in (gate_r, up_r, down_r) if w is not None]
            right = [w[j].double() for w in (gate_c, up_c, down_c) if w is not None]
            products = [float(a @ b) for a, b in zip(left, right, strict=True)]
            total = products[0] + abs(products[1] + products[2]) if len(products) == 3 else sum(products)
            norms = math.sqrt(sum(float(a @ a) for a in left) * sum(float(b @ b) for b in right))
            out[i, j] = total / norms if norms > 0 else 0.0
    return out


def balance(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B A, its r leading singular values and its best approximation, from the dense SVD of one product."""
    product = b.double() @ a.double()
    u, sigma, v = torch.linalg.svd(product, full_matrices=False)
    r = b.shape[-1]
    return product, sigma[:r], (u[:, :r] * sigma[:r]) @ v[:r]


def target_kl(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    log_p: Tensor,
    log_rest: Tensor,
    bias: Tensor | None = None,
    shared: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """(n,), differentiable: the divergence of each row from the definition, token by token, over a list of outcomes."""
    logits = x.double() @ weight.double().T
    logits = (logits + (0 if bias is None else bias.double())) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    tokens = list(range(len(weight))) if shared is None else shared.nonzero().flatten().tolist()
    found = []
    for row in range(len(x)):
        q = torch.softmax(logits[row][tokens], 0)
        named = [tokens.index(int(j)) for j in index[row]]
        others = [j for j in range(len(tokens)) if j not in named]
        total = x.new_zeros((), dtype=torch.float64)
        for j, log_probability in zip(named, log_p[row].double(), strict=True):
            if log_probability > -math.inf:
                total = total + log_probability.exp() * (log_probability - q[j].log())
        if log_rest[row] > -math.inf:
            tail = log_rest[row].double()
            total = total + tail.exp() * (tail - q[others].sum().log())
        found.append(total)
    return torch.stack(found)
