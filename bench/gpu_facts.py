"""What the device is, and two ceilings every other figure of a run is read against: a copy and a matrix product.

python bench/gpu_facts.py RUN.jsonl
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_rows import DEVICE, DRY, guarded
from gpu_timing import seconds

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy")
COPIED = 2**12 if DRY else 2**30
SIDE = 64 if DRY else 8192


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device() -> dict[str, Any]:
    """Name, memory and processors of the device, and the versions of what runs on it."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cpus": os.cpu_count(),
        "disk_free": shutil.disk_usage(os.environ.get("SCRATCH") or "/tmp").free,
    }
    if DRY:
        return facts | {"name": "CPU, dry run"}
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "name": properties.name,
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(0)),
        "l2": getattr(properties, "L2_cache_size", None),
    }


def copy_rate() -> float:
    """Bytes read and written a second by one large copy."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPIED / seconds(lambda: target.copy_(source), DEVICE)


def product_rate(dtype: torch.dtype, precision: str) -> float:
    """Operations a second of one large square product."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        a, b = (torch.randn(SIDE, SIDE, device=DEVICE).to(dtype) for _ in range(2))
        return 2 * SIDE**3 / seconds(lambda: a @ b, DEVICE)
    finally:
        torch.set_float32_matmul_precision(before)


def launch_seconds() -> float:
    """Seconds of one small PyTorch operation, a hundred of them in a row."""
    x = torch.zeros(16, device=DEVICE)

    def hundred() -> None:
        for _ in range(100):
            x.add_(1)

    return seconds(hundred, DEVICE) / 100


CEILINGS = {
    "copy, bytes a second": copy_rate,
    "bfloat16 product, operations a second": lambda: product_rate(torch.bfloat16, "highest"),
    "tf32 product, operations a second": lambda: product_rate(torch.float32, "high"),
    "float32 product, operations a second": lambda: product_rate(torch.float32, "highest"),
    "float64 product, operations a second": lambda: product_rate(torch.float64, "highest"),
    "one PyTorch launch, seconds": launch_seconds,
}


def main() -> None:
    path = Path(sys.argv[1])
    with guarded(path, {"kind": "device"}) as row:
        row |= device()
    for name, measure in CEILINGS.items():
        with guarded(path, {"kind": "ceiling", "name": name}) as row:
            row["value"] = measure()


if __name__ == "__main__":
    main()
