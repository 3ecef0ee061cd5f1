"""Whether the new model's head reads the carried states as the old model's reads its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import Checkpoint
from ..models.unembedding import gained_rows, unembedding
from ..models.vocabulary import shared_tokens, trained_rows

_ROWS = 1024


def head_r2(old: Checkpoint, new: Checkpoint, tokenizers: tuple[Any, Any], W_h: Tensor) -> float | None:
    """How much of the old head's rows the new head's explain, up to one factor: 1 for the same logits, 0 for others.

    A state x of the old model is x W_h in the new one, so that rows U_n, with the gain of the norm in front of them,
    should be U_o on it: `U_n W_h^T ∝ U_o`, both without the mean over the tokens, which no probability depends on.

    Args:
        tokenizers: of old and new, of whose shared tokens at most 1,024 trained ones are compared. W_h: (d_o, d_n).

    Returns:
        The squared cosine of the two tables, 0 where it is negative; None where there are fewer than 2 rows.
    """
    tokens = shared_tokens(*tokenizers)
    inside = (tokens.old < old.shape.V) & (tokens.new < new.shape.V)
    pairs = torch.stack([tokens.old, tokens.new])[:, inside]
    pairs = pairs[:, :: max(1, -(-pairs.shape[1] // _ROWS))]
    keep, sides = torch.ones(pairs.shape[1], dtype=torch.bool), []
    for model, chosen in zip((old, new), pairs, strict=True):
        embedding = model.tensors.view(model.embedding_name)
        keep &= trained_rows(embedding[chosen].float(), torch.arange(len(chosen)))
        sides.append(gained_rows(unembedding(model)[chosen].float(), model).double())
        model.tensors.release([model.embedding_name, model.head() or model.embedding_name])
    y, x = sides[0][keep], sides[1][keep] @ W_h.double().T
    if len(y) < 2:
        return None
    y, x = y - y.mean(0), x - x.mean(0)
    product, sizes = float((x * y).sum()), float(x.square().sum() * y.square().sum())
    return product * product / sizes if product > 0 and sizes > 0 else 0.0
