"""Labelled text that bits per byte are measured on."""

from __future__ import annotations

import os
import random
from pathlib import Path

from ..errors import LoraSuiteError
from ..io.json_files import parse_json
from ..io.text_files import read_text
from ..text.calibration import whole_characters


def load_labelled(source: str | os.PathLike[str], count: int, seed: int) -> list[tuple[str, str]]:
    """At most `count` (prompt, completion) pairs of a .jsonl file, a seeded sample in the order of the file.

    Each line has `prompt` and `completion`, or `text`, which is all completion.

    Raises:
        LoraSuiteError: an unreadable file, a line without these fields, or no line with a completion.
    """
    path = Path(source)
    if path.suffix != ".jsonl":
        raise LoraSuiteError(f"{path}: labelled text must be a .jsonl file (`text`, or `prompt` and `completion`)")
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise LoraSuiteError(f"{path}: line {number} is not JSON ({error})") from None
        fields = value if isinstance(value, dict) else {}
        prompt = "" if "text" in fields else fields.get("prompt")
        completion = fields.get("text", fields.get("completion"))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise LoraSuiteError(f"{path}: line {number} has neither `text` nor `prompt` and `completion` as strings")
        if completion:
            found.append((whole_characters(prompt), whole_characters(completion)))
    if not found:
        raise LoraSuiteError(f"{path}: holds no text")
    if len(found) > count:
        found = [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), count))]
    return found
