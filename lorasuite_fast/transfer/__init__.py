"""build plan plan_check transfer similarity mapping projection magnitude memory copying kinship head_fit"""

from typing import Any

from .._moved import moved_name


def __getattr__(name: str) -> Any:
    """Finds the names of the module of 0.1 that was called as this room is."""
    return moved_name(__name__, "embeddings", name)
