"""Which tokens two vocabularies share, compared by the bytes they stand for rather than by their spelling.

Byte-level BPE writes " the" as `Ġthe`, SentencePiece as `▁the`; comparing strings loses most of what is shared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..io.json_files import MOST_TOKENIZER_BYTES, parse_json, read_bounded

_SPACE = "\u2581"
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_ID = 1 << 24
_MOST_IN_FRONT = 64
"""Special tokens a tokenizer may add to a text."""
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def _byte_level_alphabet() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable Latin-1 as itself, the rest from U+0100 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(rest)}


def _component_types(decoder: Any) -> set[str]:
    """The decoder types in a tokenizer.json, with `Replace` counted as Metaspace where it writes spaces for ▁."""
    if not isinstance(decoder, dict):
        return set()
    if decoder.get("type") == "Sequence":
        return set().union(*(_component_types(part) for part in decoder.get("decoders", [])))
    if decoder.get("type") == "Replace" and decoder.get("pattern") == {"String": _SPACE}:
        return {"Metaspace"}
    return {str(decoder.get("type"))}


def check_ids(folder: Path) -> None:
    """Refuses a folder whose tokenizer gives two tokens one id, or one beyond any vocabulary.

    Of two tokens `tokenizers` keeps one, another one each time it is loaded; up to the largest id it counts the gaps.
    Looked at is tokenizer.json, or where there is none vocab.json and added_tokens.json, which are read in its place.

    Raises:
        LoraSuiteError: naming both tokens, or for a file of more than 256 MiB.
    """
    whole, parts = folder / "tokenizer.json", [folder / "vocab.json", folder / "added_tokens.json"]
    for path in [whole] if os.path.exists(whole) else parts:
        try:
            found = path.stat()
        except OSError:
            continue
        _check_ids(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=8)
def _check_ids(path: Path, size: int, changed: int) -> None:
    data = read_bounded(path, MOST_TOKENIZER_BYTES, "a tokenizer")
    try:
        state = parse_json(data)
        vocab = state["model"]["vocab"] if path.name == "tokenizer.json" else state
        pairs = vocab.items() if isinstance(vocab, dict) else [(n, piece[0]) for n, piece in enumerate(vocab)]
        ids = [*vocab.values()] if isinstance(vocab, dict) else []
        added = state.get("added_tokens") if path.name == "tokenizer.json" else None
        ids += [token.get("id") for token in (added if isinstance(added, list) else []) if isinstance(token, dict)]
        beyond = next((index for index in ids if isinstance(index, int) and index > _MOST_ID), None)
        if beyond is not None:
            raise LoraSuiteError(f"{path}: has the id {beyond}, beyond {_MOST_ID}; fetch or save it again")
        seen: dict[Any, Any] = {}
        for token, index in pairs:
            if seen.setdefault(index, token) != token:
                raise LoraSuiteError(
                    f"{path}: has {index!r} twice, for {seen[index]!r} and {token!r}; fetch or save it again"
                )
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        # What else is wrong with it is for its loader to say.
        return


Key = bytes | tuple[str, str]


def token_keys(tokenizer: Any) -> dict[int, tuple[Key, bool]]:
    """id -> (what the token stands for, whether it is a byte fallback).

    Ordinary tokens stand for bytes; special tokens for ("role", "bos_token") where they have a role, for
    ("special", content) elsewhere.

    Raises:
        LoraSuiteError: for a tokenizer without a `tokenizers` backend, or with two tokens of one id.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LoraSuiteError(f"{tokenizer.name_or_path}: only tokenizers with a tokenizer.json form can be compared")
    types = _component_types(json.loads(backend.to_str()).get("decoder"))
    byte_level, metaspace = "ByteLevel" in types, "Metaspace" in types
    alphabet = _byte_level_alphabet() if byte_level else {}
    added = tokenizer.added_tokens_decoder
    roles: dict[str, str] = {}
    for role in _ROLES:
        token = getattr(tokenizer, role, None)
        if token is not None:
            roles.setdefault(token, role)
    keys: dict[int, tuple[Key, bool]] = {}
    spelled: dict[int, str] = {}
    for token, index in tokenizer.get_vocab().items():
        literal = added.get(index)
        if literal is not None and token != literal.content:
            # An added token takes the place of the entry whose id it has.
            continue
        if index in spelled:
            raise LoraSuiteError(
                f"{tokenizer.name_or_path}: its tokenizer gives the id {index} to two tokens, {spelled[index]!r} and "
                f"{token!r}; fetch or save it again"
            )
        spelled[index] = token
        fallback = _FALLBACK.fullmatch(token) if "ByteFallback" in types else None
        if token in roles:
            keys[index] = ("role", roles[token]), False
        elif literal is not None and literal.special:
            keys[index] = ("special", token), False
        elif fallback:
            keys[index] = bytes([int(fallback[1], 16)]), True
        elif byte_level and literal is None and all(c in alphabet for c in token):
            keys[index] = bytes(alphabet[c] for c in token), False
        else:
            text = token.replace(_SPACE, " ") if metaspace else token
            keys[index] = text.encode("utf-8", "surrogatepass"), False
    return keys


def token_bytes(tokenizer: Any) -> dict[Key, int]:
    """What each token stands for -> its id. Of several a regular token wins over a byte fallback, then the lower."""
    return ids_by_key(token_keys(tokenizer))


