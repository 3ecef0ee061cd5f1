"""Outputs appear whole or not at all: written to a temporary sibling, then renamed into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from .errors import LoraSuiteError, WriteError


def check_output(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The output path, refused now rather than after the work if it exists or cannot be written.

    Raises:
        LoraSuiteError: OUT exists and `overwrite` is off; its parent is missing or not writable.
    """
    path = Path(out).expanduser().absolute()
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise LoraSuiteError(f"OUT {out}: exists already; choose another path or pass --overwrite")
    if not path.parent.is_dir():
        raise LoraSuiteError(f"OUT {out}: its parent folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise LoraSuiteError(f"OUT {out}: its parent folder {path.parent} is not writable")
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path: Path, write: Callable[[Path], object], *, overwrite: bool) -> None:
    """Has `write` write a file to a temporary sibling, which then takes its place.

    Raises:
        LoraSuiteError: it cannot be written, or is there already and overwrite is off.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        _sync(temporary)
        temporary.chmod(0o644)
        if path.is_dir():
            raise LoraSuiteError(f"OUT {path}: is a folder; a plan is one file")
        if path.exists() and not overwrite:
            raise LoraSuiteError(f"OUT {path}: exists already; choose another path or pass --overwrite")
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"OUT {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_folder(path: Path, files: Mapping[str, bytes | Callable[[Path], object]], *, overwrite: bool) -> None:
    """Writes a folder of files through a temporary sibling; an existing OUT is replaced only when all is on disk.

    Args:
        files: by name their bytes, or what writes the file at a path, for those too large to be held twice.
    """
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise WriteError(f"OUT {path}: cannot be written ({error.strerror or error})") from None
    aside = temporary.with_name(temporary.name + ".replaced")
    try:
        for name, data in files.items():
            if callable(data):
                data(temporary / name)
            else:
                (temporary / name).write_bytes(data)
            _sync(temporary / name)
        temporary.chmod(0o755)
        if path.exists() or path.is_symlink():
            if not overwrite:
                raise LoraSuiteError(f"OUT {path}: exists already; choose another path or pass --overwrite")
            path.rename(aside)
            try:
                temporary.rename(path)
            except OSError:
                aside.rename(path)
                raise
        else:
            temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"OUT {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        for leftover in (temporary, aside):
            if leftover.exists() or leftover.is_symlink():
                _remove(leftover)
