"""Killed, interrupted, or failed by its disk, files or memory, a command leaves OUT whole and nothing else for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest

from lorasuite_fast.errors import LoraSuiteError, WriteError
from lorasuite_fast.io import output
from lorasuite_fast.io.artifacts import REPORT_MARK


@pytest.fixture(scope="module")
def tallies() -> list[dict[str, object]]:
    command = [sys.executable, faults.__file__, "--thin", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("job", [job.name for job in faults.JOBS])
def test_every_command_survives_the_faults_that_strike_it(job: str, tallies: list[dict[str, object]]) -> None:
    mine = [tally for tally in tallies if tally["job"] == job]
    assert len(mine) >= 2
    for tally in mine:
        assert tally["trials"]
        assert tally["violations"] == [], tally


def test_every_fault_strikes_a_command(tallies: list[dict[str, object]]) -> None:
    # Only root may mount the small file system of the full disk.
    unmountable = set() if os.geteuid() == 0 else {"disk full"}
    assert {tally["fault"] for tally in tallies} >= set(faults.FAULTS) - unmountable


STRUCK_AT_ONCE = """
import os, signal, tempfile, time
from pathlib import Path
import faults

with tempfile.TemporaryDirectory() as root:
    log = Path(root) / "stderr"
    for n in range(80):
        pid = faults.start(["--version"], log)
        time.sleep(n % 40 * 2.5e-5)
        os.kill(pid, signal.SIGINT)
        end = faults.end_of(pid, log)
        assert end.code == faults.INTERRUPTED, end
        assert end.errors.startswith("interrupted; "), end
"""


def test_a_fork_struck_at_its_first_moment_ends_there_and_leaves_its_parents_folder() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(faults.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", STRUCK_AT_ONCE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def one_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With renameat2's flags, and on a system that does not know them."""
    if not request.param:
        monkeypatch.setattr(output, "_renameat2", lambda *_: False)
    return bool(request.param)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def earlier_output(out: Path) -> None:
    """What `--overwrite` may replace."""
    out.mkdir()
    (out / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def test_a_folder_takes_the_place_of_an_earlier_or_an_empty_one(one_step: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for before in (lambda out: None, earlier_output, Path.mkdir):
        before(out)
        output.write_folder(out, {"a": b"1", "b": b"2"}, overwrite=True)
        assert contents(out) == {"a": b"1", "b": b"2"}
        for leftover in (out / "a", out / "b"):
            leftover.unlink()
        out.rmdir()
    assert not list(tmp_path.iterdir())


def test_what_exists_is_refused_at_the_last_moment_too(one_step: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(path: Path) -> None:
        path.write_text("new")
        out.write_text("another process was faster")

    with pytest.raises(LoraSuiteError, match="exists already"):
        output.write_file(out, write, overwrite=False)
    assert contents(tmp_path) == {"out": b"another process was faster"}


def test_an_output_that_fails_leaves_the_old_one(one_step: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text(f"old {REPORT_MARK}")

    def write(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match="No space left on device"):
        output.write_file(out, write, overwrite=True, kind="report")
    assert contents(tmp_path) == {"out": f"old {REPORT_MARK}".encode()}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_old_output_survives_an_end_between_the_two_renames(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    earlier_output(out)
    before = contents(tmp_path)
    monkeypatch.setattr(output, "_renameat2", lambda *_: False)
    rename = Path.rename

    def ended(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise stop
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", ended)
    with pytest.raises((stop, WriteError)):
        output.write_folder(out, {"a": b"new"}, overwrite=True)
    assert contents(tmp_path) == before


def leftover(out: Path, **files: str) -> Path:
    """What a process killed while it wrote `out` leaves."""
    folder = out.with_name(f".{out.name}.abcd_123.tmp")
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    leftover(tmp_path / "out", new="half")
    output.check_output(tmp_path / "out", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_an_old_output_set_aside_by_a_killed_run_is_put_back(tmp_path: Path) -> None:
    leftover(tmp_path / "out", new="complete", previous="old")
    with pytest.raises(LoraSuiteError, match="exists already"):
        output.check_output(tmp_path / "out", overwrite=False, kind="plan")
    assert contents(tmp_path) == {"out": b"old"}


def test_temporary_files_of_a_living_process_or_of_another_output_stay(tmp_path: Path) -> None:
    with output.beside(tmp_path / "out") as mine:
        others = [leftover(tmp_path / name) for name in ("outer", "out.part")]
        output.check_output(tmp_path / "out", overwrite=False)
        assert mine.exists()
        assert all(other.exists() for other in others)
    assert not mine.exists()
