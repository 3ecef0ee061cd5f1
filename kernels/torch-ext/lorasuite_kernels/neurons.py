"""Nearest MLP neurons by the cosine of their concatenated (gate, up, down) weight vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import define, wide

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

    Args:
        gate_r, up_r, down_r: (f_rows, d), gate_c, up_c, down_c: (f_cols, d), any floating dtype; gates None on both
            sides for an ungated MLP. k: candidates per row neuron, at most f_cols are returned.

    Returns:
        NeuronCandidates, similarity in float32 (float64 for float64).

    Raises:
        ValueError: on gates on one side only, or weights that do not share a width or their number of neurons.

    Memory: a few million products at a time, never all f_rows × f_cols. Neurons of zero weights have similarity 0.
    """
    if (gate_r is None) != (gate_c is None):
        raise ValueError("both sides need gate weights, or neither")
    if k < 0 or any(w is not None and w.ndim != 2 for w in (gate_r, up_r, down_r, gate_c, up_c, down_c)):
        raise ValueError(f"weights must be (neurons, width) and k at least 0; got k = {k}, up {tuple(up_r.shape)}")
    widths = {w.shape[1] for w in (gate_r, up_r, down_r, gate_c, up_c, down_c) if w is not None}
    if len(widths) != 1:
        raise ValueError(f"all neuron weights must have one width; got {sorted(widths)}")
    for side, up, others in (("row", up_r, (gate_r, down_r)), ("column", up_c, (gate_c, down_c))):
        if any(w is not None and w.shape[0] != up.shape[0] for w in others):
            raise ValueError(f"the {side} neurons' weights must agree in their number")
    return NeuronCandidates(*_neuron_candidates_op(gate_r, up_r, down_r, gate_c, up_c, down_c, min(k, up_c.shape[0])))


def _twin(
    gate_r: Tensor | None,
    up_r: Tensor,
    down_r: Tensor,
    gate_c: Tensor | None,
    up_c: Tensor,
    down_c: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    dtype = wide(up_r, down_r, up_c, down_c)
    up_r, down_r, up_c, down_c = (w.to(dtype) for w in (up_r, down_r, up_c, down_c))
    gate_r, gate_c = (w if w is None else w.to(dtype) for w in (gate_r, gate_c))
    f_r, f_c = up_r.shape[0], up_c.shape[0]
    norm_r, norm_c = _norms(gate_r, up_r, down_r), _norms(gate_c, up_c, down_c)
    index = torch.empty(f_r, k, dtype=torch.int64, device=up_r.device)
    similarity = torch.empty(f_r, k, dtype=up_r.dtype, device=up_r.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, f_c))
    for start in range(0, f_r, step):
        rows = slice(start, start + step)
        product = up_r[rows] @ up_c.T
        product.addmm_(down_r[rows], down_c.T)
        if gate_r is not None and gate_c is not None:
            product.abs_().addmm_(gate_r[rows], gate_c.T)
        product.div_(norm_r[rows, None]).div_(norm_c)
        similarity[rows], index[rows] = product.topk(k, dim=1)
    return index, similarity


def _fake(
    gate_r: Tensor | None, up_r: Tensor, down_r: Tensor, gate_c: Tensor | None, up_c: Tensor, down_c: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    index = up_r.new_empty(up_r.shape[0], k, dtype=torch.int64)
    return index, torch.empty_like(index, dtype=wide(up_r, down_r, up_c, down_c))


_neuron_candidates_op = define(
    "neuron_candidates(Tensor? gate_r, Tensor up_r, Tensor down_r, Tensor? gate_c, Tensor up_c, Tensor down_c, int k)"
    " -> (Tensor, Tensor)",
    twin=_twin,
    fake=_fake,
)


def _norms(*parts: Tensor | None) -> Tensor:
    """Norm of the concatenation per row; infinite for zero rows, so that their cosines come out 0."""
    squared = sum(torch.linalg.vecdot(w, w) for w in parts if w is not None)
    assert isinstance(squared, Tensor)
    return torch.where(squared > 0, squared.sqrt(), torch.inf)
