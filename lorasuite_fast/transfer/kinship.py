"""How two models are related, told from their weights: the same, trained on, deeper or shallower, or strangers.

Weights are compared one module at a time, each read once; nothing is run. Where the depths differ, every layer of the
shallower model is compared with the layer of the deeper one whose weights resemble it most, layers taken in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import Checkpoint
from ..models.families import ATTENTION, MLP, ROLES, Family, Shape
from ..models.loader import Layer
from .mapping import map_layers

NEAR = 0.01
"""Relative distance of the weights, of the most distant kind of module, up to which an adapter is copied unmeasured."""
RELATED = 0.1
"""Cosine of the projections from which on one model's weights count as those of the other, trained on."""
EXACT_R2 = 0.999
"""From here on, on held-out tokens, one model counts as the other one rewritten."""
LIKE_R2 = 0.5
"""From here on two models of different widths count as relatives."""
SAME, TRAINED, DEPTH, REWRITTEN, RESIZED, STRANGERS = (
    "same weights",
    "trained on",
    "deeper or shallower",
    "rewritten",
    "grown or pruned",
    "strangers",
)
KINDS = (SAME, TRAINED, DEPTH, REWRITTEN, RESIZED, STRANGERS)
_FURTHER = ("other", "embedding", "head", "ends")
_ROWS = 2048
_SAMPLE = 64
_UNRELATED_CONFIG = (
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "architectures",
    "tie_word_embeddings",
    "vocab_size",
    "num_hidden_layers",
    "n_layer",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
)
"""What may differ between two configs whose layers compute alike; token ids besides."""

_ROPE = ("rope_theta", "partial_rotary_factor")

_WHAT = {
    SAME: "The same weights",
    TRAINED: "One model trained on from the other",
    DEPTH: "The same layers, more or fewer of them",
    REWRITTEN: "The same function rewritten",
    RESIZED: "Related, in another shape",
    STRANGERS: "Strangers",
}
_EXPECT = {
    SAME: "the adapter can be used as it is, and migrate gives it back",
    TRAINED: "copying carries most of the adapter's effect after a short training and less after a long one; least "
    "squares come close; a distillation usually carries less",
    DEPTH: "copying and least squares carry part of the adapter's effect; a distillation usually carries less",
    REWRITTEN: "least squares carry the adapter whole",
    RESIZED: "least squares or a distillation carry part of the adapter's effect; copying does not apply",
    STRANGERS: "only a distillation can be expected to carry a part of the adapter's effect",
}


@dataclass(frozen=True)
class WeightDistance:
    """How far one model's weights are from another's.

    Attributes:
        distances: kind of module -> |W_n - W_o| / |W_o|, Frobenius norms over all compared layers. "other" is all else
            a layer holds (norms, biases); "embedding", "head" and "ends" (what is outside the layers besides) are there
            where both models have them in one shape.
        cosine: of all projections of both models, taken as one vector.
        layers: new layer -> old layer that were compared.
        same_config: whether nothing in the configs but vocabulary, depth and names differs.
    """

    distances: dict[str, float]
    cosine: float
    layers: dict[int, int]
    same_config: bool

    @property
    def near(self) -> bool:
        """Whether the two models are so alike that a copied adapter needs no measurement."""
        return self.same_config and max(self.distances.values()) <= NEAR

    @property
    def overall(self) -> float:
        """The distance of the most distant kind of projection."""
        return max(distance for kind, distance in self.distances.items() if kind in ROLES)


