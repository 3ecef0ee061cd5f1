"""Where in a text the tokens of a tokenizer end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any
from unicodedata import normalize

from .vocabulary import prefix, token_keys


class TokenEnds:
    """Where in the bytes of a text the tokens of one tokenizer end.

    `keys` are its `token_keys`; `prefix` holds the special tokens the tokenizer puts in front of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.keys = token_keys(tokenizer)
        self.prefix: list[int] = prefix(tokenizer)

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
