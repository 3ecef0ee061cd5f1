"""The published LoRASuite algorithm, dense and literal in float64: slow, obvious, independent of the product.

Notation and section numbers are METHOD.md's: `o` old, `n` new, Linear weights (out, in), `x_n = x_o W_h`. Every
function takes and returns float64 tensors unless it says otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Number = TypeVar("Number", float, Fraction)
Matrix = Sequence[Sequence[Number]]


@dataclass(frozen=True)
class Attention:
    """Weights of one layer: q (H h, d), k and v (G h, d), o (d, H h)."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    heads: int
    kv_heads: int

    @property
    def group(self) -> int:
        """Query heads per kv head, H / G."""
        return self.heads // self.kv_heads

    @property
    def head_dim(self) -> int:
        """Head size h."""
        return self.q.shape[0] // self.heads

    def rows(self, module: str, head: int) -> Tensor:
        """Block (h, d) of q, k or v that query head `head` uses; a kv block serves its whole group."""
        block = head if module == "q" else head // self.group
        h = self.head_dim
        return getattr(self, module)[block * h : (block + 1) * h]

    def columns(self, head: int) -> Tensor:
        """Block (d, h) of o that query head `head` writes through."""
        h = self.head_dim
        return self.o[:, head * h : (head + 1) * h]


@dataclass(frozen=True)
class Mlp:
    """Weights of one layer: gate and up (f, d), down (d, f)."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Lora:
    """Factors of one module's update `s B A`: B (out, r), A (r, in)."""

    B: Tensor
    A: Tensor
    s: float = 1.0

    @property
    def delta(self) -> Tensor:
        """The dense update (out, in)."""
        return self.s * self.B @ self.A


@dataclass(frozen=True)
class Projected:
    """A projected update: dense `delta` (out, in) and factors with `delta = s B A` for the old adapter's s."""

    delta: Tensor
    B: Tensor
    A: Tensor


def transfer_matrix(e_o: Tensor, e_n: Tensor) -> Tensor:
    """Section 2: `pinv(E_o) E_n` (d_o, d_n) from the rows of the shared tokens, (shared, d_o) and (shared, d_n).

    With the arguments exchanged this is S (d_n, d_o).
    """
    return torch.linalg.pinv(e_o.double()) @ e_n.double()


def hsic1(K: Matrix[Number], L: Matrix[Number]) -> Number:
    """Section 3: unbiased HSIC of two (m, m) Gram matrices, m >= 4, from its sums; exact for Fractions."""
    m, zero = len(K), K[0][0] * 0
    trace = sum((K[i][j] * L[j][i] for i in range(m) for j in range(m) if i != j), zero)
    sum_k = sum((K[i][j] for i in range(m) for j in range(m) if i != j), zero)
    sum_l = sum((L[i][j] for i in range(m) for j in range(m) if i != j), zero)
    cross = sum((K[i][j] * L[j][q] for i in range(m) for j in range(m) for q in range(m) if i != j and j != q), zero)
    return (trace + sum_k * sum_l / ((m - 1) * (m - 2)) - 2 * cross / (m - 2)) / (m * (m - 3))


def hsic1_u_statistic(K: Matrix[Number], L: Matrix[Number]) -> Number:
    """What `hsic1` abbreviates: mean of `k_ij (l_ij + l_qr - 2 l_iq)` over distinct i, j, q, r (Song et al. 2012)."""
    m, zero = len(K), K[0][0] * 0
    distinct = itertools.permutations(range(m), 4)
    total = sum((K[i][j] * (L[i][j] + L[q][r] - 2 * L[i][q]) for i, j, q, r in distinct), zero)
    return total / (m * (m - 1) * (m - 2) * (m - 3))


def gram(x: Tensor) -> list[list[float]]:
    """`X X^T` of x (m, d), centred over the examples in float64 first."""
    centred = x.double() - x.double().mean(0)
    return [[float((a * b).sum()) for b in centred] for a in centred]


def gram_exact(x: Tensor) -> list[list[Fraction]]:
    """`X X^T` of integer-valued x (m, d), exact and not centred. Raises ValueError for other values."""
    if not torch.equal(x, x.round()):
        raise ValueError("exact Gram matrices need integer values")
    rows = [[int(value) for value in row] for row in x.tolist()]
    return [[Fraction(sum(p * q for p, q in zip(a, b, strict=True))) for b in rows] for a in rows]


