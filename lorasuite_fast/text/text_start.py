"""The tokens a text begins with that a model writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..io.json_files import read_json
from ..models.checkpoint import Checkpoint
from .calibration import load_examples

_FIRST = 2
"""Tokens of a shipped text with which one begins where no token marks a beginning."""
_TEXTS = 1024


@dataclass(frozen=True)
class TextStart:
    """What a written text begins with.

    Attributes:
        prompts: (n, k) int64, taken in turn. in_text: whether they are part of the text, and not a mark in front of it.
    """

    prompts: Tensor
    in_text: bool

    def rows(self, first: int, count: int) -> Tensor:
        """(count, k): the prompts of the texts from the `first` on."""
        return self.prompts[(first + torch.arange(count)) % len(self.prompts)]


def text_start(model: Checkpoint, tokenizer: Any) -> TextStart:
    """BOS or EOS of the tokenizer; else those of config.json or generation_config.json; else the shipped texts' first.

    Raises:
        LoraSuiteError: the tokenizer reads nothing of the shipped text.
    """
    mark = next(iter(_marks(model, tokenizer)), None)
    if mark is not None:
        return TextStart(torch.tensor([[mark]]), in_text=False)
    texts = load_examples(None, _TEXTS, 0)
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:_FIRST] for text in texts]
    rows = [row for row in rows if len(row) == _FIRST and max(row) < model.shape.V]
    # A character that the second token cuts in two decodes to U+FFFD.
    rows = [row for row in rows if "\ufffd" not in tokenizer.decode(row)]
    if not rows:
        raise LoraSuiteError(
            f"{model.folder}: neither its tokenizer nor its configs name BOS or EOS, and its tokenizer reads nothing "
            "of the shipped text, so that a text has nothing to begin with; give text of the adapter's domain"
        )
    return TextStart(torch.tensor(rows), in_text=True)


def _marks(model: Checkpoint, tokenizer: Any) -> list[int]:
    """The ids of tokens that mark a beginning, the best first."""
    named: list[Any] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    generation = model.folder / "generation_config.json"
    for config in (model.config, read_json(generation) if generation.exists() else {}):
        for key in ("bos_token_id", "eos_token_id"):
            value = config.get(key)
            named += value if isinstance(value, list) else [value]
    return [n for n in named if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < model.shape.V]
