"""The layer-streamed forward pass beside transformers' own and accelerate's disk offload, and over depth.

    pip install --no-deps --target .cache/peers airllm==4.0.0
    python bench/streaming.py [--folder .cache/bench] [--peers .cache/peers]

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
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import MINICPM_S_1B, machine, random_checkpoint, write_report

from lorasuite_fast.models.families import Shape

EXAMPLES, TOKENS = 64, 128
DEEP, SHALLOW = (replace(MINICPM_S_1B, V=4096, L=layers) for layers in (24, 8))
"""The deep one is compared with itself in full memory, the shallow one with those that load it again and again."""
DEPTHS = (4, 40)
DEPTH_MODEL = Shape(V=1024, d=768, h=64, H=12, G=12, f=2048, L=0)
OURS, WHOLE, OFFLOAD, AIRLLM = "lorasuite_fast", "from_pretrained", "accelerate disk_offload", "AirLLM 4.0.0"


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
    from lorasuite_fast.models.checkpoint import Checkpoint
    from lorasuite_fast.models.hidden_states import LayerStream, pooled_layers

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
    # Of the embedding only the tokens' rows are touched, on its map.
    layers = checkpoint.tensors.bytes_read - checkpoint.tensors.entry(checkpoint.embedding_name).size
    return {"seconds": seconds, "memory": peak() - before, "read": layers, "sum": check(result)}


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
    size = sum(p.nbytes for name, p in model.named_parameters() if "layers." in name)
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
            read += tensor.nbytes if "layers." in key else 0
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


def airllm(folder: Path, micro_batch: int, cold: bool) -> dict[str, Any]:
    from airllm import AirLLMLlama2
    from airllm.airllm_base import AirLLMBaseModel

    ids, read = tokens(), 0
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, redirect_stdout(sys.stderr):
        model = AirLLMLlama2(
            str(folder), device="cpu", dtype=torch.float32, layer_shards_saving_path=temporary, max_seq_len=TOKENS
        )
        original = AirLLMBaseModel.load_layer_to_cpu

        def counted(self: Any, name: str) -> dict[str, torch.Tensor]:
            nonlocal read
            tensors: dict[str, torch.Tensor] = original(self, name)
            read += sum(t.nbytes for t in tensors.values()) if ".layers." in name else 0
            return tensors

        AirLLMBaseModel.load_layer_to_cpu = counted
        if cold:
            evict(Path(temporary))
        forget_peak()
        before, start = resident(), time.perf_counter()
        parts = []
        with torch.no_grad():
            for batch in ids.split(micro_batch):
                found = model(batch, attention_mask=torch.ones_like(batch), use_cache=False, output_hidden_states=True)
                parts.append(torch.stack([s.mean(1) for s in found.hidden_states[1:]]))
                if cold:
                    evict(Path(temporary))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": peak() - before, "read": read, "sum": check(torch.cat(parts, 1))}


METHODS = {OURS: ours, WHOLE: whole, OFFLOAD: offload, AIRLLM: airllm}


def measure(name: str, folder: Path, micro_batch: int, *, cold: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--run", name, str(folder), str(micro_batch), str(int(cold))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def agree(*results: dict[str, Any]) -> float:
    return max(abs(a - b) for r in results[1:] for a, b in zip(results[0]["sum"], r["sum"], strict=True))


def times(root: Path, peers: tuple[str, ...]) -> list[str]:
    deep, shallow = (
        random_checkpoint(root / f"streaming-{model.L}", model, torch.float32, "s", 1000) for model in (DEEP, SHALLOW)
    )
    lines = [
        "# The layer-streamed forward pass",
        "",
        f"`python bench/streaming.py --part times`, {machine()}. {EXAMPLES} examples of {TOKENS} tokens, float32,",
        f"random Llama of d {DEEP.d}, f {DEEP.f}. Loading is part of the first two",
        "methods' times; the others write a folder of their own before the clock starts. Cold: the page cache is",
        "emptied before each pass (the others make one per micro-batch), as where the model is larger than memory.",
        "Times read: bytes read of the layers over their size.",
        "",
        "| layers | micro-batch | page cache | method | seconds | times ours | times read |",
        "|---|---|---|---|---|---|---|",
    ]
    difference = 0.0
    for folder, micro_batch, cold, names in (
        (deep, 16, False, (OURS, WHOLE)),
        (shallow, EXAMPLES, False, (OURS, OFFLOAD, *peers)),
        (shallow, 1, False, (OURS, OFFLOAD, *peers)),
        (shallow, 1, True, (OURS, OFFLOAD, *peers)),
    ):
        results = {name: measure(name, folder, micro_batch, cold=cold) for name in names}
        difference = max(difference, agree(*results.values()))
        read = results[OURS]["read"]
        layers, cache = (DEEP if folder is deep else SHALLOW).L, "cold" if cold else "warm"
        for name, r in results.items():
            lines.append(
                f"| {layers} | {micro_batch} | {cache} | {name} | {r['seconds']:.1f} | "
                f"{r['seconds'] / results[OURS]['seconds']:.2f} | {r['read'] / read:.1f} |"
            )
    return [
        *lines,
        "",
        f"Largest difference between the methods' pooled hidden states: {difference:.0e}.",
        "",
        "Targets: at most 1.25 times from_pretrained's time; disk_offload at least twice as slow with micro-batches of",
        "one example, and not faster with all in one batch.",
        "",
    ]


def depth(root: Path) -> list[str]:
    lines = [
        "# Time and memory over depth",
        "",
        f"`python bench/streaming.py --part depth`, {machine()}. {EXAMPLES} examples of {TOKENS} tokens, float32,",
        "micro-batch 16. Memory is the peak of the resident set beyond what the process held before.",
        "",
        "| model | method | seconds | peak memory |",
        "|---|---|---|---|",
    ]
    found = []
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        for layers in DEPTHS:
            model = replace(DEPTH_MODEL, L=layers)
            path = random_checkpoint(Path(temporary) / str(layers), model, torch.float32, "d", 1000)
            found.append(measure(OURS, path, 16))
            lines.append(_row(model, OURS, found[-1]))
    return [
        *lines,
        "",
        f"{DEPTHS[1] // DEPTHS[0]} times the layers take {found[1]['seconds'] / found[0]['seconds']:.1f} times the "
        f"time and {found[1]['memory'] / found[0]['memory']:.2f} times the memory.",
        "Target: ten times the time, and the same memory.",
        "",
    ]


def in_memory(root: Path) -> list[str]:
    deep = random_checkpoint(root / f"streaming-{DEEP.L}", DEEP, torch.float32, "s", 1000)
    found, whole_ = (measure(name, deep, 16) for name in (OURS, WHOLE))
    return [
        "# Memory against the whole model",
        "",
        f"`python bench/streaming.py --part memory`, {machine()}. {EXAMPLES} examples of {TOKENS} tokens, float32,",
        "micro-batch 16. Memory is the peak of the resident set beyond what the process held before.",
        "",
        "| model | method | seconds | peak memory |",
        "|---|---|---|---|",
        _row(DEEP, OURS, found),
        _row(DEEP, WHOLE, whole_),
        "",
        f"{found['seconds'] / whole_['seconds']:.2f} times the time, "
        f"{found['memory'] / whole_['memory']:.2f} times the memory.",
        "Targets: at most 1.25 times the time, at a tenth of the memory.",
        "",
    ]


def _row(model: Shape, name: str, found: dict[str, Any]) -> str:
    return (
        f"| {model.L} layers, d {model.d}, f {model.f} | {name} | {found['seconds']:.1f} | "
        f"{found['memory'] / 2**20:,.0f} MiB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--part", choices=("times", "depth", "memory"), nargs="+", default=["times", "depth", "memory"])
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--peers", type=Path, default=Path(".cache/peers"), help="folder AirLLM was installed into")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    sys.path.append(str(arguments.peers))
    if arguments.run:
        name, folder, micro_batch, cold = arguments.run
        # Libraries and the products' buffers are not what is compared.
        import accelerate  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401
        from transformers import AutoModel  # noqa: F401

        import lorasuite_fast.models.hidden_states  # noqa: F401

        torch.randn(256, 256) @ torch.randn(256, 256)
        print(json.dumps(METHODS[name](Path(folder), int(micro_batch), cold == "1")))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if "times" in arguments.part:
        peers = (AIRLLM,) if (arguments.peers / "airllm").exists() else ()
        write_report("streaming", "\n".join(times(arguments.folder, peers)))
    if "depth" in arguments.part:
        write_report("depth", "\n".join(depth(arguments.folder)))
    if "memory" in arguments.part:
        write_report("memory", "\n".join(in_memory(arguments.folder)))


if __name__ == "__main__":
    main()
