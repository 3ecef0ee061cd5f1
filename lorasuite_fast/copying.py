"""An adapter copied as it is, between models whose layers have the same shapes."""

from __future__ import annotations

from collections.abc import Iterable

from .checkpoint import Checkpoint
from .errors import LoraSuiteError
from .kinship import layer_differences


def check_copy(old: Checkpoint, new: Checkpoint, roles: Iterable[str]) -> None:
    """Raises LoraSuiteError where the layers differ in shape, naming the shapes that do."""
    differences = layer_differences((old.family, new.family), (old.shape, new.shape), roles)
    if differences:
        raise LoraSuiteError(
            f"method copy: the layers of old and new differ in {', '.join(differences)}, so that the adapter's tensors "
            "do not fit; use method auto, which measures what does"
        )
