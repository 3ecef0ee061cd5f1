"""Updates for new layers that continue no old one, and would otherwise have none."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..errors import LoraSuiteError
from ..models.families import Family, Shape
from .adapter import Update
from .factors import Factors

FILLS = ("none", "zero", "nearest")
SHARE = 0.5
"""Of the nearest layer's update, where nothing else is asked for."""


def fill_layers(
    updates: dict[tuple[int, str], Update],
    family: Family,
    shape: Shape,
    how: str,
    *,
    rank: int,
    alpha: float,
    share: float = SHARE,
    seed: int = 0,
) -> dict[tuple[int, str], Update]:
    """Every module that some layer has an update of, updated in all of them.

    Args:
        updates: by (layer, module). how: "none" leaves them as they are, as LoRASuite does; "zero" adds a random A
            (as PEFT draws it, uniform in ±1/sqrt(in)) and a zero B, which change nothing until they are trained;
            "nearest" adds `share` of the update of the nearest layer that has one, the earlier of two.
        rank, alpha: of what "zero" adds.

    Raises:
        LoraSuiteError: another `how`, or a share that is not a number.
    """
    if how not in FILLS:
        raise LoraSuiteError(f"fill {how!r} is not one of {', '.join(FILLS)}")
    if not math.isfinite(share):
        raise LoraSuiteError(f"fill share {share} is not a number")
    filled = dict(updates)
    if how == "none" or not updates:
        return filled
    generator = torch.Generator().manual_seed(seed)
    first = next(iter(updates.values()))
    for module in dict.fromkeys(module for _, module in updates):
        present = sorted(layer for layer, found in updates if found == module)
        out, into = family.module_shape(module, shape)
        for layer in sorted(set(range(shape.L)) - set(present)):
            if how == "nearest":
                source = updates[min(present, key=lambda j: (abs(j - layer), j)), module]
                b, a = source.factors
                filled[layer, module] = replace(source, factors=Factors(share * b, a.clone()))
            else:
                a = (2 * torch.rand(rank, into, generator=generator) - 1) / math.sqrt(into)
                dtype = first.factors.a.dtype
                factors = Factors(torch.zeros(out, rank, dtype=dtype), a.to(dtype))
                filled[layer, module] = Update(factors, alpha, first.rslora)
    return dict(sorted(filled.items()))
