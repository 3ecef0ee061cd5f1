"""Result rows of a GPU run: JSON lines, written one at a time so that a run that dies keeps what it has measured."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRY = bool(os.environ.get("DRY"))
"""Tiny shapes on the CPU, to check the scripts."""
DEVICE = "cpu" if DRY else "cuda"
_LOST_CONTEXT = ("illegal memory access", "CUDA error", "unspecified launch failure", "device-side assert", "HIP error")


class LostDevice(Exception):
    """After this error every further call on the device fails: the process has to end."""


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds one row to the run, on disk before this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a run; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


@contextmanager
def guarded(path: Path, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the row to fill in and appends it; an exception becomes its field `error`.

    Raises:
        LostDevice: the error leaves the device unusable for this process.
    """
    try:
        yield row
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[
            :300
        ]
        append(path, row)
        if any(sign in str(error) for sign in _LOST_CONTEXT) and "out of memory" not in str(error):
            raise LostDevice(row["error"]) from error
        return
    append(path, row)


def selected(names: list[str], wanted: str | None) -> list[str]:
    """Those of `names` that a list divided by commas or spaces asks for; all without one.

    Raises:
        ValueError: for a name that is not there.
    """
    if not wanted or not wanted.strip():
        return names
    asked = wanted.replace(",", " ").split()
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; choose of {', '.join(names)}")
    return [name for name in names if name in asked]


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, what went wrong) for what may fail without harm.

    Raises:
        LostDevice: the error leaves the device unusable for this process.
    """
    try:
        return work(), None
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        if "illegal memory access" in str(error):
            raise LostDevice(text) from error
        return None, text
