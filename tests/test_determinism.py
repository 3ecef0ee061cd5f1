"""The same inputs give the same bits, however the work is divided; processes side by side do not meet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasuite_fast import PlanConfig, TransferPlan, migrate
from lorasuite_fast.io.work import work_folder
from lorasuite_fast.transfer import memory

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

EXAMPLES = 8
THREADS_BOUND = 1e-6
"""Relative difference of a plan's tensors between numbers of threads, which may order a product's sums differently."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    tokenizer = tiny_tokenizer(320)
    old = save_folder(tiny_model("llama", 0, layers=3), tokenizer, root / "old")
    return old, save_folder(tiny_model("llama", 1, d=48, layers=4), tokenizer, root / "new")


@pytest.fixture(scope="module")
def adapter(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    return random_adapter(pair[0], folder, targets=["q_proj", "o_proj", "up_proj"], rank=2, alpha=4, seed=0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(*arguments: object, threads: int = 1, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lorasuite_fast", *map(str, arguments)]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads)} | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    errors = [process.communicate()[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.mark.parametrize("method", ["lstsq", "distill"])
def test_the_same_run_twice_gives_the_same_bits(
    method: str, pair: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        migrate(*pair, adapter, tmp_path / name, plan=PlanConfig(method=method, examples=EXAMPLES))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_size_of_the_micro_batches_does_not_change_a_bit(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for size in (1, 3, 16):
        monkeypatch.setattr(memory, "MICRO_BATCH", size)
        plan = TransferPlan.build(*pair, config=PlanConfig(examples=EXAMPLES, method="lstsq"))
        plan.save(tmp_path / f"plan-{size}")
        written.append((tmp_path / f"plan-{size}").read_bytes())
    assert written[0] == written[1] == written[2]


def test_the_number_of_threads_changes_rounding_at_most(pair: tuple[Path, Path], tmp_path: Path) -> None:
    common = ("plan", *pair)
    runs = [start(*common, tmp_path / str(n), "--examples", EXAMPLES, threads=n) for n in (1, 2)]
    assert [code for code, _ in ended(runs)] == [0, 0]
    one, two = (TransferPlan.load(tmp_path / str(n)) for n in (1, 2))
    assert one.layers == two.layers
    for name, tensor in one.tensors.items():
        if tensor.dtype.is_floating_point:
            difference = torch.linalg.vector_norm((two.tensors[name] - tensor).double())
            assert difference <= THREADS_BOUND * torch.linalg.vector_norm(tensor.double()), name
        else:
            assert torch.equal(tensor, two.tensors[name]), name


def test_two_migrations_into_one_out_leave_one_whole_result(
    pair: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcomes = ended(
        [start("migrate", *pair, adapter, out, "--examples", EXAMPLES, "--method", "lstsq") for _ in range(2)]
    )
    codes = sorted(code for code, _ in outcomes)
    assert codes[0] == 0
    for code, error in outcomes:
        if code:
            assert code == 2
            assert "another process is building the same output" in error or "exists already" in error
    migrate(*pair, adapter, tmp_path / "alone", plan=PlanConfig(examples=EXAMPLES, method="lstsq"))
    assert load_file(out / "adapter_model.safetensors").keys()
    assert files(out) == files(tmp_path / "alone")
    assert not work_folder(out).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def cached(cache: Path, repository: str, folder: Path) -> None:
    """A model in the layout of the hub's cache: files in blobs, links to them in a snapshot."""
    root = cache / f"models--{repository.replace('/', '--')}"
    revision = "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(revision)
    (root / "blobs").mkdir()
    (root / "snapshots" / revision).mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy2(file, root / "blobs" / file.name)
        (root / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{file.name}")


def test_two_migrations_share_a_hub_cache(pair: tuple[Path, Path], adapter: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cached(cache, "someone/old", pair[0])
    cached(cache, "someone/new", pair[1])
    # Names the base by the hub id it is migrated from.
    named = tmp_path / "adapter"
    shutil.copytree(adapter, named)
    config = json.loads((named / "adapter_config.json").read_text())
    (named / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/old"}))
    runs = [
        start(
            *("migrate", "someone/old", "someone/new", named, tmp_path / f"out-{n}", "--examples", EXAMPLES),
            HF_HUB_CACHE=str(cache),
            HF_HUB_OFFLINE="1",
        )
        for n in range(2)
    ]
    outcomes = ended(runs)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert files(tmp_path / "out-0") == files(tmp_path / "out-1")


def test_a_plan_is_applied_by_four_processes_at_once(pair: tuple[Path, Path], adapter: Path, tmp_path: Path) -> None:
    plan = TransferPlan.build(*pair, config=PlanConfig(examples=EXAMPLES, method="lstsq"))
    plan.save(tmp_path / "plan")
    plan.apply(adapter, tmp_path / "alone")
    runs = [start("apply", tmp_path / "plan", adapter, tmp_path / f"out-{n}") for n in range(4)]
    outcomes = ended(runs)
    assert [code for code, _ in outcomes] == [0] * 4, outcomes
    for n in range(4):
        assert files(tmp_path / f"out-{n}") == files(tmp_path / "alone")
