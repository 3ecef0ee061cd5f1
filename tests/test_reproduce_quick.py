"""The reproduction's plumbing: word problems and their grading, every kind of stage on a tiny pair, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
try:
    import reproduce_report
    import word_problems
finally:
    sys.path.remove(str(ROOT / "bench"))


class Tokenizer:
    """A character a token, with a token in front."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(i) for i in ids.tolist() if i > 1)


class Answering:
    """A model that answers each prompt as told."""

    training = False

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        rows = []
        for ids in input_ids.tolist():
            assert ids[0] == 1
            answer = [ord(c) for c in self.answers["".join(map(chr, ids[1:]))]][:max_new_tokens]
            rows.append([*ids, *answer, *[0] * (max_new_tokens - len(answer))])
        return torch.tensor(rows)


@pytest.mark.parametrize(
    ("answer", "right"), [(" 7", True), ("7", True), (" 8", False), (" 17", False), (" 7 8", False), ("", False)]
)
def test_an_answer_is_right_where_it_is_the_number_and_nothing_else(answer: str, right: bool) -> None:
    records = [{"prompt": "a?", "completion": " 7"}, {"prompt": "bcd?", "completion": " 3"}]
    model = Answering({"a?": answer, "bcd?": " 3"})
    assert word_problems.exact_match(model, Tokenizer(), records) == (1.0 if right else 0.5)


def test_no_problem_is_in_two_sets_and_every_answer_is_the_result() -> None:
    difficulty = word_problems.Difficulty(5)
    test = word_problems.problems(200, 1, difficulty)
    train = word_problems.problems(1000, 2, difficulty, without=test)
    assert len({r["prompt"] for r in [*test, *train]}) == 1200
    for record in train:
        a, b = (int(word) for word in record["prompt"].replace(".", " ").split() if word.isdigit())
        added = any(word in record["prompt"] for word in ("more", "found", "adds"))
        assert int(record["completion"]) == (a + b if added else a - b)
        assert a - b >= 0 or added


def test_asking_for_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="different problems"):
        word_problems.problems(2000, 0, word_problems.Difficulty(1, ("+",)))


def rows(**scores: list[float]) -> Any:
    """Exact match by row and seed, of a pair whose new model alone reaches 0.1."""
    data: dict[str, Any] = {"p/arithmetic/0/new": {"bits": {"exact_match": 0.1}}}
    for row, values in scores.items():
        for seed, value in enumerate(values):
            data[f"p/arithmetic/{seed}/{row.replace('_', '-')}"] = {"bits": {"exact_match": value}}
    return reproduce_report.Measured(data)


def test_a_share_is_of_the_gain_of_lora_on_everything_with_the_same_seed() -> None:
    measured = rows(full=[0.9, 0.5], few_paper=[0.5, 0.5])
    assert measured.shares("p", "arithmetic", "few-paper") == pytest.approx([0.5, 1.0])


def test_a_lead_within_the_spread_of_the_seeds_does_not_count() -> None:
    judge = reproduce_report._lead("few")
    clear = rows(full=[0.9] * 3, few_nothing=[0.3] * 3, few_paper=[0.5, 0.52, 0.51])
    noisy = rows(full=[0.9] * 3, few_nothing=[0.3] * 3, few_paper=[0.1, 0.9, 0.2])
    assert judge(clear, "p", "arithmetic").startswith("**yes**")
    assert judge(noisy, "p", "arithmetic").startswith("**no**")


def test_what_is_not_measured_is_said_not_to_be() -> None:
    text = reproduce_report.report(rows(full=[0.9]), ["p/arithmetic/0/full", "p/arithmetic/0/few-paper"])
    assert "1 of 2 stages are not measured yet" in text
    assert "- `p/arithmetic/0`: few-paper" in text
    assert "| LoRASuite with LFT(100), best setting | 0 | not measured yet" in text


def test_a_quick_run_makes_every_kind_of_stage_once_and_reports_every_row(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench/reproduce.py"), "--quick", "--work", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels/torch-ext")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    def run(*more: str) -> str:
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    made = run()
    report = (tmp_path / "reproduce.md").read_text()
    assert "not measured yet.**" not in report
    for row, (name, _) in reproduce_report.ROWS.items():
        if row not in reproduce_report.FURTHER:
            assert report.count(f"| {name} | 1 |") == len(reproduce_report.TASKS)
    for figure in ("rows", "rates"):
        assert (tmp_path / f"reproduce-{figure}.png").stat().st_size > 5_000
    cost = json.loads((tmp_path / "results/quick/bible/0/cost-lft.json").read_text())
    assert cost["cpu_seconds"] > 0
    assert cost["peak_memory"] > 50 * 2**20
    stages = run("--list").splitlines()
    assert all(stage.startswith("there") for stage in stages)
    for stage in stages:
        assert made.count(f" {stage.split()[1]}: ") == 1
