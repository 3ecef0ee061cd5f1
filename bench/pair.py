"""Plan and apply for the full-size MiniCPM-S-1B -> MiniCPM-2B pair: random bfloat16 checkpoints on disk, 8 GB.

    python bench/pair.py [--folder .cache/bench] [--roles attention|all]

The calibration passes are run on four short examples and left out of the figures; everything else is whole.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from measure import MINICPM_2B, MINICPM_S_1B, machine, random_adapter, random_checkpoint, write_report

from lorasuite_fast import PlanConfig, TransferPlan
from lorasuite_fast.io.phases import PhaseClock
from lorasuite_fast.models.families import ATTENTION, ROLES

RANK, SHARED = 32, 60_000
CALIBRATION = ("old hidden states", "new hidden states")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--roles", choices=("attention", "all"), nargs="+", default=["attention", "all"])
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    old = random_checkpoint(arguments.folder / "minicpm-s-1b", MINICPM_S_1B, torch.bfloat16, "o", SHARED)
    new = random_checkpoint(arguments.folder / "minicpm-2b", MINICPM_2B, torch.bfloat16, "n", SHARED)
    size = sum(p.stat().st_size for f in (old, new) for p in f.glob("*.safetensors")) / 1e9
    lines = [
        "# A full-size pair",
        "",
        f"`python bench/pair.py`, {machine()}.",
        "float32 products. MiniCPM-S-1B -> MiniCPM-2B shapes, random bfloat16",
        f"checkpoints of {size:.1f} GB on disk, {SHARED:,} shared tokens, rank {RANK}, lstsq; calibration excluded.",
        "",
        "| adapter on | build | apply a second adapter | apply / build | peak anonymous memory, plan and apply |",
        "|---|---|---|---|---|",
    ]
    details: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        text = root / "short.jsonl"
        text.write_text("".join(json.dumps({"text": f"{i} example"}) + "\n" for i in range(4)))
        for name in arguments.roles:
            roles = ATTENTION if name == "attention" else ROLES
            plan = TransferPlan.build(
                old, new, config=PlanConfig(calibration=text, examples=4, roles=roles, method="lstsq")
            )
            plan.save(root / f"{name}.plan")
            parts = [phase for phase in plan.phases if phase.name not in CALIBRATION]
            build = sum(phase.seconds for phase in parts)
            del plan
            first, second = (random_adapter(root / f"{name}-{n}", str(old), MINICPM_S_1B, RANK, roles) for n in "ab")
            TransferPlan.load(root / f"{name}.plan").apply(first, root / f"{name}-out-a")
            clock = PhaseClock()
            with clock.phase("apply", 1):
                TransferPlan.load(root / f"{name}.plan").apply(second, root / f"{name}-out-b")
            apply = clock.phases[0]
            peak = max(phase.peak_memory for phase in (*parts, apply)) / 1e9
            what = "q, k, v, o" if name == "attention" else "q, k, v, o, gate, up, down"
            lines.append(
                f"| {what} | {build:.1f} s | {apply.seconds:.2f} s | {apply.seconds / build:.1%} | {peak:.2f} GB |"
            )
            details += ["", f"Phases, {what}:", ""]
            details += [f"- {p.name}: {p.seconds:.1f} s, {p.peak_memory / 1e9:.2f} GB" for p in (*parts, apply)]
    lines += [*details, "", "Targets: apply at most 5 % of build, at most 1.5 GB of anonymous memory.", ""]
    write_report("pair", "\n".join(lines))


if __name__ == "__main__":
    main()
