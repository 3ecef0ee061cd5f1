"""Outputs appear whole or not at all: written to a temporary sibling, then put in place by one rename.

The sibling is a hidden folder, `.NAME.XXXXXXXX.tmp`, locked while its process lives; what a killed process left behind
is removed by the next run that writes the same output.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import LoraSuiteError, WriteError
from .artifacts import Given, Kind, check_replaceable, exists, may_go

_SUFFIX = ".tmp"
_NEW, _PREVIOUS, _WORK = "new", "previous", "work"
_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
"""Flags of Linux's renameat2."""
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""What kernels and file systems answer that do not know a flag."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def check_output(
    out: str | os.PathLike[str], *, overwrite: bool, kind: Kind = "folder", inputs: Given | None = None
) -> Path:
    """The output path, refused now rather than after the work if it exists or cannot be written.

    Temporary files that killed processes left beside it are removed first.

    Args:
        overwrite: replace what is there, as far as this program or PEFT wrote it (`artifacts`). kind: of output.
        inputs: what the run reads, by the name a message gives it; never replaced.

    Raises:
        LoraSuiteError: OUT exists and `overwrite` is off, or holds what is not ours; its parent is missing or not
            writable.
    """
    path = Path(out).expanduser().absolute()
    sweep(path)
    check_replaceable(path, kind, overwrite=overwrite, inputs=inputs)
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


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, None where another process holds it or the folder is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _abandon(folder: Path, path: Path) -> None:
    """Removes a temporary folder; an old output that was set aside in it, and not replaced, is put back first."""
    previous = folder / _PREVIOUS
    if (previous.exists() or previous.is_symlink()) and not (path.exists() or path.is_symlink()):
        previous.rename(path)
    shutil.rmtree(folder, ignore_errors=True)


def sweep(path: Path) -> None:
    """Removes what killed processes left beside an output.

    Where one was killed between setting an old output aside and putting the new one in place (only on file systems that
    cannot exchange two names in one step), the old one is put back.
    """
    temporary = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(_SUFFIX)}")
    with suppress(OSError):
        for folder in list(path.parent.iterdir()):
            if not temporary.fullmatch(folder.name):
                continue
            if folder.is_symlink() or (handle := _locked(folder)) is None:
                continue
            try:
                # A folder that only looks like one of these holds something else.
                if {entry.name for entry in folder.iterdir()} <= {_NEW, _PREVIOUS, _WORK}:
                    _abandon(folder, path)
            finally:
                os.close(handle)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A locked temporary folder beside `path`, gone afterwards."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent))
        # Another process may sweep the folder before it is locked.
        if (handle := _locked(folder)) is not None:
            break
        if folder.exists():
            # A file system without locks; nothing is swept there either.
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            break
    try:
        yield folder
    finally:
        try:
            _abandon(folder, path)
        finally:
            os.close(handle)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Linux's rename with a flag. False where the system does not know it; other failures are OSErrors."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(target))


def _place(new: Path, path: Path, kind: Kind, *, overwrite: bool) -> None:
    """Gives the new output its name; at no moment is there neither it nor, complete, the one it replaces.

    What was replaced is looked at once more before it goes: another process may have put something else there.

    On file systems that cannot exchange names there are two renames; what ends the process, or fails, between them
    leaves the old one set aside, and `_abandon` puts it back.
    """
    try:
        if _renameat2(new, path, _NOREPLACE):
            return
    except FileExistsError:
        pass
    check_replaceable(path, kind, overwrite=overwrite)
    try:
        if _renameat2(new, path, _EXCHANGE):
            if not may_go(new, kind, overwrite=overwrite):
                _renameat2(new, path, _EXCHANGE)
                raise exists(path)
            return
    except FileNotFoundError:
        pass
    if kind != "folder":
        new.replace(path)
    elif not os.path.lexists(path):
        new.rename(path)
    else:
        previous = new.with_name(_PREVIOUS)
        path.rename(previous)
        if not may_go(previous, kind, overwrite=overwrite):
            raise exists(path)
        new.rename(path)


def _write(path: Path, write: Callable[[Path], object], kind: Kind, *, overwrite: bool) -> None:
    try:
        with beside(path) as folder:
            new = folder / _NEW
            write(new)
            _sync(new)
            _place(new, path, kind, overwrite=overwrite)
            with suppress(OSError):
                _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"OUT {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes a WriteError of whatever a library raises that finds no room in `folder`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer of archives and safetensors have no error numbers.
        told = ("PytorchStreamWriter", "iostream error", "unexpected pos", "I/O error")
        full = error.errno in _FULL if isinstance(error, OSError) else any(words in str(error) for words in told)
        if not full:
            raise
        raise WriteError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def write_file(path: Path, write: Callable[[Path], object], *, overwrite: bool, kind: Kind = "plan") -> None:
    """Has `write` write a file to a temporary sibling, which then takes its place.

    Raises:
        LoraSuiteError: it cannot be written, or is there already and overwrite is off.
    """

    def make(new: Path) -> None:
        check_replaceable(path, kind, overwrite=overwrite)
        # In a folder of its own: safetensors writes to a temporary file beside the one it is given.
        place = new.with_name(_WORK)
        place.mkdir()
        write(place / path.name)
        (place / path.name).rename(new)
        new.chmod(0o644)

    _write(path, make, kind, overwrite=overwrite)


def write_folder(path: Path, files: Mapping[str, bytes | Callable[[Path], object]], *, overwrite: bool) -> None:
    """Writes a folder of files through a temporary sibling; an existing OUT is replaced only when all is on disk.

    Args:
        files: by name their bytes, or what writes the file at a path, for those too large to be held twice.

    Raises:
        LoraSuiteError: it cannot be written, or is there already and overwrite is off.
    """

    def make(new: Path) -> None:
        new.mkdir()
        for name, data in files.items():
            if callable(data):
                data(new / name)
            else:
                (new / name).write_bytes(data)
            _sync(new / name)
        new.chmod(0o755)

    _write(path, make, "folder", overwrite=overwrite)
