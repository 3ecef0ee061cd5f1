"""Measures every kernel on a GPU beside fair PyTorch and the published form, and checks it against float64.

    python bench/gpu.py RUN.jsonl              # shapes of Llama-2-7B -> Llama-3-8B; rows are appended as they come
    CASES="hsic cka" python bench/gpu.py RUN.jsonl
    DRY=1 python bench/gpu.py RUN.jsonl        # small shapes on the CPU: checks this script

The cases run in a process of their own. Where one takes the device down with it, that case is recorded as failed and
the others go on in a new process. Times are medians over CUDA events, the L2 cache flushed between runs, and over
replays of a captured graph, which leaves Python's share out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_cases
import roofline
import torch
from gpu_rows import DEVICE, DRY, LostDevice, append, attempt, guarded, read, selected
from gpu_timing import graph_seconds, launches, peak_bytes, seconds

from lorasuite_kernels import backend

_SLOW = float(os.environ.get("SECONDS_EACH", "0.7"))


def names() -> list[str]:
    """Every case in both dtypes, as case/dtype."""
    cases = selected(list(gpu_cases.CASES), os.environ.get("CASES"))
    return [f"{case}/{dtype}" for case in cases for dtype in gpu_cases.DTYPES]


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def measure(row: dict[str, Any], case: gpu_cases.Case) -> None:
    """Fills in a row: what was chosen, then the kernel, then fair PyTorch, and as published."""
    exact = case.exact()
    row["error_chosen"] = _error(case.kernel(), exact)
    row["seconds_chosen"] = seconds(case.kernel, DEVICE, _SLOW)
    row["launches_chosen"], _ = attempt(lambda: launches(case.kernel, DEVICE))
    row["peak_chosen"] = peak_bytes(case.kernel, DEVICE)
    row["error_fair"] = _error(case.fair(), exact)
    row["seconds_fair"] = seconds(case.fair, DEVICE, _SLOW)
    row["peak_fair"] = peak_bytes(case.fair, DEVICE)
    for name in ("triton", "torch"):
        with backend("torch" if DRY else name):
            row[f"error_{name}"] = _error(case.kernel(), exact)
            row[f"seconds_{name}"] = seconds(case.kernel, DEVICE, _SLOW)
    if case.published is not None:
        row["seconds_published"] = case.scale * seconds(case.published, DEVICE, _SLOW)
    # Last: a capture that fails may leave work behind on the device.
    row["graph_fair"], row["graph_fair_error"] = attempt(lambda: graph_seconds(case.fair, DEVICE, _SLOW))
    row["graph_chosen"], row["graph_chosen_error"] = attempt(lambda: graph_seconds(case.kernel, DEVICE, _SLOW))


def run(path: Path, wanted: list[str]) -> None:
    """Measures these cases in this process."""
    predicted = {row.name: row.predicted for row in roofline.rows()}
    for name in wanted:
        case, dtype = name.split("/")
        append(path, {"kind": "start", "name": name})
        with guarded(path, {"kind": "kernel", "name": name}) as row:
            if dtype == "bfloat16":
                row["predicted"] = predicted.get(case)
            measure(row, gpu_cases.CASES[case](gpu_cases.DTYPES[dtype]))
        print(name, row.get("error") or f"{row['seconds_chosen'] * 1e6:,.0f} µs", flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def supervise(path: Path, wanted: list[str]) -> None:
    """Runs the cases in child processes until each has a row."""
    before = len(read(path)) if path.exists() else 0
    left = list(wanted)
    while left:
        done = subprocess.run([sys.executable, __file__, str(path), "--run", *left])
        rows = read(path)[before:] if path.exists() else []
        named = {kind: {row["name"] for row in rows if row["kind"] == kind} for kind in ("start", "kernel")}
        for name in sorted(named["start"] - named["kernel"]):
            append(path, {"kind": "kernel", "name": name, "error": f"the process ended with {done.returncode}"})
            named["kernel"].add(name)
        remaining = [name for name in left if name not in named["kernel"]]
        if remaining == left:
            # It died before the first case: trying again would not end.
            append(path, {"kind": "kernel", "name": left[0], "error": f"no case started (exit {done.returncode})"})
            remaining = left[1:]
        left = remaining


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if not (DRY or torch.cuda.is_available()):
        sys.exit("no GPU is present; DRY=1 runs this script on the CPU")
    path = Path(sys.argv[1])
    if "--run" not in sys.argv:
        return supervise(path, names())
    try:
        run(path, sys.argv[3:])
    except LostDevice as error:
        sys.exit(f"the device is lost to this process: {error}")


if __name__ == "__main__":
    main()
