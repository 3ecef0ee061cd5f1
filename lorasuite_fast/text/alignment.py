"""Positions at which two models have read the same bytes of a text, each in its own tokenization.

Position p of a row of token ids is the state after token p: it predicts token p + 1. Two positions are aligned where
both tokenizers end a token at the same byte of the text, so that both models predict what follows the same prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.token_ends import TokenEnds
from ..models.vocabulary import Key, SharedTokens, ids_by_key

Keys = dict[int, tuple[Key, bool]]


def ordinary_tokens(keys_o: Keys, keys_n: Keys) -> SharedTokens:
    """The tokens that stand for the same bytes in both vocabularies, in the order of the old ids; no special tokens.

    Args:
        keys_o, keys_n: `token_keys` of the two tokenizers.
    """
    ids_o, ids_n = ids_by_key(keys_o), ids_by_key(keys_n)
    pairs = sorted((i, ids_n[key]) for key, i in ids_o.items() if isinstance(key, bytes) and key in ids_n)
    ids = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return SharedTokens(ids[:, 0].contiguous(), ids[:, 1].contiguous(), identical=ids_o == ids_n)


@dataclass(frozen=True)
class AlignedText:
    """One text for two models.

    Attributes:
        ids_o, ids_n: token ids, special tokens in front included, cut behind the last aligned position.
        positions_o, positions_n: (n,) int64, positions in `ids_o` and `ids_n` with the same bytes read.
        ends: (n,) int64, the number of bytes of the text read there, ascending.
    """

    ids_o: list[int]
    ids_n: list[int]
    positions_o: Tensor
    positions_n: Tensor
    ends: Tensor


class Alignment:
    """Aligns texts for one pair of tokenizers.

    `ordinary` holds the shared tokens that stand for bytes, which both models' predictions can be compared over.

    >>> alignment = Alignment(old_tokenizer, new_tokenizer)
    >>> aligned = alignment.align("some text", max_tokens=128)

    Raises:
        LoraSuiteError: for a tokenizer without a `tokenizers` backend.
    """

    def __init__(self, old: Any, new: Any) -> None:
        self.old, self.new = TokenEnds(old), TokenEnds(new)
        self.ordinary = ordinary_tokens(self.old.keys, self.new.keys)

    def align(self, text: str, max_tokens: int) -> AlignedText | None:
        """The text's tokens for both models and the positions they share; None where they share none.

        Of several tokens of one tokenizer that end at the same byte the last counts, because the model has then read
        them all. Offset 0 is left out: nothing of the text has been read there. So are all positions whose offset the
        other tokenizer passes in the middle of a token; nothing is interpolated.

        Args:
            max_tokens: tokens of the text each model reads at most, special tokens in front not counted.
        """
        ids_o, ends_o = self.old(text)
        ids_n, ends_n = self.new(text)
        # The last of equal offsets is what a dict keeps.
        at_o = {end: p for p, end in enumerate(ends_o[:max_tokens])}
        at_n = {end: p for p, end in enumerate(ends_n[:max_tokens])}
        ends = sorted(end for end in at_o.keys() & at_n.keys() if end > 0)
        # A token cut off by max_tokens may still add to the same offset; that offset is then not complete.
        cut = {e[max_tokens] for e in (ends_o, ends_n) if len(e) > max_tokens}
        ends = [end for end in ends if end not in cut]
        if not ends:
            return None
        rows, positions = [], []
        for ids, at, prefix in ((ids_o, at_o, self.old.prefix), (ids_n, at_n, self.new.prefix)):
            rows.append(prefix + ids[: at[ends[-1]] + 1])
            positions.append(torch.tensor([len(prefix) + at[end] for end in ends]))
        return AlignedText(rows[0], rows[1], positions[0], positions[1], torch.tensor(ends))

    def align_all(self, texts: list[str], max_tokens: int) -> list[AlignedText]:
        """`align` for every text; texts that share no position are left out."""
        return [aligned for text in texts if (aligned := self.align(text, max_tokens)) is not None]
