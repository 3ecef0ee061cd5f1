"""Text on which a training is to leave a model's predictions as they are.

Training on one kind of text makes a model forget others. To retain them a step also reads unlabelled text of another
kind and adds `weight · KL(bare model ‖ model with adapter)`, the mean over the positions of that text. (Learning
without forgetting, Li and Hoiem 2016, arXiv 1606.09282, with whole distributions of next tokens as what is kept.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..io.hub_ids import shown
from ..text.calibration import load_examples
from ..text.samples import Sample, Samples, load_samples, padded
from .predictions import predictions

SHIPPED = "shipped"
"""In the place of a file, the general text that comes with the package."""
KEPT = "kept_"
"""In front of the names of what a batch holds of the text to retain."""
_ALL_TEXTS = 10**9


def kept_samples(source: str | os.PathLike[str] | None, tokenizer: Any, max_tokens: int, seed: int) -> Samples:
    """The rows of the text to retain, none where there is none: a .jsonl (`text`) or .txt file, or SHIPPED."""
    if source is None:
        return Samples([], 0, 0)
    texts = load_examples(None if os.fspath(source) == SHIPPED else source, _ALL_TEXTS, seed)
    return load_samples([{"text": text} for text in texts], tokenizer, max_tokens=max_tokens)


def kept_batch(rows: Sequence[Sample]) -> dict[str, Tensor]:
    """What a batch holds of them: `samples.padded`, under the names with KEPT."""
    return {f"{KEPT}{name}": tensor for name, tensor in padded(rows).items()}


def named_text(source: str | os.PathLike[str]) -> str:
    """As a model card may name it."""
    return "the general text shipped with lorasuite-fast" if os.fspath(source) == SHIPPED else shown(source)


def summed_shift(model: Any, ids: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    """KL(bare model ‖ model with its adapter) in nats, summed over the predictions that count; at least float32.

    Args:
        model: a PEFT model. ids, mask: (rows, length). counted: (rows, length) bool, which tokens' predictions count;
            never the first.
    """
    at = counted[:, 1:]

    def log_probs() -> Tensor:
        return predictions(model, ids, mask).log_probs(at)

    training = model.training
    # What is kept is the model's own prediction, not one under dropout.
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        bare = log_probs()
    model.train(training)
    return functional.kl_div(log_probs(), bare, reduction="sum", log_target=True)
