"""A model's unembedding and the norm in front of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .checkpoint import Checkpoint


def unembedding(model: Checkpoint) -> Tensor:
    """(V, d), a view: the head's own weight, or the embedding it is tied to."""
    return model.tensors.view(model.head() or model.embedding_name)


def final_norm(model: Checkpoint) -> tuple[Tensor, Tensor | None]:
    """Gain and shift (None where it has none) of the norm in front of the head, (d,) float32."""
    name = f"{model.prefix}{model.family.final_norm}"
    found = {kind: model.tensors.view(f"{name}.{kind}").float() for kind in model.family.stored_norm}
    for kind, tensor in found.items():
        model.check_finite(tensor, f"{name}.{kind}")
    gain = found["weight"] + model.family.gain_offset if "weight" in found else torch.ones(model.shape.d)
    return gain, found.get("bias")


def gained_rows(rows: Tensor, model: Checkpoint) -> Tensor:
    """Rows of the unembedding (s, d) as maps of the normed residual stream: the final norm's gain, and its centring."""
    rows = rows * final_norm(model)[0].to(rows)
    return rows - rows.mean(-1, keepdim=True) if model.family.layer_norm else rows
