"""What a written text begins with: a mark of the tokenizer, of a config, or the beginning of another text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.text.calibration import load_examples
from lorasuite_fast.text.self_text import self_written
from lorasuite_fast.text.text_start import text_start

from planted import save_folder, tiny_model, tiny_tokenizer

MARKS = ("bos_token_id", "eos_token_id")


def made(root: Path, *, tokenizer: dict[str, Any], config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    """A model whose files name these marks and no others."""
    read = tiny_tokenizer(320, seed=1)
    for key in ("bos_token", "eos_token", "pad_token"):
        setattr(read, key, tokenizer.get(key))
    save_folder(tiny_model("llama", 1, layers=2), read, root / "model")
    path = root / "model/config.json"
    found = {key: value for key, value in json.loads(path.read_text()).items() if key not in MARKS}
    path.write_text(json.dumps(found | config))
    path = root / "model/generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        path.write_text(json.dumps(generation))
    return root / "model"


@pytest.mark.parametrize(
    ("tokenizer", "config", "generation", "mark"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, {"bos_token_id": 7}, {"bos_token_id": 8}, 1),
        ({"eos_token": "</s>"}, {"bos_token_id": 7}, {"bos_token_id": 8}, 2),
        ({}, {"bos_token_id": 7, "eos_token_id": 9}, {"bos_token_id": 8}, 7),
        ({}, {"bos_token_id": None, "eos_token_id": [9, 10]}, {"bos_token_id": 8}, 9),
        ({}, {"bos_token_id": 10**6}, {"bos_token_id": 8}, 8),
        ({}, {}, {"eos_token_id": [11]}, 11),
    ],
)
def test_the_first_mark_that_is_named_begins_a_text(
    tokenizer: dict[str, Any], config: dict[str, Any], generation: dict[str, Any], mark: int, tmp_path: Path
) -> None:
    model = Checkpoint(made(tmp_path, tokenizer=tokenizer, config=config, generation=generation))
    start = text_start(model, model.tokenizer())
    assert start.prompts.tolist() == [[mark]]
    assert not start.in_text


def test_without_a_mark_texts_begin_as_the_shipped_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = Checkpoint(made(tmp_path, tokenizer={}, config={}, generation=None))
    tokenizer = model.tokenizer()
    start = text_start(model, tokenizer)
    assert start.in_text
    beginnings = {tokenizer.decode(row) for row in start.prompts}
    assert all(any(text.startswith(begin) for text in load_examples(None, 1024, 0)) for begin in beginnings)
    assert len(beginnings) > 5
    texts = self_written(model, None, count=6, seed=0, device=torch.device("cpu"), tokens=24)
    assert len(texts) == 6
    assert all(any(text.startswith(begin) for begin in beginnings) for text in texts)


def test_prompts_are_taken_in_turn(tmp_path: Path) -> None:
    model = Checkpoint(made(tmp_path, tokenizer={}, config={}, generation=None))
    start = text_start(model, model.tokenizer())
    count = len(start.prompts)
    assert torch.equal(start.rows(count - 1, 2), start.prompts[[count - 1, 0]])
