"""An adapter copied as it is, between models whose layers have the same shapes."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import LoraSuiteError
from ..models.checkpoint import Checkpoint
from ..models.families import MLP, Family, Shape
from .kinship import layer_differences
from .projection import METHODS, read_alike


def check_copy(old: Checkpoint, new: Checkpoint, roles: Iterable[str]) -> None:
    """Raises LoraSuiteError where the layers differ in shape, naming the shapes that do."""
    differences = layer_differences((old.family, new.family), (old.shape, new.shape), roles)
    if differences:
        raise LoraSuiteError(
            f"method copy: the layers of old and new differ in {', '.join(differences)}, so that the adapter's tensors "
            "do not fit; use method auto, which measures what does"
        )


def applicable(families: tuple[Family, Family], shapes: tuple[Shape, Shape], roles: Iterable[str]) -> tuple[str, ...]:
    """The methods that could carry an adapter of some roles between two models, the simplest first."""
    wanted = tuple(roles)
    if any(role in families[0].projections and role not in families[1].projections for role in wanted):
        return ("distill",)
    same = not layer_differences(families, shapes, wanted)
    matched = families[0].gated == families[1].gated or not set(wanted) & set(MLP)
    matched = matched and read_alike(families, wanted)
    return tuple(name for name in METHODS if (name != "copy" or same) and (name != "lstsq" or matched))
