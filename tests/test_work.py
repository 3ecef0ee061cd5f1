"""Unfinished work: whose it is, what of it counts, and when it goes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorasuite_fast.errors import LoraSuiteError, WriteError
from lorasuite_fast.io.work import Work, clean_up, stacked, unless_unusable, unstacked, work_folder


def unfinished(folder: Path, **identity: Any) -> None:
    work = Work(folder, identity)
    work.start(micro_batch=3)
    work.save("part", {"x": torch.ones(2)}, share=0.5)
    work.close()


def test_work_lies_hidden_beside_its_output(tmp_path: Path) -> None:
    assert work_folder(tmp_path / "out") == tmp_path / ".out.work"


def test_what_was_chosen_and_finished_is_found_again(tmp_path: Path) -> None:
    unfinished(tmp_path / "work", a=1)
    work = Work(tmp_path / "work", {"a": 1})
    assert work.record["micro_batch"] == 3
    found = work.load("part")
    assert found is not None
    assert found[0]["x"].tolist() == [1, 1]
    assert found[1] == {"share": 0.5}
    assert work.load("other") is None
    work.close()


@pytest.mark.parametrize("other", [{"a": 2}, {}, {"a": 1, "b": 1}, {"a": True}])
def test_work_of_another_identity_is_refused_by_what_differs(other: dict[str, Any], tmp_path: Path) -> None:
    unfinished(tmp_path / "work", a=1)
    key = "b" if "b" in other else "a"
    with pytest.raises(LoraSuiteError, match=f"another run, with {key} "):
        Work(tmp_path / "work", other)
    Work(tmp_path / "work", {"a": 1}).close()


def test_a_long_identity_is_named_in_short(tmp_path: Path) -> None:
    unfinished(tmp_path / "work", texts="x" * 500)
    with pytest.raises(LoraSuiteError) as refused:
        Work(tmp_path / "work", {"texts": "y" * 500})
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("value", [0, -2, True, 1.5, "3"])
def test_a_record_of_what_no_run_writes_is_damaged(value: Any, tmp_path: Path) -> None:
    unfinished(tmp_path / "work", a=1)
    record = json.loads((tmp_path / "work/run.json").read_text()) | {"micro_batch": value}
    (tmp_path / "work/run.json").write_text(json.dumps(record))
    with pytest.raises(LoraSuiteError, match="holds damaged work"):
        Work(tmp_path / "work", {"a": 1})


def test_a_damaged_part_is_none(tmp_path: Path) -> None:
    unfinished(tmp_path / "work", a=1)
    work, part = Work(tmp_path / "work", {"a": 1}), tmp_path / "work/part.safetensors"
    part.write_bytes(part.read_bytes()[:-3])
    assert work.load("part") is None
    save_file({"x": torch.ones(1)}, part, metadata={"note": "[]"})
    assert work.load("part") is None
    save_file({"x": torch.ones(1)}, part)
    assert work.load("part") is None
    work.close()


def test_half_written_parts_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    unfinished(tmp_path / "work", a=1)
    (tmp_path / "work/part.safetensors.77.tmp").write_bytes(b"half")
    Work(tmp_path / "work", {"a": 1}).close()
    assert not list((tmp_path / "work").glob("*.tmp"))


def test_what_a_kill_leaves_inside_a_part_being_written_stops_no_later_run(tmp_path: Path) -> None:
    """safetensors writes to a temporary file of its own name beside the one it is given; a kill leaves that."""
    out = tmp_path / "out"
    unfinished(work_folder(out), a=1)
    killed = os.fork()
    if killed == 0:
        work = Work(work_folder(out), {"a": 1})
        work._replace("b.safetensors", lambda path: (path.with_name(".tmpUqPtH5").touch(), os._exit(9)))
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == 9
    clean_up(out)
    work = Work(work_folder(out), {"a": 1})
    assert sorted(path.name for path in work.folder.iterdir()) == [".lock", "part.safetensors", "run.json"]
    work.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    unfinished(tmp_path / "work", a=1)

    def write(path: Path) -> None:
        path.with_name(".tmpUqPtH5").touch()
        raise OSError(28, "No space left on device")

    with Work(tmp_path / "work", {"a": 1}) as work, pytest.raises(WriteError, match="No space left"):
        work._replace("b.safetensors", write)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [".lock", "part.safetensors", "run.json"]


def test_a_large_state_is_saved_so_seldom_that_it_takes_a_twentieth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving takes one second here: the next one is due 20 seconds later."""
    now = [100.0]
    monkeypatch.setattr("lorasuite_fast.io.work.time.monotonic", lambda: now[0])
    work, saved = Work(tmp_path / "work", {}), []

    def save(name: str, *_: Any, **__: Any) -> None:
        saved.append(now[0])
        now[0] += 1

    monkeypatch.setattr(work, "save", save)
    for moment in (100, 110, 120.5, 121.5, 130, 142):
        now[0] = moment
        work.save_state("state", {})
    assert saved == [100, 121.5]
    now[0] = 143
    work.save_state("state", {})
    assert saved == [100, 121.5, 143]
    work.close()


@pytest.mark.parametrize(
    ("error", "kept"),
    [(LoraSuiteError("x"), False), (WriteError("x"), True), (KeyboardInterrupt(), True), (RuntimeError("x"), True)],
)
def test_only_input_that_cannot_be_used_takes_the_work_with_it(
    error: BaseException, kept: bool, tmp_path: Path
) -> None:
    for n, ended in enumerate((lambda work: work, lambda work: unless_unusable(work, tmp_path / "none"))):
        folder = tmp_path / str(n)
        work = Work(folder, {"a": 1})
        with pytest.raises(type(error)), ended(work):
            raise error
        work.close()
        assert folder.exists() is kept


def test_work_older_than_its_note_is_no_output_of_it(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "work"
    out.touch()
    work = Work(folder, {})
    work.complete()
    work.close()
    note = (folder / "complete").stat().st_mtime_ns
    os.utime(out, ns=(note - 1, note - 1))
    clean_up(out, folder)
    assert folder.exists()
    os.utime(out, ns=(note, note))
    clean_up(out, folder)
    assert not folder.exists()


def test_stacked_tensors_come_back_in_their_order() -> None:
    tensors = [torch.tensor([float(n)]) for n in range(12)]
    stack = stacked(tensors)
    shuffled = {name: stack[name] for name in sorted(stack, reverse=True)}
    assert [float(t) for t in unstacked(shuffled, torch.device("cpu"))] == list(range(12))
