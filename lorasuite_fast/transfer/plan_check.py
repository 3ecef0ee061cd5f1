"""What a plan file must hold: everything a build would have put there, and nothing else.

A plan is not signed: a file changed so that it still agrees with itself is taken as it is.
"""

from __future__ import annotations

import math
import re
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..models.families import ATTENTION, MLP, ROLES, Family, Shape
from ..models.family_table import family_named, known_family
from ..models.layouts import READING
from .kinship import is_kinship
from .projection import METHODS
from .similarity import MEASURES

_MOST_LAYERS, _MOST_WIDTH = 10_000, 1 << 31
_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")
_OPTIONAL = ("similarity", "layer_r2", "head_r2", "method_reason", "kinship", "device", "dtype")
"""What plans of earlier releases do not say, or they alone."""
_CHOICES: dict[str, tuple[str, ...]] = {
    "layers": ("cka", "first", "medium", "last"),
    "similarity": tuple(MEASURES),
    "heads": ("hungarian", "identity"),
    "transfer": ("embedding", "identity"),
    "method": tuple(METHODS),
    "device": ("cpu", "cuda"),
    "dtype": ("float32", "bfloat16", "float64"),
}


def layer_index(text: str) -> int:
    """A layer's number as a plan spells it. Raises ValueError for another spelling."""
    if _LAYER.fullmatch(text) is None:
        raise ValueError(text)
    return int(text)


