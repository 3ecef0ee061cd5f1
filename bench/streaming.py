"""The layer-streamed forward pass beside transformers' own and accelerate's disk offload, and over depth.

    python bench/streaming.py [--folder .cache/bench] [--airllm FOLDER]

Every method runs in a process of its own, on the same random checkpoint and tokens, float32; memory is the peak of the
resident set beyond what the process held once its libraries were loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import MINICPM_S_1B, machine, random_checkpoint, write_report

from lorasuite_fast.families import Shape

EXAMPLES, TOKENS = 64, 128
MODEL = replace(MINICPM_S_1B, V=4096, L=24)
DEPTHS = (4, 40)
DEPTH_MODEL = Shape(V=1024, d=768, h=64, H=12, G=12, f=2048, L=0)
OURS, WHOLE, OFFLOAD = "lorasuite_fast", "from_pretrained", "disk_offload"


def tokens() -> torch.Tensor:
    return torch.randint(0, 1000, (EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmRSS")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def evict(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def ours(folder: Path, micro_batch: int, cold: bool) -> dict[str, Any]:
    from lorasuite_fast.checkpoint import Checkpoint
    from lorasuite_fast.hidden_states import LayerStream, pooled_layers

    ids = tokens()
    if cold:
        evict(folder)
    forget_peak()
    before, start = resident(), time.perf_counter()
    checkpoint = Checkpoint(folder)
    stream = LayerStream(
        checkpoint,
        ids,
        torch.ones_like(ids),
        device=torch.device("cpu"),
        dtype=torch.float32,
        micro_batch=micro_batch,
    )
    result = torch.stack([vectors for _, vectors in pooled_layers(stream)])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": peak() - before, "read": checkpoint.tensors.bytes_read, "sum": check(result)}


def check(pooled: torch.Tensor) -> list[float]:
    return pooled[-2].mean(1)[:4].tolist()


def whole(folder: Path, micro_batch: int, cold: bool) -> dict[str, Any]:
    from transformers import AutoModel

    ids = tokens()
    if cold:
        evict(folder)
    forget_peak()
    before, start = resident(), time.perf_counter()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    loaded = time.perf_counter() - start
    parts = []
    with torch.no_grad():
        for batch in ids.split(micro_batch):
            states = model(batch, attention_mask=torch.ones_like(batch), output_hidden_states=True).hidden_states
            parts.append(torch.stack([s.mean(1) for s in states[1:]]))
    seconds = time.perf_counter() - start
    size = sum(p.nbytes for p in model.parameters())
    result = torch.cat(parts, 1)
    return {"seconds": seconds, "memory": peak() - before, "read": size, "loading": loaded, "sum": check(result)}


def offload(folder: Path, micro_batch: int, cold: bool) -> dict[str, Any]:
    from accelerate import disk_offload
    from accelerate.utils import offload as offloading
    from transformers import AutoModel

    ids = tokens()
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        disk_offload(model, temporary, execution_device=torch.device("cpu"))
        read = 0
        original = offloading.OffloadedWeightsLoader.__getitem__

        def counted(self: Any, key: str) -> torch.Tensor:
            nonlocal read
            tensor: torch.Tensor = original(self, key)
            read += tensor.nbytes
            return tensor

        offloading.OffloadedWeightsLoader.__getitem__ = counted
        if cold:
            evict(Path(temporary))
        forget_peak()
        before, start = resident(), time.perf_counter()
        parts = []
        with torch.no_grad():
            for batch in ids.split(micro_batch):
                states = model(batch, attention_mask=torch.ones_like(batch), output_hidden_states=True).hidden_states
                parts.append(torch.stack([s.mean(1) for s in states[1:]]))
                if cold:
                    # A model larger than memory: what one pass read is gone from the cache before the next.
                    evict(Path(temporary))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": peak() - before, "read": read, "sum": check(torch.cat(parts, 1))}


METHODS = {OURS: ours, WHOLE: whole, OFFLOAD: offload}


def measure(name: str, folder: Path, micro_batch: int, *, cold: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", name, str(folder), str(micro_batch), str(int(cold))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def agree(*results: dict[str, Any]) -> float:
    return max(abs(a - b) for r in results[1:] for a, b in zip(results[0]["sum"], r["sum"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.run:
        name, folder, micro_batch, cold = arguments.run
        # Libraries and the products' buffers are not what is compared.
        import transformers.models.llama.modeling_llama  # noqa: F401

        torch.randn(256, 256) @ torch.randn(256, 256)
        print(json.dumps(METHODS[name](Path(folder), int(micro_batch), cold == "1")))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = random_checkpoint(arguments.folder / "streaming", MODEL, torch.float32, "s", 1000)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    lines = [
        "# The layer-streamed forward pass",
        "",
        f"`python bench/streaming.py`, {machine()}. {EXAMPLES} examples of {TOKENS} tokens, float32, random Llama of",
        f"{MODEL.L} layers, d {MODEL.d}, f {MODEL.f} ({size / 1e9:.1f} GB). Loading is part of every time but that of",
        "disk_offload, whose folder is written before the clock starts. Cold: the page cache is emptied before each",
        "pass over the model (before every micro-batch for disk_offload, as where the model is larger than memory).",
        "",
        "| micro-batch | page cache | method | seconds | times ours | peak memory | bytes read / size of the layers |",
        "|---|---|---|---|---|---|---|",
    ]
    layers = None
    difference = 0.0
    for micro_batch, cold, names in (
        (16, False, (OURS, WHOLE)),
        (EXAMPLES, False, (OURS, OFFLOAD)),
        (1, False, (OURS, OFFLOAD)),
        (1, True, (OURS, OFFLOAD)),
    ):
        results = {name: measure(name, folder, micro_batch, cold=cold) for name in names}
        difference = max(difference, agree(*results.values()))
        layers = layers or results[OURS]["read"]
        for name, r in results.items():
            lines.append(
                f"| {micro_batch} | {'cold' if cold else 'warm'} | {name} | {r['seconds']:.1f} | "
                f"{r['seconds'] / results[OURS]['seconds']:.2f} | {r['memory'] / 2**20:,.0f} MiB | "
                f"{r['read'] / layers:.1f} |"
            )
    lines += [
        "",
        f"Largest difference between the methods' pooled hidden states: {difference:.0e}.",
        "",
        "Targets: at most 1.25 times from_pretrained's time at a tenth of its memory; disk_offload at least twice as",
        "slow with micro-batches of one example, and not faster with all in one batch.",
        "",
        "## Over depth",
        "",
        f"d {DEPTH_MODEL.d}, f {DEPTH_MODEL.f}, the same tokens, micro-batch 16.",
        "",
        "| layers | seconds | peak memory |",
        "|---|---|---|",
    ]
    deep = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for depth in DEPTHS:
            path = random_checkpoint(
                Path(temporary) / str(depth), replace(DEPTH_MODEL, L=depth), torch.float32, "d", 1000
            )
            deep.append(measure(OURS, path, 16))
            lines.append(f"| {depth} | {deep[-1]['seconds']:.1f} | {deep[-1]['memory'] / 2**20:,.0f} MiB |")
    lines += [
        "",
        f"{DEPTHS[1] // DEPTHS[0]} times the layers take {deep[1]['seconds'] / deep[0]['seconds']:.1f} times the time "
        f"and {deep[1]['memory'] / deep[0]['memory']:.2f} times the memory.",
        "",
    ]
    write_report("streaming", "\n".join(lines))


if __name__ == "__main__":
    main()
