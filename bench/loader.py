"""The layer loader's bandwidth beside a plain sequential read of the same files, with a warm and a cold page cache.

    python bench/loader.py [--folder .cache/bench]

Each round reads the same checkpoint both ways, one after the other; medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from measure import MINICPM_2B, machine, random_checkpoint, write_report

from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.loader import stream_layers

SHARED, ROUNDS, BLOCK = 60_000, 5, 16 << 20


def evict(folder: Path) -> None:
    """Drops the files' pages from the page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def layer_files(folder: Path) -> list[Path]:
    entries = Checkpoint(folder).tensors.entries
    return sorted({entry.file for name, entry in entries.items() if ".layers." in name})


def plain(folder: Path, touch: bool) -> float:
    """Bytes per second of read() through all files, in blocks of 16 MiB."""
    buffer = torch.empty(BLOCK, dtype=torch.uint8)
    view, total, start = buffer.numpy().data, 0, time.perf_counter()
    for file in layer_files(folder):
        with file.open("rb", buffering=0) as stream:
            while got := stream.readinto(view):
                total += got
                if touch:
                    buffer[: got // 8 * 8].view(torch.int64).sum()
    return total / (time.perf_counter() - start)


def loader(folder: Path, touch: bool, mapped: bool) -> float:
    checkpoint = Checkpoint(folder, mapped=mapped)
    total, start = 0, time.perf_counter()
    for layer in stream_layers(checkpoint, torch.device("cpu")):
        for tensor in layer.tensors.values():
            total += tensor.nbytes
            if touch:
                tensor.flatten().view(torch.uint8)[: tensor.nbytes // 8 * 8].view(torch.int64).sum()
    return total / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    folder = random_checkpoint(arguments.folder / "minicpm-2b", MINICPM_2B, torch.bfloat16, "n", SHARED)
    size = sum(file.stat().st_size for file in layer_files(folder)) / 1e9
    os.sync()
    lines = [
        "# The loader's bandwidth",
        "",
        f"`python bench/loader.py`, {machine()}. A MiniCPM-2B-shaped bfloat16 checkpoint, its {MINICPM_2B.L} layers",
        f"are {size:.1f} GB in shards of 8; medians of {ROUNDS} rounds, all in each round. Summed: every byte is",
        "read by the processor too, on all sides.",
        "",
        "| page cache | what is done with a layer | plain sequential read | loader, mapped | loader, read | "
        "mapped / plain | read / plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for cold in (False, True):
        for touch in (False, True):
            rates: list[tuple[float, float, float]] = []
            for _ in range(ROUNDS):
                found = []
                for work in (
                    lambda: plain(folder, touch),  # noqa: B023
                    lambda: loader(folder, touch, mapped=True),  # noqa: B023
                    lambda: loader(folder, touch, mapped=False),  # noqa: B023
                ):
                    if cold:
                        evict(folder)
                    found.append(work() / 1e9)
                rates.append((found[0], found[1], found[2]))
            median = [statistics.median(r[k] for r in rates) for k in range(3)]
            ratios = [statistics.median(r[k] / r[0] for r in rates) for k in (1, 2)]
            lines.append(
                f"| {'cold' if cold else 'warm'} | {'summed' if touch else 'delivered'} | "
                + " | ".join(f"{value:.2f} GB/s" for value in median)
                + " | "
                + " | ".join(f"{ratio:.0%}" for ratio in ratios)
                + " |"
            )
    lines += [
        "",
        "Target: at least 85 % of the plain read. A mapped layer of a warm file is delivered without a copy.",
        "",
    ]
    write_report("loader", "\n".join(lines))


if __name__ == "__main__":
    main()
