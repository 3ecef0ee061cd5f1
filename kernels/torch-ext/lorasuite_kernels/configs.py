"""Launch configurations: one small table per target, in place of an autotune at the first call.

Every entry compiles without register spills on its target (`bench/aot.py` proves it, `bench/reports/aot.md` keeps the
proof). Nothing here imports Triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

PACKED_TILE = 128
"""Side of the square tiles in which `gram` stores an upper triangle."""

SUMMED_ROWS = 8192
"""Rows `shared_gram` sums in float32, in one launch; across launches it sums in float64."""

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SPLIT_TARGETS = ("sm_90",)
"""Where float32 products are three of TF32; on the other NVIDIA targets some kernel would spill registers."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: its block sizes by constant name, warps per program, pipeline stages."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    up_to: int | None = None
    """The largest problem size (head size, rank) this entry is meant for; None for any."""

    @property
    def keywords(self) -> dict[str, int]:
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


def _tiles(num_warps: int, num_stages: int, up_to: int | None = None, **blocks: int) -> Config:
    return Config(blocks, num_warps, num_stages, up_to)


Table = dict[str, dict[str, tuple[Config, ...]]]

# Shared memory stays under 99 KiB on sm_80, whose table serves sm_86, sm_89 and sm_120 too, and under 64 KiB on gfx942.
_GRAM: Table = {
    "sm_80": {
        "half": (_tiles(8, 3, BLOCK_K=32),),
        "float32": (_tiles(8, 2, BLOCK_K=16),),
    },
    "sm_90": {
        "half": (_tiles(8, 3, BLOCK_K=64),),
        "float32": (_tiles(8, 2, BLOCK_K=32),),
    },
    "sm_100": {
        "half": (_tiles(8, 3, BLOCK_K=64),),
        "float32": (_tiles(8, 2, BLOCK_K=16),),
    },
    "gfx942": {
        "half": (_tiles(8, 1, BLOCK_K=64),),
        "float32": (_tiles(8, 1, BLOCK_K=32),),
    },
}
_HSIC: Table = {
    "sm_80": {
        "half": (_tiles(4, 3, BLOCK_X=64, BLOCK_Y=64, BLOCK_K=64),),
        "float32": (_tiles(8, 2, BLOCK_X=64, BLOCK_Y=64, BLOCK_K=32),),
    },
    "sm_90": {
        "half": (_tiles(4, 4, BLOCK_X=64, BLOCK_Y=64, BLOCK_K=64),),
        "float32": (_tiles(4, 3, BLOCK_X=64, BLOCK_Y=64, BLOCK_K=32),),
    },
    "sm_100": {
        "half": (_tiles(4, 4, BLOCK_X=64, BLOCK_Y=64, BLOCK_K=64),),
        "float32": (_tiles(8, 3, BLOCK_X=64, BLOCK_Y=64, BLOCK_K=32),),
    },
    "gfx942": {
        "half": (_tiles(4, 1, BLOCK_X=64, BLOCK_Y=64, BLOCK_K=64),),
        "float32": (_tiles(4, 1, BLOCK_X=64, BLOCK_Y=64, BLOCK_K=32),),
    },
}
_HSIC_FINISH: Table = {target: {"float32": (_tiles(4, 1, BLOCK_L=32, BLOCK_S=32, BLOCK_K=64),)} for target in TARGETS}
# 64 lanes of gfx942 load 16 bytes each only from rows of 128.
_RATIO: Table = {target: {"float32": (_tiles(1, 1, BLOCK_L=128 if target == "gfx942" else 64),)} for target in TARGETS}
_HEADS: Table = {
    "sm_80": {
        "half": (
            _tiles(4, 3, 64, BLOCK_O=64, BLOCK_N=64, BLOCK_K=64),
            _tiles(8, 3, BLOCK_O=128, BLOCK_N=128, BLOCK_K=32),
        ),
        "float32": (_tiles(4, 2, BLOCK_O=64, BLOCK_N=64, BLOCK_K=32),),
    },
    "sm_90": {
        "half": (
            _tiles(4, 4, 64, BLOCK_O=64, BLOCK_N=64, BLOCK_K=64),
            _tiles(8, 4, BLOCK_O=128, BLOCK_N=128, BLOCK_K=64),
        ),
        "float32": (_tiles(4, 3, BLOCK_O=64, BLOCK_N=64, BLOCK_K=32),),
    },
    "sm_100": {
        "half": (
            _tiles(4, 4, 64, BLOCK_O=64, BLOCK_N=64, BLOCK_K=64),
            _tiles(8, 4, BLOCK_O=128, BLOCK_N=128, BLOCK_K=64),
        ),
        "float32": (_tiles(4, 2, BLOCK_O=64, BLOCK_N=64, BLOCK_K=32),),
    },
    "gfx942": {
        "half": (
            _tiles(4, 1, 64, BLOCK_O=64, BLOCK_N=64, BLOCK_K=64),
            _tiles(8, 1, BLOCK_O=128, BLOCK_N=128, BLOCK_K=64),
        ),
        "float32": (_tiles(4, 1, BLOCK_O=64, BLOCK_N=64, BLOCK_K=32),),
    },
}
_SHARED_GRAM: Table = {
    "sm_80": {
        "half": (_tiles(4, 3, TILE=64, BLOCK_K=64),),
        "float32": (_tiles(4, 2, TILE=64, BLOCK_K=32),),
    },
    "sm_90": {
        "half": (_tiles(8, 3, TILE=128, BLOCK_K=64),),
        "float32": (_tiles(4, 2, TILE=64, BLOCK_K=32),),
    },
    "sm_100": {
        "half": (_tiles(4, 3, TILE=64, BLOCK_K=64),),
        "float32": (_tiles(4, 2, TILE=64, BLOCK_K=32),),
    },
    "gfx942": {
        "half": (_tiles(8, 1, TILE=128, BLOCK_K=64),),
        "float32": (_tiles(8, 1, TILE=128, BLOCK_K=32),),
    },
}
_TARGET_KL: Table = {
    "sm_80": {
        "half": (_tiles(8, 3, BLOCK_N=128, BLOCK_V=128, BLOCK_K=32),),
        "float32": (_tiles(4, 2, BLOCK_N=64, BLOCK_V=64, BLOCK_K=32),),
    },
    "sm_90": {
        "half": (_tiles(8, 4, BLOCK_N=128, BLOCK_V=128, BLOCK_K=64),),
        "float32": (_tiles(4, 3, BLOCK_N=64, BLOCK_V=64, BLOCK_K=32),),
    },
    "sm_100": {
        "half": (_tiles(8, 4, BLOCK_N=128, BLOCK_V=128, BLOCK_K=64),),
        "float32": (_tiles(4, 2, BLOCK_N=64, BLOCK_V=64, BLOCK_K=32),),
    },
    "gfx942": {
        "half": (_tiles(8, 1, BLOCK_N=64, BLOCK_V=128, BLOCK_K=64),),
        "float32": (_tiles(4, 1, BLOCK_N=64, BLOCK_V=64, BLOCK_K=32),),
    },
}
TABLES: dict[str, Table] = {
    "gram": _GRAM,
    "hsic": _HSIC,
    "hsic_finish": _HSIC_FINISH,
    "ratio": _RATIO,
    "heads": _HEADS,
    "shared_gram": _SHARED_GRAM,
    "target_kl": _TARGET_KL,
}


