"""Memory where models are large: a whole plan of a full-size pair, and a model that does not fit the process.

    python bench/big.py [--folder .cache/bench] [--part plan|stream ...] [--threads 2]

plan: MiniCPM-S-1B -> MiniCPM-2B shapes (8.2 GB of bfloat16 on disk), calibration with 64 examples of 128 tokens
included. stream: a Llama-2-13B-shaped checkpoint (26 GB) through the loader and the forward pass, in a process whose
own memory is limited to less than an eighth of the model; from_pretrained is tried under the same limit.
Needs 36 GB of disk and takes about 40 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import MINICPM_2B, MINICPM_S_1B, REPORTS, machine, random_checkpoint, write_report

from lorasuite_fast import PlanConfig, Runtime
from lorasuite_fast.models.families import Shape

SHARED = 60_000
LLAMA_13B = Shape(V=32_000, d=5120, h=128, H=40, G=40, f=13_824, L=40)
EXAMPLES, TOKENS = 8, 32
LIMIT = 3_000_000_000
"""Bytes of private memory the streaming process may have."""


def whole_plan(folder: Path) -> dict[str, Any]:
    from lorasuite_fast import TransferPlan

    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text.jsonl"
        # Letters the random vocabularies share, one token each.
        line = "the quick brown fox jumps over the lazy dog and runs far away from here to there " * 2
        text.write_text("".join(json.dumps({"text": f"{i} {line}"}) + "\n" for i in range(64)))
        plan = TransferPlan.build(
            folder / "minicpm-s-1b",
            folder / "minicpm-2b",
            config=PlanConfig(calibration=text, examples=64, method="lstsq"),
            runtime=Runtime(memory="4GB"),
        )
        plan.save(Path(temporary) / "plan")
        size = (Path(temporary) / "plan").stat().st_size
    return {
        "size": size,
        "micro_batch": plan.limits.micro_batch if plan.limits else 0,
        "phases": [phase.as_dict() for phase in plan.phases],
    }


def status(field: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) * 1024


def stream(folder: Path) -> dict[str, Any]:
    from lorasuite_fast.io.phases import anonymous_memory
    from lorasuite_fast.models.checkpoint import Checkpoint
    from lorasuite_fast.models.hidden_states import LayerStream, pooled_layers

    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    ids = torch.randint(0, 1000, (EXAMPLES, TOKENS))
    checkpoint = Checkpoint(folder)
    run = LayerStream(
        checkpoint, ids, torch.ones_like(ids), device=torch.device("cpu"), dtype=torch.float32, micro_batch=EXAMPLES
    )
    anonymous = 0
    for _, vectors in pooled_layers(run):
        anonymous = max(anonymous, anonymous_memory())
        assert torch.isfinite(vectors).all()
    return {
        "resident": status("VmHWM"),
        "anonymous": anonymous,
        "read": checkpoint.tensors.bytes_read,
    }


def whole_model(folder: Path) -> dict[str, Any]:
    from transformers import AutoModel

    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    try:
        AutoModel.from_pretrained(folder, dtype=torch.float32)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0].split(' from file')[0][:100]}"}
    return {"error": ""}


def child(name: str, folder: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", name, "--folder", str(folder), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def plan_report(folder: Path, threads: int) -> list[str]:
    for name, shape, side in (("minicpm-s-1b", MINICPM_S_1B, "o"), ("minicpm-2b", MINICPM_2B, "n")):
        random_checkpoint(folder / name, shape, torch.bfloat16, side, SHARED)
    found = child("plan", folder, threads)
    lines = [
        "## A whole plan, calibration included",
        "",
        "MiniCPM-S-1B -> MiniCPM-2B shapes, random bfloat16, 8.2 GB on disk; q, k, v, o, gate, up, down; 64 examples",
        f"of 128 tokens; `--memory 4GB`, which gives micro-batches of {found['micro_batch']}. The plan is "
        f"{found['size'] / 1e6:.0f} MB.",
        "",
        "| phase | peak anonymous | peak resident | predicted resident |",
        "|---|---|---|---|",
    ]
    for p in found["phases"]:
        predicted = f"{p['predicted'] / 1e9:.2f} GB" if p["predicted"] else "–"
        lines.append(
            f"| {p['name']} | {p['peak_memory'] / 1e9:.2f} GB | {p['peak_resident'] / 1e9:.2f} GB | {predicted} |"
        )
    peak = max(p["peak_memory"] for p in found["phases"]) / 1e9
    return [*lines, "", f"Peak anonymous memory {peak:.2f} GB; wanted: at most 2.0 GB.", ""]


def stream_report(folder: Path, threads: int) -> list[str]:
    path = random_checkpoint(folder / "llama-13b", LLAMA_13B, torch.bfloat16, "l", 1000, shard=4)
    size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    found, other = child("stream", path, threads), child("whole", path, threads)
    return [
        "## A model that does not fit",
        "",
        f"Llama-2-13B shapes, random bfloat16, {size / 1e9:.1f} GB on disk, computed in float32; {EXAMPLES} examples",
        f"of {TOKENS} tokens through all {LLAMA_13B.L} layers. The process may own {LIMIT / 1e9:.0f} GB of memory.",
        "",
        "| bytes read | peak anonymous | peak resident |",
        "|---|---|---|",
        f"| {found['read'] / 1e9:.1f} GB | {found['anonymous'] / 1e9:.2f} GB | {found['resident'] / 1e9:.2f} GB |",
        "",
        f"Wanted: at most 3 GB resident. `from_pretrained` under the same limit: {other['error'] or 'it loads'}.",
        "",
    ]


RUNS = {"plan": whole_plan, "stream": stream, "whole": whole_model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--part", choices=("plan", "stream"), nargs="+", default=["plan", "stream"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.run:
        print(json.dumps(RUNS[arguments.run](arguments.folder)))
        return
    parts = {"plan": plan_report, "stream": stream_report}
    lines = ["# Large models in little memory", "", f"`python bench/big.py`, {machine()}.", ""]
    for name in arguments.part:
        lines += parts[name](arguments.folder, arguments.threads)
    if set(arguments.part) == set(parts):
        write_report("big", "\n".join(lines))
    else:
        (REPORTS / f"big-{arguments.part[0]}.md").write_text("\n".join(lines))
        print("\n".join(lines))


if __name__ == "__main__":
    main()
