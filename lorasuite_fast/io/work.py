"""What an interrupted build has finished, kept beside its output so that the same command goes on from there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import LoraSuiteError, WriteError
from .json_files import parse_json, read_json
from .output import beside, sweep

_RUN, _COMPLETE, _LOCK = "run.json", "complete", ".lock"
_OURS = re.compile(
    r"\.lock|run\.json|complete|.+\.tmp|.+\.safetensors|states|trainer|start|training|distill|(\.migrated\..+|migrated)|"
    r"targets-[0-9a-f]{16}"
)
"""Names of what lies in a folder of work; one that holds anything else is not removed, and not begun in."""
_CLAIMS = 100
"""A folder is made and claimed again this often where others remove it in between."""
_STATE_SHARE = 20
"""Resumable states are written so seldom that they take at most this fraction of the time, one in 20."""


def work_folder(out: str | os.PathLike[str]) -> Path:
    """Where a build that is to write `out` keeps its work: a hidden sibling."""
    path = Path(out).expanduser().absolute()
    return path.with_name(f".{path.name}.work")


def foreign_work(folder: Path) -> str | None:
    """What a folder of work holds that no run has put there; None where it holds nothing of the kind."""
    with suppress(OSError):
        return next((name for name in sorted(os.listdir(folder)) if not _OURS.fullmatch(name)), None)
    return None


def _check_foreign(folder: Path) -> None:
    if (name := foreign_work(folder)) is not None:
        raise LoraSuiteError(
            f"{folder}: holds {name}, which is no work of lorasuite-fast; move it elsewhere, or choose another path"
        )


def clean_up(out: str | os.PathLike[str], folder: Path | None = None, part: str = "") -> None:
    """Removes work whose output was written, where the process ended before it could do so itself.

    Args:
        folder: where the work lies, `work_folder(out)` by default. part: sub-folder of it whose work was the last.

    Raises:
        LoraSuiteError: the folder holds what no run has put there; nothing is removed.
    """
    path, folder = Path(out).expanduser().absolute(), folder or work_folder(out)
    _check_foreign(folder)
    for place in {folder, folder / part}:
        sweep(place)
    note = folder / part / _COMPLETE
    if not (path.exists() and note.exists()):
        return
    with suppress(OSError):
        lock = _claim(folder / part)
        try:
            # Whoever had it before may have removed it, or gone on.
            if note.exists() and path.stat().st_mtime_ns >= note.stat().st_mtime_ns:
                remove_work(folder)
        finally:
            os.close(lock)


def remove_work(folder: Path) -> None:
    """Removes a folder of work: its name is free at once, so that another process may begin there as the rest goes.

    Called by who holds the lock of the work in it. A folder in which something else lies by now stays.
    """
    if foreign_work(folder) is not None:
        return
    try:
        with beside(folder) as place:
            folder.rename(place / "work")
    except OSError:
        # No room for one more name, or the folder is gone.
        shutil.rmtree(folder, ignore_errors=True)


def _claim(folder: Path) -> int:
    """A descriptor that holds the lock of a folder of work, which exists.

    Raises:
        BlockingIOError: another process holds it. FileNotFoundError: there is no such folder, or no longer.
    """
    file = folder / _LOCK
    lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two calls another process may have removed the folder, and a third made a new one.
        if not os.path.samestat(os.fstat(lock), file.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    except OSError:
        os.close(lock)
        raise
    return lock


class Work:
    """A folder of finished parts, each a safetensors file that is there whole or not at all.

    Args:
        folder: made if it does not exist.
        identity: everything the result depends on, as plain data; a folder of another identity is refused.
        owner: whether this process may create the folder and claims it for itself (of several ranks only the first).

    Raises:
        LoraSuiteError: the folder holds the work of another run, naming what differs, or what is no work; another
            process is at work in it; it cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, owner: bool = True) -> None:
        self.folder, self._owner = folder, owner
        self._last_state = self._state_seconds = 0.0
        self._lock: int | None = None
        self.record: dict[str, Any]
        identity = json.loads(json.dumps(identity))
        if owner:
            _check_foreign(folder)
        if not owner:
            self.record = self._read()
            return
        try:
            for _ in range(_CLAIMS):
                with suppress(FileNotFoundError):
                    folder.mkdir(parents=True, exist_ok=True)
                    self._lock = _claim(folder)
                    break
            else:
                raise WriteError(f"{folder}: cannot be claimed, its file {_LOCK} changes all the time")
        except BlockingIOError:
            raise LoraSuiteError(f"{folder}: another process is building the same output; wait for it") from None
        except OSError as error:
            raise WriteError(f"{folder}: cannot be written ({error.strerror or error})") from None
        try:
            self.record = self._found(identity) or {"identity": identity}
        except LoraSuiteError:
            self.close()
            raise
        for leftover in folder.glob("*.tmp"):
            _remove(leftover)

    def _found(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        if not self.resumed:
            return None
        record = self._read()
        before = record["identity"]
        for key in sorted({*before, *identity}):
            same = key in before and key in identity and json.dumps(before[key]) == json.dumps(identity[key])
            if not same:
                raise LoraSuiteError(
                    f"{self.folder}: holds the unfinished work of another run, with {key} {_short(before.get(key))}; "
                    f"this one has {_short(identity.get(key))}. Repeat that run, or delete the folder to start over"
                )
        return record

    def _read(self) -> dict[str, Any]:
        """What `start` recorded."""
        record: Any = None
        with suppress(LoraSuiteError):
            record = read_json(self.folder / _RUN)
        counts = [] if record is None else [value for key, value in record.items() if key != "identity"]
        if (
            record is None
            or not isinstance(record.get("identity"), dict)
            or not all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts)
        ):
            raise LoraSuiteError(f"{self.folder}: holds damaged work; delete the folder to start over")
        found: dict[str, Any] = record
        return found

    @property
    def resumed(self) -> bool:
        return (self.folder / _RUN).exists()

    def start(self, **chosen: Any) -> None:
        """Records what the run chose by itself (micro-batch sizes), which a resumed run must repeat."""
        if not self._owner:
            return
        self.record |= chosen
        self._replace(_RUN, lambda path: path.write_text(json.dumps(self.record)))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished part and what was noted with it; None where there is none, or what is there is damaged."""
        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as file:
                note = parse_json((file.metadata() or {})["note"])
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError):
            return None
        return (tensors, note) if isinstance(note, dict) else None

    def save(self, name: str, tensors: dict[str, Tensor], **note: Any) -> None:
        host = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._replace(f"{name}.safetensors", lambda path: save_file(host, path, metadata={"note": json.dumps(note)}))

    def save_state(self, name: str, tensors: dict[str, Tensor], **note: Any) -> None:
        """Saves a large state a run can go on from, unless that would take more than its share of the time."""
        start = time.monotonic()
        if start - self._last_state < _STATE_SHARE * self._state_seconds:
            return
        self.save(name, tensors, **note)
        self._last_state = time.monotonic()
        self._state_seconds = self._last_state - start

    def _replace(self, name: str, write: Any) -> None:
        # A folder, since safetensors writes to a temporary file of its own beside the one it is given.
        place = self.folder / f"{name}.{os.getpid()}.tmp"
        try:
            place.mkdir(exist_ok=True)
            temporary = place / name
            write(temporary)
            handle = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            temporary.replace(self.folder / name)
            place.rmdir()
        except (OSError, SafetensorError) as error:
            _remove(place)
            reason = getattr(error, "strerror", None) or error
            raise WriteError(f"{self.folder / name}: cannot be written ({reason})") from None

    def complete(self) -> None:
        """Notes that all parts are there; an output younger than this note was made from them."""
        (self.folder / _COMPLETE).touch()

    def discard(self) -> None:
        """Removes the folder, once its output is in place; one that another process goes on in is left to that one."""
        if not self._owner:
            return
        try:
            self._lock = self._lock if self._lock is not None else _claim(self.folder)
        except OSError:
            return
        remove_work(self.folder)
        self.close()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Lets others claim the folder; where input cannot be used there is nothing to go on with, and it goes."""
        if isinstance(error, LoraSuiteError) and not isinstance(error, WriteError):
            self.discard()
        self.close()

    def close(self) -> None:
        """Lets others claim the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove(leftover: Path) -> None:
    """Removes what a part was being written to: a folder, or the file earlier versions used."""
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


@contextmanager
def unless_unusable(work: Work, folder: Path) -> Iterator[None]:
    """Removes a part of the work in a folder, and the folder if that was all, where its input cannot be used."""
    try:
        yield
    except WriteError:
        raise
    except LoraSuiteError:
        work.discard()
        with suppress(OSError):
            folder.rmdir()
        raise


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def stacked(tensors: list[Tensor]) -> dict[str, Tensor]:
    """A list of tensors as named ones, in order."""
    return {f"{n:05d}": tensor for n, tensor in enumerate(tensors)}


def unstacked(tensors: dict[str, Tensor], device: torch.device) -> list[Tensor]:
    return [tensors[name].to(device) for name in sorted(tensors)]
