"""CKA of all pairs of layers on the CPU, beside pytorch-cka 1.1.3 and torch-cka 0.21 from PyPI: time and peak memory.

    pip install --no-deps --target peers pytorch-cka==1.1.3 torch-cka==0.21 matplotlib
    python bench/kernels_cpu.py --peers peers            # 52 and 40 layers, m 512, d 1536 and 2304
    python bench/kernels_cpu.py --peers peers --quick    # a small case, to see that it works

All three get the same float32 tensors and compute the same quantity, unbiased CKA of one minibatch. torch-cka takes its
pairs one at a time: it is timed on a few and scaled to all. Each runs in a process of its own, for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

REPORT = Path(__file__).parent / "reports" / "kernels_cpu.md"
FULL = {"layers": (52, 40), "m": 512, "d": (1536, 2304)}
QUICK = {"layers": (6, 5), "m": 96, "d": (64, 80)}
OURS, PYTORCH_CKA, TORCH_CKA = "lorasuite_kernels.cka", "pytorch-cka 1.1.3", "torch-cka 0.21"
LAYERS_TIMED = 2
"""Layers a side that torch-cka is timed on."""


def tensors(case: dict) -> tuple[Tensor, Tensor]:
    """Hidden states that share some features, so that CKA is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(case["m"], 32, generator=generator)
    sides = []
    for layers, width in zip(case["layers"], case["d"], strict=True):
        x = torch.randn(layers, case["m"], width, generator=generator)
        sides.append(x.add_(shared @ torch.randn(32, width, generator=generator), alpha=0.2))
    return sides[0], sides[1]


def ours(x: Tensor, y: Tensor) -> Tensor:
    from lorasuite_kernels import cka

    return cka(x, y)


def pytorch_cka(x: Tensor, y: Tensor) -> Tensor:
    from cka import cka_from_features

    return cka_from_features(x, y)


class Replay(torch.nn.Module):
    """A model whose layers put out given tensors, for a package that reads them through hooks."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in features)

    def forward(self, _: Tensor) -> Tensor:
        for layer, feature in zip(self.layers, self.features, strict=True):
            layer(feature)
        return self.features[-1]


def torch_cka(x: Tensor, y: Tensor) -> Tensor:
    from torch_cka import CKA

    names = [[f"layers.{i}" for i in range(len(side))] for side in (x, y)]
    cka = CKA(Replay(x), Replay(y), "x", "y", *names)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1, 1)))
    cka.compare(loader, loader)
    return cka.export()["CKA"]


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {OURS: ours, PYTORCH_CKA: pytorch_cka, TORCH_CKA: torch_cka}


def measure(name: str, case: dict, repeats: int) -> dict:
    """Seconds for all pairs, and the peak resident memory beyond the inputs, of one method in this process."""
    x, y = tensors(case)
    pairs, timed = len(x) * len(y), 1.0
    if name == TORCH_CKA:
        x, y = x[:LAYERS_TIMED].clone(), y[:LAYERS_TIMED].clone()
        timed = pairs / (len(x) * len(y))
    method = METHODS[name]
    # Imports and the first call's buffers are no part of the method's peak.
    method(x[:2, :8], y[:2, :8])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = method(x, y)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "seconds": statistics.median(times) * timed,
        "peak_mib": peak / 1024,
        "scaled": timed != 1,
        "corner": result[:2, :2].flatten().tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder the two packages were installed into")
    parser.add_argument("--quick", action="store_true", help="a small case; prints and writes no report")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--method", choices=list(METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    case = QUICK if arguments.quick else FULL
    if arguments.peers:
        sys.path.insert(0, str(arguments.peers))
    torch.set_num_threads(arguments.threads)
    if arguments.method:
        print("RESULT " + json.dumps(measure(arguments.method, case, arguments.repeats)))
        return
    results = {}
    for name in METHODS:
        command = [sys.executable, __file__, *sys.argv[1:], "--method", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        results[name] = json.loads(line.removeprefix("RESULT "))
    text = report(results, case, arguments.threads)
    print(text)
    if not arguments.quick:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(text)


def report(results: dict[str, dict], case: dict, threads: int) -> str:
    (L_x, L_y), (d_x, d_y) = case["layers"], case["d"]
    lines = [
        "# CKA of all pairs of layers, CPU",
        "",
        f"{L_x} × {L_y} layers, m {case['m']}, d {d_x} and {d_y}, float32. {platform.machine()}, {threads} threads, "
        f"torch {torch.__version__}. Median of the runs, each method in a process of its own; written by "
        "`python bench/kernels_cpu.py`.",
        "",
        "| method | seconds | times ours | peak memory beyond the inputs | largest difference (2 × 2 corner) |",
        "|---|---:|---:|---:|---:|",
    ]
    reference = results[OURS]
    for name, result in results.items():
        difference = max(abs(a - b) for a, b in zip(result["corner"], reference["corner"], strict=True))
        times = result["seconds"] / reference["seconds"]
        note = f" (from {LAYERS_TIMED} × {LAYERS_TIMED} layers, scaled)" if result["scaled"] else ""
        peak = f"{result['peak_mib']:.0f} MiB"
        lines.append(f"| {name}{note} | {result['seconds']:.3f} | {times:.1f} | {peak} | {difference:.1e} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