@dataclass(frozen=True)
class Kinship:
    """What kind of relatives two models are.

    Attributes:
        kind: one of KINDS. weights: None where the layers' shapes differ. fits: R² of linear maps between them.
    """

    kind: str
    weights: WeightDistance | None
    fits: tuple[float, ...] = ()

    @property
    def sentence(self) -> str:
        """The kind, what it was told from, and what to expect."""
        far = None if self.weights is None else self.weights.overall
        return describe(self.kind, far, self.fits)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for plans and results."""
        if self.weights is None:
            return {"kind": self.kind}
        found = asdict(self.weights)
        del found["layers"]
        return {"kind": self.kind, **found}


def describe(kind: str, distance: float | None, fits: Iterable[float]) -> str:
    """One sentence on a kind of relatives.

    Args:
        distance: of the most distant kind of projection; None where the layers' shapes differ. fits: see `Kinship`.
    """
    r2 = list(fits)
    fit = f"; linear maps between them fit with R² of at least {min(r2):.4f}" if r2 else ""
    shape = "layers of different shapes" if distance is None else f"projections up to {distance:.1%} apart"
    return f"{_WHAT[kind]} ({shape}{fit}): {_EXPECT[kind]}"


def layer_differences(families: tuple[Family, Family], shapes: tuple[Shape, Shape], roles: Iterable[str]) -> list[str]:
    """In what the layers of two models differ, as far as some roles' weights are concerned; empty where in nothing."""
    (old, new), (o, n) = families, shapes
    wanted = tuple(roles)
    found = [f"width {o.d} and {n.d}"] if o.d != n.d else []
    if set(wanted) & set(ATTENTION):
        if (o.H, o.h) != (n.H, n.h):
            found.append(f"heads {o.H} of {o.h} and {n.H} of {n.h}")
        if o.G != n.G:
            found.append(f"key/value heads {o.G} and {n.G}")
    if set(wanted) & set(MLP):
        if o.f != n.f:
            found.append(f"MLP width {o.f} and {n.f}")
        if old.gated != new.gated:
            found.append(f"MLP {'gated' if old.gated else 'not gated'} and {'gated' if new.gated else 'not gated'}")
    lacking = [role for role in wanted if role in old.projections and role not in new.projections]
    return found + ([f"no {', '.join(lacking)} in {new.model_type}"] if lacking else [])


def comparable(old: Checkpoint, new: Checkpoint) -> bool:
    """Whether the layers of two models are of one family and have the same shapes."""
    families, shapes = (old.family, new.family), (old.shape, new.shape)
    return old.family.text_type == new.family.text_type and not layer_differences(families, shapes, ROLES)


def weight_distance(old: Checkpoint, new: Checkpoint) -> WeightDistance:
    """Compares the weights of two models, which must be `comparable`."""
    layers = _partners(old, new)
    sums: dict[str, Tensor] = {}
    for j, i in layers.items():
        _add_layer(sums, old, new, i, j)
    for kind, name_o, name_n in _outside(old, new):
        _add(sums, kind, old.tensors.view(name_o), new.tensors.view(name_n))
        old.tensors.release([name_o])
        new.tensors.release([name_n])
    projections = torch.stack([sums[role] for role in ROLES if role in sums]).sum(0)
    size = (projections[1] * projections[2]).sqrt()
    return WeightDistance(
        {kind: _ratio(found) for kind, found in sums.items()},
        float(projections[3] / size) if size > 0 else 0.0,
        layers,
        same_computation(old, new),
    )


def same_computation(old: Checkpoint, new: Checkpoint) -> bool:
    """Whether nothing in two configs but vocabulary, depth and names differs."""
    return _config(old.config) == _config(new.config)


def _ratio(sums: Tensor) -> float:
    """|Δ| / |W_o| of sums of squares; 1 where only the old weights are zero."""
    change, size = float(sums[0]), float(sums[1])
    return (change / size) ** 0.5 if size > 0 else float(change > 0)


def _config(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config says how a layer computes, absent keys and nulls alike."""
    return {
        key: value
        for key, value in _one_rope(config).items()
        if value is not None and key not in _UNRELATED_CONFIG and not key.endswith("_token_id")
    }


def _one_rope(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the rotation in one spelling: `rope_theta` and `rope_scaling` as parts of `rope_parameters`.

    Parameters given for each type of layer stay as they are.
    """
    parts = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, dict) for part in parts) or any(isinstance(v, dict) for v in parts[1].values()):
        return config
    alone = {key: config[key] for key in _ROPE if config.get(key) is not None}
    rope = {"type" if key == "rope_type" else key: value for part in (alone, *parts) for key, value in part.items()}
    if rope.get("type") == "default":
        del rope["type"]
    rest = {key: value for key, value in config.items() if key not in (*_ROPE, "rope_scaling", "rope_parameters")}
    return rest | {"rope_parameters": rope}


def _add_layer(sums: dict[str, Tensor], old: Checkpoint, new: Checkpoint, i: int, j: int) -> None:
    family = old.family
    weights = {f"{module}.weight" for module in family.modules()}
    sides = Layer.of(old, i), Layer.of(new, j)
    for role in family.roles:
        _add(sums, role, *(side.weight(role, torch.float32) for side in sides))
    inside = [side.inside for side in sides]
    for name in sorted(set(inside[0]) & set(inside[1]) - weights):
        if family.is_expert(name):
            continue
        _add(sums, "other", inside[0][name], inside[1][name])
    for side in sides:
        side.release()


