"""Two tokenizers' positions meet exactly where both models have read the same bytes."""

from __future__ import annotations

from typing import Any
from unicodedata import normalize

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorasuite_fast.models.token_ends import TokenEnds
from lorasuite_fast.models.vocabulary import token_keys
from lorasuite_fast.text.alignment import AlignedText, Alignment

import real_models
from planted import tiny_tokenizer

TEXTS = [
    "the rain on the other side",
    " leading space, and trailing ",
    "two  spaces\nand\t\ttabs\n\n",
    "Ünïcode: ñandú, 東京, \U0001f600\U0001f680 and é",
    "\U0001f600",
    "x",
]
KINDS = [("bytelevel", "sentencepiece"), ("sentencepiece", "bytelevel"), ("sentencepiece", "sentencepiece")]


def pair(kinds: tuple[str, str]) -> tuple[Any, Any]:
    return tiny_tokenizer(500, kinds[0], 1), tiny_tokenizer(700, kinds[1], 2)


def bytes_read(keys: Any, ids: list[int]) -> bytes:
    """What a row of ids stands for, special tokens as nothing."""
    return b"".join(keys[i][0] for i in ids if isinstance(keys[i][0], bytes))


def prefixes(tokenizer: Any, ids: list[int], text: bytes) -> dict[int, int]:
    """Bytes of the text read -> position, by decoding every prefix of the row anew."""
    found, keys = {}, token_keys(tokenizer)
    for p in range(len(ids)):
        read = bytes_read(keys, ids[: p + 1])
        if not text.startswith(read):
            read = read.removeprefix(b" ")
        assert text.startswith(read)
        if read:
            found[len(read)] = p
    return found


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_positions_are_all_those_where_the_same_prefix_has_been_read(kinds: tuple[str, str], text: str) -> None:
    old, new = pair(kinds)
    aligned = Alignment(old, new).align(text, 1000)
    assert aligned is not None
    at_o = prefixes(old, old(text)["input_ids"], text.encode())
    at_n = prefixes(new, new(text)["input_ids"], text.encode())
    both = sorted(at_o.keys() & at_n.keys())
    assert aligned.ends.tolist() == both
    assert aligned.positions_o.tolist() == [at_o[end] for end in both]
    assert aligned.positions_n.tolist() == [at_n[end] for end in both]
    assert both[-1] == len(text.encode())


def test_a_character_split_between_tokens_is_aligned_byte_by_byte() -> None:
    aligned = Alignment(*pair(("bytelevel", "sentencepiece"))).align("\U0001f600", 1000)
    assert aligned is not None
    assert aligned.ends.tolist() == [1, 2, 3, 4]


def test_a_text_of_nothing_has_no_positions() -> None:
    alignment = Alignment(*pair(KINDS[0]))
    assert alignment.align("", 10) is None
    assert alignment.align_all(["", "ab", ""], 10) != []


def test_rows_carry_each_tokenizer_s_own_special_tokens_in_front() -> None:
    old, new = pair(KINDS[0])
    aligned = Alignment(old, new).align("some words", 1000)
    assert aligned is not None
    assert aligned.ids_o == old("some words", add_special_tokens=False)["input_ids"]
    assert aligned.ids_n == new("some words")["input_ids"]
    assert aligned.ids_n[0] == new.bos_token_id


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_neither_model_reads_more_tokens_than_allowed(limit: int) -> None:
    old, new = pair(KINDS[0])
    text = "a longer text, of which only the beginning is read"
    whole, cut = (Alignment(old, new).align(text, n) for n in (1000, limit))
    assert whole is not None
    assert cut is not None or limit == 1
    if cut is not None:
        assert len(cut.ids_o) <= limit
        assert len(cut.ids_n) <= limit + 1
        n = len(cut.ends)
        for field in ("positions_o", "positions_n", "ends"):
            assert torch.equal(getattr(cut, field), getattr(whole, field)[:n])
        assert cut.positions_o[-1] == len(cut.ids_o) - 1
        assert cut.positions_n[-1] == len(cut.ids_n) - 1


