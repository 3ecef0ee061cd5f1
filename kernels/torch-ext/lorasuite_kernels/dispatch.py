"""Which implementation an operator runs: the Triton kernel or its PyTorch twin.

CUDA and HIP tensors go to the kernel, unless `forms` says that PyTorch is faster there, CPU tensors to the twin. With
`TRITON_INTERPRET=1` in the environment CPU tensors go through the kernel, in Triton's interpreter. float64 is always
the twin's. Triton is imported by the first launch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .forms import form, vendor

# `torch.library.custom_op` imports torch._dynamo (and with it Triton) at an operator's first call, seconds for someone
# who compiles nothing. Defining the operators on a Library does not.
_LIBRARY = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")
_KEYS = ("CPU", "CUDA", "MPS", "XPU")
_FORCED: ContextVar[str | None] = ContextVar("lorasuite_kernels_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one implementation inside the block: `"triton"` the kernels, `"torch"` the twins.

    `balance`, `head_blocks`, `apply_head_blocks`, `project_heads` and `neuron_candidates` have no kernel and are not
    affected.

    Raises:
        ValueError: for another name.
        RuntimeError: `"triton"` where Triton is not installed; and, from an operator inside the block, for tensors that
            no kernel takes (float64; CPU tensors without `TRITON_INTERPRET=1`; GPUs older than sm_80).
    """
    if name not in ("triton", "torch"):
        raise ValueError(f"backend must be 'triton' or 'torch'; got {name!r}")
    if name == "triton" and not _triton_installed():
        raise RuntimeError("backend 'triton' needs the package triton, which is not installed")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(tensors: list[Tensor]) -> str | None:
    """Why the kernel cannot take these tensors; None where it can."""
    device = tensors[0].device
    unsupported = {t.dtype for t in tensors if t.is_floating_point()} - {torch.float32, torch.bfloat16, torch.float16}
    if unsupported:
        return f"the kernels take float32, bfloat16 and float16, not {', '.join(sorted(map(str, unsupported)))}"
    if device.type == "cpu" and not interpreting():
        return "CPU tensors reach a kernel only with TRITON_INTERPRET=1 in the environment"
    if device.type not in ("cpu", "cuda"):
        return f"there is no kernel for device {device}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of sm_80 or newer"
    if not _triton_installed():
        return "the package triton is not installed"
    return None


def implementation(
    device: torch.device, dtype: torch.dtype = torch.float32, operator: str | None = None
) -> tuple[str, str | None]:
    """What runs an operator on such tensors: `"triton"`, `"interpreter"` or `"torch"`, and why no kernel does."""
    obstacle = _obstacle([torch.empty(0, dtype=dtype, device=device)])
    if obstacle is not None:
        return "torch", obstacle
    if operator is not None and (chosen := form(operator, vendor(device), dtype)).name == "torch":
        return "torch", chosen.reason
    return ("interpreter" if device.type == "cpu" else "triton"), None


def _use_kernel(operator: str, tensors: list[Tensor]) -> bool:
    forced = _FORCED.get()
    if forced == "torch":
        return False
    obstacle = _obstacle(tensors)
    if forced == "triton" and obstacle:
        raise RuntimeError(f"backend 'triton' was asked for, but {obstacle}")
    if obstacle or forced == "triton":
        return obstacle is None
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors if t.is_floating_point()))
    return form(operator, vendor(tensors[0].device), dtype).name == "triton"


def define(
    signature: str, twin: Callable[..., Any], fake: Callable[..., Any], kernel: tuple[str, str] | None = None
) -> Callable[..., Any]:
    """Defines an operator and returns it.

    Args:
        signature: name and schema, such as `"gram(Tensor x) -> (Tensor, Tensor, Tensor)"`.
        twin: the PyTorch implementation. fake: shapes and dtypes of its results, for tracing.
        kernel: module of this package and launcher in it, imported when first needed; None where there is no kernel.
    """
    name = signature.partition("(")[0]

    def run(*arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if kernel is not None and _use_kernel(name, tensors):
            launcher = getattr(importlib.import_module(f".{kernel[0]}", __package__), kernel[1])
            # Triton launches on the current device, wherever the tensors are.
            with torch.cuda.device_of(tensors[0]):
                return launcher(*arguments)
        return twin(*arguments)

    _LIBRARY.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
    for key in _KEYS:
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(ops, name).default
    return operator


def check_one_device(**tensors: Tensor) -> None:
    """Raises ValueError unless all tensors are on one device."""
    if len({t.device for t in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"all tensors must be on one device; got {places}")


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype a twin computes in: float64 if any tensor is, else float32.

    Half-precision matrix products are hundreds of times slower than float32 on a CPU without units for them.
    """
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
