"""A memory budget decides the sizes of the work before it starts, and holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorasuite_fast import Runtime, TransferPlan
from lorasuite_fast.config import parse_memory
from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.families import ATTENTION, ROLES
from lorasuite_fast.transfer.memory import Demand

from planted import save_folder, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6 * 10**9),
        ("512MiB", 512 << 20),
        ("1.5 g", 1_500_000_000),
        ("20480000", 20480000),
        (7 << 20, 7 << 20),
        ("3Ti", 3 << 40),
    ],
)
def test_sizes_are_read_in_the_usual_units(text: str | int, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "6 apples", "-1GB", "0", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(LoraSuiteError, match="expected a size such as 6GB"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["6", "0.5M", 6, "999k"])
def test_a_size_without_its_unit_is_refused(text: str | int) -> None:
    with pytest.raises(LoraSuiteError, match="less than any model needs") as refusal:
        parse_memory(text)
    assert ("did you mean 6GB?" in str(refusal.value)) == (str(text) == "6")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    old = tiny_model("llama", 0, d=256, layers=3, heads=8, kv_heads=4, head_dim=32, intermediate=1024, vocab=600)
    new = tiny_model("llama", 1, d=384, layers=4, heads=8, kv_heads=8, head_dim=48, intermediate=2048, vocab=600)
    tokenizer = tiny_tokenizer(600)
    return save_folder(old, tokenizer, root / "old"), save_folder(new, tokenizer, root / "new")


def demand(pair: tuple[Path, Path], *, base: int = 0) -> Demand:
    return Demand(Checkpoint(pair[0]), Checkpoint(pair[1]), ATTENTION, 64, 129, torch.float32, CPU, base)


def test_a_smaller_budget_means_smaller_micro_batches_and_chunks(pair: tuple[Path, Path]) -> None:
    asked = demand(pair)
    free = asked.fit(None)
    least = max(asked.predict(1, 256).values())
    assert asked.fit(10 * free.peak).micro_batch == free.micro_batch == 16
    assert asked.fit(least).micro_batch == 1
    assert asked.predict(1, 256)["transfer matrix"] < asked.predict(1, 4096)["transfer matrix"]
    for budget in range(least, free.peak, (free.peak - least) // 7 or 1):
        assert asked.fit(budget).peak <= budget


def test_what_cannot_fit_is_refused_with_the_smallest_budget_that_would_do(pair: tuple[Path, Path]) -> None:
    asked = demand(pair, base=200 << 20)
    with pytest.raises(LoraSuiteError, match="smallest budget that would do") as refusal:
        asked.fit(100 << 20)
    enough = re.search(r"`memory=(\d+MiB)`$", str(refusal.value))
    assert enough is not None
    assert asked.fit(parse_memory(enough[1])).micro_batch >= 1
    with pytest.raises(LoraSuiteError):
        asked.fit(parse_memory(enough[1]) - (1 << 20))


def test_a_refused_budget_leaves_nothing_behind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="smallest budget"):
        TransferPlan.build(*pair, runtime=Runtime(memory="1MB"), work=tmp_path / "work")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("roles", [ATTENTION, ROLES])
def test_what_was_measured_stays_below_what_was_predicted(pair: tuple[Path, Path], roles: tuple[str, ...]) -> None:
    code = f"""
import json
from lorasuite_fast import TransferPlan
plan = TransferPlan.build({str(pair[0])!r}, {str(pair[1])!r}, roles={roles!r}, memory="1500MB")
print(json.dumps([[p.name, p.peak_resident, p.predicted] for p in plan.phases]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    phases = json.loads(done.stdout.splitlines()[-1])
    predicted = [(name, peak, limit) for name, peak, limit in phases if limit is not None]
    assert len(predicted) == 4
    for name, peak, limit in predicted:
        assert peak <= limit <= 1500 * 10**6, name
