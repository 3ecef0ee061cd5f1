"""Which old layer, head and neuron each new one continues."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from lorasuite_kernels import neuron_candidates

from ..errors import LoraSuiteError
from ..io.number_range import check_range

TIE = 1e-4
"""CKA sums that differ by less are ties, which go to the earlier layer."""
_CANDIDATES = 16


def map_layers(cka: Tensor, how: str = "cka") -> dict[int, int]:
    """New layer -> old layer.

    The shallower model's layers go, in order, to distinct layers of the deeper one, layer i to one of i … i + Δ with
    Δ = |L_o - L_n| (LoRASuite, arXiv 2505.13515, algorithm 1).

    Args:
        cka: (L_o, L_n).
        how: `cka` maximises the sum of CKA; `first`, `medium` and `last` take offsets 0, Δ // 2 and Δ throughout.
    """
    check_range("the similarity of the models' layers", cka)
    L_o, L_n = cka.shape
    table = cka if L_o <= L_n else cka.T
    shallow, deep = table.shape
    offsets = {"first": 0, "medium": (deep - shallow) // 2, "last": deep - shallow}
    if how == "cka":
        chosen = _best_path(table.double().numpy())
    elif how in offsets:
        chosen = [i + offsets[how] for i in range(shallow)]
    else:
        raise LoraSuiteError(f"layer mapping {how!r} is not one of cka, first, medium, last")
    return {j: i for i, j in enumerate(chosen)} if L_o <= L_n else dict(enumerate(chosen))


def _best_path(table: np.ndarray) -> list[int]:
    """Increasing columns of greatest sum, row i within i … i + Δ; a running maximum makes it O(L·Δ)."""
    rows, columns = table.shape
    slack = columns - rows
    reach = np.zeros(slack + 1)
    choices = np.empty((rows, slack + 1), dtype=int)
    for i in range(rows):
        best = -np.inf
        for offset in range(slack + 1):
            total = reach[offset] + table[i, i + offset]
            if total > best + TIE:
                best, choice = total, offset
            reach[offset] = best
            choices[i, offset] = choice
    path, offset = [], slack
    for i in reversed(range(rows)):
        offset = int(choices[i, offset])
        path.append(i + offset)
    return path[::-1]


def match_heads(similarity: Tensor, how: str = "hungarian") -> Tensor:
    """(H_n,) int64: the old query head of each new one, -1 where there is none.

    Args:
        similarity: (H_o, H_n).
        how: `hungarian` maximises the summed similarity; `identity` matches equal indices.
    """
    check_range("the similarity of the models' heads", similarity)
    H_o, H_n = similarity.shape
    match = torch.full((H_n,), -1, dtype=torch.int64)
    if how == "identity":
        match[: min(H_o, H_n)] = torch.arange(min(H_o, H_n))
    elif how == "hungarian":
        rows, columns = linear_sum_assignment(similarity.double().cpu().numpy(), maximize=True)
        match[torch.from_numpy(columns)] = torch.from_numpy(rows)
    else:
        raise LoraSuiteError(f"head mapping {how!r} is not one of hungarian, identity")
    return match


def match_neurons(old: tuple[Tensor | None, Tensor, Tensor], new: tuple[Tensor | None, Tensor, Tensor]) -> Tensor:
    """(f_n,) int64: the old neuron of each new one, -1 where there is none.

    One-to-one on the best candidates of each neuron of the smaller side, maximising the summed cosine of the
    concatenated (gate, up, down) vectors; a neuron none of whose candidates is free stays without a partner.

    Args:
        old, new: (gate or None, up, down), each (f, d_n), the old ones carried to the new width.
    """
    swap = old[1].shape[0] > new[1].shape[0]
    rows, columns = (new, old) if swap else (old, new)
    found = neuron_candidates(*rows, *columns, k=_CANDIDATES)
    check_range("the similarity of the models' neurons", found.similarity)
    f_r, f_c, k = rows[1].shape[0], columns[1].shape[0], found.indices.shape[1]
    similarity = found.similarity.double().cpu().numpy().ravel()
    useful = similarity > 0
    r = np.repeat(np.arange(f_r), k)[useful]
    c = found.indices.cpu().numpy().ravel()[useful]
    # Every row may also stay alone, at the cost of similarity 0: a full matching then always exists.
    alone = np.arange(f_r)
    cost = coo_array(
        (np.concatenate([2 - similarity[useful], np.full(f_r, 2.0)]), (np.r_[r, alone], np.r_[c, f_c + alone])),
        shape=(f_r, f_c + f_r),
    )
    r, c = min_weight_full_bipartite_matching(cost.tocsr())
    r, c = r[c < f_c], c[c < f_c]
    match = torch.full((new[1].shape[0],), -1, dtype=torch.int64)
    into, source = (r, c) if swap else (c, r)
    match[torch.from_numpy(into.astype(np.int64))] = torch.from_numpy(source.astype(np.int64))
    return match
