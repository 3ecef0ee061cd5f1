"""The registry of mutants fits the tree it is to change, and the runner tells what a test notices."""

from __future__ import annotations

import ast
import os
import signal
import time
from pathlib import Path

import mutate
import pytest
from mutants import MODULES, ROOT, Module, Mutant, applied, source_of

TESTS = ROOT / "tests"


@pytest.mark.parametrize("name", MODULES)
def test_every_mutant_changes_one_place_of_its_module_and_is_python(name: str) -> None:
    for mutant in MODULES[name].mutants:
        text = source_of(ROOT, name, mutant.old).read_text("utf-8")
        ast.parse(applied(text, mutant, name))
    changes = [(mutant.old, mutant.new) for mutant in MODULES[name].mutants]
    assert len(changes) == len(set(changes))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_names_tests_that_exist(name: str) -> None:
    for test in MODULES[name].tests:
        file, _, function = test.partition("::")
        (path,) = TESTS.rglob(file)
        assert not function or f"def {function.partition('[')[0]}(" in path.read_text("utf-8"), test


def test_a_mutant_that_no_longer_matches_is_an_error() -> None:
    for text in ("", "a = 1\na = 1\n"):
        with pytest.raises(LookupError, match="write it anew"):
            applied(text, Mutant("a = 1", "a = 2"), "x.py")
    with pytest.raises(LookupError, match="0 files below lorasuite_fast"):
        source_of(ROOT, "nowhere.py", "no line of the package")


def test_a_fork_tells_its_exit_code_its_signal_and_that_it_hangs(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def crash() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def hang() -> int:
        time.sleep(60)
        return 0

    assert mutate.run_in_fork(lambda: 5, log, 20) == 5
    assert mutate.run_in_fork(crash, log, 20) == -signal.SIGKILL
    assert mutate.run_in_fork(hang, log, 0.3) is None


def test_the_report_counts_survivors_and_asks_for_their_reasons() -> None:
    rows = [(Mutant("a | b", "c", "no one can tell"), mutate.Outcome("", 1.0))]
    rows += [(Mutant(f"x{n}", "y"), mutate.Outcome("tests/test_x.py::test_x[1]", 1.0)) for n in range(24)]
    results = {"x.py": rows}
    text = mutate.report(results)
    assert "25 mutants, 24 noticed, 1 survivors (4.0%)" in text
    assert "| x.py | `a \\| b` → `c` | no one can tell |" in text
    assert "| x.py | `x3` → `y` | test_x.py::test_x |" in text
    assert mutate.sound(results)
    assert not mutate.sound({"x.py": [*rows, (Mutant("z", "w"), mutate.Outcome("", 1.0))]})
    assert not mutate.sound({"x.py": [*rows, (Mutant("z", "w", "a reason"), mutate.Outcome("t", 1.0))]})
    assert not mutate.sound({"x.py": rows[:3]})


def test_outcomes_are_kept_until_the_module_or_a_test_of_it_changes(tmp_path: Path) -> None:
    for name in ("lorasuite_fast", "tests"):
        (tmp_path / name).mkdir()
    for file in ("lorasuite_fast/x.py", "tests/test_x.py", "tests/shared.py", "tests/test_y.py"):
        (tmp_path / file).write_text("1")
    module, file = Module(("test_x.py",), ()), tmp_path / "kept.json"
    outcomes = {"1 -> 2": mutate.Outcome("test_x.py::test_x", 1.0), "1 -> 3": mutate.Outcome("", 2.0)}
    now = mutate.Kept.of(tmp_path, "x.py", module)
    mutate.Kept(now.source, now.tests, outcomes).write(file)
    kept = mutate.Kept.read(file)
    assert kept is not None
    (tmp_path / "tests/test_y.py").write_text("2")
    assert kept.usable(mutate.Kept.of(tmp_path, "x.py", module), grown=False) == outcomes
    for changed in ("tests/test_x.py", "tests/shared.py"):
        (tmp_path / changed).write_text("2")
        now = mutate.Kept.of(tmp_path, "x.py", module)
        assert kept.usable(now, grown=False) == {}
        assert kept.usable(now, grown=True) == {"1 -> 2": outcomes["1 -> 2"]}
        (tmp_path / changed).write_text("1")
    (tmp_path / "lorasuite_fast/x.py").write_text("2")
    assert kept.usable(mutate.Kept.of(tmp_path, "x.py", module), grown=True) == {}
