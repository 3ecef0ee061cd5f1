"""How an adapter came about, as data: `lorasuite.json` beside it, from which its card is rendered.

The file is a list of steps. Nothing of the machine they ran on is in it: no device, no memory, no path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import LoraSuiteError
from ..io.artifacts import PROVENANCE, PROVENANCE_FORMAT
from ..io.json_files import read_json

VERSION = 1
_MACHINE = ("device", "dtype", "memory", "gradient_checkpointing", "micro_batch", "work", "cache")
"""Options that say where and how a step ran, not what came of it."""
_MOST_STEPS, _MOST_ENTRIES, _MOST_ROWS, _MOST_CHARACTERS = 64, 64, 4096, 4000


@dataclass(frozen=True)
class Step:
    """One step on an adapter's way.

    Attributes:
        step: migration, refinement or fine-tuning. outcome: in one sentence; warning: whether it speaks against the
            result.
        config: the options it ran with. versions: of packages. fingerprints: of models, by their part in it.
        figures: by label, as the card shows them. layers: a table of them, its head in the first row.
    """

    step: str
    outcome: str
    config: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    layers: Sequence[Sequence[str]] = ()
    warning: bool = False
    versions: Mapping[str, str] = field(default_factory=lambda: versions())


def versions() -> dict[str, str]:
    return {"lorasuite-fast": __version__} | {p: metadata.version(p) for p in ("torch", "transformers", "peft")}


def without_machine(options: Mapping[str, Any]) -> dict[str, Any]:
    """A step's options without what belongs to the machine."""
    return {name: value for name, value in options.items() if name not in _MACHINE}


def provenance(steps: Sequence[Step]) -> bytes:
    """The bytes of lorasuite.json."""
    record = {"format": PROVENANCE_FORMAT, "version": VERSION, "steps": [asdict(step) for step in steps]}
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_steps(folder: Path | None) -> list[Step]:
    """The steps a folder tells of; none where it tells of none, or of such as no release wrote."""
    if folder is None:
        return []
    try:
        record = read_json(folder / PROVENANCE)
    except (LoraSuiteError, OSError):
        return []
    steps = record.get("steps")
    if record.get("format") != PROVENANCE_FORMAT or record.get("version") != VERSION or not isinstance(steps, list):
        return []
    found = [_step(value) for value in steps[:_MOST_STEPS]]
    return [] if None in found else [step for step in found if step is not None]


def _step(value: Any) -> Step | None:
    if not isinstance(value, dict):
        return None
    texts = [value.get("step"), value.get("outcome")]
    tables = [value.get(name) for name in ("versions", "fingerprints", "figures")]
    config, layers = value.get("config"), value.get("layers")
    if (
        not all(map(_is_text, texts))
        or not all(isinstance(table, dict) and _are_texts([*table, *table.values()]) for table in tables)
        or not (isinstance(config, dict) and _are_texts(list(config)) and all(map(_is_plain, config.values())))
        or not (isinstance(layers, list) and len(layers) <= _MOST_ROWS)
        or not all(isinstance(row, list) and _are_texts(row) for row in layers)
        or not isinstance(value.get("warning"), bool)
    ):
        return None
    return Step(**{name: value[name] for name in Step.__dataclass_fields__})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_CHARACTERS


def _are_texts(values: list[Any]) -> bool:
    return len(values) <= 2 * _MOST_ENTRIES and all(map(_is_text, values))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= _MOST_ENTRIES and not any(isinstance(part, list) or not _is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float) or _is_text(value)