def test_special_tokens_in_the_text_are_read_as_such_and_positions_behind_them_meet() -> None:
    old, new = pair(KINDS[0])
    text = "one</s>two<|endoftext|>three"
    aligned = Alignment(old, new).align(text, 1000)
    assert aligned is not None
    assert old.convert_tokens_to_ids("<|endoftext|>") in aligned.ids_o
    assert new.eos_token_id in aligned.ids_n
    for end in (3, len("one</s>"), len("one</s>two"), len(text)):
        assert end in aligned.ends
    data = text.encode()
    for tokenizer, ids, positions in (
        (old, aligned.ids_o, aligned.positions_o),
        (new, aligned.ids_n, aligned.positions_n),
    ):
        for end, p in zip(aligned.ends.tolist(), positions.tolist(), strict=True):
            shown = tokenizer.decode(ids[: p + 1], skip_special_tokens=False).encode()
            assert shown.removeprefix(b"<s>").replace(b" ", b"") == data[:end]


def normalising() -> PreTrainedTokenizerFast:
    """Lower-cases, drops accents, splits at spaces and knows only a few words."""
    words = ["[unk]", "cafe", "is", "open", "f", "i"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]")


def test_a_tokenizer_that_rewrites_the_text_is_followed_by_its_offsets() -> None:
    text = "Café is never OPEN"
    ids, ends = TokenEnds(normalising())(text)
    assert ids == [1, 2, 0, 3]
    assert ends == [len("Café".encode()), len("Café is".encode()), len("Café is never".encode()), len(text.encode())]


def by_pieces(vocab: list[str], pattern: str, normalizer: normalizers.Normalizer | None = None) -> Any:
    """Every match of a pattern is one token, of the text as the normalizer leaves it."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocab)}, unk_token="[unk]"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]")


@pytest.mark.parametrize("swap", [False, True])
def test_an_offset_the_first_token_cut_off_also_ends_at_is_no_position(swap: bool) -> None:
    """The ligature is f and i to one tokenizer, both of which end where it ends: after f it has been read in part."""
    split = by_pieces(["[unk]", "f", "i", "x"], ".", normalizers.NFKD())
    whole = by_pieces(["[unk]", "\ufb01", "x"], ".")
    assert TokenEnds(split)("\ufb01x") == ([1, 2, 3], [3, 3, 4])
    alignment = Alignment(whole, split) if swap else Alignment(split, whole)
    assert alignment.align("\ufb01x", 1) is None
    aligned = alignment.align("\ufb01x", 2)
    assert aligned is not None
    assert aligned.ends.tolist() == [3]
    assert (aligned.positions_o.tolist(), aligned.positions_n.tolist()) == (([0], [1]) if swap else ([1], [0]))


@pytest.mark.parametrize("swap", [False, True])
def test_the_limit_holds_for_the_model_that_reads_more_tokens(swap: bool) -> None:
    singles, pairs = by_pieces(["[unk]", "a", "b"], "."), by_pieces(["[unk]", "ab"], "..")
    aligned = (Alignment(pairs, singles) if swap else Alignment(singles, pairs)).align("ababab", 3)
    assert aligned is not None
    assert aligned.ends.tolist() == [2]
    assert sorted((aligned.ids_o, aligned.ids_n)) == [[1], [1, 2]]


def test_a_token_that_happens_to_read_like_the_text_before_it_ends_where_it_stands() -> None:
    """The tokenizer drops what the text begins with; its a is the last one."""
    tokenizer = by_pieces(["[unk]", "a"], ".", normalizers.Replace(Regex("^ab"), ""))
    assert TokenEnds(tokenizer)("aba") == ([1], [3])


def test_an_accent_that_is_a_token_of_its_own_is_not_read_with_its_letter() -> None:
    tokenizer = by_pieces(["[unk]", "e", "\u0301"], ".", normalizers.Lowercase())
    assert TokenEnds(tokenizer)("E\u0301") == ([1, 2], [1, 3])


def test_offsets_never_fall() -> None:
    assert TokenEnds._walk("ab", b"ab", [b"ab", None], [(0, 2), (0, 1)]) == [2, 2]


@pytest.mark.parametrize("text", ["\U0001f600</s>", "</s> \U0001f600", " \U0001f600</s>"])
def test_bytes_of_a_character_end_one_by_one_beside_special_tokens(text: str) -> None:
    """A space of the tokenizer's own reads nothing, one of the text a byte."""
    tokenizer, data = tiny_tokenizer(700, "sentencepiece", 2), text.encode()
    ids, ends = TokenEnds(tokenizer)(text)
    keys, read = token_keys(tokenizer), 0
    for i, end in zip(ids, ends, strict=True):
        key = keys[i][0]
        if not isinstance(key, bytes):
            read += len("</s>")
        elif data.startswith(key, read):
            read += len(key)
        else:
            assert key.startswith(b" ")
            assert data.startswith(key[1:], read)
            read += len(key) - 1
        assert end == read
    assert read == len(data)


