"""What this machine has, what of lorasuite-fast runs on it and how, and what to do about what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .._version import __version__

REQUIRED = ("torch", "numpy", "scipy", "safetensors", "transformers", "peft", "accelerate", "huggingface_hub")
OPTIONAL = {
    "triton": "the kernels on a GPU, pip install triton",
    "matplotlib": "figures in notebooks, pip install matplotlib; reports do not need it",
    "datasets": "labelled data from the hub or saved by datasets, pip install datasets",
}
OPERATORS = ("cka", "cka_terms", "gram", "hsic_terms", "head_similarity", "shared_gram", "linear_target_kl")
"""Operators of `lorasuite_kernels` that have a kernel beside the PyTorch twin."""
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+?)\s*>=\s*(?P<least>[\d.]+)")
_LITTLE_MEMORY = 4 * 2**30
_LITTLE_DISK = 5 * 2**30


@dataclass(frozen=True)
class Package:
    """A package that is needed, or of use for something; `found` is None where it is not installed."""

    name: str
    found: str | None
    least: str | None
    required: bool

    @property
    def fine(self) -> bool:
        return self.found is not None and (self.least is None or _release(self.found) >= _release(self.least))


@dataclass(frozen=True)
class Device:
    """Where tensors can be; memory in bytes, None where it cannot be told."""

    name: str
    description: str
    memory: int | None
    free: int | None


@dataclass(frozen=True)
class Kernel:
    """How one operator runs on one device: `triton` (compiled), `interpreter` or `torch` (the PyTorch twin)."""

    operator: str
    device: str
    runs: str
    reason: str | None


@dataclass(frozen=True)
class Diagnosis:
    """The outcome of `examine`.

    Attributes:
        disk: free bytes by the folder asked about. hub: cache folder, whether it is there, whether the hub is off.
        problems: what keeps lorasuite-fast from working. advice: what would make it work better.
    """

    versions: dict[str, str]
    packages: list[Package]
    devices: list[Device]
    kernels: list[Kernel]
    disk: dict[str, int]
    hub: dict[str, Any]
    problems: list[str]
    advice: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, what `--json` prints."""
        return asdict(self) | {"fine": not self.problems}


def examine() -> Diagnosis:
    """Looks at everything; nothing is downloaded and no model opened."""
    packages = _packages()
    torch_found = importlib.util.find_spec("torch") is not None
    devices = [_processor(), *(_gpus() if torch_found else [])]
    kernels = _kernels([device.name for device in devices]) if torch_found else []
    versions = {
        "lorasuite-fast": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if torch_found:
        import torch

        runtime = torch.version.hip or torch.version.cuda
        versions["GPU runtime"] = f"{'ROCm' if torch.version.hip else 'CUDA'} {runtime}" if runtime else "none in torch"
    hub = _hub()
    disk = {
        "working folder": shutil.disk_usage(Path.cwd()).free,
        "temporary files": shutil.disk_usage(tempfile.gettempdir()).free,
        "hub cache": shutil.disk_usage(_existing(Path(hub["cache"]))).free,
    }
    return Diagnosis(
        versions,
        packages,
        devices,
        kernels,
        disk,
        hub,
        _problems(packages),
        _advice(packages, devices, kernels, disk, hub),
    )


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[Package]:
    least: dict[str, str] = {}
    try:
        for line in metadata.requires("lorasuite-fast") or []:
            if found := _REQUIREMENT.match(line):
                least[found["name"].replace("-", "_")] = found["least"]
    except metadata.PackageNotFoundError:
        # Run from a checkout that is not installed: nothing says which versions are needed.
        pass
    names = [(name, True) for name in REQUIRED] + [(name, False) for name in OPTIONAL]
    return [Package(name, _installed(name), least.get(name), required) for name, required in names]


def _processor() -> Device:
    total, available = _memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device("cpu", f"{cores} cores", total, available)


def _memory() -> tuple[int | None, int | None]:
    """Bytes of the machine and what of them is available; of the control group, where that allows less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
        total, available = fields["MemTotal"], fields["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return None, None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return total, available
    return min(total, limit), max(0, min(available, limit - used))


def _gpus() -> list[Device]:
    import torch

    found = []
    for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(n)
        free, total = torch.cuda.mem_get_info(n)
        kind = "" if torch.version.hip else f", sm_{facts.major}{facts.minor}"
        bfloat16 = "" if torch.cuda.is_bf16_supported() else ", no bfloat16"
        found.append(Device(f"cuda:{n}", f"{facts.name}{kind}{bfloat16}", total, free))
    return found


def _kernels(devices: list[str]) -> list[Kernel]:
    import torch

    from lorasuite_kernels.dispatch import implementation

    return [
        Kernel(operator, device, *implementation(torch.device(device), operator=operator))
        for device in devices
        for operator in OPERATORS
    ]


def _hub() -> dict[str, Any]:
    if importlib.util.find_spec("huggingface_hub") is None:
        return {"cache": str(Path("~/.cache/huggingface/hub").expanduser()), "exists": False, "offline": False}
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser()
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    return {
        "cache": str(cache),
        "exists": cache.is_dir(),
        "models": models,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "endpoint": constants.ENDPOINT,
    }


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _problems(packages: list[Package]) -> list[str]:
    problems = []
    for package in packages:
        if package.required and not package.fine:
            wanted = package.name + (f">={package.least}" if package.least else "")
            state = "is not installed" if package.found is None else f"is {package.found}"
            problems.append(f"{package.name} {state}; pip install '{wanted}'")
    return problems


def _advice(
    packages: list[Package], devices: list[Device], kernels: list[Kernel], disk: dict[str, int], hub: dict[str, Any]
) -> list[str]:
    advice = []
    for package in packages:
        if package.name == "triton" and len(devices) == 1:
            continue
        if not package.required and not package.fine:
            state = "is not installed" if package.found is None else f"is {package.found}, {package.least} is needed"
            advice.append(f"{package.name} {state}: it is for {OPTIONAL[package.name]}")
    if len(devices) == 1:
        advice.append(
            "PyTorch sees no GPU: plans and distillation work on the CPU; refine and finetune of large models take "
            "hours there. With a GPU in the machine, install a PyTorch built for it (https://pytorch.org)"
        )
    for device in devices[1:]:
        # Where some operators alone run in PyTorch, it is the faster form there.
        reasons = {k.reason for k in kernels if k.device == device.name}
        if len(reasons) == 1 and (reason := reasons.pop()):
            advice.append(f"{device.name} runs the PyTorch twins: {reason}")
    memory = devices[0].free
    if memory is not None and memory < _LITTLE_MEMORY:
        advice.append(f"only {memory / 2**30:.1f} GiB of memory are free: pass --memory {memory / 2**30 * 0.8:.1f}GB")
    for place, free in disk.items():
        if free < _LITTLE_DISK:
            advice.append(f"only {free / 2**30:.1f} GiB are free for the {place}: a model of 1B parameters takes 2 GiB")
    if hub["offline"]:
        advice.append("HF_HUB_OFFLINE is set: hub ids are only found in the cache; unset it to download")
    return advice
