"""Nearest MLP neurons by the cosine of their concatenated (gate, up, down) weight vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 8_000_000


class NeuronCandidates(NamedTuple):
    """For each row neuron its best column neurons: int64 index and cosine, both (f_rows, k), best first."""

    indices: Tensor
    similarity: Tensor


def neuron_candidates(
    gate_r: Tensor | None,
    up_r: Tensor,
    down_r: Tensor,
    gate_c: Tensor | None,
    up_c: Tensor,
    down_c: Tensor,
    *,
    k: int,
) -> NeuronCandidates:
    """The k most similar column neurons of every row neuron, all weights (f, d) at one width.

    A gated neuron `act(gate·x) (up·x) down` computes the same when up and down both change sign, so the similarity is
    `(gate·gate' + |up·up' + down·down'|) / norms`. Without a gate the sign matters and no modulus is taken.

    Memory: a few million products at a time, never all f_rows × f_cols. Neurons of zero weights have similarity 0.
    """
    if (gate_r is None) != (gate_c is None):
        raise ValueError("both sides need gate weights, or neither")
    widths = {w.shape[1] for w in (gate_r, up_r, down_r, gate_c, up_c, down_c) if w is not None}
    if len(widths) != 1:
        raise ValueError(f"all neuron weights must have one width; got {sorted(widths)}")
    f_r, f_c, k = up_r.shape[0], up_c.shape[0], min(k, up_c.shape[0])
    norm_r, norm_c = _norms(gate_r, up_r, down_r), _norms(gate_c, up_c, down_c)
    index = torch.empty(f_r, k, dtype=torch.int64, device=up_r.device)
    similarity = torch.empty(f_r, k, dtype=up_r.dtype, device=up_r.device)
    step = max(1, _CHUNK_ELEMENTS // f_c)
    for start in range(0, f_r, step):
        rows = slice(start, start + step)
        product = up_r[rows] @ up_c.T
        product.addmm_(down_r[rows], down_c.T)
        if gate_r is not None and gate_c is not None:
            product.abs_().addmm_(gate_r[rows], gate_c.T)
        product.div_(norm_r[rows, None]).div_(norm_c)
        similarity[rows], index[rows] = product.topk(k, dim=1)
    return NeuronCandidates(index, similarity)


def _norms(*parts: Tensor | None) -> Tensor:
    """Norm of the concatenation per row; infinite for zero rows, so that their cosines come out 0."""
    squared = sum(torch.linalg.vecdot(w, w) for w in parts if w is not None)
    assert isinstance(squared, Tensor)
    return torch.where(squared > 0, squared.sqrt(), torch.inf)
