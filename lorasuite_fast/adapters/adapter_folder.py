"""An adapter's folder before anything of it is read: regular files, inside the folder or a hub cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import LoraSuiteError
from ..io.json_files import open_regular
from ..models.checkpoint import check_links
from .adapter_config import CONFIG, WEIGHTS

_PIECE = 1 << 20


def open_folder(source: str | os.PathLike[str], what: str = "ADAPTER") -> Path:
    """The folder, whose files are safe to open.

    Raises:
        LoraSuiteError: no folder, or one with a link out of it, a pipe or a device, or a file far too long.
    """
    folder = Path(source).expanduser()
    try:
        found = folder.is_dir()
    except (OSError, ValueError):
        found = False
    if not found:
        raise LoraSuiteError(f"{what} {os.fspath(source)}: no such folder")
    check_links(folder)
    return folder


def adapter_digest(source: str | os.PathLike[str]) -> str:
    """SHA-256 over an adapter's configuration and weights, 32 hex digits.

    Raises:
        LoraSuiteError: if either is missing, is no regular file, or cannot be read.
    """
    folder, digest = open_folder(source), hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            with open(open_regular(folder / name), "rb", buffering=0) as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
        except OSError as error:
            raise LoraSuiteError(f"{folder}: {name} cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()[:32]