def cka_minibatch(batches_o: Sequence[Sequence[Tensor]], batches_n: Sequence[Sequence[Tensor]]) -> Tensor:
    """Section 3: CKA (L_o, L_n) of minibatches of layers, `batches_o[b][i]` (m, d_o) and `batches_n[b][j]` (m, d_n)."""
    return _cka(
        [[gram(x) for x in layers] for layers in batches_o], [[gram(y) for y in layers] for layers in batches_n]
    )


def cka_minibatch_exact(batches_o: Sequence[Sequence[Tensor]], batches_n: Sequence[Sequence[Tensor]]) -> Tensor:
    """`cka_minibatch` of integer-valued hidden states in rational arithmetic up to the final square root."""
    return _cka(
        [[gram_exact(x) for x in layers] for layers in batches_o],
        [[gram_exact(y) for y in layers] for layers in batches_n],
    )


def _cka(grams_o: Sequence[Sequence[Matrix[Number]]], grams_n: Sequence[Sequence[Matrix[Number]]]) -> Tensor:
    """CKA (L_o, L_n): each HSIC is averaged over the minibatches before the quotient is taken."""
    batches = len(grams_o)
    layers_o, layers_n = len(grams_o[0]), len(grams_n[0])
    cka = torch.empty(layers_o, layers_n, dtype=torch.float64)
    for i in range(layers_o):
        own_o = sum(hsic1(grams_o[b][i], grams_o[b][i]) for b in range(batches)) / batches
        for j in range(layers_n):
            own_n = sum(hsic1(grams_n[b][j], grams_n[b][j]) for b in range(batches)) / batches
            both = sum(hsic1(grams_o[b][i], grams_n[b][j]) for b in range(batches)) / batches
            cka[i, j] = float(both) / math.sqrt(own_o * own_n)
    return cka


def layer_mapping(cka: Tensor) -> dict[int, int]:
    """Section 4: old layer -> new layer with the largest sum of CKA (L_o, L_n), by trying every increasing map.

    Layer i of the shallower model may go to i … i + |L_o - L_n| of the deeper one. The first best map in
    lexicographic order wins. Where old is the deeper model, its unused layers are missing.
    """
    if cka.shape[0] > cka.shape[1]:
        return {old: new for new, old in layer_mapping(cka.T).items()}
    shallow, deep = cka.shape
    windows = [range(i, i + deep - shallow + 1) for i in range(shallow)]
    increasing = (p for p in itertools.product(*windows) if all(a < b for a, b in itertools.pairwise(p)))
    best = max(increasing, key=lambda places: sum(float(cka[i, j]) for i, j in enumerate(places)))
    return dict(enumerate(best))


def interaction(attention: Attention, head: int) -> tuple[Tensor, Tensor]:
    """Section 5: `W_QK = Q^T K` and `W_VO = V^T O^T` of one query head, (d, d) each."""
    w_qk = attention.rows("q", head).T @ attention.rows("k", head)
    w_vo = attention.rows("v", head).T @ attention.columns(head).T
    return w_qk, w_vo


def head_similarity(old: Attention, new: Attention, W_h: Tensor) -> Tensor:
    """Section 5: cosine (H_o, H_n) of [QK; VO], the old interaction matrices carried as `W_h^T (.) W_h`."""
    similarity = torch.empty(old.heads, new.heads, dtype=torch.float64)
    for a in range(old.heads):
        carried = torch.cat([W_h.T @ w @ W_h for w in interaction(old, a)])
        for b in range(new.heads):
            target = torch.cat(interaction(new, b))
            similarity[a, b] = (carried * target).sum() / (carried.norm() * target.norm())
    return similarity


def head_mapping(similarity: Tensor) -> dict[int, int | None]:
    """Section 5: new query head -> old query head, or None, of the assignment with the largest sum of (H_o, H_n)."""
    heads_o, heads_n = linear_sum_assignment(similarity.numpy(), maximize=True)
    matched = dict(zip(heads_n.tolist(), heads_o.tolist(), strict=True))
    return {b: matched.get(b) for b in range(similarity.shape[1])}


