"""Many adapters through one plan in one command: throughput, memory, and one bad adapter among them.

python bench/load.py            200 adapters of the demo pair; writes reports/load.md
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine, write_report
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lorasuite_fast import PlanConfig, TransferPlan

DEMO = Path(__file__).resolve().parents[1] / "lorasuite_fast/demo"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
KINDS = ("LoRA", "rsLoRA", "AdaLoRA", "DoRA")
RANKS = (1, 2, 4, 8, 16, 32, 64)


def make(folder: Path, kind: str, rank: int, targets: list[str], seed: int) -> None:
    """An adapter of random factors in PEFT's own files."""
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": targets, "lora_alpha": 2 * rank}
    if kind == "AdaLoRA":
        config = AdaLoraConfig(init_r=rank, target_r=rank, total_step=1000, tinit=0, tfinal=0, **common)
    else:
        config = LoraConfig(r=rank, use_rslora=kind == "rsLoRA", use_dora=kind == "DoRA", **common)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(DEMO / "old", dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_E" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def carry(plan: Path, adapters: list[Path], out: Path) -> tuple[float, int, int, dict[str, Any]]:
    """Seconds, peak resident bytes and exit code of one command, and what it says of each adapter."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "lorasuite_fast", "apply", str(plan), *map(str, adapters)]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(out), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - begin, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status), json.loads(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=200)
    count = parser.parse_args().adapters
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        plan = TransferPlan.build(DEMO / "old", DEMO / "new", config=PlanConfig(method="lstsq"))
        plan.save(root / "plan")
        adapters = []
        for n in range(count):
            kind, rank = KINDS[n % len(KINDS)], choose.choice(RANKS)
            targets = choose.choice([ATTENTION, ATTENTION + MLP, ["q_proj", "v_proj"], MLP])
            adapters.append(root / "adapters" / f"{n:03d}-{kind.lower()}-{rank}")
            make(adapters[-1], kind, rank, targets, n)
        bad = adapters[count // 2]
        weights = bad / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        few = [adapter for adapter in adapters if adapter != bad][: count // 10]
        rows = []
        for given in (few, adapters):
            seconds, peak, code, told = carry(root / "plan", given, root / "out")
            failed = [Path(name).name for name, outcome in told["adapters"].items() if "error" in outcome]
            written = len(list((root / "out").iterdir()))
            rows.append((len(given), seconds, 60 * len(given) / seconds, peak / 2**20, code, written, failed))
        message = told["adapters"][str(bad)]["error"].replace(str(root), "…")
    lines = [
        "# Many adapters through one plan",
        "",
        f"`python bench/load.py`, {machine()}, float32, the demo pair, `lstsq`, all seven projections.",
        f"Adapters in turn {', '.join(KINDS)}, of ranks {', '.join(map(str, RANKS))}, on the attention, MLP, both or",
        "q and v; one of the larger number is cut off by a byte. The time includes starting Python. DoRA opens both",
        "models for its norms.",
        "",
        "| adapters | seconds | adapters a minute | peak resident, MiB | exit code | written | failed |",
        "|---:|---:|---:|---:|---:|---:|---|",
        *(f"| {n} | {s:.1f} | {r:.0f} | {m:.0f} | {c} | {w} | {', '.join(f) or '–'} |" for n, s, r, m, c, w, f in rows),
        "",
        f"What it says of the bad one: {message}",
        "",
        f"Memory of {rows[1][0]} adapters over that of {rows[0][0]}: {rows[1][3] / rows[0][3]:.2f} times.",
    ]
    write_report("load", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
