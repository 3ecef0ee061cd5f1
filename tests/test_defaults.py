"""From Python and from the command line the same call does the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import given
from typer.testing import CliRunner

from lorasuite_fast import LoraSuiteError, RefineConfig, Runtime, TransferPlan, cli, migrate
from lorasuite_fast.pipeline import migrate as verb


@pytest.mark.parametrize("many", [False, True])
def test_apply_hands_its_options_on(many: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}

    class Stub:
        def __init__(self) -> None:
            self.options = {"seed": 0, "method": "distill"}

        def apply(self, *_: Any, **options: Any) -> None:
            taken.update(options)
            raise LoraSuiteError("stop")

        apply_all = apply

    monkeypatch.setattr(TransferPlan, "from_pretrained", lambda *_: Stub())
    (tmp_path / "plan").touch()
    (tmp_path / "adapter").mkdir()
    given = ["apply", tmp_path / "plan", tmp_path / "adapter", *(["--out"] if many else []), tmp_path / "out"]
    further = ["--device", "cpu", "--dtype", "bfloat16", "--trust-remote-code"]
    result = CliRunner().invoke(cli.app, [*map(str, given), *further])
    assert "error: stop" in result.output
    runtime = taken["runtime"]
    assert (runtime.device, runtime.dtype, runtime.trust_remote_code) == ("cpu", "bfloat16", True)


def test_a_plan_is_applied_on_this_machine_not_on_the_one_it_was_built_on() -> None:
    built = TransferPlan(None, None, {"device": "cuda", "dtype": "float32"}, {}, {}, {})  # type: ignore[arg-type]
    assert built._on("cpu", None).options == {"device": "cpu", "dtype": "float32"}
    assert built._on("cpu", "bfloat16").options == {"device": "cpu", "dtype": "bfloat16"}
    assert built.options == {"device": "cuda", "dtype": "float32"}


def test_whether_a_migration_refines_is_decided_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def decide(device: str) -> int:
        asked.append(device)
        raise LoraSuiteError("stop")

    monkeypatch.setattr(verb, "default_refinement", decide)
    paths = [str(tmp_path / name) for name in ("old", "new", "adapter", "out")]
    for folder in paths[:3]:
        Path(folder).mkdir()
    with pytest.raises(LoraSuiteError, match="stop"):
        migrate(*paths, runtime=Runtime(device="cpu"))  # type: ignore[arg-type]
    CliRunner().invoke(cli.app, ["migrate", *paths, "--device", "cpu"])
    assert asked == ["cpu", "cpu"]


def test_a_migration_refines_by_default_on_a_gpu_alone_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    on = RefineConfig()
    for found, device, wanted in ((True, "auto", on), (True, "cpu", False), (False, "auto", False), (True, "cuda", on)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert verb.default_refinement(device) == wanted
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, words in (
        ({"refine": 7}, "then refining without labels, 7 steps"),
        ({"finetune": [{}]}, "then fine-tuning on labelled data"),
    ):
        with pytest.raises(LoraSuiteError, match=r"no such (folder|file)"):
            migrate("./no", "./no", "./no", "./out", **given(migrate, say=said.append, **options))  # type: ignore[arg-type]
        assert words in said[-1]
    assert len(said) == 2
