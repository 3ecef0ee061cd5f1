"""Changes one line at a time and looks whether a test notices; writes bench/reports/mutations.md.

    python bench/mutate.py                                   every mutant of bench/mutants.py
    python bench/mutate.py --only mapping.py --only work.py  those of some modules; prints the outcomes, no report

Outcomes are kept in .cache/mutations until the module or its tests change; --again forgets them, and with --grown what
was noticed counts although tests have been added since.

A mutant is applied in a temporary copy of the tree, never in the working tree, and the tests named for its module run
in a fork of this process, which has imported torch and transformers once. The first test that fails notices it, and so
does a crash or a run that takes far longer than without the mutant. Without any mutant all these tests must pass.
The exit code is 1 where a mutant survives that is not said to be equivalent, or is noticed although it is.
"""

from __future__ import annotations

import argparse
import compileall
import gc
import hashlib
import inspect
import json
import os
import platform
import py_compile
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from mutants import MODULES, ROOT, Module, Mutant, applied, source_of

REPORT = ROOT / "bench" / "reports" / "mutations.md"
CACHE = ROOT / ".cache" / "mutations"
TREES = ("lorasuite_fast", "kernels", "tests", "bench", "examples")
LEAST_SECONDS, TIMES_LONGER, GIBIBYTES = 60, 6, 8
MOST_SURVIVORS = 0.05
PASSED, FAILED, INTERRUPTED = 0, 1, 2
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_SELECTION = (
    "-m",
    "not real and not gpu",
    "-k",
    "not interpreter",
    "-x",
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:unraisableexception",
)
_HYPOTHESIS = ("-p", "_hypothesis_pytestplugin", "--hypothesis-seed=0")


@dataclass(frozen=True)
class Outcome:
    """What became of one run of a module's tests.

    Attributes:
        notice: the test that failed, or "a crash" or "the time limit"; "" where all passed.
    """

    notice: str
    seconds: float


class Recorder:
    """A pytest plugin that writes the first failure to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def _record(self, report: object) -> None:
        if getattr(report, "failed", False) and not self.file.exists():
            self.file.write_text(str(getattr(report, "nodeid", "")))

    pytest_runtest_logreport = pytest_collectreport = _record


def copy_tree(target: Path) -> None:
    """Copies what the tests need, with byte code that is checked against the source's content, not its time."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "reports")
    for name in TREES:
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)
    # One test compares the options with the page that lists them.
    shutil.copytree(ROOT / "docs/reference", target / "docs/reference")
    for name in TREES[:2]:
        compileall.compile_dir(target / name, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def import_once() -> None:
    """Imports what every run needs, and nothing of this project: its operators can be defined only once a process."""
    os.environ["TRITON_INTERPRET"] = "1"  # Triton decides at its import whether kernels are interpreted.
    with suppress(ImportError):
        import triton.language  # noqa: F401
    del os.environ["TRITON_INTERPRET"]
    import accelerate  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import scipy.optimize
    import scipy.sparse.csgraph  # noqa: F401
    import transformers.trainer  # noqa: F401
    import typer.testing  # noqa: F401
    from transformers import (  # noqa: F401
        AutoTokenizer,
        BloomForCausalLM,
        Gemma2ForCausalLM,
        Gemma3ForCausalLM,
        GPTNeoXForCausalLM,
        LlamaForCausalLM,
        MistralForCausalLM,
        Phi3ForCausalLM,
        PhiForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
    )

    # torch.library asks for the file of every module: read once here, and never looked through by the collector again.
    inspect.getmodule(sys._getframe(), "nowhere")
    gc.collect()
    gc.freeze()
    loaded = [name for name in sys.modules if name.startswith("lorasuite")]
    if loaded:
        raise RuntimeError(f"the parent process: imported {loaded[0]}; a fork would not see the mutant")


def _run_tests(tree: Path, tests: Sequence[str]) -> int:
    import pytest

    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "kernels" / "torch-ext")]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    limit = GIBIBYTES << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    arguments = [*_SELECTION, *_HYPOTHESIS, f"--rootdir={tree}", f"--basetemp={tree / 'scratch'}", *tests]
    code = int(pytest.main(arguments, plugins=[Recorder(tree / "failed")]))
    found = getattr(sys.modules.get("lorasuite_fast") or sys.modules.get("lorasuite_kernels"), "__file__", None)
    if found is not None and not Path(found).is_relative_to(tree):
        print(f"{found}: is not of the copied tree")
        return 64
    return code


