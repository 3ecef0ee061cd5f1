"""Paths a command was given, looked at before anything that takes time to import."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import LoraSuiteError

_ALIKE = 0.75
"""How alike two names must be for one to be a slip of the other."""


def check_folder(what: str, given: str | os.PathLike[str], *, hub: bool = True) -> None:
    """Refuses a model or an adapter that is neither a folder nor, where the hub is asked, may be an id of it.

    A name that could be a hub id passes, unless it is not in the local cache and a folder here is called almost so.

    Raises:
        LoraSuiteError: naming the folder that was probably meant.
    """
    text = os.fspath(given)
    path = _path(what, text)
    if path.is_dir():
        return
    if path.exists():
        if hub:
            raise LoraSuiteError(f"{what} {text}: expected a folder or a hub id, found a file")
        raise LoraSuiteError(f"{what} {text}: expected a folder, found a file")
    meant = _meant(text, path, Path.is_dir)
    local = not hub or text.startswith((".", "/", "~")) or text.count("/") > 1
    if local or (meant and not _cached(text)):
        raise LoraSuiteError(f"{what} {text}: no such folder{meant}")


def check_file(what: str, given: str | os.PathLike[str] | None, *words: str) -> None:
    """Refuses a text that is not there; `words` stand for texts of our own."""
    if given is None or os.fspath(given) in words:
        return
    text = os.fspath(given)
    path = _path(what, text)
    if not path.exists():
        raise LoraSuiteError(f"{what} {text}: no such file{_meant(text, path, Path.exists)}")


def same_model(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> bool:
    """Whether two models are one, by name or as the same folder."""
    try:
        return os.fspath(old) == os.fspath(new) or os.path.samefile(Path(old).expanduser(), Path(new).expanduser())
    except (OSError, RuntimeError, ValueError):
        return False


def _path(what: str, text: str) -> Path:
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoraSuiteError(f"{what} {text}: no such file or folder ({reason})") from None
    return path


def _meant(text: str, path: Path, fits: Callable[[Path], bool]) -> str:
    """A question that names the sibling most like a path; empty where none is."""
    try:
        names = [entry for entry in os.listdir(path.parent) if not entry.startswith(".") and fits(path.parent / entry)]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 1, _ALIKE)
    return f"; did you mean {Path(text).with_name(close[0])}?" if close else ""


def _cached(name: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE).expanduser() / f"models--{name.replace('/', '--')}").is_dir()
