"""The main job on random checkpoints of Llama-2-7B -> Llama-3-8B shape: seconds and peak memory of each phase.

    python bench/gpu_job.py RUN.jsonl
    JOB="plan verify write refine" python bench/gpu_job.py RUN.jsonl    # a choice of parts; apply comes with plan
    DRY=1 python bench/gpu_job.py RUN.jsonl                             # tiny shapes on the CPU

The checkpoints are made on the device and written below SCRATCH (a temporary folder without it; 31 GB). Every part is
recorded by itself, and one that fails does not stop the next. Random models have nothing to carry: what is measured is
time and memory.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import scipy_stand_in
import torch
from gpu_rows import DEVICE, DRY, LostDevice, append, guarded, selected

from lorasuite_fast import PlanConfig, Runtime

try:
    import scipy.optimize  # noqa: F401
except ImportError:
    scipy_stand_in.install()

import gpu_models
import gpu_predict

PARTS = ["plan", "verify", "write", "refine"]
ROLES = ("q", "k", "v", "o")
"""The MLP's neurons are matched by scipy, which the machine may not have."""
EXAMPLES, TOKENS = (8, 16) if DRY else (gpu_predict.EXAMPLES, gpu_predict.TOKENS)
STEPS = 2 if DRY else 20
MEMORY = os.environ.get("MEMORY") or None


@contextmanager
def timed(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """A row with the seconds and the device's peak memory of what runs inside."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    append(path, {"kind": "job-start", "name": name})
    with guarded(path, {"kind": "job", "name": name, "predicted": gpu_predict.predictions().get(name)}) as row:
        start = time.perf_counter()
        try:
            yield row
        finally:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
                row["peak_device_memory"] = torch.cuda.max_memory_allocated()
            row["seconds"] = time.perf_counter() - start
    print(name, row.get("error") or f"{row['seconds']:.1f} s", flush=True)


def phases(path: Path, part: str, found: Any) -> None:
    """A row for each phase a verb timed itself."""
    predicted = gpu_predict.predictions()
    for phase in found:
        name = f"{part}: {phase.name}"
        row = {"kind": "job-phase", "name": name, "seconds": phase.seconds, "predicted": predicted.get(name)}
        append(path, row | {"peak_device_memory": phase.peak_device_memory, "peak_memory": phase.peak_memory})


def texts(folder: Path) -> Path:
    """Texts both random tokenizers read: one token a byte."""
    file = folder / "text.jsonl"
    line = "the quick brown fox jumps over the lazy dog and runs far away from here to there "
    rows = [json.dumps({"text": (f"{i} {line}" * 4)[: 2 * TOKENS]}) + "\n" for i in range(EXAMPLES)]
    file.write_text("".join(rows))
    return file


class Job:
    """The parts, over the models below one folder."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.old, self.new, self.adapter = (folder / name for name in ("old", "new", "adapter"))
        self.out = folder / "migrated"

    def make(self) -> None:
        with timed(self.path, "make the models") as row:
            gpu_models.pair(self.folder)
            row["bytes"] = sum(file.stat().st_size for file in self.folder.rglob("*.safetensors"))
        self.text = texts(self.folder)

    def plan(self) -> None:
        from lorasuite_fast import TransferPlan

        plan = None
        with timed(self.path, "plan"):
            plan = TransferPlan.build(
                self.old,
                self.new,
                config=PlanConfig(calibration=self.text, examples=EXAMPLES, method="lstsq", roles=ROLES),
                runtime=Runtime(device=DEVICE, memory=MEMORY),
            )
        if plan is None:
            return
        phases(self.path, "plan", plan.phases)
        with timed(self.path, "apply"):
            plan.apply(self.adapter, self.out)

    def _migrated(self) -> Path:
        """The migrated adapter, or a random one where no plan was made."""
        if not self.out.exists():
            gpu_models.random_adapter(self.out, str(self.new), gpu_models.NEW, gpu_models.RANK, ROLES)
        return self.out

    def verify(self) -> None:
        from lorasuite_fast import verify

        with timed(self.path, "verify") as row:
            found = verify(
                self.old, self.adapter, self.new, self._migrated(), text=self.text, examples=EXAMPLES,
                max_tokens=TOKENS, device=DEVICE, bootstrap=100,
            )  # fmt: skip
            row["phases"] = [phase.as_dict() for phase in getattr(found, "phases", [])]

    def write(self) -> None:
        from lorasuite_fast.models.checkpoint import Checkpoint
        from lorasuite_fast.text.self_text import self_written

        dtype = torch.float32 if DRY else torch.bfloat16
        with timed(self.path, "write") as row:
            written = self_written(
                Checkpoint(self.old, "old"), self.adapter, count=EXAMPLES, seed=0, device=torch.device(DEVICE),
                tokens=TOKENS, dtype=dtype,
            )  # fmt: skip
            row["texts"], row["tokens"] = len(written), len(written) * TOKENS

    def refine(self) -> None:
        from lorasuite_fast import refine

        found = None
        with timed(self.path, "refine") as row:
            found = refine(
                self.old, self.adapter, self.new, self._migrated(), self.folder / "refined", text=self.text,
                steps=STEPS, max_tokens=TOKENS, eval_every=STEPS, learning_rate=1e-4, device=DEVICE,
                memory=None if DRY else "24GB",
            )  # fmt: skip
            row["steps"] = STEPS
        if found is not None:
            phases(self.path, "refine", found.phases)


def main() -> None:
    path = Path(sys.argv[1])
    parts = selected(PARTS, os.environ.get("JOB"))
    root = os.environ.get("SCRATCH")
    folder = Path(tempfile.mkdtemp(prefix="lorasuite-gpu-", dir=root))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    job = Job(path, folder)
    try:
        job.make()
        for part in parts:
            getattr(job, part)()
    except LostDevice as error:
        sys.exit(f"the device is lost to this process: {error}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
