"""What a distillation keeps in memory: all its states, or only what a budget leaves, the rest in files.

    python bench/distill_memory.py [--folder .cache/bench]

Each run is a process of its own, on the same random checkpoints, adapter and text. Memory does not grow with depth
(`bench/reports/depth.md`), so two layers on each side stand for any number of them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine, random_checkpoint, write_report

from lorasuite_fast import ApplyConfig, PlanConfig, Runtime
from lorasuite_fast.models.families import Shape

OLD = Shape(V=32_768, d=768, h=64, H=12, G=12, f=2048, L=2)
NEW = Shape(V=49_152, d=1024, h=64, H=16, G=8, f=2816, L=2)
SHARED = 24_000
TEXTS, CHARACTERS = 1024, 160
SLACK = 40
"""MiB over the least budget, for what a process grows by between being refused and being run."""


def adapter(folder: Path, old: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if not (folder / "adapter_config.json").exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32)
        peft = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"]))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        peft.save_pretrained(folder)
    return folder


def text(path: Path) -> Path:
    """Random words; the tokenizers have no merges, so that every character is a token."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(5000)]
    rows = (" ".join(rng.choices(words, k=CHARACTERS // 5))[:CHARACTERS] for _ in range(TEXTS))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def run(root: Path, memory: str | None) -> dict[str, Any]:
    """One distillation, in this process."""
    from lorasuite_fast import TransferPlan

    plan = TransferPlan.load(root / "plan")
    start = time.perf_counter()
    result = plan.apply(
        root / "adapter",
        root / "out",
        config=ApplyConfig(text=root / "text.jsonl"),
        runtime=Runtime(memory=memory),
        overwrite=True,
    )
    assert result.distilled is not None
    return {
        "seconds": time.perf_counter() - start,
        "phases": [[p.name, p.peak_memory, p.peak_resident, p.predicted] for p in result.phases if p.predicted],
        "explained": result.distilled.explained,
        "positions": result.distilled.positions,
        "texts": result.distilled.texts,
    }


def in_process(root: Path, memory: str | None) -> dict[str, Any] | str:
    """The run in a process of its own, or the error it ends with."""
    command = [sys.executable, __file__, "--folder", str(root.parent), "--run", memory or "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    root = arguments.folder / "distill"
    if arguments.run:
        print(json.dumps(run(root, None if arguments.run == "none" else arguments.run)))
        return
    from lorasuite_fast import TransferPlan

    old = random_checkpoint(root / "old", OLD, torch.bfloat16, "old", SHARED)
    new = random_checkpoint(root / "new", NEW, torch.bfloat16, "new", SHARED)
    adapter(root / "adapter", old)
    text(root / "text.jsonl")
    if not (root / "plan").exists():
        plan = TransferPlan.build(
            old,
            new,
            config=PlanConfig(examples=16, roles=("q", "v", "o"), method="distill"),
            runtime=Runtime(dtype="float32"),
        )
        plan.save(root / "plan")
    free = in_process(root, None)
    refused = in_process(root, "1MB")
    assert isinstance(free, dict)
    assert isinstance(refused, str)
    least = re.search(r"--memory (\d+)MiB$", refused)
    assert least is not None, refused
    budget = int(least[1]) + SLACK
    bound = in_process(root, f"{budget}MiB")
    assert isinstance(bound, dict), bound
    # What happened before the distillation is the plan's.
    phases = {name: rows for name, *rows in free["phases"][-4:]}, {name: rows for name, *rows in bound["phases"][-4:]}
    mib = 2**20
    exceeded = [name for side in phases for name, (_, resident, predicted) in side.items() if resident > predicted]
    lines = [
        "# Memory of a distillation",
        "",
        f"`python bench/distill_memory.py`, {machine()}, float32. Llama-like, d {OLD.d} to {NEW.d}, f {OLD.f} to "
        f"{NEW.f}, {OLD.V:,} and {NEW.V:,} tokens of which {SHARED:,} are shared, two layers each, random weights in "
        f"bfloat16; {free['texts']:,} texts, {free['positions']:,} aligned positions. Peaks of each phase in MiB: what "
        "the process allocated itself, its resident set with mapped files, and what was predicted of the latter before "
        "the work began.",
        "",
        f"| phase | no budget: allocated | resident | predicted | `--memory {budget}MiB`: allocated | resident | "
        "predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in phases[0]:
        cells = [f"{value / mib:,.0f}" for side in phases for value in side[name]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    differences = [abs(free["explained"][j] - bound["explained"][j]) for j in free["explained"]]
    lines += [
        "",
        f"Seconds: {free['seconds']:.0f} without a budget, {bound['seconds']:.0f} with the least one (and {SLACK} "
        f"MiB). The shares explained on held-out text differ by {max(differences):.1e} at most.",
        "",
    ]
    write_report("distill_memory", "\n".join(lines))
    if exceeded:
        sys.exit(f"more than predicted: {', '.join(exceeded)}")


if __name__ == "__main__":
    main()
