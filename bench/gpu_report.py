"""Writes bench/reports/gpu.md from the rows of a GPU run.

python bench/gpu_report.py RUN.jsonl [--out FILE.md]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpu_rows import read

REPORT = Path(__file__).resolve().parent / "reports" / "gpu.md"
Rows = list[dict[str, Any]]


def _number(value: Any, scale: float = 1.0, digits: int = 1) -> str:
    return "–" if value is None else f"{value * scale:,.{digits}f}"


def _error(value: Any) -> str:
    return "–" if value is None else f"{value:.1e}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _of(rows: Rows, *kinds: str) -> Rows:
    return [row for row in rows if row["kind"] in kinds]


def device_lines(rows: Rows) -> list[str]:
    """What the run was measured on."""
    facts = next(iter(_of(rows, "device")), {})
    versions = ", ".join(f"{name} {number}" for name, number in facts.get("versions", {}).items() if number)
    return [f"Measured with `bench/gpu.sh` on {facts.get('name', 'an unknown device')}; {versions}.", ""]


def ceiling_lines(rows: Rows) -> list[str]:
    """The rates every other figure is read against."""
    found = _of(rows, "ceiling")
    table = [[row["name"], row.get("error") or f"{row['value']:.3g}"] for row in found]
    return ["## Ceilings", "", *_table(["rate", "measured"], table)] if table else []


def kernel_lines(rows: Rows) -> list[str]:
    """Every kernel beside fair PyTorch and the published form; of a case measured again, the last row."""
    last: dict[str, dict[str, Any]] = {row["name"]: {"error": "not finished"} for row in _of(rows, "start")}
    last |= {row["name"]: row for row in _of(rows, "kernel")}
    if not last:
        return []
    head = ["operation", "chosen form µs", "its launches", "as a graph µs", "Triton µs", "PyTorch twin µs"]
    head += ["fair PyTorch µs", "as a graph µs", "fair / chosen", "published µs (scaled)", "predicted µs"]
    head += ["error", "fair error", "peak MiB", "fair peak MiB"]
    table = []
    for name, row in last.items():
        if "error" in row:
            table.append([name, row["error"], *[""] * (len(head) - 2)])
            continue
        micro = [
            _number(row.get(f"seconds_{kind}"), 1e6) for kind in ("chosen", "triton", "torch", "fair", "published")
        ]
        graphs = [_number(row.get(f"graph_{kind}"), 1e6) for kind in ("chosen", "fair")]
        ratio = row["seconds_fair"] / row["seconds_chosen"]
        table.append([
            name, micro[0], str(row.get("launches_chosen") or "–"), graphs[0], micro[1], micro[2], micro[3], graphs[1],
            f"{ratio:.2f}", micro[4], _number(row.get("predicted"), 1e6), _error(row["error_chosen"]),
            _error(row["error_fair"]), _number(row["peak_chosen"], 2**-20, 0), _number(row["peak_fair"], 2**-20, 0),
        ])  # fmt: skip
    text = "Errors are the largest against float64, relative to the largest element. Published forms are scaled."
    return ["## Kernels", "", text, "", *_table(head, table)]


def job_lines(rows: Rows) -> list[str]:
    """Seconds a phase beside what was predicted, and the device's peak memory."""
    found, started = _of(rows, "job", "job-phase"), _of(rows, "job-start")
    if not started:
        return []
    table = [
        [
            row["name"],
            row.get("error") or _number(row.get("seconds")),
            _number(row.get("predicted")),
            _number(row.get("peak_device_memory"), 1e-9),
        ]
        for row in found
    ]
    ended = {row["name"] for row in found}
    table += [[row["name"], "not finished", "", ""] for row in started if row["name"] not in ended]
    head = ["phase", "seconds", "predicted seconds", "device peak GB"]
    return ["## The main job", "", *_table(head, table)]


def section_lines(rows: Rows) -> list[str]:
    """How each section ended."""
    found = _of(rows, "section")
    table = [[row["name"], str(row["exit"]), str(row["seconds"])] for row in found]
    return ["## Sections", "", *_table(["section", "exit", "seconds"], table)] if table else []


def report(rows: Rows) -> str:
    """The whole report as Markdown."""
    parts = (device_lines, ceiling_lines, kernel_lines, job_lines, section_lines)
    return "\n".join(["# Kernels and the main job on a GPU", "", *(line for part in parts for line in part(rows))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    arguments.out.write_text(report(read(arguments.run)))
    print(arguments.out)


if __name__ == "__main__":
    main()
