"""Ctrl-C: one line and exit code 130, pressed once, twice or during the clean-up; at the third press at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LINE = "interrupted; OUT is what it was, or complete; the same command goes on from what is done\n"
BEGIN = """
import os, signal, sys, time
from lorasuite_fast.cli import commands as cli
from lorasuite_fast.interrupts import interrupts
def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
"""


def run(code: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


CLEANING = """
def work(args):
    try:
        {first}
    finally:
        print("cleaning", flush=True)
        {second}
        print("cleaned", flush=True)
cli.app = work
cli.main([])
"""


@pytest.mark.parametrize("second", ["pass", "press()", "raise RuntimeError('half open')"])
def test_what_is_open_is_cleaned_up_whatever_comes_then(second: str) -> None:
    code, printed, errors = run(CLEANING.format(first="press()", second=second))
    assert (code, errors) == (130, LINE)
    assert printed == "cleaning\n" + "cleaned\n" * ("raise" not in second)


def test_the_third_press_ends_it_at_once() -> None:
    assert run(CLEANING.format(first="press()", second="press(); press()")) == (130, "cleaning\n", LINE)


def test_an_error_without_a_press_is_what_it_is() -> None:
    code, _, errors = run(CLEANING.format(first="raise ValueError('x')", second="pass"))
    assert code == 70
    assert "ValueError: x" in errors
    assert "interrupted" not in errors


def test_a_press_inside_a_finalizer_is_heard_behind_it() -> None:
    code = """
class Last:
    def __del__(self):
        press()
def work(args):
    Last()
    print("on", flush=True)
    time.sleep(60)
cli.app = work
cli.main([])
"""
    assert run(code) == (130, "on\n", LINE)


def test_a_press_during_the_imports_and_behind_the_end_is_no_traceback() -> None:
    code = """
import runpy
sys.modules["lorasuite_fast.cli.commands"] = None
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "lorasuite_fast.cli.commands":
            press()
del sys.modules["lorasuite_fast.cli.commands"]
sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["--version"]
import atexit
atexit.register(press)
runpy.run_module("lorasuite_fast", run_name="__main__")
"""
    assert run(code) == (130, "", LINE)
    # Of the two presses only the one behind the end.
    code, printed, errors = run(code.replace("press()", "pass"))
    assert (code, errors) == (0, "")
    assert printed.startswith("lorasuite-fast ")


def test_a_command_interrupted_twice_ends_in_one_line(tmp_path: Path) -> None:
    code = f"""
def work(args):
    from lorasuite_fast.io.output import write_folder
    from pathlib import Path
    def write(path):
        path.write_bytes(b"half")
        press()
    write_folder(Path({str(tmp_path)!r}) / "out", {{"a": write}}, overwrite=False)
import shutil
remove = shutil.rmtree
def slow(*arguments, **more):
    press()
    remove(*arguments, **more)
shutil.rmtree = slow
cli.app = work
cli.main([])
"""
    assert run(code) == (130, "", LINE)
    assert not any(tmp_path.iterdir())
