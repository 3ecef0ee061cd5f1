"""Several processes build the plan one process builds, to the bit, and share a list of adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorasuite_fast.io.ranks import Ranks
from lorasuite_fast.io.work import work_folder

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer


def run(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # Sums of a product may depend on how many threads share it: one each, as torchrun sets it.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "lorasuite_fast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    tokenizer = tiny_tokenizer(320)
    old = save_folder(tiny_model("llama", 0, layers=3), tokenizer, root / "old")
    return old, save_folder(tiny_model("llama", 1, d=48, layers=5), tokenizer, root / "new")


def test_two_processes_build_the_same_plan_to_the_bit_and_share_adapters(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for processes in (1, 2):
        done = run(processes, "plan", *pair, tmp_path / f"plan-{processes}", "--examples", 8)
        assert done.returncode == 0, done.stderr
        assert not work_folder(tmp_path / f"plan-{processes}").exists()
    assert (tmp_path / "plan-1").read_bytes() == (tmp_path / "plan-2").read_bytes()
    adapters = [
        random_adapter(pair[0], tmp_path / f"adapter-{n}", targets=["q_proj", "down_proj"], rank=2, alpha=4, seed=n)
        for n in range(3)
    ]
    for processes in (1, 2):
        done = run(processes, "apply", tmp_path / "plan-1", *adapters, "--out", tmp_path / f"out-{processes}")
        assert done.returncode == 0, done.stderr
        assert "carried: 3 of 3" in done.stdout
    for n in range(3):
        one, two = (tmp_path / f"out-{p}/adapter-{n}/adapter_model.safetensors" for p in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_two_processes_agree_on_another_measure_of_similarity(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for processes in (1, 2):
        options = ("--examples", 8, "--roles", "q", "--similarity", "pwcca")
        done = run(processes, "plan", *pair, tmp_path / f"plan-{processes}", *options)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan-1").read_bytes() == (tmp_path / "plan-2").read_bytes()


def test_one_bad_adapter_among_many_fails_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    assert run(1, "plan", *pair, plan, "--examples", 8).returncode == 0
    good, bad = (
        random_adapter(pair[0], tmp_path / name, targets=["q_proj"], rank=2, alpha=4, seed=0)
        for name in ("good", "bad")
    )
    (bad / "adapter_model.safetensors").write_bytes(b"nothing")
    done = run(1, "apply", plan, good, bad, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "carried: 1 of 2" in done.stdout
    assert "bad" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good"]


def test_blocks_of_layers_cover_everything_once_and_in_order() -> None:
    for size in (1, 2, 3, 7):
        for start, stop in ((0, 5), (2, 12), (4, 4)):
            blocks = [Ranks(rank, size).block(start, stop) for rank in range(size)]
            assert [i for block in blocks for i in block] == list(range(start, stop))
            assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
