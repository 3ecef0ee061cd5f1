"""Labelled samples for fine-tuning: records put into words, as token ids and which of them the loss counts."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Data as Data
from ..errors import LoraSuiteError
from ..io.json_files import parse_json
from ..io.text_files import read_text
from ..models.loading import reason
from ..models.token_ends import TokenEnds
from ..models.vocabulary import prefix
from .calibration import cut_text, whole_characters

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_SHAPES = "messages; prompt and completion; instruction, output and perhaps input; text"
_FILES = (".json", ".jsonl", ".txt")
_PARAGRAPHS = re.compile(r"\n[ \t]*\n\s*")
_FIELD = re.compile(r"\{(instruction|input)\}")
_GENERATION = re.compile(r"\{%-?\+?\s*generation\b")


@dataclass(frozen=True)
class Sample:
    """One row of token ids, and for each of them whether the loss counts its prediction; never for the first."""

    ids: list[int]
    counted: list[bool]

    @property
    def tokens(self) -> int:
        """How many predictions the loss counts."""
        return sum(self.counted)


def padded(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels of some rows, (samples, length) each, the longest row first.

    Labels are -100 where nothing counts.
    """
    rows = sorted(samples, key=lambda sample: -len(sample.ids))
    shape = len(rows), len(rows[0].ids)
    ids, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    labels = torch.full(shape, -100)
    for at, row in enumerate(rows):
        length = len(row.ids)
        ids[at, :length], mask[at, :length] = torch.tensor(row.ids), 1
        labels[at, :length] = torch.tensor([i if c else -100 for i, c in zip(row.ids, row.counted, strict=True)])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Samples:
    """The samples of one source.

    Attributes:
        truncated: samples that lost their end to the cut-off length. left_out: records of which nothing was left to
            count there.
    """

    samples: list[Sample]
    truncated: int
    left_out: int

    def digest(self) -> str:
        """SHA-256 over all token ids and what is counted, 32 hex digits."""
        rows = [(sample.ids, sample.counted) for sample in self.samples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def prompt(instruction: str, input: str = "", template: str = "alpaca") -> str:
    """What stands in front of the response, in training and in use.

    Args:
        template: "alpaca", the form the paper trains on, or a text with {instruction} and, for records that have an
            input, {input}.

    Raises:
        LoraSuiteError: the template has no {instruction}, or there is an input and no {input} to put it.
    """
    text = (_ALPACA_WITH_INPUT if input else _ALPACA) if template == "alpaca" else template
    for name, value in (("instruction", True), ("input", bool(input))):
        if value and f"{{{name}}}" not in text:
            raise LoraSuiteError(f"the template {template[:40]!r} has no {{{name}}}; give one that has, or alpaca")
    fields = {"instruction": instruction, "input": input}
    return _FIELD.sub(lambda match: fields[match[1]], text)


def read_records(source: Data) -> list[tuple[str, dict[str, Any]]]:
    """Records with where each comes from: a file and its line or record, counted from 1.

    A .json file is a list of records, a .jsonl file has one a line, a .txt file holds texts divided by blank lines (one
    of more than about 1,000 characters is cut at line ends, as calibration text is). A folder saved by `datasets`, or
    the hub id of a data set, gives its split `train`.

    Raises:
        LoraSuiteError: an unreadable or unknown source, or one that holds no record.
    """
    if not isinstance(source, str | os.PathLike):
        records, where = _numbered(source, "the data"), "the data"
    else:
        path, where = Path(source).expanduser(), os.fspath(source)
        if path.is_dir() or (not path.exists() and path.suffix not in _FILES):
            records = _numbered(_dataset(path, where), where)
        elif path.suffix not in _FILES:
            raise LoraSuiteError(f"{path}: data must be a {', '.join(_FILES)} file or a folder saved by `datasets`")
        else:
            records = _file(path)
    if not records:
        raise LoraSuiteError(f"{where}: holds no records")
    return records


def _numbered(values: Iterable[Any], where: str, unit: str = "record") -> list[tuple[str, dict[str, Any]]]:
    return [(at := f"{where}: {unit} {n}", _fields(value, at)) for n, value in enumerate(values, 1)]


def _fields(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, Mapping):
        raise LoraSuiteError(f"{where} is {type(value).__name__}, neither an object nor a string")
    return dict(value)


def _file(path: Path) -> list[tuple[str, dict[str, Any]]]:
    text = read_text(path)
    if path.suffix == ".txt":
        return _numbered([piece for part in _PARAGRAPHS.split(text) for piece in cut_text(part.strip())], str(path))
    try:
        if path.suffix == ".json":
            values = parse_json(text)
            if not isinstance(values, list):
                raise LoraSuiteError(f"{path}: expected a list of records, found {type(values).__name__}")
            return _numbered(values, str(path))
    except ValueError as error:
        raise LoraSuiteError(f"{path}: is not JSON ({error})") from None
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            at = f"{path}: line {number}"
            try:
                records.append((at, _fields(parse_json(line), at)))
            except ValueError as error:
                raise LoraSuiteError(f"{at} is not JSON ({error})") from None
    return records


def _dataset(path: Path, where: str) -> Iterable[Any]:
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where):
        raise LoraSuiteError(f"{where}: no such file or folder")
    try:
        import datasets
    except ImportError:
        what = "is a folder" if path.is_dir() else "is no file here, and a data set of the hub"
        raise LoraSuiteError(
            f"{where}: {what} needs the package `datasets`: pip install datasets, or give a .json, .jsonl or .txt file"
        ) from None
    try:
        found = datasets.load_from_disk(path) if path.is_dir() else datasets.load_dataset(where)
        if isinstance(found, Mapping):
            if "train" not in found:
                raise LoraSuiteError(f"{where}: has no split `train`, but {', '.join(map(str, found))}")
            found = found["train"]
        return list(found)
    except LoraSuiteError:
        raise
    except Exception as error:
        raise LoraSuiteError(f"{where}: `datasets` cannot read it ({reason(error)})") from None


