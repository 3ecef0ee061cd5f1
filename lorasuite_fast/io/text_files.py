"""Text out of files and pipes, bounded: nothing is waited for without end, and nothing endless is read."""

from __future__ import annotations

import os
import select
import stat
from pathlib import Path

from ..errors import LoraSuiteError

MOST_BYTES = 1 << 30
"""Longest text file that is read; all of it is in memory at once."""
MOST_PIPED = 256 << 20
"""Longest text that is read from a pipe."""
SILENCE = 60.0
"""Seconds a pipe may give nothing before it is given up."""
_PIECE = 1 << 20


def read_text(path: Path, *, pipe: bool = True, most: int = MOST_BYTES) -> str:
    """A UTF-8 text, with or without a byte order mark; every line end is a newline.

    Args:
        pipe: read a pipe, too. False where the path is not the user's own word, but that of a file they were sent.
        most: bytes of a file; a pipe may give MOST_PIPED of them at most.

    Raises:
        LoraSuiteError: it cannot be read, is no text, is a folder or a device, or longer than that.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = _read(descriptor, path, pipe, most)
        finally:
            os.close(descriptor)
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise LoraSuiteError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise LoraSuiteError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise LoraSuiteError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read(descriptor: int, path: Path, pipe: bool, most: int) -> bytes:
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode):
        if found.st_size <= most and len(data := _bytes_of(descriptor, most + 1)) <= most:
            return data
        raise LoraSuiteError(f"{path}: is longer than {_size(most)}; pass a shorter text, a part of it is enough")
    if not stat.S_ISFIFO(found.st_mode):
        raise LoraSuiteError(f"{path}: is not a regular file; pass a file, or a pipe that ends")
    if not pipe:
        raise LoraSuiteError(f"{path}: is a pipe, not a regular file; pass a text file of your own")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LoraSuiteError(f"{path}: is a pipe, which several processes cannot share; save its text to a file")
    return _piped(descriptor, path, min(most, MOST_PIPED))


def _bytes_of(descriptor: int, most: int) -> bytes:
    data = bytearray()
    while len(data) < most and (piece := os.read(descriptor, min(_PIECE, most - len(data)))):
        data += piece
    return bytes(data)


def _piped(descriptor: int, path: Path, most: int) -> bytes:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    data = bytearray()
    while True:
        if not poll.poll(SILENCE * 1000):
            raise LoraSuiteError(
                f"{path}: is a pipe that gave nothing for {SILENCE:g} s; see that something writes to it, or save the "
                "text to a file"
            )
        try:
            piece = os.read(descriptor, _PIECE)
        except BlockingIOError:
            continue
        if not piece:
            return bytes(data)
        data += piece
        if len(data) > most:
            raise LoraSuiteError(f"{path}: is a pipe that gives more than {_size(most)}; save a part of it to a file")


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size} bytes"


def refuse_pipe(source: object) -> None:
    """For texts that are read more than once.

    Raises:
        LoraSuiteError: the source is the path of a pipe, which gives its text once.
    """
    if not isinstance(source, str | os.PathLike):
        return
    try:
        piped = stat.S_ISFIFO(Path(source).expanduser().stat().st_mode)
    except (OSError, ValueError):
        return
    if piped:
        raise LoraSuiteError(f"{source}: is a pipe, and this run reads the text more than once; save it to a file")
