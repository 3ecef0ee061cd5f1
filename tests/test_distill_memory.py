"""A distillation keeps to a memory budget, and goes on where it was interrupted, to the same bits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import given
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorasuite_fast import ApplyConfig, LoraSuiteError, PlanConfig, Runtime, TransferPlan, migrate
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.cli.app import app
from lorasuite_fast.distillation.distill import distill
from lorasuite_fast.distillation.layer_fit import Fit
from lorasuite_fast.distillation.settings import Distilled, Settings
from lorasuite_fast.distillation.streams import Side
from lorasuite_fast.errors import WriteError
from lorasuite_fast.io.phases import PhaseClock
from lorasuite_fast.io.stored_tensors import StoredTensors
from lorasuite_fast.io.work import Work, work_folder
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.text.calibration import load_examples

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

SIZES = {"micro_batch": 7, "rows": 100, "elements": 2**14}


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    for name, seed, d, layers, vocab in (("old", 0, 32, 3, 420), ("new", 1, 48, 4, 480)):
        save_folder(tiny_model("llama", seed, d=d, layers=layers, vocab=vocab), tiny_tokenizer(vocab), root / name)
    for n in range(2):
        random_adapter(
            root / "old", root / f"adapter-{n}", targets=["q_proj", "v_proj"], rank=4, alpha=8, seed=n, size=0.3
        )
    return root


@pytest.fixture(scope="module")
def plan(root: Path) -> Path:
    path = root / "plan"
    TransferPlan.build(root / "old", root / "new", config=PlanConfig(examples=16, method="distill")).save(path)
    return path


def distil(root: Path, work: Work | None, progress: Any = None, settings: Settings | None = None) -> Distilled:
    old, new = Checkpoint(root / "old", "old"), Checkpoint(root / "new", "new")
    source = read_adapter(root / "adapter-0", old.family, old.shape, old.name)
    return distill(
        old,
        new,
        source,
        (old.tokenizer(), new.tokenizer()),
        load_examples(None, 60, 0),
        settings or Settings(max_tokens=48),
        PhaseClock(progress),
        device=torch.device("cpu"),
        dtype=torch.float32,
        work=work,
    )


def begun(folder: Path, *, away: bool) -> Work:
    """Work that says of which sizes it is, as an interrupted run leaves it."""
    work = Work(folder, {"of": "these tests"})
    if not work.resumed:
        work.start(**SIZES, away=1 + away)
    return work


def same(one: Distilled, two: Distilled) -> bool:
    factors = [torch.equal(a, b) for key in one.fitted for a, b in zip(one.fitted[key], two.fitted[key], strict=True)]
    return all(factors) and len(factors) == 2 * len(two.fitted) and one.as_dict() == two.as_dict()


def stop_at(phase: str, step: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, _: int) -> None:
        if (name, done) == (phase, step):
            raise Stop

    return progress


def test_states_in_files_give_the_bits_states_in_memory_give(root: Path, tmp_path: Path) -> None:
    with begun(tmp_path / "memory", away=False) as work:
        inside = distil(root, work)
    with begun(tmp_path / "files", away=True) as work:
        outside = distil(root, work)
        assert (work.folder / "states").exists()
    assert not (tmp_path / "memory/states").exists()
    assert same(inside, outside)


def test_sizes_of_the_work_change_rounding_at_most(root: Path, tmp_path: Path) -> None:
    with begun(tmp_path / "work", away=True) as work:
        small = distil(root, work)
    free = distil(root, None)
    for key, (b, a) in free.fitted.items():
        found = small.fitted[key].b @ small.fitted[key].a
        torch.testing.assert_close(found, b @ a, rtol=0, atol=1e-4 * float((b @ a).abs().max()))
    assert small.explained == pytest.approx(free.explained, abs=1e-5)
    assert small.gains == pytest.approx(free.gains, abs=1e-5)
    assert small.output_r2 == pytest.approx(free.output_r2, abs=1e-9)


@pytest.mark.parametrize("control", ["shuffled", "flipped", "rotated"])
def test_controls_are_the_same_from_files(control: str, root: Path, tmp_path: Path) -> None:
    settings = Settings(max_tokens=48, control=control, layers=1)
    with begun(tmp_path / "memory", away=False) as work:
        inside = distil(root, work, settings=settings)
    with begun(tmp_path / "files", away=True) as work:
        assert same(inside, distil(root, work, settings=settings))


@pytest.mark.parametrize("away", [False, True], ids=["in memory", "in files"])
@pytest.mark.parametrize(("phase", "step"), [("adapter's effect", 2), ("output map", 1), ("fit", 3), ("fit", 4)])
def test_an_interrupted_distillation_goes_on_to_the_same_bits(
    phase: str, step: int, away: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(tmp_path / "whole", away=away) as work:
        whole = distil(root, work)
    with pytest.raises(Stop), begun(tmp_path / "work", away=away) as work:
        distil(root, work, stop_at(phase, step))
    read, fitted = [], []
    states, fit = Side.stream, Fit._fitted

    def stream(side: Any, run: Any, name: str, **options: Any) -> Any:
        read.append(name)
        return states(side, run, name, **options)

    def fitting(self: Any, layer: Any, *arguments: Any) -> Any:
        fitted.append(layer.index)
        return fit(self, layer, *arguments)

    monkeypatch.setattr(Side, "stream", stream)
    monkeypatch.setattr(Fit, "_fitted", fitting)
    with begun(tmp_path / "work", away=away) as work:
        assert same(distil(root, work), whole)
    assert ("old" in read) == (phase == "adapter's effect")
    # Steps are counted behind a layer: at 3 the first of the two fitted layers is there.
    assert fitted == ([2, 3] if phase != "fit" else [3] if step == 3 else [])


@pytest.mark.parametrize("away", [False, True], ids=["in memory", "in files"])
def test_damaged_work_is_made_again(away: bool, root: Path, tmp_path: Path) -> None:
    with begun(tmp_path / "work", away=away) as work:
        whole = distil(root, work)
    parts = sorted(path for path in (tmp_path / "work").rglob("*") if path.is_file() and path.name[0] in "ef0")
    assert {"effect.safetensors", "fit.2.safetensors"} <= {path.name for path in parts}
    for path in parts:
        path.write_bytes(path.read_bytes()[:-5])
    with begun(tmp_path / "work", away=away) as work:
        assert same(distil(root, work), whole)


def test_an_interrupted_migration_goes_on_and_leaves_nothing_behind(root: Path, tmp_path: Path) -> None:
    options = {"examples": 60, "method": "distill", "settings": Settings(max_tokens=48)}
    migrate(root / "old", root / "new", root / "adapter-0", tmp_path / "whole", **given(migrate, **options))
    with pytest.raises(Stop):
        migrate(
            root / "old",
            root / "new",
            root / "adapter-0",
            tmp_path / "out",
            **given(migrate, progress=stop_at("fit", 3), **options),
        )
    assert work_folder(tmp_path / "out").exists()
    assert not (tmp_path / "out").exists()
    migrate(root / "old", root / "new", root / "adapter-0", tmp_path / "out", **given(migrate, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == two


def test_an_interrupted_apply_goes_on_and_leaves_nothing_behind(root: Path, plan: Path, tmp_path: Path) -> None:
    loaded, settings = TransferPlan.from_pretrained(plan), Settings(max_tokens=48)
    loaded.apply(root / "adapter-0", tmp_path / "whole", config=ApplyConfig(distill=settings))
    with pytest.raises(Stop):
        loaded.apply(
            root / "adapter-0",
            tmp_path / "out",
            config=ApplyConfig(distill=settings),
            runtime=Runtime(progress=stop_at("fit", 3)),
        )
    with pytest.raises(LoraSuiteError, match="unfinished work of another run, with adapter"):
        loaded.apply(root / "adapter-1", tmp_path / "out", config=ApplyConfig(distill=settings))
    loaded.apply(root / "adapter-0", tmp_path / "out", config=ApplyConfig(distill=settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == two


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_process_killed_as_it_removed_its_work_left_goes_with_the_next_run(
    overwrite: bool, root: Path, plan: Path, tmp_path: Path
) -> None:
    loaded, settings = TransferPlan.from_pretrained(plan), Settings(max_tokens=48)
    shutil.copytree(root / "adapter-1", tmp_path / "out")
    leftover = work_folder(tmp_path / "out") / ".distill.abcd_123.tmp/work"
    leftover.mkdir(parents=True)
    (leftover / "run.json").write_text("{}")
    if overwrite:
        loaded.apply(root / "adapter-0", tmp_path / "out", config=ApplyConfig(distill=settings), overwrite=True)
    else:
        with pytest.raises(LoraSuiteError, match="exists already"):
            loaded.apply(root / "adapter-0", tmp_path / "out", config=ApplyConfig(distill=settings))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_text_that_is_too_little_leaves_no_work_behind(root: Path, plan: Path, tmp_path: Path) -> None:
    rows = (json.dumps({"text": f"a few words, {n}"}) + "\n" for n in range(12))
    (tmp_path / "text.jsonl").write_text("".join(rows))
    with pytest.raises(LoraSuiteError, match="it needs 256 positions"):
        TransferPlan.from_pretrained(plan).apply(
            root / "adapter-0", tmp_path / "out", config=ApplyConfig(text=tmp_path / "text.jsonl")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_a_refused_budget_names_one_that_is_enough(root: Path, plan: Path, tmp_path: Path) -> None:
    loaded = TransferPlan.from_pretrained(plan)
    with pytest.raises(LoraSuiteError, match="smallest budget that would do") as refusal:
        loaded.apply(root / "adapter-0", tmp_path / "out", runtime=Runtime(memory="1MB"))
    assert not list(tmp_path.iterdir())
    enough = re.search(r"`memory=(\d+)MiB`$", str(refusal.value))
    assert enough is not None
    # What this process holds by itself may have grown a little since.
    loaded.apply(root / "adapter-0", tmp_path / "out", runtime=Runtime(memory=f"{int(enough[1]) + 40}MiB"))
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_budget_too_small_for_the_model_that_writes_is_refused(root: Path, plan: Path, tmp_path: Path) -> None:
    loaded = TransferPlan.from_pretrained(plan)
    with pytest.raises(LoraSuiteError, match=r"writes text only as a whole.*in a file in the place of self"):
        loaded.apply(
            root / "adapter-0", tmp_path / "out", config=ApplyConfig(text="self"), runtime=Runtime(memory="1MB")
        )
    assert not list(tmp_path.iterdir())


def test_many_adapters_are_distilled_with_the_options_given(root: Path, plan: Path, tmp_path: Path) -> None:
    adapters = [str(root / f"adapter-{n}") for n in range(2)]
    call = ["apply", str(plan), *adapters, "--out", str(tmp_path / "out"), "--rank", "2", "--distill-layers", "1"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    for n in range(2):
        assert json.loads((tmp_path / f"out/adapter-{n}/adapter_config.json").read_text())["r"] == 2
        layers = {name.split(".")[4] for name in load_file(tmp_path / f"out/adapter-{n}/adapter_model.safetensors")}
        assert layers == {"3"}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("larger")
    tokenizer = tiny_tokenizer(600)
    old = tiny_model("llama", 0, d=256, layers=2, heads=8, kv_heads=4, head_dim=32, intermediate=512, vocab=600)
    new = tiny_model("llama", 1, d=512, layers=2, heads=8, kv_heads=8, head_dim=64, intermediate=768, vocab=600)
    save_folder(old, tokenizer, root / "old")
    save_folder(new, tokenizer, root / "new")
    random_adapter(root / "old", root / "adapter", targets=["q_proj"], rank=2, alpha=4, seed=0, size=0.3)
    TransferPlan.build(root / "old", root / "new", config=PlanConfig(examples=16, roles=("q",), method="distill")).save(
        root / "plan"
    )
    return root


@pytest.mark.parametrize("away", [False, True], ids=["in memory", "in files"])
def test_what_was_measured_stays_below_what_was_predicted(away: bool, larger: Path, tmp_path: Path) -> None:
    # The least that is accepted has the states in files.
    code = f"""