def ids_by_key(keys: dict[int, tuple[Key, bool]]) -> dict[Key, int]:
    """`token_bytes` of a tokenizer whose `token_keys` are at hand."""
    result: dict[Key, int] = {}
    for index, (key, _) in sorted(keys.items(), key=lambda item: (item[1][1], item[0])):
        result.setdefault(key, index)
    return result


@dataclass(frozen=True)
class SharedTokens:
    """Paired embedding rows: `old` and `new` are (s,) int64, row for row the same bytes."""

    old: Tensor
    new: Tensor
    identical: bool
    """True where both vocabularies give every token the same id."""
    dropped: int = 0
    """Shared tokens left out because their rows are untrained: all zero, or a copy of another row."""

    def __len__(self) -> int:
        return self.old.shape[0]


def shared_tokens(old: Any, new: Any) -> SharedTokens:
    """Pairs the tokens of two tokenizers that stand for the same bytes, in the order of the old ids."""
    bytes_old, bytes_new = token_bytes(old), token_bytes(new)
    pairs = sorted((i, bytes_new[key]) for key, i in bytes_old.items() if key in bytes_new)
    ids = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return SharedTokens(ids[:, 0].contiguous(), ids[:, 1].contiguous(), identical=bytes_old == bytes_new)


def common_ids(old: Any, new: Any, texts: list[str], max_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """The same texts for both models, cut into the same pieces: token ids for the old and for the new one.

    A text is split as the old tokenizer does, and a token the new vocabulary lacks into the longest pieces both have.
    Both models then read the same sequence, and what differs between their hidden states is the models' doing, not
    their tokenizers'. Each gets the special tokens its own tokenizer puts in front. Texts of which nothing is left are
    left out.

    Args:
        max_tokens: pieces of each text, special tokens not counted.
    """
    keys_old, bytes_old, bytes_new = token_keys(old), token_bytes(old), token_bytes(new)
    shared = {key: (i, bytes_new[key]) for key, i in bytes_old.items() if key in bytes_new}
    longest = max((len(key) for key in shared if isinstance(key, bytes)), default=0)

    def pieces(key: Key) -> list[tuple[int, int]]:
        if key in shared:
            return [shared[key]]
        found, start = [], 0
        while isinstance(key, bytes) and start < len(key):
            ends = range(min(len(key), start + longest), start, -1)
            end = next((end for end in ends if key[start:end] in shared), None)
            if end is not None:
                found.append(shared[key[start:end]])
            start = end or start + 1
        return found

    rows_old, rows_new = [], []
    prefix_old, prefix_new = prefix(old), prefix(new)
    for text in texts:
        ids = old(text, add_special_tokens=False, verbose=False)["input_ids"]
        pairs = list(islice((pair for i in ids for pair in pieces(keys_old[i][0])), max_tokens))
        if pairs:
            rows_old.append(prefix_old + [i for i, _ in pairs])
            rows_new.append(prefix_new + [i for _, i in pairs])
    return rows_old, rows_new


def prefix(tokenizer: Any) -> list[int]:
    """The special tokens a tokenizer puts in front of a text.

    Raises:
        LoraSuiteError: more than _MOST_IN_FRONT of them, which no limit of a text's tokens counts.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    if len(full) > len(plain) + _MOST_IN_FRONT:
        raise LoraSuiteError(
            f"{tokenizer.name_or_path}: its tokenizer adds {len(full) - len(plain)} special tokens to every text, more "
            f"than {_MOST_IN_FRONT}; fetch or save it again"
        )
    start = next((n for n in range(len(full)) if full[n : n + len(plain)] == plain), 0)
    return full[:start]


def trained_rows(table: Tensor, rows: Tensor, chunk: int = 8192) -> Tensor:
    """(s,) bool: which of the given rows hold something of their own, being neither zero nor equal to an earlier one.

    Rows are first told apart by two fixed random projections in float64, and those that agree by a hash of all they
    hold: whoever makes a table can let as many of its rows agree in the projections as they like.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(table.shape[1], 2, dtype=torch.float64, generator=generator)
    keys = torch.cat([table[part].double() @ probe for part in rows.split(chunk)]) if len(rows) else probe[:0]
    keep = (keys != 0).any(1)
    same: dict[tuple[float, ...], list[int]] = {}
    for position in keep.nonzero().flatten().tolist():
        same.setdefault(tuple(keys[position].tolist()), []).append(position)
    for positions in same.values():
        if len(positions) == 1:
            continue
        seen: set[bytes] = set()
        for position in positions:
            found = _row_digest(table[rows[position]])
            keep[position] = found not in seen
            seen.add(found)
    return keep


def _row_digest(row: Tensor) -> bytes:
    """One for rows that are equal; -0 equals 0."""
    return hashlib.sha256((row.double() + 0.0).cpu().numpy().tobytes()).digest()


def drop_untrained(shared: SharedTokens, e_o: Tensor, e_n: Tensor) -> SharedTokens:
    """Leaves out pairs beyond either table's end, and pairs of which either row is untrained."""
    inside = (shared.old < e_o.shape[0]) & (shared.new < e_n.shape[0])
    old, new = shared.old[inside], shared.new[inside]
    keep = trained_rows(e_o, old) & trained_rows(e_n, new)
    return SharedTokens(old[keep], new[keep], shared.identical, dropped=len(shared) - int(keep.sum()))
