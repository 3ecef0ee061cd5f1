"""The kernels compile for every target without a GPU, and keep what the configuration tables promise.

`bench/aot.py` runs the whole matrix and writes bench/reports/aot.md; here every kernel runs on every target in bfloat16
(its widest configuration) and on sm_100, the strictest target for registers, in float16 and float32 too.
"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("triton")


def load_bench(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


aot = load_bench("aot")


@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile_within_the_limits_of_their_target(target: str) -> None:
    every = aot.jobs(list(aot.KERNELS), [target])
    last = {(job.kernel, job.dtype): job for job in every if job.precision != "tf32"}
    wanted = [job for (kernel, dtype), job in last.items() if dtype == "bfloat16" or target == "sm_100"]
    # These differ from others by an index computation or the dtype of a store: the whole matrix has them.
    wanted = [job for job in wanted if job.kernel not in ("shared_gram_symmetric", "heads_norms", "gram_mixed")]
    results = aot.run(wanted)
    assert len(results) == len(wanted)
    assert {(r.kernel, r.dtype): r.problems for r in results if r.problems} == {}


def test_the_report_covers_every_configuration_and_finds_no_problem() -> None:
    report = aot.REPORT.read_text()
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (.+?) \| (.+?) \|.*\| (.*?) \|$", report, re.MULTILINE)[1:]
    expected = set()
    for job in aot.jobs(list(aot.KERNELS), list(aot.TARGETS)):
        dtype = f"{job.dtype} ({job.precision})" if job.dtype == "float32" else job.dtype
        expected.add((job.kernel, job.target, dtype, aot.describe(aot.config_of(job))))
    assert {row[:4] for row in rows} == expected
    assert {row[4] for row in rows} == {"ok"}
