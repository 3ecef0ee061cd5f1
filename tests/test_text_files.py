"""Texts from files, pipes and devices: bounded in bytes and in waiting, each refusal one line."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from flat_options import given
from typer.testing import CliRunner

from lorasuite_fast import ApplyConfig, LoraSuiteError, PlanConfig, TransferPlan, migrate
from lorasuite_fast.cli.app import app
from lorasuite_fast.evaluation.labelled import load_labelled
from lorasuite_fast.io import text_files
from lorasuite_fast.io.text_files import read_text
from lorasuite_fast.text.calibration import load_examples
from lorasuite_fast.text.samples import read_records

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

LINES = "".join(json.dumps({"text": f"line {n} of the text"}) + "\n" for n in range(6))


@contextmanager
def pipe(path: Path, data: bytes, times: int = 1) -> Iterator[Path]:
    """A pipe to which `data` is written `times` over, for as long as anyone reads."""
    os.mkfifo(path)

    def write() -> None:
        try:
            with open(path, "wb", buffering=0) as file:
                for _ in range(times):
                    file.write(data)
        except BrokenPipeError:
            pass

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield path
    finally:
        # A writer that still waits for a reader gets one.
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        thread.join()


@pytest.mark.parametrize("read", [lambda p: load_examples(p, 8, 0), read_records, lambda p: load_labelled(p, 8, 0)])
def test_a_pipe_gives_what_a_file_gives(read, tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text(LINES)
    with pipe(tmp_path / "pipe.jsonl", LINES.encode()) as path:
        found = read(path)
    assert str(found).replace("pipe.jsonl", "file.jsonl") == str(read(tmp_path / "file.jsonl"))


def test_an_endless_pipe_is_read_to_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MOST_PIPED", 1 << 16)
    with (
        pipe(tmp_path / "pipe.txt", b"x" * 4096, times=1 << 20) as path,
        pytest.raises(LoraSuiteError, match=r"pipe\.txt: is a pipe that gives more than 65536 bytes; save a part"),
    ):
        read_text(path)


def test_a_pipe_nobody_writes_to_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "SILENCE", 0.05)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(LoraSuiteError, match=r"pipe\.txt: is a pipe that gave nothing for 0\.05 s; see that something"):
        load_examples(tmp_path / "pipe.txt", 8, 0)


def test_processes_do_not_share_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(LoraSuiteError, match="several processes cannot share"):
        read_text(tmp_path / "pipe.txt")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_text(device: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").symlink_to(device)
    for read in (lambda path: load_examples(path, 8, 0), read_records, read_text):
        with pytest.raises(LoraSuiteError, match=r"text\.txt: is not a regular file; pass a file"):
            read(tmp_path / "text.txt")


def test_a_file_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "long.txt", "wb") as file:
        file.truncate(text_files.MOST_BYTES + 1)
    with pytest.raises(LoraSuiteError, match=r"long\.txt: is longer than 1024 MiB; pass a shorter text"):
        load_examples(tmp_path / "long.txt", 8, 0)


def test_a_template_is_bounded_as_texts_are(tmp_path: Path) -> None:
    (tmp_path / "template").symlink_to("/dev/zero")
    (tmp_path / "d.jsonl").write_text("{}\n")
    given = ["finetune", tmp_path, "none", tmp_path / "d.jsonl", tmp_path / "o", "--template", tmp_path / "template"]
    result = CliRunner().invoke(app, list(map(str, given)))
    assert result.exit_code == 2
    assert "is not a regular file" in result.stderr


def test_line_ends_and_a_byte_order_mark_are_what_they_are_in_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "text.txt") == (tmp_path / "text.txt").read_text("utf-8-sig") == "one\ntwo\nthree\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "adapter", targets=["q_proj", "o_proj"], rank=2, alpha=4, seed=0)
    return root


def test_a_pipe_that_a_plan_names_is_not_waited_for(root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(
        "some text to compare\n" * 2 + "".join(f"{n} words in a line\n" * 40 for n in range(40))
    )
    plan = TransferPlan.build(
        root / "old", root / "new", config=PlanConfig(method="distill", calibration=tmp_path / "text.txt")
    )
    (tmp_path / "text.txt").unlink()
    os.mkfifo(tmp_path / "text.txt")
    with pytest.raises(LoraSuiteError, match=r"text\.txt: is a pipe, not a regular file; pass a text file of your own"):
        plan.apply(root / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_a_text_that_is_read_twice_is_no_pipe(root: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text.jsonl")
    models = root / "old", root / "new", root / "adapter", tmp_path / "out"
    for options in (
        {"calibration": tmp_path / "text.jsonl"},
        {"finetune": tmp_path / "text.jsonl"},
        {"finetune": [{"text": "a"}], "finetune_options": {"retain": tmp_path / "text.jsonl"}},
    ):
        with pytest.raises(LoraSuiteError, match="is a pipe, and this run reads the text more than once; save it"):
            migrate(*models, **given(migrate, **options))
    plan = TransferPlan.build(root / "old", root / "new", config=PlanConfig(method="distill"))
    with pytest.raises(LoraSuiteError, match="reads the text more than once"):
        plan.apply_all(
            [root / "adapter", root / "old"], tmp_path / "all", config=ApplyConfig(text=tmp_path / "text.jsonl")
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl"]