def _outside(old: Checkpoint, new: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Kind and names of the tensors outside the layers that both models have in one shape."""
    heads = old.head(), new.head()
    pairs = [("embedding", old.embedding_name, new.embedding_name)]
    if heads[0] is not None and heads[1] is not None:
        pairs.append(("head", heads[0], heads[1]))
    for norm in filter(None, (old.family.final_norm, old.family.embedding_norm)):
        pairs += [
            ("ends", f"{old.prefix}{norm}.{kind}", f"{new.prefix}{norm}.{kind}") for kind in old.family.stored_norm
        ]
    for kind, name_o, name_n in pairs:
        if old.tensors.entry(name_o).shape == new.tensors.entry(name_n).shape:
            yield kind, name_o, name_n


def _add(sums: dict[str, Tensor], kind: str, old: Tensor, new: Tensor) -> None:
    """Adds |Δ|², |W_o|², |W_n|² and <W_o, W_n>, float64, a block of rows at a time."""
    total = sums.setdefault(kind, torch.zeros(4, dtype=torch.float64))
    for o, n in zip(old.split(_ROWS), new.split(_ROWS), strict=True):
        a, b = o.double(), n.double()
        parts = (b - a).square().sum(), a.square().sum(), b.square().sum(), (a * b).sum()
        total += torch.stack(parts)


def _partners(old: Checkpoint, new: Checkpoint) -> dict[int, int]:
    """New layer -> old layer: in order where the depths agree, else those whose weights are most alike."""
    L_o, L_n = old.shape.L, new.shape.L
    if L_o == L_n:
        return {i: i for i in range(L_o)}
    samples = [torch.stack([_sample(model, i) for i in range(model.shape.L)]) for model in (old, new)]
    return dict(sorted(map_layers((samples[0] @ samples[1].T).clamp_min(0)).items()))


def _sample(model: Checkpoint, layer: int) -> Tensor:
    """Some rows of a layer's output projections as one vector of length 1, float64."""
    roles = tuple(role for role in ("o", "down") if role in model.family.projections)
    read = Layer.of(model, layer, roles)
    rows = [read.weight(role, torch.float32)[:_SAMPLE].double().flatten() for role in roles]
    vector = torch.cat(rows)
    read.release()
    unit: Tensor = vector / vector.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return unit


def is_kinship(value: Any) -> bool:
    """Whether a plan's fact is what `Kinship.as_dict` gives."""
    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        return False
    if set(value) == {"kind"}:
        return True
    distances = value.get("distances")
    return (
        set(value) == {"kind", "distances", "cosine", "same_config"}
        and isinstance(value["same_config"], bool)
        and _is_number(value["cosine"])
        and isinstance(distances, dict)
        and bool(distances)
        and set(distances) <= {*ROLES, *_FURTHER}
        and all(_is_number(distance) and distance >= 0 for distance in distances.values())
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def kinship(
    weights: WeightDistance | None, r2: Iterable[float | None] = (), *, same_depth: bool = True, same: bool = False
) -> Kinship:
    """Names the kind of relatives.

    Args:
        weights: as `weight_distance` gives it. r2: fits of linear maps between the two models, as far as there are
            any. same_depth: whether both have as many layers. same: whether their weights are known to be equal.
    """
    fits = tuple(value for value in r2 if value is not None)
    if same:
        return Kinship(SAME, weights, fits)
    if weights is not None and weights.cosine >= RELATED:
        return Kinship(TRAINED if same_depth else DEPTH, weights, fits)
    least = min(fits, default=0.0)
    return Kinship(REWRITTEN if least >= EXACT_R2 else RESIZED if least >= LIKE_R2 else STRANGERS, weights, fits)


def plan_kinship(facts: dict[str, Any]) -> str | None:
    """The sentence on the kind of relatives from a plan's facts; None for a plan of an earlier release."""
    found = facts.get("kinship")
    if found is None:
        return None
    roles = [distance for kind, distance in found.get("distances", {}).items() if kind in ROLES]
    fits = [facts[name] for name in ("r2", "r2_back") if facts[name] is not None]
    return describe(found["kind"], max(roles, default=None), fits)