_INTERPRETED = {
    "hsic": _tiles(1, 1, BLOCK_X=16, BLOCK_Y=16, BLOCK_K=1024),
    "hsic_finish": _tiles(1, 1, BLOCK_L=16, BLOCK_S=256, BLOCK_K=1024),
}
"""Fewer, wider steps for the interpreter, which would take minutes otherwise; for the rest it takes sm_80's table."""


@functools.cache
def target_of(device: torch.device) -> str:
    """The table a device is served from: its own, or that of the nearest older kind with as little shared memory."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def choose(kernel: str, dtype: torch.dtype, device: torch.device, size: int = 1) -> Config:
    """The first entry meant for problems of this size; the last where none is."""
    if device.type == "cpu" and kernel in _INTERPRETED:
        return _INTERPRETED[kernel]
    entries = TABLES[kernel][target_of(device)]["float32" if dtype == torch.float32 else "half"]
    return next((entry for entry in entries if entry.up_to is None or size <= entry.up_to), entries[-1])


def precision(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """`PRECISION` of a kernel's products.

    float32 operands take TF32 only where PyTorch is allowed to use it. Elsewhere they are split, on sm_90, into three
    TF32 products, whose error is that of float32 (about 1e-6) and which run on the tensor cores, or multiplied as they
    are.
    """
    if dtype != torch.float32:
        return {"PRECISION": "ieee"}
    if torch.get_float32_matmul_precision() != "highest":
        return {"PRECISION": "tf32"}
    return {"PRECISION": "tf32x3" if device.type == "cuda" and target_of(device) in SPLIT_TARGETS else "ieee"}