class SampleMaker:
    """Turns records into samples for one tokenizer.

    In front stand the special tokens the tokenizer puts there, behind an end-of-sequence token where it has one. A chat
    template writes both itself. What is longer than `max_tokens` loses its end.

    Args:
        template: how `instruction` records become a prompt, see `prompt`; "chat" has the tokenizer's chat template
            write these and `prompt` records as a user's and an assistant's turn.
        completion_only: count only the completion (of messages: the assistant's turns with what ends them). A token
            that reaches from the prompt into it counts to it. Plain text is all completion.

    Raises:
        LoraSuiteError: for a template that cannot be used.
    """

    def __init__(self, tokenizer: Any, *, template: str, max_tokens: int, completion_only: bool) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._max_tokens, self._completion_only = max_tokens, completion_only
        self._ends = TokenEnds(tokenizer) if completion_only else None
        self._front = prefix(tokenizer)
        if template == "chat":
            self._check_chat("`template=chat`")
        else:
            prompt("", template=template)

    def _check_chat(self, where: str) -> None:
        if not getattr(self._tokenizer, "chat_template", None):
            raise LoraSuiteError(
                f"{where}: the model's tokenizer has no chat template; give prompt and completion, or instruction and "
                "output"
            )

    def __call__(self, fields: Mapping[str, Any], where: str) -> tuple[Sample, bool]:
        """The sample and whether its end was cut off; it may hold nothing that counts.

        Raises:
            LoraSuiteError: a record of no known shape, or with a field of another kind, naming `where`.
        """
        if fields.get("messages") is not None:
            ids, counted = self._chat(_messages(fields["messages"], where), where)
        else:
            question, answer = self._worded(fields, where)
            if self._template == "chat" and question:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                ids, counted = self._chat(turns, where)
            else:
                ids, counted = self._plain(question, answer)
        truncated = len(ids) > self._max_tokens
        ids, counted = ids[: self._max_tokens], counted[: self._max_tokens]
        return Sample(ids, [False, *counted[1:]]), truncated

    def _worded(self, fields: Mapping[str, Any], where: str) -> tuple[str, str]:
        """Prompt and completion; the prompt of plain text is empty."""
        for first, second in (("prompt", "completion"), ("instruction", "output")):
            if fields.get(first) is not None and fields.get(second) is not None:
                question, answer = (_string(fields, name, where) for name in (first, second))
                if not answer.strip():
                    raise LoraSuiteError(f"{where} has an empty {second}; there is nothing to learn from it")
                if first == "prompt":
                    return question, answer
                context = "" if fields.get("input") is None else _string(fields, "input", where)
                if self._template == "chat":
                    return "\n\n".join(part for part in (question, context) if part), answer
                try:
                    return prompt(question, context, self._template), answer
                except LoraSuiteError as error:
                    raise LoraSuiteError(f"{where}: {error}") from None
        if fields.get("text") is not None:
            text = _string(fields, "text", where)
            if not text.strip():
                raise LoraSuiteError(f"{where} has an empty text; there is nothing to learn from it")
            return "", text
        found = ", ".join(sorted(map(str, fields))) or "none"
        raise LoraSuiteError(f"{where} has the fields {found}; expected one of: {_SHAPES}")

    def _plain(self, question: str, answer: str) -> tuple[list[int], list[bool]]:
        if self._ends is None or not question:
            ids = self._tokenizer(question + answer, add_special_tokens=False, verbose=False)["input_ids"]
            counted = [True] * len(ids)
        else:
            ids, ends = self._ends(question + answer)
            size = len(question.encode("utf-8", "surrogatepass"))
            counted = [end > size for end in ends]
        last = self._tokenizer.eos_token_id
        tail = [] if last is None or ids[-1:] == [last] else [last]
        every = not self._completion_only
        return [*self._front, *ids, *tail], [*[every] * len(self._front), *counted, *[True] * len(tail)]

    def _chat(self, messages: list[dict[str, Any]], where: str) -> tuple[list[int], list[bool]]:
        self._check_chat(where)
        if not self._completion_only:
            ids = self._tokenizer(self._render(messages, where), add_special_tokens=False, verbose=False)["input_ids"]
            return ids, [True] * len(ids)
        if not any(message["role"] == "assistant" for message in messages):
            raise LoraSuiteError(
                f"{where} has no turn of the assistant; with completion_only there is nothing to learn"
            )
        if _GENERATION.search(str(self._tokenizer.chat_template)):
            with _writing_turns(where):
                marked = self._tokenizer.apply_chat_template(
                    messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                )
            return list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
        return self._by_prefixes(messages, where)

    def _by_prefixes(self, messages: list[dict[str, Any]], where: str) -> tuple[list[int], list[bool]]:
        """The assistant's turns told from what the template writes before and behind each of them.

        Each takes writing all turns before it once more, so that turns behind the cut-off length are not looked at.
        """
        assert self._ends is not None
        whole = self._render(messages, where)
        ids, ends = self._ends(whole)
        limit = ends[min(len(ends), self._max_tokens) - 1] if ends else 0
        spans: list[tuple[int, int]] = []
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:n], where, generation=True) if n else ""
            behind = self._render(messages[: n + 1], where)
            if not (whole.startswith(behind) and behind.startswith(before)):
                raise LoraSuiteError(
                    f"{where}: the tokenizer's chat template writes turn {n + 1} differently when others follow, so "
                    "the assistant's turns cannot be told apart; leave completion_only off, or give one turn a record"
                )
            first, last = (len(text.encode("utf-8", "surrogatepass")) for text in (before, behind))
            spans.append((first, last))
            if last >= limit:
                break
        return ids, _reaching_into(spans, ends)

    def _render(self, messages: list[dict[str, Any]], where: str, generation: bool = False) -> str:
        with _writing_turns(where):
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        # The template, too, may hold half a surrogate pair.
        return whole_characters(text)


