"""The text both models read so that their layers can be compared."""

from __future__ import annotations

import os
import random
from importlib.resources import files
from pathlib import Path

from ..errors import LoraSuiteError
from ..io.json_files import parse_json
from ..io.text_files import read_text

EXAMPLE_CHARACTERS = 1000
MIN_EXAMPLES = 4


def whole_characters(text: str) -> str:
    """The text with U+FFFD for half a surrogate pair, which JSON can spell and no tokenizer reads."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_text(text: str) -> list[str]:
    """Examples of about EXAMPLE_CHARACTERS, cut at line ends; a longer line is an example of its own."""
    examples: list[str] = []
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if lines and size + len(line) > EXAMPLE_CHARACTERS:
            examples.append("".join(lines))
            lines.clear()
            size = 0
        lines.append(line)
        size += len(line)
    return [e for e in (*examples, "".join(lines)) if e.strip()]


def _json_lines(text: str, where: str) -> list[str]:
    examples = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise LoraSuiteError(f"{where}: line {number} is not JSON ({error})") from None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise LoraSuiteError(f'{where}: line {number} has no string field "text"')
        if value["text"].strip():
            examples.append(whole_characters(value["text"]))
    return examples


def load_examples(source: str | os.PathLike[str] | None, count: int, seed: int, *, pipe: bool = True) -> list[str]:
    """At most `count` calibration examples: from a .jsonl or .txt file, or (None) the text shipped with the package.

    A .jsonl file holds one example a line in the field `text`; a .txt file is cut at line ends into examples of about
    1,000 characters. An example that is there before counts once: its repeats would be tokens CKA has seen, and would
    stand on both sides of a split into fitted and held-out texts. Where there are more than `count`, a sample seeded by
    `seed` is taken, in the order of the file.

    Args:
        pipe: read a pipe, too; see `read_text`.

    Raises:
        LoraSuiteError: an unreadable or unknown file, or fewer than 4 examples, the least the unbiased CKA needs.
    """
    if source is None:
        where = "the shipped calibration text"
        examples = _json_lines(files("lorasuite_fast").joinpath("data/calibration.jsonl").read_text("utf-8"), where)
    else:
        path = Path(source)
        where = str(path)
        if path.suffix not in (".jsonl", ".txt"):
            raise LoraSuiteError(f"{path}: calibration text must be a .jsonl (field `text`) or a .txt file")
        text = read_text(path, pipe=pipe)
        examples = _json_lines(text, where) if path.suffix == ".jsonl" else cut_text(text)
    if count < MIN_EXAMPLES:
        raise LoraSuiteError(f"`examples={count}`: at least {MIN_EXAMPLES} are needed")
    held, examples = len(examples), list(dict.fromkeys(examples))
    if len(examples) < MIN_EXAMPLES:
        different = f", {len(examples)} of them different" if held > len(examples) else ""
        raise LoraSuiteError(
            f"{where}: holds {held} examples{different}; at least {MIN_EXAMPLES} different ones are needed"
        )
    if len(examples) > count:
        chosen = sorted(random.Random(seed).sample(range(len(examples)), count))
        examples = [examples[i] for i in chosen]
    return examples
