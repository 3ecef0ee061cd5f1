"""What label-free refinement carries between the two demo models, with its controls.

    python bench/refine.py                     every row, then the report
    python bench/refine.py both kl             only these rows
    python bench/refine.py report              only the report, from the rows measured so far

A row already in the work folder is skipped; an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_pair import bits_per_byte
from measure import machine, write_report
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lorasuite_fast import refine
from lorasuite_fast.checkpoint import Checkpoint
from lorasuite_fast.self_text import self_written

DEMO = Path(__file__).resolve().parents[1] / "lorasuite_fast" / "demo"
OLD, NEW, ADAPTER = DEMO / "old", DEMO / "new", DEMO / "adapter"
TEXT_BYTES = 600_000
PARTS = {"half": 300_000, "small": 75_000}
"""Bytes from the front of the text the adapted model wrote."""
TESTS = ("domain_test", "general_test")


@dataclass(frozen=True)
class Row:
    """One run: options of `refine`, and which text it reads."""

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    text: str = "half"


ROWS = {
    "both": Row("KL + 0.3 × next token"),
    "both-shuffled": Row("KL + 0.3 × next token, teacher positions shuffled", {"control": "shuffled"}),
    "kl": Row("KL alone", {"next_token_weight": 0.0}),
    "kl-shuffled": Row("KL alone, teacher positions shuffled", {"next_token_weight": 0.0, "control": "shuffled"}),
    "next-token": Row("next token alone", {"kl_weight": 0.0, "next_token_weight": 1.0}),
    "both-bare-text": Row("KL + 0.3 × next token, text written without the adapter", text="bare"),
    "both-mlp": Row(
        "KL + 0.3 × next token, also gate, up and down", {"roles": ["q", "k", "v", "o", "gate", "up", "down"]}
    ),
    "both-k64": Row("KL + 0.3 × next token, 64 tokens of each target kept", {"top_k": 64}),
    "both-long-text": Row("KL + 0.3 × next token, 600 KB of text", text="self"),
    "both-small-text": Row("KL + 0.3 × next token, 75 KB of text", text="small"),
    "both-seed-1": Row("KL + 0.3 × next token, another seed", {"seed": 1}),
}


def texts_of(work: Path, kind: str) -> list[str]:
    """The text of a row, written once; what writing it took is kept beside it."""
    if kind in PARTS:
        taken: list[str] = []
        for text in texts_of(work, "self"):
            if sum(len(t.encode()) for t in taken) >= PARTS[kind]:
                break
            taken.append(text)
        return taken
    path = work / f"text-{kind}.json"
    if not path.exists():
        start = time.perf_counter()
        texts = self_written(
            Checkpoint(OLD, "old"),
            ADAPTER if kind == "self" else None,
            size=TEXT_BYTES if kind == "self" else PARTS["half"],
            seed=0,
            tokens=256,
            device=torch.device("cpu"),
        )
        seconds = time.perf_counter() - start
        path.write_text(json.dumps({"texts": texts, "seconds": seconds}))
    return json.loads(path.read_text())["texts"]


def score(folder: Path | None) -> dict[str, float]:
    model: Any = AutoModelForCausalLM.from_pretrained(NEW, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(NEW)
    return {name: bits_per_byte(model, tokenizer, (DEMO / f"{name}.txt").read_text("utf-8")) for name in TESTS}


def measure(work: Path, name: str) -> dict[str, Any]:
    path = work / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    row = ROWS[name]
    texts = texts_of(work, row.text)

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "train" and done % 50 == 0:
            print(f"{name}: {done} of {total} steps", flush=True)

    result = refine(
        OLD, ADAPTER, NEW, None, work / name, text=texts, cache=work, overwrite=True, progress=progress,
        **({"steps": 300, "patience": None, "eval_every": 50} | row.options),
    )  # fmt: skip
    figures = {"bits": score(work / name), "refinement": result.as_dict()}
    path.write_text(json.dumps(figures))
    print(f"{name}: {figures['bits']} {result.summary}", flush=True)
    return figures


def report(work: Path) -> None:
    recorded = json.loads((DEMO / "recorded.json").read_text())
    bits = recorded["bits_per_byte"]
    base, full = bits["new"], bits["new + lora_full"]
    gain = base["domain_test"] - full["domain_test"]

    def share(value: float) -> float:
        return (base["domain_test"] - value) / gain

    lines = [
        "# Label-free refinement on the demo pair",
        "",
        f"`python bench/refine.py`, {machine()}. The old demo model and its adapter (King James Bible) to the new one, "
        "no labels and no user data: text the old model wrote, rank 8 on q, k, v, o from zero. Domain and general are "
        "test texts in bits per byte; the share is that of the gain of LoRA trained on the full labelled set. "
        "Agreement is the held-out share of the teacher's KL taken away, which is what the run itself sees. One seed "
        "a row unless it says otherwise.",
        "",
        "| row | domain | share | general | agreement | steps | chosen | text KB | seconds | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label, values in (("new model alone", base), ("LoRA, 100 samples", bits["new + lora_100"])):
        lines.append(
            f"| {label} | {values['domain_test']:.4f} | {share(values['domain_test']):.1%} "
            f"| {values['general_test']:.4f} | | | | | | |"
        )
    best = recorded["best"]["lora_full"]
    lines.append(
        f"| LoRA, full set | {full['domain_test']:.4f} | 100.0% | {full['general_test']:.4f} | | {best['steps']} | | "
        f"| {best['cpu_seconds']:.0f} (CPU) | |"
    )
    measured = {name: json.loads(p.read_text()) for name in ROWS if (p := work / f"{name}.json").exists()}
    for name, figures in measured.items():
        r, b = figures["refinement"], figures["bits"]
        lines.append(
            f"| {ROWS[name].label} | {b['domain_test']:.4f} | {share(b['domain_test']):.1%} | {b['general_test']:.4f} "
            f"| {r['agreement']:.3f} | {r['steps']} | {r['chosen_step']} | {r['teacher']['bytes'] / 1000:.0f} "
            f"| {r['seconds']:.0f} | {r['peak_memory'] / 2**20:.0f} |"
        )
    lines.append("")
    if "both" in measured:
        lines += conclusions(work, measured, share, full)
    write_report("refine", "\n".join(lines) + "\n")


def conclusions(work: Path, measured: dict[str, Any], share: Any, full: dict[str, float]) -> list[str]:
    both = measured["both"]
    reached = share(both["bits"]["domain_test"])
    lines = [f"- Share of LoRA(full)'s gain, no labels: {reached:.1%}; at least 60 % is wanted."]
    for name, what in (
        ("both-shuffled", "teacher positions shuffled, the text as it is"),
        ("kl-shuffled", "teacher positions shuffled, KL alone"),
        ("both-bare-text", "text written without the adapter"),
    ):
        if name in measured:
            left = share(measured[name]["bits"]["domain_test"])
            lines.append(
                f"- Beyond the control ({what}: {left:.1%}): {100 * (reached - left):.1f} points; 45 are wanted."
            )
    if "kl" in measured and "kl-shuffled" in measured:
        kl, left = (share(measured[n]["bits"]["domain_test"]) for n in ("kl", "kl-shuffled"))
        lines.append(f"- KL alone beyond its own shuffled control: {100 * (kl - left):.1f} points.")
    general = both["bits"]["general_test"]
    lines.append(
        f"- Forgetting on general text: {general:.4f} bits per byte refined, {full['general_test']:.4f} LoRA(full)."
    )
    teacher = both["refinement"]["teacher"]
    lines.append(
        f"- Targets keep {teacher['k']} of {teacher['shared']} shared tokens: {teacher['rest']:.2%} of the mass is "
        f"merged, and {teacher['truncation']:.2%} of the divergence lost ({teacher['positions']:,} positions)."
    )
    kept = json.loads((work / "text-self.json").read_text())["seconds"]
    costs: dict[str, float] = {}
    for figures in measured.values():
        for phase, seconds in figures["refinement"]["costs"].items():
            costs[phase] = max(costs.get(phase, 0.0), seconds)
    training = both["refinement"]["costs"]["train"]
    passes = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in costs.items() if phase != "train")
    lines.append(
        f"- Cost in seconds: writing {TEXT_BYTES / 1000:.0f} KB of text {kept:.0f}; {passes}"
        f"; training {training:.0f}, its evaluations included. Rows that found the targets on disk did not work them "
        "out again."
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of: text, {', '.join(ROWS)}, report (default: all)")
    parser.add_argument("--work", type=Path, default=Path(".cache/refine"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    unknown = set(arguments.rows) - {"text", "report", *ROWS}
    if unknown:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in arguments.rows or [*ROWS, "report"]:
        if name == "text":
            size = sum(len(t.encode()) for t in texts_of(arguments.work, "self"))
            print(f"text: {size} bytes")
        elif name == "report":
            report(arguments.work)
        else:
            measure(arguments.work, name)


if __name__ == "__main__":
    main()
