"""What a run is given: its device and its dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .errors import LoraSuiteError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def check_choice(what: str, known: Iterable[str], value: str) -> str:
    if value not in known:
        raise LoraSuiteError(f"{what} {value!r} is not one of {', '.join(known)}")
    return value


def pick_device(name: str) -> torch.device:
    """auto takes the GPU where there is one."""
    check_choice("device", ("auto", "cpu", "cuda"), name)
    if name == "cuda" and not torch.cuda.is_available():
        raise LoraSuiteError("`device=cuda`: PyTorch sees no GPU; pass `device=cpu`")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def finite_hint(dtype: torch.dtype) -> str:
    """What to do about NaN or infinity that a model gives in a dtype."""
    wide = dtype in (torch.float32, torch.float64)
    return "check the weights" if wide else "check the weights, or pass `dtype=float32`"


def pick_dtype(name: str) -> torch.dtype:
    """auto is float32: float16 and, on many CPUs, bfloat16 products are slow there, and inexact everywhere."""
    if name == "auto":
        return torch.float32
    check_choice("dtype", ("auto", *_DTYPES), name)
    return _DTYPES[name]