def run_in_fork(work: Callable[[], int], log: Path, limit: float) -> int | None:
    """The exit code of `work` in a fork, -n where signal n ended it, None where it ran past the limit."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            code = work()
            sys.stdout.flush()
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def outcome(tree: Path, tests: Sequence[str], limit: float) -> Outcome:
    """Runs tests in the copied tree.

    Raises:
        RuntimeError: pytest could not run them, or found none.
    """
    failed, log, start = tree / "failed", tree / "log", time.monotonic()
    failed.unlink(missing_ok=True)
    code = run_in_fork(lambda: _run_tests(tree, tests), log, limit)
    seconds = time.monotonic() - start
    if code is None:
        return Outcome("the time limit", seconds)
    if code == PASSED:
        return Outcome("", seconds)
    if code in (FAILED, INTERRUPTED) and failed.exists():
        return Outcome(failed.read_text(), seconds)
    if code < 0:
        return Outcome("a crash", seconds)
    raise RuntimeError(f"pytest: ended with {code} on {', '.join(tests)}\n{log.read_text()[-4000:]}")


def test_paths(tree: Path, module: Module) -> list[str]:
    """The module's tests as pytest takes them, wherever below tests/ their files lie."""
    paths = []
    for name in module.tests:
        file, _, rest = name.partition("::")
        (path,) = (tree / "tests").rglob(file)
        paths.append(f"{path.relative_to(tree)}::{rest}" if rest else str(path.relative_to(tree)))
    return paths


def run_module(tree: Path, name: str, module: Module) -> list[tuple[Mutant, Outcome]]:
    """The module's mutants and what became of them.

    Raises:
        RuntimeError: a test fails without any mutant.
    """
    tests = test_paths(tree, module)
    bare = outcome(tree, tests, 600)
    if bare.notice:
        raise RuntimeError(f"{name}: {bare.notice} fails without a mutant\n{(tree / 'log').read_text()[-4000:]}")
    print(f"{name}: {len(module.mutants)} mutants, {bare.seconds:.0f} s without one", flush=True)
    found = []
    for mutant in module.mutants:
        file = source_of(tree, name, mutant.old)
        text = file.read_text("utf-8")
        file.write_text(applied(text, mutant, name), "utf-8")
        try:
            result = outcome(tree, tests, max(LEAST_SECONDS, TIMES_LONGER * bare.seconds))
        finally:
            file.write_text(text, "utf-8")
        found.append((mutant, result))
        if not result.notice or mutant.equivalent:
            stale = result.notice and f", but noticed by {result.notice}"
            reason = f"equivalent: {mutant.equivalent}{stale}" if mutant.equivalent else "SURVIVES"
            print(f"  {mutant.old!r} -> {mutant.new!r}: {reason}", flush=True)
    return found


@dataclass(frozen=True)
class Kept:
    """Outcomes of an earlier run of one module, by what was replaced and by what.

    Attributes:
        source: of the module, and tests: of its tests and what tests share, a hash of the content. The rest of the
            package does not count, so that an edit elsewhere does not ask for everything anew.
    """

    source: str
    tests: str
    outcomes: dict[str, Outcome]

    def usable(self, now: Kept, grown: bool) -> dict[str, Outcome]:
        """Those that still hold; with `grown`, tests were only added to, so that what was noticed still is."""
        if self.source != now.source:
            return {}
        if self.tests == now.tests:
            return self.outcomes
        return {change: outcome for change, outcome in self.outcomes.items() if grown and outcome.notice}

    @classmethod
    def of(cls, tree: Path, name: str, module: Module) -> Kept:
        """The hashes of a tree, and no outcome yet."""
        tests = {tree / path.partition("::")[0] for path in test_paths(tree, module)}
        shared = {path for path in (tree / "tests").rglob("*.py") if not path.name.startswith("test_")}
        content = hashlib.sha256(repr(module.tests).encode())
        for path in sorted(tests | shared):
            content.update(path.read_bytes())
        source = hashlib.sha256()
        parts = {source_of(tree, name, mutant.old) for mutant in module.mutants} or {source_of(tree, name)}
        for path in sorted(parts):
            source.update(path.read_bytes())
        return cls(source.hexdigest(), content.hexdigest(), {})

    @classmethod
    def read(cls, file: Path) -> Kept | None:
        if not file.exists():
            return None
        found = json.loads(file.read_text("utf-8"))
        outcomes = {change: Outcome(**values) for change, values in found.pop("outcomes").items()}
        return cls(**found, outcomes=outcomes)

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1), "utf-8")


