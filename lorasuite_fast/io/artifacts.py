"""What an output may take the place of: what lorasuite-fast or PEFT wrote, and nothing else.

A folder is replaced only if every entry of it is a regular file that this program or PEFT's `save_pretrained` writes:
an adapter (adapter_config.json, its weights) or a plan, and beside it a model card, lorasuite.json and reports of
ours. One other entry, a sub-folder or a link included, and nothing is replaced: the folder of a trainer, with its
checkpoints, its optimizer and the tokenizer, is the trainer's. A file is replaced only by its own kind, plan by plan
and report by report. Links, mount points and whatever else is neither a file nor a folder stay. So do the inputs of
the run, what lies in them and what they lie in.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from ..errors import LoraSuiteError
from .json_files import MOST_BYTES, open_regular, parse_json, read_json

Kind = Literal["folder", "plan", "report"]
"""What is written: a folder (an adapter, or a plan with its card), or one file."""

REPORT_MARK = '<meta name="generator" content="lorasuite-fast">'
"""What tells a report from any other page."""
STEPS_MARK = "<!-- lorasuite-fast: how this adapter came about -->"
"""What tells a card of ours from any other."""
PLAN_FORMAT = "lorasuite-fast plan"
PROVENANCE = "lorasuite.json"
PROVENANCE_FORMAT = "lorasuite-fast provenance"
_CONFIG, _CARD, _PLAN = "adapter_config.json", "README.md", "transfer_plan.safetensors"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CARDS = ("library_name: peft", "library_name: lorasuite-fast")
_BEGINNING = 1 << 16
"""Bytes of a card or a report in which its mark stands."""

Given = Mapping[str, object]
"""What a run reads: by the name a message gives it a path, or anything else (hub id, texts, None): passed over."""


def check_replaceable(path: Path, kind: Kind, *, overwrite: bool, inputs: Given | None = None) -> None:
    """Refuses an output that would take the place of anything foreign; an absent or empty one is free.

    Raises:
        LoraSuiteError: naming what is in the way.
    """
    try:
        _check(path, kind, overwrite, inputs or {})
    except FileNotFoundError:
        # Nothing is there, or nothing any more.
        return
    except OSError as error:
        reason = error.strerror or str(error)
        raise LoraSuiteError(f"OUT {path}: cannot be looked at ({reason}); choose another path") from None


def _check(path: Path, kind: Kind, overwrite: bool, inputs: Given) -> None:
    if (reason := _not_plain(path, kind)) is not None:
        raise LoraSuiteError(f"OUT {path}: {reason}")
    if _is_empty(path, kind):
        return
    for what, where in _paths(inputs):
        if (how := _relation(path, where)) is not None:
            raise LoraSuiteError(f"OUT {path}: {how} {what} ({where}), which stays as it is; choose another path")
    if not overwrite:
        raise exists(path)
    if (name := foreign_part(path, kind)) is not None:
        what = f"holds {name}, which neither lorasuite-fast nor PEFT wrote" if kind == "folder" else name
        raise LoraSuiteError(f"OUT {path}: {what}; it stays as it is, choose another path")


def exists(path: Path) -> LoraSuiteError:
    return LoraSuiteError(f"OUT {path}: exists already; choose another path or pass `overwrite=True`")


def may_go(path: Path, kind: Kind, *, overwrite: bool) -> bool:
    """Whether what lies at a path, set aside already, may be removed."""
    with suppress(OSError):
        empty = _not_plain(path, kind) is None and _is_empty(path, kind)
        return empty or (overwrite and _not_plain(path, kind) is None and foreign_part(path, kind) is None)
    return False


def _not_plain(path: Path, kind: Kind) -> str | None:
    """Why a path can never be replaced, whatever is in it."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"is a link to {os.path.realpath(path)}; name that path itself, or choose another"
    if os.path.ismount(path):
        return "is a mount point, which cannot be replaced; name a path in it"
    if stat.S_ISDIR(mode):
        return None if kind == "folder" else "is a folder; this output is one file"
    if not stat.S_ISREG(mode):
        return "is neither a file nor a folder; choose another path"
    return "is a file; this output is a folder, choose another path" if kind == "folder" else None


