"""Whether an adapter was trained on the old model: by its base's name, and by the weights where both are at hand.

What an adapter names is opened only where the user named it too, as OLD or NEW, or where it is a hub id in the local
cache. Nothing is fetched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..io.notices import notice
from ..models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from .adapter import Adapter

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--[\w.-]+?--(?P<name>[\w.-]+)/snapshots/")
_VALUES = 256
"""Of each tensor that are compared."""
_DIFFERENT = 0.01
"""Share of values that may differ between copies of one model in two dtypes: those beyond the range of one of them."""


def check_base(adapter: Adapter, fingerprint: str, name: str, passed: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Refuses an adapter whose recorded base is a model at hand that is not the old model.

    Copies of one model count as the same whatever their config files say and whichever dtype they are stored in. A base
    that is not at hand cannot be compared: the shapes have to do, and one line says so, unless its name is OLD's.

    Args:
        fingerprint, name: of the old model. passed: further models the user named.

    Raises:
        LoraSuiteError: the adapter was trained on another model; both are named.
    """
    base = adapter.base
    if base is None or base == name or _real(base) == _real(name):
        return
    found = _opened(base, passed)
    if found is None:
        if not _names(base, name):
            notice(f"{adapter.where}: was trained on {base}, given {name}; the two could not be compared")
        return
    held = found.fingerprint()
    if held == fingerprint:
        return
    old = _at_hand(name)
    if old is not None and old.fingerprint() == fingerprint and same_weights(found, old):
        return
    raise LoraSuiteError(
        f"{adapter.where}: trained on {base} (fingerprint {held}), while the plan's old model is {name} "
        f"(fingerprint {fingerprint}); build a plan for that base"
    )


def _real(name: str) -> str:
    """A name as an absolute path without links; nothing is opened."""
    try:
        return os.path.realpath(os.path.expanduser(name))
    except (OSError, ValueError):
        return name


def _opened(base: str, passed: Iterable[str | os.PathLike[str]]) -> Checkpoint | None:
    """The base, where it may be opened and is a whole model that can be read."""
    named = any(base == os.fspath(model) or _real(base) == _real(os.fspath(model)) for model in passed)
    if not named and (os.path.lexists(_real(base)) or not _HUB_ID.fullmatch(base)):
        return None
    return _at_hand(base)


def _at_hand(name: str) -> Checkpoint | None:
    """A model in its own folder or the hub's cache; None where it is in neither, or is not one that is read here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            folder = Path(snapshot_download(name, local_files_only=True))
        return Checkpoint(folder, "base")
    except (LoraSuiteError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError, ValueError):
        # Of a base PEFT has often cached config.json alone; quantised ones hold no weights that can be compared.
        return None


def _names(base: str, name: str) -> bool:
    """Whether a base's name is plainly that of the model given: what its path ends in, but for spelling."""
    cached = _CACHED.search(name)
    given, wanted = _letters(cached["name"] if cached else name), _letters(base.rstrip("/").rpartition("/")[2])
    return bool(wanted) and given.endswith(wanted)


def _letters(text: str) -> str:
    return re.sub(r"[^0-9a-z]", "", text.lower())


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold one model, up to the dtype they are stored in, told from a sample of each tensor."""
    if one.family.model_type != other.family.model_type or one.shape != other.shape:
        return False
    names = [
        {key.removeprefix(model.prefix) if model.prefix else key: key for key in model.tensors.entries}
        for model in (one, other)
    ]
    # A head that is stored beside an equal embedding, or computed buffers, may be in one file alone.
    common = sorted(names[0].keys() & names[1].keys())
    if one.embedding_name.removeprefix(one.prefix) not in common or len(common) < len(one.family.modules()):
        return False
    different = total = 0
    for name in common:
        a, b = (_sample(model, keys[name]) for model, keys in ((one, names[0]), (other, names[1])))
        if a.shape != b.shape:
            return False
        coarse = min((a.dtype, b.dtype), key=lambda dtype: -torch.finfo(dtype).eps)
        different += int((a.to(coarse) != b.to(coarse)).sum())
        total += a.numel()
    return different <= (0 if _dtypes(one) == _dtypes(other) else _DIFFERENT * total)


def _dtypes(model: Checkpoint) -> set[str]:
    return {entry.dtype for entry in model.tensors.entries.values()}


def _sample(model: Checkpoint, name: str) -> Tensor:
    values = model.tensors.view(name).flatten()
    start = max(0, (len(values) - _VALUES) // 2)
    found = values[start : start + _VALUES].clone()
    model.tensors.release([name])
    return found if found.dtype.is_floating_point else found.float()
