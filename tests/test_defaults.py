"""From Python and from the command line the same call does the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lorasuite_fast import LoraSuiteError, TransferPlan, cli, finetune, migrate, refine, verify
from lorasuite_fast.cli import carrying, training, verification
from lorasuite_fast.pipeline import migrate as verb

ELSEWHERE = {"overwrite", "report_file", "as_json", "seed"}
"""Options whose default is checked elsewhere, or which the command line has alone."""


@pytest.mark.parametrize(
    ("command", "functions", "renamed"),
    [
        (carrying.migrate, (migrate, TransferPlan.build), {}),
        (carrying.plan, (TransferPlan.build,), {"roles": None}),
        (carrying.apply, (TransferPlan.apply,), {"out": None}),
        (training.refine, (refine,), {"patience": None, "top_k": None}),
        (training.finetune, (finetune,), {}),
        (verification.verify, (verify,), {}),
    ],
)
def test_an_option_has_one_default(
    command: Callable[..., Any], functions: tuple[Callable[..., Any], ...], renamed: dict[str, Any]
) -> None:
    python = {name: p.default for f in reversed(functions) for name, p in inspect.signature(f).parameters.items()}
    compared = 0
    for name, parameter in inspect.signature(command).parameters.items():
        if (
            name in python
            and name not in ELSEWHERE | renamed.keys()
            and parameter.default is not inspect.Parameter.empty
        ):
            assert parameter.default == python[name], name
            compared += 1
    assert compared >= 4


def test_apply_offers_what_its_function_takes() -> None:
    offered = inspect.signature(carrying.apply).parameters
    assert {"device", "dtype", "trust_remote_code", "memory", "old", "new", "text"} <= offered.keys()


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
    assert (taken["device"], taken["dtype"], taken["trust_remote_code"]) == ("cpu", "bfloat16", True)


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
        migrate(*paths, device="cpu")  # type: ignore[arg-type]
    CliRunner().invoke(cli.app, ["migrate", *paths, "--device", "cpu"])
    assert asked == ["cpu", "cpu"]


def test_a_migration_refines_by_default_on_a_gpu_alone_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for found, device, steps in ((True, "auto", "auto"), (True, "cpu", 0), (False, "auto", 0), (True, "cuda", "auto")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert verb.default_refinement(device) == steps
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, words in (
        ({"refine": 7}, "then refining without labels, 7 steps"),
        ({"finetune": [{}]}, "then fine-tuning on labelled data"),
    ):
        with pytest.raises(LoraSuiteError, match=r"no such (folder|file)"):
            migrate("./no", "./no", "./no", "./out", say=said.append, **options)  # type: ignore[arg-type]
        assert words in said[-1]
    assert len(said) == 2