def _is_empty(path: Path, kind: Kind) -> bool:
    if kind != "folder":
        return path.stat().st_size == 0
    with os.scandir(path) as entries:
        return next(entries, None) is None


def foreign_part(path: Path, kind: Kind) -> str | None:
    """What in a folder, or about a file, is not of this program or PEFT; None where all is."""
    if kind == "plan":
        return None if _is_plan(path) else "is no plan of lorasuite-fast"
    if kind == "report":
        return None if _is_report(path) else "is no report of lorasuite-fast"
    adapter, plan = _is_config(path / _CONFIG), _is_plan(path / _PLAN)
    for name in sorted(os.listdir(path)):
        if not stat.S_ISREG((path / name).lstat().st_mode) or not _is_known(path / name, adapter, plan):
            return name
    return None


def _is_known(file: Path, adapter: bool, plan: bool) -> bool:
    """Whether a file is what its name says, in a folder that holds an adapter's configuration or a plan, or neither."""
    if file.name in (_CONFIG, *_WEIGHTS):
        return adapter
    if file.name == _PLAN or not (adapter or plan):
        return plan
    if file.name == _CARD:
        return _is_card(file)
    if file.name == PROVENANCE:
        return _is_provenance(file)
    return file.suffix == ".html" and _is_report(file)


def _beginning(path: Path) -> str:
    with open(open_regular(path), "rb") as file:
        return file.read(_BEGINNING).decode("utf-8", "replace")


def _is_config(path: Path) -> bool:
    try:
        return isinstance(read_json(path).get("peft_type"), str)
    except (LoraSuiteError, OSError):
        return False


def _is_provenance(path: Path) -> bool:
    try:
        return read_json(path).get("format") == PROVENANCE_FORMAT
    except (LoraSuiteError, OSError):
        return False


def _is_plan(path: Path) -> bool:
    """Whether a file's header says that it is a plan, of whatever version; its tensors are not looked at."""
    try:
        with open(open_regular(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_BYTES:
                return False
            header = parse_json(parse_json(file.read(length))["__metadata__"]["plan"])
        return isinstance(header, dict) and header.get("format") == PLAN_FORMAT
    except (LoraSuiteError, OSError, ValueError, TypeError, KeyError):
        return False


def _is_report(path: Path) -> bool:
    try:
        return REPORT_MARK in _beginning(path)
    except (LoraSuiteError, OSError):
        return False


def _is_card(path: Path) -> bool:
    """A card of ours, or one PEFT has written, who says so in its metadata."""
    try:
        text = _beginning(path)
    except (LoraSuiteError, OSError):
        return False
    metadata = text[3:].partition("\n---")[0] if text.startswith("---") else ""
    return STEPS_MARK in text or any(line.strip() in _CARDS for line in metadata.splitlines())


def _paths(inputs: Given) -> Iterator[tuple[str, Path]]:
    """The inputs that are there as files or folders, and what the links in their folders lead to."""
    for what, value in inputs.items():
        if not isinstance(value, str | os.PathLike):
            continue
        with suppress(OSError, ValueError, RuntimeError):
            path = Path(value).expanduser()
            if not path.exists():
                continue
            yield what, path
            if path.is_dir():
                with os.scandir(path) as entries:
                    yield from ((what, Path(os.path.realpath(entry))) for entry in entries if entry.is_symlink())


def _relation(out: Path, given: Path) -> str | None:
    """How an output that exists and an input lie to each other: by what they are, not by how they are written."""
    if _same(out, given):
        return "is"
    if any(_same(parent, given) for parent in Path(os.path.realpath(out)).parents):
        return "lies in"
    if any(_same(parent, out) for parent in Path(os.path.realpath(given)).parents):
        return "contains"
    return None


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
