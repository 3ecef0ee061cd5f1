"""The two projections of an update from an old layer onto its new partner.

Both are exact in rank: an update of rank r stays one, nothing is truncated. `Paper` is Eq. (3) of LoRASuite (arXiv
2505.13515) and its appendix A.3. `LeastSquares` asks instead that the adapter read the same features and write the same
effect in the new model, and is exact wherever a linear map between the two models exists.

Notation: x_n ≈ x_o W_h, x_o ≈ x_n S (row vectors); weights are (out, in); `B` (out, r), `A` (r, in).

`LeastSquares` takes norms as they are. In front of a projection the gains (and the centring of LayerNorm) are folded
into what reads through them. Behind one, as in Gemma 2 and 3, a norm makes the output's size free, so that the new
weight itself says what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lorasuite_kernels import apply_head_blocks, head_blocks, head_similarity

from ..adapters.factors import Factors
from ..errors import LoraSuiteError
from ..models.checkpoint import Checkpoint
from ..models.families import ATTENTION, MLP, Family, Shape
from ..models.layouts import READING
from ..models.loader import Layer
from .embeddings import pinv_times
from .mapping import match_heads, match_neurons
from .similarity import whiten

_STORED = ("gain_old", "gain_new", "shift_old", "shift_new", "after_old", "after_new", "scale")
_MOST_CORRECTION = 10


@dataclass(frozen=True)
class Pair:
    """What building one layer pair needs: both layers, the transfer matrices in the compute dtype, the options."""

    old: Layer
    new: Layer
    W_h: Tensor
    S: Tensor
    rms_ratio: float
    factor: float
    heads: str = "hungarian"
    texts: list[str] = field(default_factory=list)
    """Calibration examples, for methods that read text."""

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        return self.old.checkpoint.shape, self.new.checkpoint.shape

    def weights(self, side: Layer, roles: tuple[str, ...]) -> list[Tensor]:
        return [side.weight(role, self.W_h.dtype) for role in roles]

    def gained(self, side: Layer, roles: tuple[str, ...]) -> list[Tensor]:
        """Weights that read the residual stream, with the gain of the norm before them folded in.

        Of a LayerNorm, which centres what it reads, also with the centring.
        """
        # One at a time, so that no two raw weights are there at once.
        dtype, family = self.W_h.dtype, side.checkpoint.family
        folded = ((role, side.weight(role, dtype) * self.gain(side, role, dtype)) for role in roles)
        centred = {role: family.layer_norm and family.reads_through_norms(role) for role in roles}
        return [without_mean(w) if centred[role] else w for role, w in folded]

    def gain(self, side: Layer, role: str, dtype: torch.dtype) -> Tensor:
        """(d,) gain of the norm a projection reads through.

        A stream that is read as it is has the gain of its own size, here in units of the old stream's.
        """
        if side.checkpoint.family.reads_through_norms(role):
            return side.gain(role, dtype)
        size = self.rms_ratio if side is self.new else 1.0
        return torch.full((side.checkpoint.shape.d,), size, dtype=dtype, device=side.device)

    def read_in(self, weight: Tensor) -> Tensor:
        """An old map of the normalised residual stream as a map of the new one: W S^T rms_n / rms_o.

        Norms fix the root mean square over the width, and the ratio of the streams' is measured on the embeddings; it
        is sqrt(d_o / d_n) where the map between the models keeps lengths.
        """
        return weight @ (self.S.T * self.rms_ratio)

    def written(self, role: str) -> Tensor:
        """(d_n, in): an old weight that writes to the residual stream, carried to the new one; a norm behind it is
        undone on the new side and applied on the old, up to a factor."""
        weight = self.weights(self.old, (role,))[0]
        before, after = (side.gain_after(role, weight.dtype) for side in (self.old, self.new))
        return carry_writes(weight, self.W_h, before, after)


def carry_writes(weight: Tensor, W_h: Tensor, gain_old: Tensor | None, gain_new: Tensor | None) -> Tensor:
    """diag(g_n)^{-1} W_h^T diag(g_o) W, (d_n, k), for W (d_o, k); a gain that is None is 1."""
    carried = W_h.T @ (weight if gain_old is None else gain_old[:, None] * weight)
    return carried if gain_new is None else carried * inverse(gain_new)[:, None]


def inverse(gain: Tensor) -> Tensor:
    """1 / gain, and 0 where the gain is 0."""
    return torch.where(gain != 0, 1 / gain, 0)


def without_mean(w: Tensor) -> Tensor:
    """Rows without their mean: what a map of centred vectors amounts to."""
    return w - w.mean(-1, keepdim=True)


@dataclass(frozen=True)
class PlannedLayer:
    """One layer pair of a plan: the tensors its method stored, and what applying them needs."""

    old_layer: int
    new_layer: int
    tensors: Mapping[str, Tensor]
    W_h: Tensor
    S: Tensor
    rms_ratio: float
    factor: float
    old_shape: Shape
    new_shape: Shape
    checkpoints: Callable[[], tuple[Checkpoint, Checkpoint]]
    """Opens both models, for the one projection that needs their weights (Eq. (3) on the MLP)."""


class Method(Protocol):
    """A way to carry updates. A plan stores what `build` returns for each layer pair; `project` reads it back."""

    name: str
    needs_text: bool

    def build(self, pair: Pair, roles: tuple[str, ...]) -> dict[str, Tensor]: ...

    def project(self, layer: PlannedLayer, role: str, update: Factors) -> Factors: ...


def _attention_tensors(similarity: Tensor, match: Tensor, blocks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"heads.similarity": similarity, "heads.match": match} | {f"{r}.blocks": c for r, c in blocks.items()}


def _project_rows(layer: PlannedLayer, role: str, x: Tensor, *, mean_of_matched: bool) -> Tensor:
    """Carries the head-space factor of one projection: B of q, k, v, or A^T of o.

    Grouped attention averages the new group's query heads: over all of them, unmatched ones counting as zero (the
    published rule, with the group size of the new model), or over the matched ones alone.
    """
    return carry_heads(layer.tensors, role, x, layer.old_shape, layer.new_shape, mean_of_matched=mean_of_matched)


def carry_heads(
    tensors: Mapping[str, Tensor], role: str, x: Tensor, old: Shape, new: Shape, *, mean_of_matched: bool = True
) -> Tensor:
    """What `_project_rows` says, for tensors and shapes instead of a layer."""
    match = tensors["heads.match"]
    grouped = role in ("k", "v")
    weight = (match >= 0).float()
    if grouped:
        groups = weight.view(new.G, -1)
        size = groups.sum(1, keepdim=True).clamp_min(1) if mean_of_matched else groups.shape[1]
        weight = (groups / size).flatten()
    return apply_head_blocks(
        tensors[f"{role}.blocks"],
        x,
        match,
        weight,
        blocks=(old.G, new.G) if grouped else (old.H, new.H),
        old_share=old.H // old.G if grouped else 1,
    )


def _unscaled(W_h: Tensor, factor: float) -> Tensor:
    """W_h of the embeddings as they are stored; without a copy where neither model scales them."""
    return W_h if factor == 1 else W_h / factor


def read_alike(families: tuple[Family, Family], roles: Iterable[str]) -> bool:
    """Whether some roles read the stream alike in both families: through norms, or as it is.

    Heads are compared by all their roles, so that q, k and v count where any of the attention's roles is asked for.
    """
    wanted = set(roles)
    compared = {role for part in (ATTENTION, MLP) if wanted & set(part) for role in part} & set(READING)
    old, new = families
    both = [role for role in compared if role in old.projections and role in new.projections]
    return all(old.reads_through_norms(role) == new.reads_through_norms(role) for role in both)


def check_reading(families: tuple[Family, Family], roles: Iterable[str]) -> None:
    """Raises LoraSuiteError where one family reads through norms and the other the stream as it is."""
    if not read_alike(families, roles):
        names = [family.model_type for family in families]
        raise LoraSuiteError(
            f"{names[0]} and {names[1]}: one reads its residual stream through norms, the other as it is, and no "
            "linear map leads from one to the other; use method distill"
        )


class Paper:
    """Eq. (3): `C = W_o[a] W_h W_n[b]^T`, ΔW_n[b] = C^T ΔW_o[a] W_h; for o, ΔW_n[:, b] = W_h^T ΔW_o[:, a] C.

    W_h is that of the embeddings as they are stored, as published. Updates hold it twice, so that one of the residual
    streams would be far too large where only one model scales its embeddings, by sqrt(d) in Gemma.
    """

    name = "paper"
    needs_text = False

    def build(self, pair: Pair, roles: tuple[str, ...]) -> dict[str, Tensor]:
        if not set(roles) & set(ATTENTION):
            return {}
        old, new = pair.shapes
        W_h = _unscaled(pair.W_h, pair.factor)
        q, k, v, o = pair.weights(pair.old, ATTENTION)
        q, k, v, o_t = q @ W_h, k @ W_h, v @ W_h, o.T @ W_h
        q_n, k_n, v_n, o_n = pair.weights(pair.new, ATTENTION)
        similarity = head_similarity(q, k, v, o_t.T, q_n, k_n, v_n, o_n, heads=(old.H, new.H), kv_heads=(old.G, new.G))
        match = match_heads(similarity, pair.heads)
        heads, groups, share = (old.H, new.H), (old.G, new.G), old.H // old.G
        blocks = {
            "q": head_blocks(q, q_n, match, blocks=heads),
            "k": head_blocks(k, k_n, match, blocks=groups, old_share=share),
            "v": head_blocks(v, v_n, match, blocks=groups, old_share=share),
            "o": head_blocks(o_t, o_n.T.contiguous(), match, blocks=heads),
        }
        return _attention_tensors(similarity, match, {r: c for r, c in blocks.items() if r in roles})

    def project(self, layer: PlannedLayer, role: str, update: Factors) -> Factors:
        b, a = update
        W_h = _unscaled(layer.W_h, layer.factor)
        if role == "o":
            return Factors(W_h.T @ b, _project_rows(layer, role, a.T, mean_of_matched=False).T)
        if role in ATTENTION:
            return Factors(_project_rows(layer, role, b, mean_of_matched=False), a @ W_h)
        old, new = layer.checkpoints()
        weight_o = Layer.of(old, layer.old_layer, (role,)).weight(role, b.dtype)
        weight_n = Layer.of(new, layer.new_layer, (role,)).weight(role, b.dtype)
        if role == "down":
            return Factors(pinv_times(W_h, b), pinv_times(weight_o.T, a.T).T @ W_h @ weight_n)
        return Factors(weight_n @ pinv_times(W_h, pinv_times(weight_o, b)), a @ W_h)


class LeastSquares:
    """Data-free least squares: A reads the same features, B writes through the map between matched heads or neurons.

    Read-in maps have the norm gains folded in and the ratio of the streams' sizes (`Pair.read_in`). With M = W_o[a]
    carried to the new width: R = W_n[b] M^T (M M^T)^{-1} carries B of q, k, v; R' = M_V N^T (N N^T)^{-1} with
    N = W_nV[b] carries A of o. MLP neurons are matched one to one: the nonlinearity lets only permutations through.
    """

    name = "lstsq"
    needs_text = False

    def build(self, pair: Pair, roles: tuple[str, ...]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        check_reading((pair.old.checkpoint.family, pair.new.checkpoint.family), roles)
        if set(roles) & set(ATTENTION):
            tensors |= self._attention(pair, roles)
        if set(roles) & set(MLP):
            tensors |= self._neurons(pair)
        for role in roles:
            for side, layer in (("old", pair.old), ("new", pair.new)):
                if role in READING:
                    tensors[f"{role}.gain_{side}"] = pair.gain(layer, role, torch.float32)
                found = {"shift": layer.shift(role, torch.float32), "after": layer.gain_after(role, torch.float32)}
                tensors |= {f"{role}.{name}_{side}": t.clone() for name, t in found.items() if t is not None}
        return tensors

    def _attention(self, pair: Pair, roles: tuple[str, ...]) -> dict[str, Tensor]:
        old, new = pair.shapes
        q, k, v = (pair.read_in(w) for w in pair.gained(pair.old, ("q", "k", "v")))
        o_t = pair.written("o").T
        q_n, k_n, v_n = pair.gained(pair.new, ("q", "k", "v"))
        (o_n,) = pair.weights(pair.new, ("o",))
        similarity = head_similarity(q, k, v, o_t.T, q_n, k_n, v_n, o_n, heads=(old.H, new.H), kv_heads=(old.G, new.G))
        match = match_heads(similarity, pair.heads)
        heads, groups, share = (old.H, new.H), (old.G, new.G), old.H // old.G
        blocks: dict[str, Tensor] = {}
        if "q" in roles:
            blocks["q"] = head_blocks(whiten(q, old.H), q_n, match, blocks=heads)
        if "k" in roles:
            blocks["k"] = head_blocks(whiten(k, old.G), k_n, match, blocks=groups, old_share=share)
        if "v" in roles:
            blocks["v"] = head_blocks(whiten(v, old.G), v_n, match, blocks=groups, old_share=share)
        if "o" in roles:
            blocks["o"] = head_blocks(v, whiten(v_n, new.G), match, blocks=groups, old_share=share)
        tensors = _attention_tensors(similarity, match, blocks)
        if "o" in roles and any(side.checkpoint.family.projections["o"].after for side in (pair.old, pair.new)):
            carried = carry_heads(tensors, "o", o_t, old, new)
            tensors["o.scale"] = _fitted_scale(carried.float(), o_n.T.float()).view(1)
        return tensors

    def _neurons(self, pair: Pair) -> dict[str, Tensor]:
        gated = [side.checkpoint.family.gated for side in (pair.old, pair.new)]
        if gated[0] != gated[1]:
            names = [side.checkpoint.family.model_type for side in (pair.old, pair.new)]
            raise LoraSuiteError(
                f"the MLP's neurons are gated in {names[1 - gated[0]]} and not in {names[1 - gated[1]]}: they cannot "
                "be matched one to one; pass `roles=q,k,v,o`, or `method=distill`"
            )
        reading = ("gate", "up") if gated[0] else ("up",)
        old = (*(pair.read_in(w) for w in pair.gained(pair.old, reading)), pair.written("down").T)
        new = (*pair.gained(pair.new, reading), pair.weights(pair.new, ("down",))[0].T.contiguous())
        match = match_neurons(_three(old), _three(new))
        scales, similarity = _neuron_fit(old, new, match)
        return {"neurons.match": match, "neurons.similarity": similarity, "neurons.scales": scales}

    def project(self, layer: PlannedLayer, role: str, update: Factors) -> Factors:
        b, a = update
        stored = {name: layer.tensors[f"{role}.{name}"].to(a) for name in _STORED if f"{role}.{name}" in layer.tensors}
        if role in ("o", "down"):
            b_n = carry_writes(b, layer.W_h, stored.get("after_old"), stored.get("after_new"))
            if role == "down":
                return Factors(b_n, self._by_neuron(layer, role, a.T).T)
            return Factors(b_n * stored.get("scale", 1), _project_rows(layer, role, a.T, mean_of_matched=True).T)
        read = a * stored["gain_old"]
        if "shift_old" in stored:
            read = without_mean(read)
        reciprocal = inverse(stored["gain_new"])
        a_n = read @ layer.S.T * layer.rms_ratio * reciprocal
        if "shift_new" in stored:
            constant = a @ stored["shift_old"] if "shift_old" in stored else 0
            a_n = _with_constant(a_n, constant, stored["shift_new"], reciprocal)
        if role in ATTENTION:
            return Factors(_project_rows(layer, role, b, mean_of_matched=True), a_n)
        return Factors(self._by_neuron(layer, role, b), a_n)

    @staticmethod
    def _by_neuron(layer: PlannedLayer, role: str, x: Tensor) -> Tensor:
        match = layer.tensors["neurons.match"]
        scales = layer.tensors["neurons.scales"]
        scale = scales[MLP.index(role) - len(MLP) + len(scales)].to(x)
        return x[match.clamp_min(0)] * (scale * (match >= 0))[:, None]


class Copy:
    """Takes every update as it is, for models whose layers have the same shapes (`copying.check_copy`)."""

    name = "copy"
    needs_text = False

    def build(self, pair: Pair, roles: tuple[str, ...]) -> dict[str, Tensor]:
        return {}

    def project(self, layer: PlannedLayer, role: str, update: Factors) -> Factors:
        return update


class Distill:
    """Carries nothing layer by layer: what an adapter does is fitted anew from text (`distillation.distill`)."""

    name = "distill"
    needs_text = True

    def build(self, pair: Pair, roles: tuple[str, ...]) -> dict[str, Tensor]:
        return {}

    def project(self, layer: PlannedLayer, role: str, update: Factors) -> Factors:
        raise NotImplementedError("distill fits a whole adapter at once")


METHODS: dict[str, Method] = {method.name: method for method in (Copy(), LeastSquares(), Paper(), Distill())}


def _three(weights: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor, Tensor]:
    """(gate or None, up, down)."""
    return (None, weights[0], weights[1]) if len(weights) == 2 else (weights[0], weights[1], weights[2])


def _fitted_scale(carried: Tensor, found: Tensor) -> Tensor:
    """The factor on `carried` that comes closest to `found`; over rows that were carried at all."""
    product, square = (carried * found).sum(), carried.square().sum()
    return torch.where(square > 0, product / square, 1)


def _with_constant(a: Tensor, constant: Tensor | float, shift: Tensor, reciprocal: Tensor) -> Tensor:
    """A that gives `constant` (r,) on the new norm's shift, and on its centred part what it gave.

    What a LayerNorm hands on is `g z + b` with z centred, so that A may change by any multiple of 1 / g. Where that
    takes more than ten times the row itself (a shift orthogonal to 1 / g, or none), the constant is lost: a LoRA of
    this model cannot express it.
    """
    sum_ = (shift * reciprocal).sum()
    size = torch.where(sum_ != 0, (constant - a @ shift) / sum_, torch.inf)
    allowed = size.abs() * reciprocal.norm() <= _MOST_CORRECTION * a.norm(dim=1)
    return a + torch.where(allowed, size, 0)[:, None] * reciprocal


def _neuron_fit(old: tuple[Tensor, ...], new: tuple[Tensor, ...], match: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale of each matched neuron's vectors (of gate if gated, up, down), and the pair's cosine, (f_n,).

    The sign comes with the scale: up and down of a gated neuron may both be negated.
    """
    has = (match >= 0).to(match.device)
    partner = match.clamp_min(0).to(old[0].device)
    scales, inner, squares = [], [], []
    for w_o, w_n in zip(old, new, strict=True):
        w_o = w_o[partner]
        product, square = torch.linalg.vecdot(w_o, w_n), torch.linalg.vecdot(w_o, w_o)
        scales.append(torch.where(square > 0, product / square, 0) * has.to(product))
        inner.append(product)
        squares.append((square, torch.linalg.vecdot(w_n, w_n)))
    total = inner[-2] + inner[-1]
    if len(inner) == 3:
        total = inner[0] + total.abs()
    norms = (sum(s for s, _ in squares) * sum(s for _, s in squares)).sqrt()
    similarity = torch.where(norms > 0, total / norms, 0) * has.to(total)
    return torch.stack(scales), similarity


@dataclass(frozen=True)
class LayerResult:
    """One new layer that has a partner, or that distillation has fitted; the partner is None where it has none.

    Attributes:
        cka: of the partner's hidden states with this layer's, or whatever measure the plan's option `similarity` names.
        head_similarity, neuron_similarity: mean cosine over the matched heads and neurons, None where the adapter does
            not touch them.
        explained: share of distillation's target reached behind this layer on held-out text, None with other methods.
        update: role -> Frobenius norm of s·B A over that of the new weight.
    """

    new_layer: int
    old_layer: int | None
    cka: float | None
    head_similarity: float | None
    neuron_similarity: float | None
    update: dict[str, float]
    explained: float | None = None
