"""One rule for what is opened of an adapter's or model's folder: regular files inside it, of bounded size."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import write_adapter, write_model

from lorasuite_fast import LoraSuiteError, RefineConfig
from lorasuite_fast.adapters.adapter_folder import adapter_digest
from lorasuite_fast.adapters.aligned_states import LoadedModel
from lorasuite_fast.models.checkpoint import Checkpoint, check_links
from lorasuite_fast.models.vocabulary import check_ids
from lorasuite_fast.pipeline.finetune import finetune
from lorasuite_fast.pipeline.refine import refine
from lorasuite_fast.reporting.provenance import Step, provenance, read_steps

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """What waits for a pipe fails instead."""

    def ring(*_: Any) -> None:
        raise AssertionError("waited for a file that is none")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def spoil(path: Path, kind: str, outside: Path) -> None:
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "endless zeros":
        path.symlink_to("/dev/zero")
    elif kind == "a file elsewhere":
        outside.write_bytes(b"secret")
        path.symlink_to(outside)
    elif kind == "a folder":
        path.mkdir()


KINDS = ("a pipe", "endless zeros", "a file elsewhere", "a folder", "nothing")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pair")
    save_folder(tiny_model("llama", 1, layers=2), tiny_tokenizer(320, seed=1), root / "old")
    return root


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_opened_only_where_its_files_are_files(kind: str, name: str, root: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    random_adapter(root / "old", adapter, targets=["q_proj"], rank=2, alpha=4, seed=0)
    spoil(adapter / name, kind, tmp_path / "secret")
    before = sorted(path.name for path in tmp_path.iterdir())
    for run in (
        lambda: adapter_digest(adapter),
        lambda: refine(
            root / "old", adapter, root / "old", None, tmp_path / "out", config=RefineConfig(text=["a b c"] * 8)
        ),
        lambda: finetune(root / "old", adapter, [{"text": "a b c"}], tmp_path / "out"),
        lambda: LoadedModel(root / "old", "OLD", device=torch.device("cpu"), dtype=torch.float32).attach(adapter),
    ):
        with pytest.raises(LoraSuiteError):
            run()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_digest_is_that_of_both_files_one_behind_the_other(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / FILES[1]).write_bytes(os.urandom((1 << 20) + 17))
    both = b"".join((adapter / name).read_bytes() for name in FILES)
    assert adapter_digest(adapter) == hashlib.sha256(both).hexdigest()[:32]


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_json_that_is_longer_than_any_models_is_refused_unread(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with (model / name).open("ab") as file:
        file.truncate(9 << 20)
    with pytest.raises(LoraSuiteError, match=rf"{name}: is longer than 8 MiB"):
        Checkpoint(model)


def test_a_tokenizer_longer_than_any_is_refused_unread(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with (model / "tokenizer.json").open("ab") as file:
        file.truncate((256 << 20) + 1)
    for read in (check_links, check_ids):
        with pytest.raises(LoraSuiteError, match="longer than 256 MiB"):
            read(model)


@pytest.mark.parametrize("kind", ["long", "a pipe", "a folder"])
def test_a_record_of_steps_that_is_none_is_left_alone(kind: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    record = adapter / "lorasuite.json"
    record.write_bytes(provenance([Step("migration", "A step.")]))
    assert [step.outcome for step in read_steps(adapter)] == ["A step."]
    if kind == "long":
        with record.open("ab") as file:
            file.truncate(1 << 30)
    else:
        spoil(record, kind, tmp_path / "x")
    assert read_steps(adapter) == []


def test_a_file_nobody_reads_may_be_long(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "trainer_state.json").write_text(json.dumps({"log_history": ["x" * (9 << 20)]}))
    Checkpoint(model)
