"""DoRA's magnitudes (arXiv 2402.09353), carried.

DoRA's weight is `diag(m / |W + ΔW|) (W + ΔW)`, norms taken by row, so that what it learnt beside ΔW is the factor
`m / |W + ΔW|` on every output. The new magnitude is that factor, carried, times the norm of the new row. Outputs are
carried as rows of B are: by matched heads or neurons, and by W_h. Where such a map mixes outputs, DoRA, whose factors
are one per output, cannot follow it; the new factor is then the mean of the old ones, weighted by the squared entries
of the map. That is exact where outputs correspond one to one, and stays between the smallest and the largest. What a
factor makes of the shift of a LayerNorm in front is not carried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters.adapter import Update
from ..errors import LoraSuiteError
from ..models.checkpoint import Checkpoint
from ..models.loader import Layer
from .projection import PlannedLayer, carry_heads


def row_norms(weight: Tensor, update: Update) -> Tensor:
    """|W + s B A| by row, (out,) float64; W (out, in) is read once, and its sum with the update never formed."""
    b, a = (factor.double() * scale for factor, scale in zip(update.factors, (update.scale, 1.0), strict=True))
    w = weight.double()
    squares = w.square().sum(1) + 2 * ((w @ a.T) * b).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
    return squares.clamp_min(0).sqrt()


def factors_of(weight: Tensor, update: Update) -> Tensor:
    """m / |W + ΔW|, (out,) float64; 1 for rows that are zero."""
    assert update.magnitude is not None
    norms = row_norms(weight, update)
    return torch.where(norms > 0, update.magnitude.double() / norms, 1)


def stored_factors(model: Checkpoint, layer: int, role: str, update: Update) -> Tensor:
    """`factors_of` with the weight from the checkpoint."""
    return factors_of(Layer.of(model, layer, (role,)).weight(role, torch.float32), update)


def carry_factors(layer: PlannedLayer, role: str, old: Tensor) -> Tensor:
    """Old outputs' factors (out_o,) as the new outputs', (out_n,); 1 for outputs that continue none.

    Raises:
        LoraSuiteError: by Eq. (3) on the MLP, which matches no neurons.
    """
    values = torch.stack([old, torch.ones_like(old)], 1)
    if role in ("o", "down"):
        summed = layer.W_h.double().square().T @ values
    elif role in ("gate", "up"):
        if "neurons.match" not in layer.tensors:
            raise LoraSuiteError(
                f"DoRA's magnitudes of {role} cannot be carried by Eq. (3), which matches no neurons; use lstsq"
            )
        match = layer.tensors["neurons.match"]
        summed = values[match.clamp_min(0)] * (match >= 0)[:, None]
    else:
        blocks = {
            "heads.match": layer.tensors["heads.match"],
            f"{role}.blocks": layer.tensors[f"{role}.blocks"].double().square(),
        }
        summed = carry_heads(blocks, role, values, layer.old_shape, layer.new_shape)
    weighted, total = summed.unbind(1)
    return torch.where(total > 0, weighted / total, 1)


def with_magnitudes(
    updates: dict[tuple[int, str], Update], factors: Mapping[tuple[int, str], Tensor], new: Checkpoint
) -> dict[tuple[int, str], Update]:
    """Gives updates by (new layer, module) their magnitudes, from factors by (new layer, role).

    Raises:
        LoraSuiteError: a new weight with rows of zeros that the update leaves as they are.
    """
    family, shape = new.family, new.shape
    found = {}
    for (layer, module), update in updates.items():
        roles = family.sharing(module)
        read = Layer.of(new, layer, roles)
        magnitude = row_norms(read.module_weight(module, torch.float32), update)
        if not magnitude.all():
            raise LoraSuiteError(
                f"{new.folder}: {family.layer(layer)}.{module} has rows of zeros, by whose norm DoRA would divide; "
                "carry the effect as a plain LoRA instead, with `method=distill`"
            )
        for role in roles:
            if (layer, role) in factors:
                rows = family.rows(role, shape)
                where = slice(None) if rows is None else rows
                magnitude[where] *= factors[layer, role]
        found[layer, module] = replace(update, magnitude=magnitude.to(update.factors.a.dtype))
    return found