def _reaching_into(spans: list[tuple[int, int]], ends: list[int]) -> list[bool]:
    """Which tokens, by where they end, reach into one of the spans."""
    apart: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if apart and first < apart[-1][1]:
            apart[-1] = apart[-1][0], max(last, apart[-1][1])
        else:
            apart.append((first, last))
    found, at, start = [], 0, 0
    for end in ends:
        while at < len(apart) and apart[at][1] <= start:
            at += 1
        found.append(at < len(apart) and end > apart[at][0])
        start = end
    return found


@contextmanager
def _writing_turns(where: str) -> Iterator[None]:
    """Turns what a chat template raises into one line that names the record."""
    try:
        yield
    except Exception as error:
        raise LoraSuiteError(f"{where}: the tokenizer's chat template cannot write it ({reason(error)})") from None


def _string(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise LoraSuiteError(f"{where}: its {name} is {type(value).__name__}, not a string")
    return whole_characters(value)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise LoraSuiteError(f"{where}: messages must be a list of turns")
    for n, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(k), str) for k in ("role", "content")):
            raise LoraSuiteError(f"{where}: turn {n} of its messages has no role and content as strings")
    turns: list[dict[str, Any]] = _whole(value)
    return turns


def _whole(value: Any) -> Any:
    """A turn may hold strings in any depth and under any name, and a chat template may write each of them."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, Mapping):
        return {_whole(key): _whole(part) for key, part in value.items()}
    return [_whole(part) for part in value] if isinstance(value, list | tuple) else value


def load_samples(
    source: Data,
    tokenizer: Any,
    *,
    template: str = "alpaca",
    max_tokens: int = 256,
    completion_only: bool = False,
) -> Samples:
    """Every record of a source as a sample: `read_records`, then `SampleMaker`.

    Raises:
        LoraSuiteError: a source, a record or a template that cannot be used, or nothing to learn from in any record.
    """
    records = read_records(source)
    make = SampleMaker(tokenizer, template=template, max_tokens=max_tokens, completion_only=completion_only)
    made = [make(fields, where) for where, fields in records]
    kept = [sample for sample, _ in made if sample.tokens]
    if not kept:
        where = os.fspath(source) if isinstance(source, str | os.PathLike) else "the data"
        raise LoraSuiteError(
            f"{where}: within {max_tokens} tokens none of its {len(records)} records has anything to learn; raise "
            "max_tokens"
        )
    return Samples(kept, sum(cut for _, cut in made), len(made) - len(kept))
