"""Positions at which two models have read the same bytes of a text, each in its own tokenization.

Position p of a row of token ids is the state after token p: it predicts token p + 1. Two positions are aligned where
both tokenizers end a token at the same byte of the text, so that both models predict what follows the same prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor

from .vocabulary import Key, SharedTokens, _prefix, ids_by_key, token_keys

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


class TokenEnds:
    """Where in the bytes of a text the tokens of one tokenizer end.

    `keys` are its `token_keys`; `prefix` holds the special tokens the tokenizer puts in front of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.keys = token_keys(tokenizer)
        self.prefix: list[int] = _prefix(tokenizer)

    def __call__(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of the text, without special tokens in front, and the byte offset at which each of them ends.

        Offsets never fall. A token that adds nothing to what has been read (a space that SentencePiece puts in front
        of the text and the text does not have) ends where the token before it ended, the first one at 0.

        Where the tokens' bytes, joined, are the text's, up to such a space, the offsets are exact, also inside a
        character that is split between tokens. Elsewhere (special tokens in the text, unknown tokens, text that the
        tokenizer normalises) every token whose bytes are the next ones of the text ends behind them, and any other
        where the tokenizer's offset mapping has it end, with the marks it was composed with.
        """
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        data = text.encode("utf-8", "surrogatepass")
        keys = [self.keys[i][0] for i in ids]
        pieces = [key if isinstance(key, bytes) else None for key in keys]
        joined = b"".join(piece or b"" for piece in pieces)
        for space in (0, 1):
            if None not in pieces and joined == b" " * space + data:
                return ids, [max(0, end - space) for end in accumulate(len(piece or b"") for piece in pieces)]
        return ids, self._walk(text, data, pieces, encoded["offset_mapping"])

    @staticmethod
    def _walk(text: str, data: bytes, pieces: list[bytes | None], offsets: list[tuple[int, int]]) -> list[int]:
        starts = [0, *accumulate(len(c.encode("utf-8", "surrogatepass")) for c in text)]
        ends: list[int] = []
        done = 0
        in_front = True
        for k, (piece, (first, last)) in enumerate(zip(pieces, offsets, strict=True)):
            near = starts[first] <= done + len(piece or b"") and done <= starts[last]
            spaced = in_front and piece is not None and piece.startswith(b" ") and not data.startswith(b" ", done)
            read = piece[1:] if piece is not None and spaced else piece
            if read is not None and near and data.startswith(read, done):
                done += len(read)
            else:
                done = max(done, starts[_composed_end(text, offsets, k)])
            ends.append(done)
            # SentencePiece may put its space behind a special token, too.
            in_front = piece is None
        return ends


def _composed_end(text: str, offsets: Sequence[tuple[int, int]], k: int) -> int:
    """Behind which character token k ends, where its offsets may end too early.

    NFC makes one character of a letter and the marks behind it (of Hangul jamo, one syllable), and `tokenizers` gives
    that the offsets of the letter alone. What composes with the token's characters and no later token claims is its.
    """
    first, last = offsets[k]
    following = k + 1
    while following < len(offsets) and offsets[following][0] < last:
        following += 1
    limit = offsets[following][0] if following < len(offsets) else len(text)
    while last < limit and len(normalize("NFC", text[first : last + 1])) <= len(normalize("NFC", text[first:last])):
        last += 1
    return last


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