@pytest.mark.parametrize("front", ["</s>", "x</s>"])
def test_the_space_put_behind_a_special_token_reads_nothing(front: str) -> None:
    """Were it taken to read what follows, all bytes of the character would end where it ends."""
    tokenizer = tiny_tokenizer(700, "sentencepiece", 2)
    text = f"{front}\U0001f600"
    ids, ends = TokenEnds(tokenizer)(text)
    assert tokenizer.convert_ids_to_tokens(ids)[-5:] == ["\u2581", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert ends[-5:] == [len(front) + n for n in range(5)]


@pytest.mark.parametrize(
    "text", ["cafe\u0301 is", "\u1112\u1161\u11ab\u1112\u1161", "e\u0323\u0301x", "\u09c7\u09be", "a\u0301"]
)
def test_a_composed_character_is_read_with_its_marks(text: str) -> None:
    """NFC reads a letter and its accent as one; a model that has read it has read both."""
    plain, composing = tiny_tokenizer(500, "bytelevel", 1), tiny_tokenizer(500, "bytelevel", 1)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    aligned = Alignment(plain, composing).align(text, 1000)
    assert aligned is not None
    data, keys = text.encode(), token_keys(composing)
    assert aligned.ends[-1] == len(data)
    for end, p_o, p_n in zip(aligned.ends, aligned.positions_o, aligned.positions_n, strict=True):
        assert bytes_read(token_keys(plain), aligned.ids_o[: p_o + 1]) == data[:end]
        if end in [len(text[:k].encode()) for k in range(len(text) + 1)]:
            assert bytes_read(keys, aligned.ids_n[: p_n + 1]).decode() == normalize("NFC", data[:end].decode())


def test_only_ordinary_tokens_are_compared() -> None:
    old, new = pair(KINDS[0])
    ordinary = Alignment(old, new).ordinary
    assert not set(ordinary.old.tolist()) & set(old.all_special_ids)
    assert not set(ordinary.new.tolist()) & set(new.all_special_ids)
    keys_o, keys_n = token_keys(old), token_keys(new)
    for i, j in zip(ordinary.old.tolist(), ordinary.new.tolist(), strict=True):
        assert keys_o[i][0] == keys_n[j][0]
    assert len(ordinary) >= 256


@pytest.mark.real
def test_real_tokenizers_meet_at_nearly_every_word() -> None:
    from transformers import AutoTokenizer

    old, new = AutoTokenizer.from_pretrained(real_models.smollm2()), real_models.gemma_tokenizer()
    alignment = Alignment(old, new)
    assert len(alignment.ordinary) > 45_000
    text = (
        "The harbour authority said that no one had been injured, and that a pontoon would be towed in. 東京 \U0001f680"
    )
    aligned = alignment.align(text, 1000)
    assert isinstance(aligned, AlignedText)
    assert len(aligned.ends) > 0.8 * len(text.split())
    data = text.encode()
    keys_o, keys_n = alignment.old.keys, alignment.new.keys
    for end, p_o, p_n in zip(aligned.ends, aligned.positions_o, aligned.positions_n, strict=True):
        assert bytes_read(keys_o, aligned.ids_o[: p_o + 1]) == data[:end]
        assert bytes_read(keys_n, aligned.ids_n[: p_n + 1]) == data[:end]
