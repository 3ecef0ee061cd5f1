"""The paper's pairs at their own widths, one or two layers deep, against the dense oracle; writes reports/widths.md.

    python bench/widths.py                 # those that are not measured yet; up to 20 GB of memory
    python bench/widths.py Pythia Phi      # pairs whose names hold one of these, again

Runs tests/test_pairs.py --full-width, a process for each pair, and collects how far each projection is from the dense
form in float64. Rows are kept in .cache/widths.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch
from measure import write_report

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".cache/widths.json"
sys.path.insert(0, str(ROOT / "tests"))

from test_pairs import FULL, Model  # noqa: E402

COLUMNS = ("head cosine", "q", "k", "v", "o", "up", "down")


def shape(model: Model) -> str:
    heads = str(model.heads) if model.heads == model.kv_heads else f"{model.heads}:{model.kv_heads}"
    return f"{model.d}, {model.f}, {heads}"


def run(name: str) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "found.xml"
        start = time.perf_counter()
        found = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "--full-width", "tests/test_pairs.py",
             "-k", name.replace(" ", "-"), f"--junitxml={report}", f"--basetemp={folder}/models"],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if found.returncode:
            print(found.stdout[-3000:])
        cases = list(ElementTree.parse(report).iter("testcase"))
        properties = [p for case in cases for p in case.iter("property")]
    worst = {c: max((float(p.get("value", 0)) for p in properties if p.get("name") == c), default=0.0) for c in COLUMNS}
    passed = sum(case.find("failure") is None and case.find("error") is None for case in cases)
    figures = " | ".join(f"{worst[c]:.0e}" for c in COLUMNS)
    result = f"{passed} of {len(cases)}" if cases else "**none ran**"
    return f"{result} | {figures} | {seconds:.0f} |"


def main() -> None:
    KEPT.parent.mkdir(exist_ok=True)
    rows: dict[str, str] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in FULL:
        if any(part in name for part in sys.argv[1:]) if sys.argv[1:] else name not in rows:
            rows[name] = run(name)
            KEPT.write_text(json.dumps(rows))
            print(f"{name}: {rows[name]}", flush=True)
    missing = "not measured | " + " | ".join("–" for _ in COLUMNS) + " | – |"
    table = [f"| {name} | {shape(old)} → {shape(new)} | {rows.get(name, missing)}" for name, (old, new) in FULL.items()]
    text = f"""# The paper's pairs at their own widths

`python bench/widths.py`, {platform.machine()} CPU, one thread, torch {torch.__version__}.
Random weights in bfloat16, one or two layers, a vocabulary as small as
the width allows; `paper` (Eq. (3)) of every projection, computed in float32. Relative distance from the dense form in
float64 by role, and the largest difference of a head's cosine. The result is loaded by PEFT and run. Heads are
`H`, or `H:G` where key/value heads are shared. Seconds are those of the test, most of them the oracle's, beside other
work.

| pair | d, f, heads | passed | {" | ".join(COLUMNS)} | seconds |
|---|---|---|{"---:|" * len(COLUMNS)}---:|
"""
    write_report("widths", text + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
