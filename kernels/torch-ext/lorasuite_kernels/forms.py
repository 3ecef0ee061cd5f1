"""Which form of an operation runs on a GPU: its Triton kernel, or PyTorch where that is the faster one.

Only what differs from "the kernel" stands here, with the reason. `backend` overrides it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Form(NamedTuple):
    """`"triton"` or `"torch"`, and why."""

    name: str
    reason: str


TRITON = Form("triton", "the kernel reads less memory, or starts fewer kernels, than PyTorch")

FORMS: dict[tuple[str, str, torch.dtype], Form] = dict.fromkeys(
    (("shared_gram", "nvidia", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    Form("torch", "a chunk of rows gathered once feeds cuBLAS; the kernel gathers them again for every row of tiles"),
)
"""(operator, vendor, widest dtype) -> form."""


def vendor(device: torch.device) -> str:
    """Whose GPU a device is: `"nvidia"` or `"amd"`; `"none"` for a CPU and others."""
    if device.type != "cuda":
        return "none"
    return "nvidia" if torch.version.hip is None else "amd"


def form(operator: str, maker: str, dtype: torch.dtype) -> Form:
    """What runs an operator for this vendor's GPUs where nothing is forced."""
    return FORMS.get((operator, maker, dtype), TRITON)
