"""What a person meets first: help, completion, doctor, inspect, progress where there is no terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from lorasuite_fast import PlanConfig, TransferPlan
from lorasuite_fast.cli import doctor
from lorasuite_fast.cli.app import app
from lorasuite_fast.cli.running import _PlainProgress

from planted import save_folder, tiny_model, tiny_tokenizer

COMMANDS = ("migrate", "plan", "apply", "inspect", "verify", "check", "refine", "finetune", "doctor")
TALLEST = 60


def help_of(command: str) -> list[str]:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_all_commands_are_covered_here() -> None:
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(command: str) -> None:
    lines = help_of(command)
    assert len(lines) <= TALLEST
    assert any(f": lorasuite-fast {command} " in f"{line} " for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_one_line_of_help(command: str) -> None:
    lines = help_of(command)
    options = lines[next(n for n, line in enumerate(lines) if "─ Options ─" in line) :]
    rows = [line.strip("│") for line in options if line.startswith("│")]
    assert rows
    for row in rows:
        assert row.startswith(" --"), f"{command} wraps: {row}"


def test_defaults_in_help_are_those_of_the_commands() -> None:
    text = "\n".join(help_of("migrate"))
    assert re.search(r"--method .*\[auto\]", text)
    assert re.search(r"--examples .*\[64\]", text)


def test_completion_offers_commands_and_options() -> None:
    def complete(words: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "lorasuite_fast"],
            env=os.environ
            | {
                "_PYTHON_M_LORASUITE_FAST_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split())),
            },
            capture_output=True,
            text=True,
        ).stdout

    assert {"migrate", "inspect", "doctor"} <= set(complete("lorasuite-fast ").split())


def test_doctor_names_versions_devices_kernels_disk_and_cache() -> None:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["doctor"])
    for word in ("torch", "safetensors", "cpu", "GiB", "hub cache", "everything needed is here"):
        assert word in result.stdout
    assert result.exit_code == 0


def test_doctor_json_tells_how_every_kernel_runs() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert found["fine"] is True
    on_cpu = [kernel for kernel in found["kernels"] if kernel["device"] == "cpu"]
    assert {kernel["operator"] for kernel in on_cpu} == set(doctor.OPERATORS)
    assert {kernel["runs"] for kernel in on_cpu} == {"torch"}


def test_doctor_shows_a_gpu_with_its_memory_and_why_it_runs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import lorasuite_kernels.dispatch as dispatch

    old_gpu = SimpleNamespace(name="Tesla P100", major=6, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: old_gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda n: (2**33, 2**34))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    reason = "the kernels need a GPU of sm_80 or newer"
    real = dispatch.implementation
    monkeypatch.setattr(
        dispatch, "implementation", lambda d, operator: ("torch", reason) if d.type == "cuda" else real(d)
    )
    found = doctor.examine()
    assert found.devices[1] == doctor.Device("cuda:0", "Tesla P100, sm_60, no bfloat16", 2**34, 2**33)
    assert f"cuda:0 runs the PyTorch twins: {reason}" in found.advice
    assert not any("sees no GPU" in sentence for sentence in found.advice)


def test_doctor_knows_every_operator_with_a_kernel() -> None:
    source = Path(doctor.__file__).parents[2] / "kernels/torch-ext/lorasuite_kernels"
    found = re.findall(r'kernel=\("\w+", "(\w+)"\)', "".join(path.read_text() for path in source.glob("*.py")))
    assert set(found) == set(doctor.OPERATORS)


def test_doctor_says_interpreter_where_the_interpreter_runs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert {kernel.runs for kernel in doctor.examine().kernels if kernel.device == "cpu"} == {"interpreter"}


def test_doctor_fails_and_says_what_to_do_where_a_needed_package_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.1" if name == "peft" else real(name))
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "PROBLEM: peft is 0.1; pip install 'peft>=" in result.stdout


def test_doctor_fails_where_a_needed_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "safetensors" else real(name))
    assert [p for p in doctor.examine().problems if p.startswith("safetensors is not installed")]


@pytest.mark.parametrize(("found", "least", "fine"), [("2.10.1", "2.6", True), ("2.5.9", "2.6", False)])
def test_versions_are_compared_as_numbers(found: str, least: str, fine: bool) -> None:
    assert doctor.Package("torch", found, least, True).fine is fine


def test_doctor_advises_on_little_memory_and_an_offline_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(doctor, "_memory", lambda: (2**33, 2**30))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    advice = " ".join(doctor.examine().advice)
    assert "only 1.0 GiB of memory are free: pass --memory 0.8GB" in advice
    assert "HF_HUB_OFFLINE is set" in advice


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("inspect")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    plan = TransferPlan.build(root / "old", root / "new", config=PlanConfig(method="lstsq", examples=8))
    plan.save(root / "plan")
    return SimpleNamespace(root=root, plan=plan, file=root / "plan")


def inspected(planned: Any) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["inspect", str(planned.file), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_inspect_opens_neither_model(planned: Any, tmp_path: Path) -> None:
    before = inspected(planned)
    for name in ("old", "new"):
        (planned.root / name).rename(tmp_path / name)
    try:
        assert inspected(planned) == before
    finally:
        for name in ("old", "new"):
            (tmp_path / name).rename(planned.root / name)


def test_inspect_counts_matches_and_their_cosines(planned: Any) -> None:
    found = inspected(planned)
    assert found["unpartnered_new_layers"] == [j for j in range(3) if j not in planned.plan.layers]
    for layer in found["layers"]:
        similarity = planned.plan.tensors[f"layers.{layer['new']}.heads.similarity"]
        match = planned.plan.tensors[f"layers.{layer['new']}.heads.match"].tolist()
        cosines = [float(similarity[a, b]) for b, a in enumerate(match) if a >= 0]
        assert layer["heads"]["matched"] == len(cosines)
        assert layer["heads"]["mean_cosine"] == pytest.approx(sum(cosines) / len(cosines))
        assert layer["heads"]["least_cosine"] == pytest.approx(min(cosines))


def test_inspect_accounts_for_every_byte_of_the_tensors(planned: Any) -> None:
    found = inspected(planned)
    assert sum(found["bytes"].values()) == sum(t.numel() * t.element_size() for t in planned.plan.tensors.values())
    assert planned.file.stat().st_size - sum(found["bytes"].values()) < 50_000


def test_inspect_shows_models_layers_options_and_sizes(planned: Any) -> None:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["inspect", str(planned.file)])
    assert result.exit_code == 0, result.output
    for word in (
        "fingerprint",
        planned.plan.old.fingerprint,
        "heads matched",
        "no partner",
        "method lstsq",
        "MiB",
        "R²",
    ):
        assert word in result.stdout


def test_inspect_of_another_file_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: PLAN ")


def test_progress_without_a_terminal_is_a_line_in_ten_seconds_with_rate_and_time_left() -> None:
    now, lines = 0.0, []
    progress = _PlainProgress(lambda line, err: lines.append(line), lambda: now)
    for step in range(31):
        now = float(step)
        progress("train", step, 30)
    assert lines == [
        "train: 2 of 30, 1.0/s, 28 s left",
        "train: 12 of 30, 1.0/s, 18 s left",
        "train: 22 of 30, 1.0/s, 8 s left",
        "train: 30 of 30, 1.0/s in 30 s",
    ]


def test_a_short_phase_prints_no_progress() -> None:
    now, lines = 0.0, []
    progress = _PlainProgress(lambda line, err: lines.append(line), lambda: now)
    for step in range(31):
        now = 100 + step / 20
        progress("train", step, 30)
    assert lines == []