def truncated_svd(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors of a dense (out, in): `B = U sqrt(Σ)` (out, rank) and `A = sqrt(Σ) V^T` (rank, in)."""
    U, sigma, Vt = torch.linalg.svd(delta, full_matrices=False)
    root = sigma[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vt[:rank]


def project_attention(
    old: Attention,
    new: Attention,
    W_h: Tensor,
    mapping: Mapping[int, int | None],
    adapter: Mapping[str, Lora],
) -> dict[str, Projected]:
    """Section 6, Eq. (3), for the modules among "q", "k", "v", "o" that `adapter` has.

    `mapping` is new head -> old head. Unmatched new heads get a zero block. With grouped attention on the new side, k
    and v blocks are formed per query head and averaged over the group of the NEW model, unmatched ones as zero. The
    factors come from a full SVD of `delta / s`, kept to the adapter's rank, so that alpha carries over unchanged.
    """
    projected = {}
    for module, lora in adapter.items():
        if module == "o":
            delta = _project_o(old, new, W_h, mapping, lora.delta)
        else:
            delta = _project_qkv(module, old, new, W_h, mapping, lora.delta)
        projected[module] = Projected(delta, *truncated_svd(delta / lora.s, lora.A.shape[0]))
    return projected


def _project_qkv(
    module: str, old: Attention, new: Attention, W_h: Tensor, mapping: Mapping[int, int | None], delta_o: Tensor
) -> Tensor:
    """`C = W_o[a] W_h W_n[b]^T`, `ΔW_n[b, :] = C^T ΔW_o[a, :] W_h`; dense (out_n, d_n)."""
    h_o, h_n = old.head_dim, new.head_dim
    blocks = torch.zeros(new.heads, h_n, W_h.shape[1], dtype=torch.float64)
    for b, a in mapping.items():
        if a is None:
            continue
        block_o = a if module == "q" else a // old.group
        C = old.rows(module, a) @ W_h @ new.rows(module, b).T
        blocks[b] = C.T @ delta_o[block_o * h_o : (block_o + 1) * h_o] @ W_h
    if module == "q":
        return blocks.flatten(0, 1)
    groups = [blocks[g * new.group : (g + 1) * new.group] for g in range(new.kv_heads)]
    return torch.cat([group.mean(0) for group in groups])


def _project_o(
    old: Attention, new: Attention, W_h: Tensor, mapping: Mapping[int, int | None], delta_o: Tensor
) -> Tensor:
    """`C = O_o[:, a]^T W_h O_n[:, b]`, `ΔW_n[:, b] = W_h^T ΔW_o[:, a] C`; dense (d_n, H_n h_n)."""
    h_o, h_n = old.head_dim, new.head_dim
    delta_n = torch.zeros(W_h.shape[1], new.heads * h_n, dtype=torch.float64)
    for b, a in mapping.items():
        if a is None:
            continue
        C = old.columns(a).T @ W_h @ new.columns(b)
        delta_n[:, b * h_n : (b + 1) * h_n] = W_h.T @ delta_o[:, a * h_o : (a + 1) * h_o] @ C
    return delta_n


def project_mlp(old: Mlp, new: Mlp, W_h: Tensor, adapter: Mapping[str, Lora]) -> dict[str, Projected]:
    """Section 6, the paper's A.3, for the modules among "gate", "up", "down" that `adapter` has.

    gate and up: `B_n = U_n pinv(W_h) pinv(U_o) B_o`, `A_n = A_o W_h`. down: `B_n = pinv(W_h) B_o`,
    `A_n = A_o pinv(D_o) W_h D_n`.
    """
    pinv = torch.linalg.pinv
    projected = {}
    for module, lora in adapter.items():
        w_o, w_n = getattr(old, module), getattr(new, module)
        if module == "down":
            B = pinv(W_h) @ lora.B
            A = lora.A @ pinv(w_o) @ W_h @ w_n
        else:
            B = w_n @ pinv(W_h) @ pinv(w_o) @ lora.B
            A = lora.A @ W_h
        projected[module] = Projected(lora.s * B @ A, B, A)
    return projected
