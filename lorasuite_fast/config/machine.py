"""Device, dtype and memory, as a run names them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import LoraSuiteError

if TYPE_CHECKING:
    import torch

_DTYPES = ("float32", "bfloat16", "float64")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|[KMGT]I?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """What the models of a run are computed with.

    Attributes:
        dtype: Of the models and their products.
        half: The device is a GPU that computes in bfloat16.
        memory: What may be resident on the device; None sets no bound.
    """

    device: torch.device
    dtype: torch.dtype
    half: bool = False
    trust_remote_code: bool = False
    memory: str | int | None = None


def check_choice(what: str, known: Iterable[str], value: str) -> str:
    if value not in known:
        raise LoraSuiteError(f"{what} {value!r} is not one of {', '.join(known)}")
    return value


def pick_device(name: str) -> torch.device:
    """auto takes the GPU where there is one."""
    import torch

    check_choice("device", ("auto", "cpu", "cuda"), name)
    if name == "cuda" and not torch.cuda.is_available():
        raise LoraSuiteError("`device=cuda`: PyTorch sees no GPU; pass `device=cpu`")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def finite_hint(dtype: torch.dtype) -> str:
    """What to do about NaN or infinity that a model gives in a dtype."""
    wide = str(dtype) in ("torch.float32", "torch.float64")
    return "check the weights" if wide else "check the weights, or pass `dtype=float32`"


def pick_dtype(name: str) -> torch.dtype:
    """auto is float32: float16 and, on many CPUs, bfloat16 products are slow there, and inexact everywhere."""
    import torch

    if name == "auto":
        return torch.float32
    dtype: torch.dtype = getattr(torch, check_choice("dtype", ("auto", *_DTYPES), name))
    return dtype


def parse_memory(text: str | int) -> int:
    """Bytes of "6GB", "512MiB", "24 G" or a plain number.

    Raises:
        LoraSuiteError: if it is none of these, or less than a megabyte, which is a unit left out.
    """
    match = _SIZE.fullmatch(str(text).strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise LoraSuiteError(f"`memory={text}`: expected a size such as 6GB, 512MiB or 24000000000")
    if size < 10**6:
        unit = "" if match is None or match[2] else f"; did you mean {match[1]}GB?"
        raise LoraSuiteError(f"`memory={text}`: is {size:,} bytes, less than any model needs{unit}")
    return size
