"""Small arithmetic word problems of one step, from templates and a seeded generator, and how answers are graded."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Record = dict[str, str]
NAMES = ("Ann", "Ben", "Carl", "Dan", "Eva", "Ian", "Jan", "Lee", "Max", "Peter", "Sam", "Tom")
THINGS = ("books", "cards", "files", "keys", "lines", "points", "rings", "tables")
TEMPLATES = {
    "+": (
        "{name} has {a} {things} and gets {b} more. How many now?",
        "{name} had {a} {things} and then found {b}. How many in all?",
        "There are {a} {things} here and {name} adds {b}. What is the total?",
    ),
    "-": (
        "{name} has {a} {things} and gives {b} of them. How many are left?",
        "{name} had {a} {things} but lost {b}. How many are left?",
        "There are {a} {things} here and {name} takes {b}. What is left?",
    ),
}
ANSWER_TOKENS = 5
"""Generated at most: a space, two digits and the end, one token each at worst."""
_NUMBER = re.compile(r"\s*(\d+)\s*")


@dataclass(frozen=True)
class Difficulty:
    """Which problems there are: both numbers from 1 to `largest`, no result below 0."""

    largest: int = 9
    operations: tuple[str, ...] = ("+", "-")


def problems(count: int, seed: int, difficulty: Difficulty, *, without: Sequence[Record] = ()) -> list[Record]:
    """Different problems as `prompt` and `completion` (a space and the number), none of them in `without`.

    Raises:
        ValueError: there are not as many.
    """
    draw = random.Random(seed)
    known = {record["prompt"] for record in without}
    found: list[Record] = []
    for _ in range(100 * count):
        if len(found) == count:
            return found
        operation = draw.choice(difficulty.operations)
        a, b = draw.randint(1, difficulty.largest), draw.randint(1, difficulty.largest)
        if operation == "-" and b > a:
            a, b = b, a
        template = draw.choice(TEMPLATES[operation])
        text = template.format(name=draw.choice(NAMES), things=draw.choice(THINGS), a=a, b=b)
        if text not in known:
            known.add(text)
            found.append({"prompt": text, "completion": f" {a + b if operation == '+' else a - b}"})
    raise ValueError(f"no {count} different problems of {difficulty} in {100 * count} draws")


def fixed_answers(records: Sequence[Record]) -> float:
    """What a model scores that gives every addition one number and every subtraction one, the best two."""
    answers: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    for record in records:
        first, second = (int(number) for number in re.findall(r"\d+", record["prompt"]))
        answer = int(record["completion"])
        answers[first + second == answer][answer] += 1
    return sum(max(counts.values(), default=0) for counts in answers.values()) / len(records)


def exact_match(model: Any, tokenizer: Any, records: Sequence[Record], *, batch: int = 125) -> float:
    """The share of problems whose answer, generated greedily after the prompt, is the number and nothing else.

    Rows of a batch have the same number of tokens, so that nothing is padded.
    """
    front = tokenizer("a")["input_ids"]
    front = front[: len(front) - len(tokenizer("a", add_special_tokens=False)["input_ids"])]
    rows = defaultdict(list)
    for record in records:
        ids = [*front, *tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]]
        rows[len(ids)].append((ids, int(record["completion"])))
    was_training = model.training
    model.eval()
    right = 0
    with torch.inference_mode():
        for group in rows.values():
            for first in range(0, len(group), batch):
                ids = torch.tensor([ids for ids, _ in group[first : first + batch]])
                written = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=ANSWER_TOKENS,
                    pad_token_id=tokenizer.eos_token_id,
                )[:, ids.shape[1] :]
                for answer, (_, wanted) in zip(written, group[first:], strict=False):
                    number = _NUMBER.fullmatch(tokenizer.decode(answer, skip_special_tokens=True))
                    right += number is not None and int(number[1]) == wanted
    model.train(was_training)
    return right / len(records)