import json, re
from lorasuite_fast import LoraSuiteError, TransferPlan
from lorasuite_fast.distillation.distill import Settings
options = {{"settings": Settings(max_tokens=80)}}
plan = TransferPlan.from_pretrained({str(larger / "plan")!r})
memory = "4GB"
if {away}:
    try:
        plan.apply({str(larger / "adapter")!r}, {str(tmp_path / "out")!r}, memory="1MB", **options)
    except LoraSuiteError as error:
        memory = str(int(re.search(r"`memory=(\\d+)MiB`$", str(error))[1]) + 40) + "MiB"
result = plan.apply({str(larger / "adapter")!r}, {str(tmp_path / "out")!r}, memory=memory, **options)
print(json.dumps([[p.name, p.peak_resident, p.predicted] for p in result.phases]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    phases = {name: (peak, limit) for name, peak, limit in json.loads(done.stdout.splitlines()[-1])}
    assert list(phases)[-5:-1] == ["adapter's effect", "output map", "fit", "held-out agreement"]
    for name in list(phases)[-5:-1]:
        peak, limit = phases[name]
        assert peak <= limit, name
    # The prediction is of use where it is not far above.
    assert phases["fit"][1] < 2.5 * phases["fit"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_stored_tensors_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    given = [torch.randn(3, 4, 5).to(dtype), torch.randn(7, 2).T.to(dtype), torch.empty(0, 3, dtype=dtype)]
    stored = StoredTensors(tmp_path / "a", given)
    assert all(torch.equal(one, two) for one, two in zip(stored, given, strict=True))
    stored[1] = given[0]
    assert torch.equal(stored[1], given[0])
    stored.sync()
    again = StoredTensors.found(tmp_path / "a", [(3, 4, 5), (3, 4, 5), (0, 3)], dtype)
    assert again is not None
    assert torch.equal(again[0], given[0])
    assert StoredTensors.found(tmp_path / "a", [(3, 4, 6), (3, 4, 5), (0, 3)], dtype) is None
    assert StoredTensors.found(tmp_path / "a", [(3, 4, 5)] * 4, dtype) is None


def test_stored_tensors_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = StoredTensors(tmp_path / "a", [torch.ones(4)])
    (tmp_path / "a/00000").write_bytes(b"123")
    with pytest.raises(LoraSuiteError, match="00000: 3 of 16 bytes are there"):
        stored[0]
    (tmp_path / "a/00000").unlink()
    with pytest.raises(LoraSuiteError, match="00000: cannot be read"):
        stored[0]
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file/b: cannot be written"):
        StoredTensors(tmp_path / "file/b")
