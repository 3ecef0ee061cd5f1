"""bench/gpu.sh, which has a GPU for minutes: run on the CPU at tiny shapes, and what it does when parts fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_report
import gpu_rows
import numpy as np
import pytest
import scipy_stand_in
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

ROOT = Path(__file__).resolve().parent.parent
JOB = ["make the models", "plan", "apply", "verify", "write", "refine"]


def run_script(out: Path, **environment: str) -> list[dict]:
    variables = {"DRY": "1", "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "SCRATCH": str(out)}
    out.mkdir(exist_ok=True)
    subprocess.run(["bash", ROOT / "bench" / "gpu.sh"], env=os.environ | variables | environment, check=True)
    return gpu_rows.read(out / "run.jsonl")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The rows of a whole dry run, on a machine without scipy."""
    out = tmp_path_factory.mktemp("gpu")
    blocked = out / "blocked" / "scipy"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('not installed here')")
    found = run_script(out / "run", SECTIONS="facts kernels job", PYTHONPATH=str(blocked.parent))
    assert not list((out / "run").glob("lorasuite-gpu-*"))
    return found


def test_gpu_script_dry_run_measures_every_part_without_error(rows: list[dict]) -> None:
    assert [row for row in rows if "error" in row] == []
    assert {row["name"]: row["exit"] for row in rows if row["kind"] == "section"} == {
        "facts": 0,
        "kernels": 0,
        "job": 0,
    }
    kernels = [row["name"] for row in rows if row["kind"] == "kernel"]
    operations = "gram", "hsic", "cka", "head_similarity", "shared_gram", "plan_hsic"
    assert kernels == [f"{name}/{dtype}" for name in operations for dtype in ("bfloat16", "float32")]
    assert [row["name"] for row in rows if row["kind"] == "job"] == JOB
    phases = {row["name"] for row in rows if row["kind"] == "job-phase"}
    assert {"plan: transfer matrix", "plan: heads and projections", "refine: train"} <= phases


def test_gpu_script_kernels_agree_with_float64(rows: list[dict]) -> None:
    for row in rows:
        if row["kind"] == "kernel":
            bound = 2e-2 if row["name"].endswith("bfloat16") else 1e-4
            assert max(row[f"error_{form}"] for form in ("chosen", "fair", "triton", "torch")) < bound, row["name"]


def test_gpu_report_holds_every_row_of_the_run(rows: list[dict]) -> None:
    text = gpu_report.report(rows)
    for name in [row["name"] for row in rows if "name" in row]:
        assert name in text
    assert "not finished" not in text


def test_gpu_report_names_what_failed_and_what_never_ended() -> None:
    rows = [
        {"kind": "start", "name": "hsic/float32"},
        {"kind": "start", "name": "cka/float32"},
        {"kind": "kernel", "name": "cka/float32", "error": "RuntimeError: out of registers"},
        {"kind": "job-start", "name": "plan"},
    ]
    text = gpu_report.report(rows)
    assert "| cka/float32 | RuntimeError: out of registers |" in text
    assert "| hsic/float32 | not finished |" in text
    assert "| plan | not finished |" in text


def test_gpu_script_runs_the_chosen_parts_alone(tmp_path: Path) -> None:
    found = run_script(tmp_path / "one", SECTIONS="kernels", CASES="hsic")
    assert {row["name"] for row in found if row["kind"] == "kernel"} == {"hsic/bfloat16", "hsic/float32"}
    assert [row["name"] for row in found if row["kind"] == "section"] == ["kernels"]


def test_cases_after_a_lost_device_run_in_a_new_process(tmp_path: Path) -> None:
    """The first case fails as an illegal access does, which ends its process; the second has to be measured."""
    code = """
import os, sys
import gpu, gpu_cases
def lost(dtype):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
gpu_cases.CASES = {"lost": lost, "hsic": gpu_cases.CASES["hsic"]}
gpu.__file__ = sys.argv[0]
sys.argv[0] = gpu.__file__
gpu.main()
"""
    script = tmp_path / "gpu_with_a_lost_case.py"
    script.write_text(code)
    run = tmp_path / "run.jsonl"
    path = os.pathsep.join(str(ROOT / part) for part in ("bench", "kernels/torch-ext", "."))
    environment = os.environ | {"DRY": "1", "PYTHONPATH": path, "CASES": ""}
    subprocess.run([sys.executable, script, run], env=environment, check=True)
    kernels = {row["name"]: row.get("error") for row in gpu_rows.read(run) if row["kind"] == "kernel"}
    assert list(kernels) == ["lost/bfloat16", "lost/float32", "hsic/bfloat16", "hsic/float32"]
    assert "illegal memory access" in kernels["lost/bfloat16"]
    assert kernels["hsic/bfloat16"] is None


def test_a_guarded_failure_is_a_row_and_the_next_runs(tmp_path: Path) -> None:
    run = tmp_path / "run.jsonl"
    for name, work in (("bad", lambda: 1 / 0), ("good", lambda: 1)):
        with gpu_rows.guarded(run, {"kind": "kernel", "name": name}) as row:
            row["value"] = work()
    assert [row.get("error") for row in gpu_rows.read(run)] == ["ZeroDivisionError: division by zero", None]


def test_a_row_that_was_cut_off_leaves_the_others_readable(tmp_path: Path) -> None:
    run = tmp_path / "run.jsonl"
    gpu_rows.append(run, {"kind": "kernel", "name": "whole"})
    with run.open("a") as file:
        file.write(json.dumps({"kind": "kernel", "name": "cut"})[:15])
    assert [row["name"] for row in gpu_rows.read(run)] == ["whole"]


def test_an_unknown_case_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown: what; choose of hsic, cka"):
        gpu_rows.selected(["hsic", "cka"], "what, hsic")


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), maximize=st.booleans(), seed=st.integers(0, 2**31))
def test_the_stand_in_finds_assignments_as_good_as_scipy(rows: int, columns: int, maximize: bool, seed: int) -> None:
    cost = np.random.default_rng(seed).normal(size=(rows, columns))
    found, wanted = (f(cost, maximize=maximize) for f in (scipy_stand_in.linear_sum_assignment, linear_sum_assignment))
    assert len(set(found[1])) == len(found[0]) == min(rows, columns)
    assert list(found[0]) == sorted(found[0])
    np.testing.assert_allclose(cost[found].sum(), cost[wanted].sum(), rtol=1e-12, atol=1e-12)