def change_of(mutant: Mutant) -> str:
    return f"{mutant.old} -> {mutant.new}"


def results_of(tree: Path, name: str, *, again: bool, grown: bool) -> list[tuple[Mutant, Outcome]]:
    """A module's outcomes, those kept of an earlier run where nothing they depend on has changed."""
    module, file = MODULES[name], CACHE / f"{name.replace('/', '-')}.json"
    now, before = Kept.of(tree, name, module), None if again else Kept.read(file)
    outcomes = {} if before is None else before.usable(now, grown)
    left = tuple(mutant for mutant in module.mutants if change_of(mutant) not in outcomes)
    if left:
        run = run_module(tree, name, replace(module, mutants=left))
        outcomes |= {change_of(mutant): result for mutant, result in run}
        replace(now, outcomes=outcomes).write(file)
    return [(mutant, outcomes[change_of(mutant)]) for mutant in module.mutants]


def _code(text: str) -> str:
    shown = " ".join(text.split()).replace("|", "\\|")
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`" if shown else "nothing"


def _test(notice: str) -> str:
    return notice.rpartition("/")[2].replace("|", "\\|").partition("[")[0] if "::" in notice else notice


Results = dict[str, list[tuple[Mutant, Outcome]]]


def report(results: Results, *, grown: bool = False) -> str:
    """The report's Markdown; it says where outcomes were noticed before tests were added."""
    how = " --grown" if grown else ""
    minutes = sum(result.seconds for found in results.values() for _, result in found) / 60
    rows = [(name, mutant, result) for name, found in results.items() for mutant, result in found]
    survivors = [(name, mutant) for name, mutant, result in rows if not result.notice]
    lines = [
        "# Mutations",
        "",
        f"`python bench/mutate.py{how}`, {platform.machine()} CPU, one thread, {minutes:.0f} minutes. Each mutant of",
        "`bench/mutants.py` changes one place of one module; the tests named for the module then run until one fails.",
        f"{len(rows)} mutants, {len(rows) - len(survivors)} noticed, {len(survivors)} survivors "
        f"({len(survivors) / len(rows):.1%}). Wanted: at most {MOST_SURVIVORS:.0%}, each for a reason given below.",
        "",
        "| module | mutants | noticed | survivors |",
        "|---|---|---|---|",
    ]
    for name, found in results.items():
        noticed = sum(bool(result.notice) for _, result in found)
        lines.append(f"| {name} | {len(found)} | {noticed} | {len(found) - noticed} |")
    lines += ["", "## Survivors", "", "| module | change | why no test can notice |", "|---|---|---|"]
    for name, mutant in survivors:
        why = mutant.equivalent.replace("|", "\\|") or "**no reason given**"
        lines.append(f"| {name} | {_code(mutant.old)} → {_code(mutant.new)} | {why} |")
    lines += ["", "## Noticed", "", "| module | change | first test that failed |", "|---|---|---|"]
    for name, mutant, result in rows:
        if result.notice:
            lines.append(f"| {name} | {_code(mutant.old)} → {_code(mutant.new)} | {_test(result.notice)} |")
    return "\n".join(lines) + "\n"


def sound(results: Results) -> bool:
    """Whether every survivor has a reason, every reason a survivor, and there are few."""
    rows = [row for found in results.values() for row in found]
    survivors = [mutant for mutant, result in rows if not result.notice]
    consistent = all(bool(mutant.equivalent) != bool(result.notice) for mutant, result in rows)
    return consistent and len(survivors) <= MOST_SURVIVORS * len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=MODULES, help="module to mutate; all by default")
    parser.add_argument("--again", action="store_true", help="also where outcomes are kept of an earlier run")
    parser.add_argument("--grown", action="store_true", help="tests were only added to: what was noticed still is")
    options = parser.parse_args()
    os.environ.update(_ENVIRONMENT)
    import_once()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder).resolve()
        copy_tree(tree)
        run = partial(results_of, tree, again=options.again, grown=options.grown)
        results = {name: run(name) for name in options.only or MODULES}
    if not options.only:
        REPORT.write_text(report(results, grown=options.grown), "utf-8")
    return 0 if sound(results) else 1


if __name__ == "__main__":
    sys.exit(main())
