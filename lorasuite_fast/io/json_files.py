"""JSON out of files nobody has vouched for: bounded in size and depth, and read as one thing or not at all."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError

MOST_BYTES = 8 << 20
"""Longest JSON file or safetensors header that is read; those of the largest models hold a tenth of it."""
MOST_TOKENIZER_BYTES = 256 << 20
"""Longest file of a tokenizer."""
_DEEPEST = 100


def finite(value: float | None) -> float | None:
    """A number that JSON can hold; NaN and infinity it cannot, and they become None."""
    return value if value is not None and math.isfinite(value) else None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: for anything `json` cannot read, nesting it gives up on and numbers too long to convert included.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_unique(text: str | bytes, *, equal_twice: bool = True) -> Any:
    """As `parse_json`, but a key that stands twice in one object, NaN, Infinity and nesting beyond 100 are errors.

    Args:
        equal_twice: let a key stand twice where both values are the same.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: dict[str, Any] = {}
            for key, value in pairs:
                if key in seen and not (equal_twice and repr(seen[key]) == repr(value)):
                    raise ValueError(f"the key {key!r} stands twice in one object")
                seen[key] = value
        return found

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return value


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, for reading; a pipe or device in its place is neither waited for nor read.

    Raises:
        LoraSuiteError: something else than a file. OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise LoraSuiteError(f"{path}: is not a regular file")


def read_bounded(path: Path, most: int, what: str) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Args:
        what: it is to be, for messages.

    Raises:
        LoraSuiteError: no such file, something else than a file, one that is longer, or that cannot be read.
    """
    try:
        with open(open_regular(path), "rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise LoraSuiteError(f"{path}: no such file") from None
    except OSError as error:
        raise LoraSuiteError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(data) > most:
        raise LoraSuiteError(
            f"{path}: is longer than {most >> 20} MiB, which is no file of {what}; fetch or save it again"
        )
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a one-line error."""
    data = read_bounded(path, MOST_BYTES, "a model")
    try:
        value = parse_unique(data.decode("utf-8"))
    except ValueError as error:
        raise LoraSuiteError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise LoraSuiteError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
