"""A build killed at any moment goes on where it stopped, and gives the plan an uninterrupted one gives, to the bit."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flat_options import given
from typer.testing import CliRunner

from lorasuite_fast import PlanConfig, Runtime, TransferPlan, migrate
from lorasuite_fast.cli.app import app
from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.io.work import Work, clean_up, work_folder

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

EXAMPLES = 8
# Sums of a product may depend on how many threads share it: one, as in this process.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    tokenizer = tiny_tokenizer(320)
    old = save_folder(tiny_model("llama", 0, layers=6), tokenizer, root / "old")
    return old, save_folder(tiny_model("llama", 1, d=48, layers=8), tokenizer, root / "new")


def plan_command(pair: tuple[Path, Path], out: Path) -> list[str]:
    return [sys.executable, "-m", "lorasuite_fast", "plan", *map(str, pair), str(out), "--examples", str(EXAMPLES)]


@pytest.fixture(scope="module")
def whole(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "plan"
    subprocess.run(plan_command(pair, out), check=True, capture_output=True, env=ENVIRONMENT)
    assert not work_folder(out).exists()
    return out.read_bytes()


class Stop(Exception):
    pass


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_an_interrupted_build_goes_on_to_the_same_bits(
    pair: tuple[Path, Path], whole: bytes, tmp_path: Path, fraction: float
) -> None:
    steps: list[tuple[str, int]] = []
    TransferPlan.build(
        *pair,
        config=PlanConfig(examples=EXAMPLES),
        runtime=Runtime(progress=lambda phase, done, _: steps.append((phase, done))),
    )
    stop_at = int(fraction * len(steps))
    seen = 0

    def interrupt(phase: str, done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen > stop_at:
            raise Stop

    options = {"examples": EXAMPLES, "work": tmp_path / "work"}
    with pytest.raises(Stop):
        TransferPlan.build(*pair, **given(TransferPlan.build, progress=interrupt, **options))
    plan = TransferPlan.build(*pair, **given(TransferPlan.build, **options))
    plan.save(tmp_path / "plan")
    plan.finish()
    assert (tmp_path / "plan").read_bytes() == whole
    assert not (tmp_path / "work").exists()


def test_what_is_finished_is_not_done_again(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    TransferPlan.build(*pair, config=PlanConfig(examples=EXAMPLES), work=work)
    for module, name in (
        ("transfer.compare", "build_transfer"),
        ("transfer.compare", "LayerStream"),
        ("transfer.build", "_pair"),
    ):
        monkeypatch.setattr(f"lorasuite_fast.{module}.{name}", lambda *_, **__: pytest.fail("done again"))
    TransferPlan.build(*pair, config=PlanConfig(examples=EXAMPLES), work=work)


def test_a_build_killed_at_random_moments_ends_with_the_same_bits(
    pair: tuple[Path, Path], whole: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "plan"
    started = time.monotonic()
    subprocess.run(plan_command(pair, tmp_path / "timed"), check=True, capture_output=True, env=ENVIRONMENT)
    duration = time.monotonic() - started
    (tmp_path / "timed").unlink()
    random_moments = random.Random()
    kills = 0
    for _ in range(8):
        process = subprocess.Popen(
            plan_command(pair, out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=ENVIRONMENT,
        )
        try:
            process.wait(random_moments.uniform(0.3, 1.0) * duration)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            # Never a part of it; the last moments may lie behind its appearance.
            assert not out.exists() or out.read_bytes() == whole
    subprocess.run(plan_command(pair, out), check=not out.exists(), capture_output=True, env=ENVIRONMENT)
    assert out.read_bytes() == whole, f"after {kills} kills"
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"examples": EXAMPLES + 1}, "calibration text"),
        ({"heads": "identity"}, "option heads"),
        ({"roles": ("q", "v")}, "option roles"),
        ({"method": "paper"}, "option method"),
    ],
)
def test_another_input_does_not_resume_and_says_why(
    pair: tuple[Path, Path], tmp_path: Path, changed: dict[str, object], named: str
) -> None:
    options: dict[str, object] = {"examples": EXAMPLES, "work": tmp_path / "work"}
    TransferPlan.build(*pair, **given(TransferPlan.build, **options))  # type: ignore[arg-type]
    before = sorted(path.name for path in (tmp_path / "work").iterdir())
    with pytest.raises(LoraSuiteError, match=f"unfinished work of another run, with {named}"):
        TransferPlan.build(*pair, **given(TransferPlan.build, **options | changed))  # type: ignore[arg-type]
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == before


def test_a_model_replaced_in_between_does_not_resume(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_folder(tiny_model("llama", 7, layers=6), tiny_tokenizer(320), tmp_path / "other")
    TransferPlan.build(*pair, config=PlanConfig(examples=EXAMPLES), work=tmp_path / "work")
    with pytest.raises(LoraSuiteError, match="unfinished work of another run, with old model"):
        TransferPlan.build(other, pair[1], config=PlanConfig(examples=EXAMPLES), work=tmp_path / "work")


def test_two_builds_of_one_output_do_not_meet(tmp_path: Path) -> None:
    first = Work(tmp_path / "work", {"a": 1})
    with pytest.raises(LoraSuiteError, match="another process is building the same output"):
        Work(tmp_path / "work", {"a": 1})
    first.close()
    Work(tmp_path / "work", {"a": 1}).close()


def test_work_removed_between_opening_and_locking_it_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Work(tmp_path / "work", {"a": 1})
    first.start(chosen=1)
    lock = fcntl.flock

    def late(handle: int, operation: int) -> None:
        monkeypatch.undo()
        first.discard()
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    second = Work(tmp_path / "work", {"a": 2})
    assert not second.resumed
    second.save("part", {"x": torch.ones(1)})
    assert second.load("part") is not None
    with pytest.raises(LoraSuiteError, match="another process is building the same output"):
        Work(tmp_path / "work", {"a": 2})
    second.discard()
    assert not list(tmp_path.iterdir())


def test_work_that_another_run_goes_on_with_is_left_to_it(tmp_path: Path) -> None:
    first = Work(tmp_path / "work", {"a": 1})
    first.start(chosen=1)
    first.complete()
    first.close()
    second = Work(tmp_path / "work", {"a": 1})
    (tmp_path / "out").touch()
    first.discard()
    clean_up(tmp_path / "out", tmp_path / "work")
    second.save("part", {"x": torch.ones(1)})
    second.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_work_whose_output_was_written_goes_with_the_next_run(tmp_path: Path) -> None:
    first = Work(tmp_path / "work", {"a": 1})
    first.complete()
    first.close()
    (tmp_path / ".work.abcd_123.tmp").mkdir()  # of a process killed as it removed its work
    clean_up(tmp_path / "out", tmp_path / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    (tmp_path / "out").touch()
    clean_up(tmp_path / "out", tmp_path / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_plan_refused_at_its_end_leaves_no_work_behind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "plan"
    save = TransferPlan.save

    def written_meanwhile(plan: TransferPlan, path: Path, **options: bool) -> None:
        out.write_text("another's")
        save(plan, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransferPlan, "save", written_meanwhile)
        assert CliRunner().invoke(app, plan_command(pair, out)[3:]).exit_code == 2
    assert out.read_text() == "another's"
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_damaged_part_is_made_again(pair: tuple[Path, Path], whole: bytes, tmp_path: Path) -> None:
    work = tmp_path / "work"
    TransferPlan.build(*pair, config=PlanConfig(examples=EXAMPLES), work=work)
    for name in ("transfer", "old.gram.3", "new.state.0", "pair.*"):
        path = next(work.glob(f"{name}.safetensors"))
        path.write_bytes(path.read_bytes()[:-5])
    plan = TransferPlan.build(*pair, config=PlanConfig(examples=EXAMPLES), work=work)
    plan.save(tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes() == whole


def test_migrate_leaves_no_work_behind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = random_adapter(pair[0], tmp_path / "adapter", targets=["q_proj", "o_proj"], rank=2, alpha=4, seed=0)
    migrate(*pair, adapter, tmp_path / "out", plan=PlanConfig(examples=EXAMPLES))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_migration_refused_for_its_adapter_leaves_no_work_behind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = random_adapter(pair[0], tmp_path / "adapter", targets=["q_proj"], rank=2, alpha=4, seed=0)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraSuiteError):
        migrate(*pair, adapter, tmp_path / "out", plan=PlanConfig(examples=EXAMPLES))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
