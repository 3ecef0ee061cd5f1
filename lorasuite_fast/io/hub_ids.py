"""Names of models as they may be shown: a hub id, or the last part of a path."""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


_CACHED = re.compile(r"models--(?P<id>[\w.-]+?--[\w.-]+)/snapshots/")


def hub_id(name: str) -> str | None:
    """The hub id of a model named by id or by its folder in the hub's cache; None for any other folder."""
    if cached := _CACHED.search(name):
        return cached["id"].replace("--", "/", 1)
    return name if HUB_ID.fullmatch(name) and not name.startswith(".") and not Path(name).exists() else None


def shown(name: str | os.PathLike[str]) -> str:
    """A model, adapter or file as a card may name it: a hub id, else the last part of its path."""
    text = os.fspath(name)
    return hub_id(text) or Path(text).name or text
