"""The small promises of an output: its mode, its parent, what is a leftover, and what counts as a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lorasuite_fast.errors import LoraSuiteError, WriteError
from lorasuite_fast.io import output


def test_outputs_can_be_read_by_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        output.write_file(tmp_path / "file", lambda path: path.write_bytes(b"x"), overwrite=False)
        output.write_folder(tmp_path / "folder", {"a": b"x"}, overwrite=False)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def test_a_folders_files_are_bytes_or_what_writes_them(tmp_path: Path) -> None:
    output.write_folder(tmp_path / "out", {"a": b"1", "b": lambda path: path.write_bytes(b"2")}, overwrite=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"a": b"1", "b": b"2"}


def test_a_missing_parent_is_named_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match=r"its parent folder .* does not exist"):
        output.check_output(tmp_path / "no" / "out", overwrite=False)


@pytest.mark.parametrize("name", [".out.abcd.tmp", ".out.ABCD1234.tmp", ".out.abcd_1234.tmp", ".out.abcd_123.txt"])
def test_what_is_only_named_like_a_leftover_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    output.sweep(tmp_path / "out")
    assert (tmp_path / name).exists()


def test_a_link_named_like_a_leftover_stays_and_so_does_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("thesis.txt", "previous"):
        (tmp_path / "mine" / name).write_text("all of it")
    (tmp_path / ".out.abcd_123.tmp").symlink_to(tmp_path / "mine")
    output.sweep(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["previous", "thesis.txt"]
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.abcd_123.tmp").is_symlink()


def test_what_a_kill_leaves_of_a_file_being_written_is_swept(tmp_path: Path) -> None:
    """safetensors writes to a temporary file of its own name beside the one it is given; a kill leaves that."""
    killed = os.fork()
    if killed == 0:
        output.write_file(
            tmp_path / "out",
            lambda path: (path.with_name(".tmpUqPtH5").touch(), os._exit(9)),
            overwrite=False,
        )
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == 9
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    output.sweep(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_set_aside_stays_aside_where_its_place_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / ".out.abcd_123.tmp"
    folder.mkdir()
    (folder / "previous").write_text("older")
    (tmp_path / "out").write_text("newer")
    output.sweep(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "newer"
    assert not folder.exists()


def test_a_file_system_without_the_exchange_of_names_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's answer to flags a file system does not know."""

    class Libc:
        @staticmethod
        def renameat2(*_: object) -> int:
            return -1

    monkeypatch.setattr(output.ctypes, "CDLL", lambda *_, **__: Libc)
    monkeypatch.setattr(output.ctypes, "get_errno", lambda: errno.EINVAL)
    output.write_file(tmp_path / "out", lambda path: path.write_bytes(b"x"), overwrite=False)
    assert (tmp_path / "out").read_bytes() == b"x"
    monkeypatch.setattr(output.ctypes, "get_errno", lambda: errno.EACCES)
    with pytest.raises(WriteError, match="Permission denied"):
        output.write_file(tmp_path / "other", lambda path: path.write_bytes(b"x"), overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_never_takes_the_place_of_a_folder(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(LoraSuiteError, match="is a folder"):
        output.write_file(tmp_path / "out", lambda path: path.write_bytes(b"x"), overwrite=overwrite)
    assert (tmp_path / "out").is_dir()


def test_only_a_full_disk_becomes_a_write_error(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")
    for error in (*full, SafetensorError("I/O error: No space left")):
        with pytest.raises(WriteError, match="cannot be written"), output.writing(tmp_path):
            raise error
    for other in (FileNotFoundError(errno.ENOENT, "No such file"), RuntimeError("shapes do not fit")):
        with pytest.raises(type(other)), output.writing(tmp_path):
            raise other