class _Model(Protocol):
    """What of a plan's record of a model is checked."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def shape(self) -> Shape: ...


class Checked(Protocol):
    """The fields of a plan that are checked."""

    @property
    def old(self) -> _Model: ...
    @property
    def new(self) -> _Model: ...
    @property
    def options(self) -> dict[str, Any]: ...
    @property
    def layers(self) -> dict[int, int]: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> Any: ...


def check_plan(plan: Checked, held: dict[str, tuple[str, tuple[int, ...]]], where: str) -> None:
    """The invariants every method of a plan relies on, told from its header alone but for the matches.

    Args:
        held: dtype, as safetensors names it, and shape of every tensor in the file. where: the plan, for messages.

    Raises:
        LoraSuiteError: naming what is wrong.
    """

    def refuse(what: str) -> None:
        raise LoraSuiteError(f"{where}: {what}; build it again")

    for role, model in (("old", plan.old), ("new", plan.new)):
        if not all(_is_text(text) for text in (model.name, model.fingerprint, model.family)):
            refuse(f"its {role} model's name, fingerprint or family is no text")
        if known_family(model.family) is None:
            refuse(f"names a family, {model.family}, not known here")
        if not _is_shape(model.shape):
            refuse(f"gives the {role} model sizes that no model has, {model.shape}")
    _check_options(plan.options, refuse)
    _check_facts(plan.facts, refuse)
    L_o, L_n = plan.old.shape.L, plan.new.shape.L
    if not all(_is_int(i) and 0 <= i < L_o and j < L_n for j, i in plan.layers.items()):
        refuse("maps layers the models do not have")
    if len(set(plan.layers.values())) < len(plan.layers):
        refuse("maps two new layers to one old layer")
    families = family_named(plan.old.family), family_named(plan.new.family)
    roles = plan.options["roles"]
    if not all(role in family.projections for role in roles for family in families):
        refuse(f"plans for roles ({', '.join(roles)}) that its models do not have")
    expected = _expected(plan, families)
    for name in sorted({*expected, *held}):
        if name not in held:
            refuse(f"tensor {name} is missing")
        if name not in expected:
            refuse(f"tensor {name} does not belong in it")
        if held[name] != expected[name]:
            (dtype, shape), (kind, size) = held[name], expected[name]
            refuse(f"tensor {name} is {dtype} {list(shape)}, not {kind} {list(size)}")
    for name in expected:
        if name.endswith(".match"):
            most = plan.old.shape.H if name.endswith("heads.match") else plan.old.shape.f
            _check_match(plan.tensors[name], most, name, refuse)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or (_is_int(value) and abs(value) < _MOST_WIDTH)


def _is_shape(shape: Shape) -> bool:
    sizes = vars(shape).values()
    if not all(_is_int(size) and 0 < size < _MOST_WIDTH for size in sizes):
        return False
    return shape.L <= _MOST_LAYERS and shape.H % shape.G == 0


def _check_options(options: dict[str, Any], refuse: Any) -> None:
    for name, known in _CHOICES.items():
        if options.get(name) not in known and not (name in _OPTIONAL and name not in options):
            refuse(f"was built with the unknown {name} {options.get(name)!r}")
    roles = options.get("roles")
    all_known = isinstance(roles, list) and all(role in ROLES for role in roles)
    if not roles or not all_known or len(set(roles)) < len(roles):
        refuse(f"was built for the unknown roles {roles!r}")
    candidates = options.get("candidates", ["distill"])
    if not isinstance(candidates, list) or candidates != [name for name in METHODS if name in candidates]:
        refuse(f"was built with the unknown candidates {candidates!r}")
    if "candidates" in options and not (options["method"] == "distill" == candidates[-1]):
        refuse(f"its candidates {candidates!r} are not those of its method {options['method']}")
    wrong = [name for name in ("seed", "examples", "max_tokens") if not _is_int(options.get(name))]
    wrong += [] if _is_finite(options.get("ridge")) else ["ridge"]
    wrong += [] if _is_text(options.get("calibration")) else ["calibration"]
    if wrong:
        refuse(f"its option {wrong[0]} is {options.get(wrong[0])!r}")


def _check_facts(facts: dict[str, Any], refuse: Any) -> None:
    kinds = {
        "same_vocabulary": lambda value: isinstance(value, bool),
        **dict.fromkeys(("shared_tokens", "untrained_tokens", "rank"), lambda value: _is_int(value) and value >= 0),
        **dict.fromkeys(("rms_ratio", "embedding_factor"), lambda value: _is_finite(value) and value > 0),
        **dict.fromkeys(("r2", "r2_back", "head_r2"), lambda value: value is None or _is_finite(value)),
        "layer_r2": lambda value: (
            isinstance(value, dict) and all(_LAYER.fullmatch(j) and _is_finite(r2) for j, r2 in value.items())
        ),
        "method_reason": _is_text,
        "kinship": is_kinship,
    }
    for name, right in kinds.items():
        if name not in facts and name in _OPTIONAL:
            continue
        if name not in facts or not right(facts[name]):
            refuse(f"its fact {name} is {facts.get(name)!r}")


def _expected(plan: Checked, families: tuple[Family, Family]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a plan, as `build` stores them."""
    old, new = plan.old.shape, plan.new.shape
    shapes: dict[str, tuple[int, ...]] = {"W_h": (old.d, new.d), "S": (new.d, old.d), "cka": (old.L, new.L)}
    layer: dict[str, tuple[int, ...]] = {}
    roles = plan.options["roles"]
    lstsq = plan.options["method"] == "lstsq"
    if plan.options["method"] in ("lstsq", "paper") and set(roles) & set(ATTENTION):
        layer |= {"heads.similarity": (old.H, new.H), "heads.match": (new.H,)}
        layer |= {f"{role}.blocks": (new.H, old.h, new.h) for role in roles if role in ATTENTION}
    if lstsq and set(roles) & set(MLP):
        vectors = 3 if families[0].gated else 2
        layer |= {"neurons.match": (new.f,), "neurons.similarity": (new.f,), "neurons.scales": (vectors, new.f)}
    for role in roles:
        layer[f"{role}.norm"] = (1,)
        if not lstsq:
            continue
        sides = list(zip(("old", "new"), families, (old.d, new.d), strict=True))
        for side, family, d in sides:
            if role in READING:
                layer[f"{role}.gain_{side}"] = (d,)
            if family.projections[role].norm is not None and family.layer_norm:
                layer[f"{role}.shift_{side}"] = (d,)
            if family.projections[role].after is not None or (family.multipliers and role not in READING):
                layer[f"{role}.after_{side}"] = (d,)
        if role == "o" and any(family.projections["o"].after is not None for family in families):
            layer["o.scale"] = (1,)
    shapes |= {f"layers.{j}.{name}": shape for j in plan.layers for name, shape in layer.items()}
    return {name: ("I64" if name.endswith(".match") else "F32", shape) for name, shape in shapes.items()}


def _check_match(match: Tensor, most: int, name: str, refuse: Any) -> None:
    """Each old head or neuron at most once; -1 for none."""
    partners = match[match != -1]
    if partners.numel() and not 0 <= int(partners.min()) <= int(partners.max()) < most:
        refuse(f"tensor {name} points beyond the old model's {most}")
    if len(torch.unique(partners)) < len(partners):
        refuse(f"tensor {name} gives one partner twice")
