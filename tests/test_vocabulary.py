"""Tokens are matched by the bytes they stand for, and rows that were never trained take no part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lorasuite_fast import LoraSuiteError
from lorasuite_fast.models.vocabulary import (
    SharedTokens,
    check_ids,
    common_ids,
    drop_untrained,
    prefix,
    shared_tokens,
    token_bytes,
    trained_rows,
)
from lorasuite_fast.transfer.embeddings import Stream, fit_transfer

from planted import tiny_tokenizer


def wrap(vocab: list[str], decoder: Any, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=[]))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level(vocab: list[str], **special: str) -> PreTrainedTokenizerFast:
    return wrap(vocab, decoders.ByteLevel(), **special)


def metaspace(vocab: list[str], **special: str) -> PreTrainedTokenizerFast:
    return wrap(
        vocab,
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        **special,
    )


def test_spellings_of_the_same_bytes_are_paired() -> None:
    old = byte_level(["<s>", "Ġthe", "ĊĊ", "Ã©", "Ġ", "zz"], bos_token="<s>")
    new = metaspace(["é", "<bos>", "▁the", "<0x0A>", "\n\n", "▁", "qq"], bos_token="<bos>")
    shared = shared_tokens(old, new)
    pairs = list(zip(shared.old.tolist(), shared.new.tolist(), strict=True))
    assert pairs == [(0, 1), (1, 2), (2, 4), (3, 0), (4, 5)]
    assert not shared.identical


def test_a_regular_token_wins_over_a_byte_fallback() -> None:
    tokens = token_bytes(metaspace(["<0x41>", "A", "<0x42>"]))
    assert tokens[b"A"] == 1
    assert tokens[b"B"] == 2


def test_angle_brackets_are_text_where_there_is_no_byte_fallback() -> None:
    assert token_bytes(byte_level(["<0x41>"]))[b"<0x41>"] == 0


def test_special_tokens_pair_by_role_and_never_with_text() -> None:
    old = byte_level(["<s>", "</s>", "hello"], bos_token="<s>", eos_token="</s>")
    new = byte_level(["<|begin|>", "<s>", "hello"], bos_token="<|begin|>")
    shared = shared_tokens(old, new)
    assert list(zip(shared.old.tolist(), shared.new.tolist(), strict=True)) == [(0, 0), (2, 2)]


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "unk_token", "pad_token"])
def test_a_special_token_of_either_role_pairs_with_that_role_s_other_spelling(role: str) -> None:
    old, new = byte_level(["<a>", "x"], **{role: "<a>"}), byte_level(["x", "<b>", "<a>"], **{role: "<b>"})
    shared = shared_tokens(old, new)
    assert list(zip(shared.old.tolist(), shared.new.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_a_token_of_two_roles_has_the_first_of_them() -> None:
    both = byte_level(["<end>", "x"], eos_token="<end>", pad_token="<end>")
    assert token_bytes(both)["role", "eos_token"] == 0
    assert ("role", "pad_token") not in token_bytes(both)


def test_added_text_tokens_are_taken_literally() -> None:
    tokenizer = byte_level(["a", "b"])
    tokenizer.add_tokens([AddedToken("ÿé x", normalized=False)])
    assert token_bytes(tokenizer)["ÿé x".encode()] == 2


def test_an_added_token_of_the_byte_alphabet_is_text_and_no_bytes() -> None:
    """Ġ is a space in the vocabulary of byte-level BPE, and a letter in a token somebody added."""
    tokenizer = byte_level(["a", "b"])
    tokenizer.add_tokens([AddedToken("Ġé", normalized=False)])
    assert token_bytes(tokenizer)["Ġé".encode()] == 2


def test_a_special_token_without_a_role_is_no_text() -> None:
    special = byte_level(["a"])
    special.add_tokens([AddedToken("<tool>", special=True)], special_tokens=True)
    text = byte_level(["<tool>", "a"])
    assert token_bytes(special)["special", "<tool>"] == 1
    assert shared_tokens(special, text).old.tolist() == [0]
    assert shared_tokens(special, special).old.tolist() == [0, 1]


def test_of_two_tokens_for_the_same_bytes_the_lower_id_counts() -> None:
    tokenizer = metaspace(["x", "▁a"])
    tokenizer.add_tokens([AddedToken(" a", normalized=False)])
    assert token_bytes(tokenizer)[b" a"] == 1


def test_two_tokens_of_one_id_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(["a", "b"])
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda _: {"a": 0, "b": 0})
    with pytest.raises(LoraSuiteError, match="gives the id 0 to two tokens, 'a' and 'b'"):
        token_bytes(tokenizer)


def pieces_of(token: str, new: list[str]) -> list[str]:
    """How a token that only the old vocabulary has is cut for both."""
    old = byte_level(["a", "b", "c", "d", "ab", "cd", "x"])
    old.add_tokens([AddedToken(token, normalized=False)])
    rows_old, rows_new = common_ids(old, byte_level(new), [token], 10)
    found = [old.convert_ids_to_tokens(row) for row in rows_old]
    assert [[new[i] for i in row] for row in rows_new] == found
    return found[0]


def test_a_token_the_new_vocabulary_lacks_is_cut_into_the_longest_pieces_both_have() -> None:
    assert pieces_of("abcd", ["a", "b", "c", "d", "ab", "cd"]) == ["ab", "cd"]
    assert pieces_of("xabx", ["a", "b", "ab"]) == ["ab"]


def test_each_model_gets_the_special_tokens_of_its_own_tokenizer_in_front() -> None:
    plain, prefixed = tiny_tokenizer(400, "bytelevel", 1), tiny_tokenizer(400, "sentencepiece", 1)
    for old, new in ((plain, prefixed), (prefixed, plain)):
        for tokenizer, rows in zip((old, new), common_ids(old, new, ["some text"], 4), strict=True):
            assert (rows[0][0] == tokenizer.bos_token_id) == (tokenizer is prefixed)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 0}}}, "has 0 twice, for 'a' and 'b'"),
        ("tokenizer.json", {"model": {"vocab": {"a": (1 << 24) + 1}}}, "has the id 16777217, beyond"),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"id": 1 << 25}]}, "has the id 33554432"),
        ("vocab.json", {"a": 3, "b": 3}, "has 3 twice"),
        ("added_tokens.json", {"a": 3, "b": 3}, "has 3 twice"),
    ],
)
def test_files_that_give_two_tokens_one_id_or_one_beyond_any_vocabulary_are_refused(
    name: str, content: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(LoraSuiteError, match=said):
        check_ids(tmp_path)
    (tmp_path / name).write_text(json.dumps({"model": {"vocab": {"a": 1 << 24, "b": 0}}, "later": 1}))
    check_ids(tmp_path)


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
def test_token_bytes_agree_with_the_tokenizer_s_own_decoding(kind: str) -> None:
    tokenizer = tiny_tokenizer(600, kind, 0)
    tokens = token_bytes(tokenizer)
    # Behind another token: decoders may strip what a text begins with.
    first = tokens[b"A"]
    for key, index in tokens.items():
        if isinstance(key, bytes):
            text = tokenizer.decode([first, index], clean_up_tokenization_spaces=False)
            assert text == "A" + key.decode("utf-8", "replace")


def test_untrained_rows_are_left_out() -> None:
    table = torch.randn(8, 5)
    table[1] = 0
    table[6] = table[2]
    other = torch.randn(9, 5)
    other[3] = 0
    shared = SharedTokens(torch.arange(8), torch.tensor([0, 1, 2, 3, 4, 5, 6, 20]), identical=False)
    kept = drop_untrained(shared, table, other)
    assert kept.old.tolist() == [0, 2, 4, 5]
    assert kept.dropped == 4


class Counted(torch.Tensor):
    """A table that counts how often a single row of it is taken."""

    taken = 0

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows = self.as_subclass(torch.Tensor)[index]
        Counted.taken += rows.dim() == 1
        return rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_that_agree_in_both_projections_are_looked_at_once_each(dtype: torch.dtype) -> None:
    """Beside 1, entries of 1e-30 and less are lost in a projection; every row stands there twice."""
    n = 600
    table = torch.zeros(n, 6, dtype=dtype)
    table[:, 0] = 1
    table[:, 1] = torch.arange(n) // 2 * 1e-33
    table[0, 5] = -0.0
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    Counted.taken = 0
    found = trained_rows(table.as_subclass(Counted), order)
    values = [int(i) // 2 for i in order]
    assert found.tolist() == [value not in values[:at] for at, value in enumerate(values)]
    assert Counted.taken <= n


def test_a_tokenizer_that_puts_any_number_of_tokens_in_front_is_refused() -> None:
    tokenizer = tiny_tokenizer(400, "bytelevel", 1)
    name = tokenizer.eos_token
    for count, fine in ((64, True), (65, False), (20_000, False)):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{name} " * count + "$A", special_tokens=[(name, tokenizer.eos_token_id)]
        )
        if fine:
            assert prefix(tokenizer) == [tokenizer.eos_token_id] * count
        else:
            with pytest.raises(LoraSuiteError, match=f"adds {count} special tokens to every text, more than 64; fetch"):
                common_ids(tokenizer, tokenizer, ["a text"], 4)


def test_untrained_rows_do_not_bend_the_transfer_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    e_o, w = torch.randn(200, 6, generator=generator), torch.randn(6, 9, generator=generator)
    e_n = e_o @ w
    e_n[20:60] = 0
    e_n[70:90] = e_n[70]
    ids = torch.arange(200)
    found = fit_transfer(Stream(e_o), Stream(e_n), SharedTokens(ids, ids, identical=True))
    assert found.dropped == 40 + 19
    assert (found.W_h - w).abs().max() < 1e-5
    assert found.r2 == pytest.approx(1, abs=1e-9)


def test_the_way_back_ignores_directions_the_new_width_does_not_use() -> None:
    generator = torch.Generator().manual_seed(1)
    e_o = torch.randn(300, 6, generator=generator)
    q, _ = torch.linalg.qr(torch.randn(10, 6, generator=generator))
    ids = torch.arange(300)
    found = fit_transfer(Stream(e_o), Stream(e_o @ q.T), SharedTokens(ids, ids, identical=True))
    assert (found.S - q).abs().max() < 1e-5
    assert found.rank == 6


@pytest.mark.parametrize(("kind_old", "kind_new"), [("bytelevel", "sentencepiece"), ("sentencepiece", "bytelevel")])
def test_both_models_read_the_same_pieces(kind_old: str, kind_new: str) -> None:
    old, new = tiny_tokenizer(500, kind_old, 1), tiny_tokenizer(700, kind_new, 2)
    texts = ["a plain line, with Ünïcode and \U0001f600", "", "x" * 50]
    rows_old, rows_new = common_ids(old, new, texts, 1000)
    assert len(rows_old) == len(rows_new) == 2
    bytes_old, bytes_new = ({i: key for key, i in token_bytes(t).items()} for t in (old, new))
    for text, ids_old, ids_new in zip((texts[0], texts[2]), rows_old, rows_new, strict=True):
        pieces_old = [bytes_old[i] for i in ids_old if isinstance(bytes_old[i], bytes)]
        pieces_new = [bytes_new[i] for i in ids_new if isinstance(bytes_new[i], bytes)]
        assert pieces_old == pieces_new
        assert b"".join(pieces_old).lstrip() == text.encode()


def test_pieces_are_cut_to_length_and_keep_each_model_s_own_prefix() -> None:
    old, new = tiny_tokenizer(400, "bytelevel", 1), tiny_tokenizer(400, "bytelevel", 2)
    rows_old, rows_new = common_ids(old, new, ["some text that is long enough"], 4)
    for tokenizer, rows in ((old, rows_old), (new, rows_new)):
        prefix = [i for i in tokenizer("a")["input_ids"] if i in tokenizer.all_special_ids]
        assert len(rows[0]) == 4 + len(prefix)
        assert rows[0][: len(prefix)] == prefix
