"""What is left when a command is killed, interrupted, or its disk, files or memory fail it.

    python bench/faults.py                    50 kills of each command and every other fault; writes reports/faults.md
    python bench/faults.py --kills 2 --json   the figures alone, as JSON

After each fault: OUT is absent, or what it was before, or complete, byte by byte; a foreseen fault ends in one line and
its exit code; and the same command, run again, gives what an undisturbed one gives and leaves nothing else in the
folder.
The commands run in forks of this process, so that moments are spent in their work and not in imports.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import peft  # noqa: F401
import scipy.optimize  # noqa: F401
import torch
import transformers.trainer
from measure import machine, write_report
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

import lorasuite_fast.cli.commands
import lorasuite_fast.distillation.distilled_adapter
import lorasuite_fast.io.tensor_files
import lorasuite_fast.training.finetuning
import lorasuite_fast.training.refinement
import lorasuite_fast.transfer.build
import lorasuite_fast.transfer.plan
from lorasuite_fast.io.artifacts import REPORT_MARK

DEMO = Path(lorasuite_fast.__file__).parent / "demo"
PLAN = ("--examples", "4", "--method", "lstsq")
PLANS: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "plan": lambda i: (*PLAN, "--roles", "attention"),
    "distill-plan": lambda i: ("--examples", "4", "--method", "distill", "--calibration", f"{i}/text.jsonl"),
}
"""Plans to apply."""
State = dict[str, bytes] | None
OK, REFUSED, ABORTED, INTERRUPTED = 0, 2, 127, 130
WEIGHTS = "adapter_model.safetensors"
MEMORY = "out of memory"
COSTS = re.compile(rb'<section id="time-and-memory">.*?</section>', re.DOTALL)
FAULTS = (
    *("SIGKILL", "Ctrl-C", "Ctrl-C twice", "file cut off", "read error", "file replaced"),
    *(MEMORY, "unwritable folder", "unreadable file", "disk full"),
)
THIN = 4
ROUNDING = 1e-5
"""Of a tensor's largest element: what an output of a run short of memory may differ by."""


@dataclass(frozen=True)
class Job:
    """A command, its output in the folder it may write to, and the files it reads from `inputs`."""

    name: str
    arguments: Callable[[Path, Path], list[str]]
    reads: tuple[str, ...]
    replacing: tuple[str, ...] = ("--overwrite",)
    """What lets it replace an older output; a report needs nothing."""


JOBS = (
    Job("plan", lambda i, o: ["plan", f"{i}/old", f"{i}/new", f"{o}/out", *PLAN, "--roles", "attention"], ("old",)),
    Job("apply", lambda i, o: ["apply", f"{i}/plan", f"{i}/adapter", f"{o}/out"], ("adapter", "plan")),
    Job("migrate", lambda i, o: ["migrate", f"{i}/old", f"{i}/new", f"{i}/adapter", f"{o}/out", *PLAN], ("old",)),
    Job(
        "distill",
        lambda i, o: [
            *("migrate", f"{i}/old", f"{i}/new", f"{i}/adapter", f"{o}/out", "--examples", "4", "--method", "distill"),
            *("--calibration", f"{i}/text.jsonl", "--distill-layers", "2"),
        ],
        ("old",),
    ),
    Job(
        "apply-distill",
        lambda i, o: [
            "apply",
            f"{i}/distill-plan",
            f"{i}/adapter",
            f"{o}/out",
            "--distill-layers",
            "2",
            "--text",
            f"{i}/text.jsonl",
        ],
        ("adapter", "distill-plan"),
    ),
    Job(
        "refine",
        lambda i, o: [
            *("refine", f"{i}/old", f"{i}/adapter", f"{i}/new", "none", f"{o}/out", "--text", f"{i}/text.jsonl"),
            *("--steps", "6", "--batch-bytes", "400", "--eval-every", "2", "--rank", "4"),
        ],
        ("new",),
    ),
    Job(
        "finetune",
        lambda i, o: [
            *("finetune", f"{i}/new", "none", f"{i}/samples.txt", f"{o}/out"),
            *("--steps", "6", "--batch", "4", "--save-every", "2", "--max-tokens", "48", "--rank", "4"),
        ],
        ("new",),
    ),
    Job(
        "verify",
        lambda i, o: ["verify", f"{i}/old", f"{i}/new", "--text", f"{i}/text.jsonl", "--report", f"{o}/out"],
        ("new",),
        (),
    ),
)


@dataclass
class Tally:
    """What came of the trials of one fault on one command."""

    job: str
    fault: str
    trials: int = 0
    struck: int = 0
    """Trials in which the fault came before the command was done."""
    left_over: int = 0
    """Trials after which something besides inputs and OUT lay in the folder, for the next run to use or remove."""
    rounded: int = 0
    """Trials whose output was complete but for rounding, short of memory."""
    violations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """How a command ended: exit code or minus the signal, what it printed on stderr."""

    code: int
    errors: str


def start(arguments: list[str], log: Path, inject: Callable[[], object] | None = None) -> int:
    """Runs a command of the command line in a fork; `inject` is called there first.

    Nothing raised in the fork may reach the caller's frames there: they would remove the folder under our feet. So a
    signal waits until the fork has begun, and one that arrives behind the command's end is too late.
    """
    with log.open("wb") as file, open(os.devnull, "wb") as nothing:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        pid = os.fork()
        if pid == 0:
            _child(arguments, file.fileno(), nothing.fileno(), before, inject)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _child(
    arguments: list[str],
    errors: int,
    nothing: int,
    mask: set[signal.Signals | int],
    inject: Callable[[], object] | None,
) -> NoReturn:
    code: Any = 1
    try:
        try:
            os.setsid()
            os.dup2(errors, 2)
            os.dup2(nothing, 1)
            # Started in the background this process ignores it, and its forks would.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if inject:
                inject()
            lorasuite_fast.cli.commands.main(arguments)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        # Before the command began, or behind its end.
        os.write(2, b"interrupted; outside of the command\n")
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(code if isinstance(code, int) else 1)


def end_of(pid: int, log: Path) -> End:
    _, status = os.waitpid(pid, 0)
    return End(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"))


def state(path: Path) -> State:
    """What an output holds; of a report its words, for its times and its bytes in use are its own."""
    if not path.exists():
        return None
    if path.is_file():
        data = path.read_bytes()
        return {"": COSTS.sub(b"", data) if REPORT_MARK.encode() in data else data}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def rounded(found: State, whole: State) -> bool:
    """Whether two outputs differ by nothing but rounding in their tensors."""
    if found is None or whole is None or found.keys() != whole.keys():
        return False
    for name, data in found.items():
        if data == whole[name]:
            continue
        try:
            tensors = load(data), load(whole[name])
        except SafetensorError:
            return False
        if tensors[0].keys() != tensors[1].keys():
            return False
        for key, wanted in tensors[1].items():
            value = tensors[0][key]
            if value.dtype != wanted.dtype or value.shape != wanted.shape:
                return False
            error = (value.double() - wanted.double()).abs().max()
            if not error <= ROUNDING * wanted.double().abs().max():
                return False
    return True


class Laboratory:
    """Inputs, references and one folder to write to, made anew for each trial."""

    def __init__(self, root: Path, jobs: Sequence[Job], seed: int, *, thin: bool = False) -> None:
        self.root, self.jobs, self.random, self.thin = root, jobs, random.Random(seed), thin
        self.inputs, self.folder, self.log = root / "inputs", root / "folder", root / "stderr"
        self.inputs.mkdir()
        for name in ("old", "new", "adapter"):
            shutil.copytree(DEMO / name, self.inputs / name)
        text = (DEMO / "domain_train.txt").read_text().split("\n\n")[:16]
        (self.inputs / "samples.txt").write_text("\n\n".join(text))
        short = (json.dumps({"text": part[:120]}) + "\n" for part in text)
        (self.inputs / "text.jsonl").write_text("".join(short))
        models = str(self.inputs / "old"), str(self.inputs / "new")
        for name, options in PLANS.items():
            end = self.run(["plan", *models, str(self.inputs / name), *options(self.inputs)])
            assert end.code == OK, end.errors
        self.whole: dict[str, State] = {}
        self.seconds: dict[str, float] = {}
        for job in jobs:
            self.fresh()
            begin = time.perf_counter()
            end = self.run(job.arguments(self.inputs, self.folder))
            self.seconds[job.name] = time.perf_counter() - begin
            assert end.code == OK, end.errors
            self.whole[job.name] = state(self.folder / "out")

    def fresh(self, before: State = None) -> None:
        """An empty folder, or one that holds an older output."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        out = self.folder / "out"
        if before is None:
            return
        if list(before) == [""]:
            out.write_bytes(before[""])
        else:
            out.mkdir()
            for name, data in before.items():
                (out / name).write_bytes(data)

    def struck_by(self, fault: str) -> list[Job]:
        """The commands a fault strikes: all of them, or, thinned out, every fourth."""
        step = THIN if self.thin else 1
        jobs = [job for n, job in enumerate(self.jobs) if (n + FAULTS.index(fault)) % step == 0]
        if fault == "read error":
            return [job for job in jobs if job.name in ("plan", "migrate", "distill", "apply-distill")]
        return jobs

    def counted(self, job: Job, count: int) -> Iterator[bool]:
        """For each trial of a command, whether it replaces an older output: every other one does."""
        first = self.jobs.index(job) if self.thin else 0
        return ((first + n) % 2 == 1 for n in range(1 if self.thin else count))

    def run(self, arguments: list[str], inject: Callable[[], object] | None = None) -> End:
        return end_of(start(arguments, self.log, inject), self.log)

    def older(self, job: Job) -> State:
        """An output of an earlier run with other tensors."""
        whole = self.whole[job.name]
        assert whole is not None
        halved = {name: data[: len(data) // 2] for name, data in whole.items() if name in ("", WEIGHTS)}
        return whole | halved

    def trial(
        self,
        tally: Tally,
        job: Job,
        fault: Callable[[list[str]], End],
        *,
        replaces: bool,
        codes: tuple[int, ...],
        mend: Callable[[], object] = lambda: None,
        others: State = None,
    ) -> None:
        """One fault, and what is there after it and after the next run. `others`: an output as right as ours."""
        before = self.older(job) if replaces else None
        self.fresh(before)
        arguments = [*job.arguments(self.inputs, self.folder), *(job.replacing if replaces else ())]
        end = fault(arguments)
        mend()
        tally.trials += 1
        tally.struck += end.code != OK
        where = f"{job.name}, {tally.fault}{', replacing' if replaces else ''}"

        def violated(what: str) -> None:
            tally.violations.append(f"{where}: {what}")

        found = state(self.folder / "out")
        complete = found is not None and found in (self.whole[job.name], others)
        if tally.fault == MEMORY and rounded(found, self.whole[job.name]):
            tally.rounded += not complete
            complete = True
        if end.code not in (OK, *codes):
            violated(f"exit code {end.code}: {end.errors[-400:]}")
        if end.code == OK and not complete:
            violated("success without the whole output")
        if end.code in (REFUSED, INTERRUPTED):
            last = end.errors.strip().splitlines()[-1:]
            if "Traceback" in end.errors or not last or not last[0].startswith(("error: ", "interrupted; ")):
                violated(f"not one line: {end.errors[-400:]}")
        if not complete and found != before:
            violated(f"OUT is neither what it was nor complete: {sorted(found or {})}")
        tally.left_over += {path.name for path in self.folder.iterdir()} - {"out"} != set()
        again = self.run(arguments)
        if again.code != OK and not (complete and not replaces and "exists already" in again.errors):
            violated(f"the next run ends with {again.code}: {again.errors[-400:]}")
        if again.code == OK and state(self.folder / "out") != self.whole[job.name]:
            violated("the next run's output is not an undisturbed one's")
        if left := sorted({path.name for path in self.folder.iterdir()} - {"out"}):
            violated(f"the next run leaves {left}")

    def signalled(self, job: Job, number: int, times: int = 1) -> Callable[[list[str]], End]:
        """A signal at a random moment of the command's duration, and further ones within a tenth of a second of it."""

        def strike(arguments: list[str]) -> End:
            pid = start(arguments, self.log)
            time.sleep(self.random.uniform(0, self.seconds[job.name]))
            os.kill(pid, number)
            for _ in range(times - 1):
                time.sleep(self.random.uniform(0, 0.1))
                os.kill(pid, number)
            return end_of(pid, self.log)

        return strike


# What goes wrong in the fork, before the command starts.


def failing_reads(share: float, generator: random.Random) -> Callable[[], None]:
    """Reads of tensors that fail as on a broken disk, from a random one on."""
    first = generator.randrange(1, max(2, int(share)))

    def inject() -> None:
        count = 0
        populate = lorasuite_fast.io.tensor_files._File.populate

        def broken(file: Any, begin: int, stop: int) -> None:
            nonlocal count
            count += 1
            if count < first:
                return populate(file, begin, stop)

            def advise(option: int, *_: object) -> None:
                # Another thread may give pages of the same file back meanwhile, which reads nothing.
                if option == mmap.MADV_DONTNEED:
                    return
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            file.advise = advise
            try:
                populate(file, begin, stop)
            finally:
                del file.advise

        lorasuite_fast.io.tensor_files._File.populate = broken  # type: ignore[method-assign]

    return inject


def little_memory(extra: int) -> Callable[[], None]:
    """Address space for what is there already and `extra` bytes."""

    def inject() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * mmap.PAGESIZE + extra
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return inject


def bound_by_permissions() -> None:
    """Takes from root what lets it pass over the permissions of files: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(version, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~0b110
    sets[1] &= ~0b110
    if libc.capset(version, sets):
        raise OSError(ctypes.get_errno(), "capset")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes at `folder`, where this process may mount one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = os.geteuid() == 0 and libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0
    try:
        yield mounted
    finally:
        if mounted:
            libc.umount2(os.fsencode(folder), 2)


def kills(lab: Laboratory, count: int) -> Iterator[Tally]:
    for name, number, codes in (
        ("SIGKILL", signal.SIGKILL, (-signal.SIGKILL,)),
        ("Ctrl-C", signal.SIGINT, (INTERRUPTED, -signal.SIGINT)),
        ("Ctrl-C twice", signal.SIGINT, (INTERRUPTED, -signal.SIGINT)),
    ):
        for job in lab.struck_by(name):
            tally = Tally(job.name, name)
            for replaces in lab.counted(job, count if number == signal.SIGKILL else max(2, count // 5)):
                strike = lab.signalled(job, number, 1 + (name == "Ctrl-C twice"))
                lab.trial(tally, job, strike, replaces=replaces, codes=codes)
            yield tally


def read_errors(lab: Laboratory, count: int) -> Iterator[Tally]:
    for job in lab.struck_by("read error"):
        tally = Tally(job.name, "read error")
        for replaces in lab.counted(job, count):
            inject = failing_reads(12, lab.random)
            lab.trial(tally, job, lambda a, i=inject: lab.run(a, i), replaces=replaces, codes=(REFUSED,))
        yield tally


def changed_files(lab: Laboratory, count: int) -> Iterator[Tally]:
    """A file of the model cut off, or another model's put in its place, at a random moment."""
    for job in lab.jobs:
        names = [name for name in ("file cut off", "file replaced") if job in lab.struck_by(name)]
        if not names:
            continue
        path = lab.inputs / job.reads[0]
        path = path / ("adapter_model.safetensors" if job.reads[0] == "adapter" else "model.safetensors")
        kept = lab.root / "kept.safetensors"
        other = lab.root / "other.safetensors"
        shutil.copy2(path, kept)
        save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, other, metadata={"format": "pt"})

        def restore(path: Path = path, kept: Path = kept) -> None:
            # A file of its own: the copy that was struck may still be mapped somewhere.
            shutil.copy2(kept, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)

        shutil.copy2(other, path)
        lab.fresh()
        assert lab.run(job.arguments(lab.inputs, lab.folder)).code == OK
        others = state(lab.folder / "out")
        assert others != lab.whole[job.name]
        restore()

        for name in names:

            def strike(
                arguments: list[str], name: str = name, job: Job = job, path: Path = path, other: Path = other
            ) -> End:
                pid = start(arguments, lab.log)
                time.sleep(lab.random.uniform(0, lab.seconds[job.name]))
                if name == "file cut off":
                    os.truncate(path, lab.random.randrange(path.stat().st_size))
                else:
                    shutil.copy2(other, path.with_suffix(".tmp"))
                    path.with_suffix(".tmp").replace(path)
                return end_of(pid, lab.log)

            tally = Tally(job.name, name)
            for replaces in lab.counted(job, count):
                lab.trial(tally, job, strike, replaces=replaces, codes=(REFUSED,), mend=restore, others=others)
            yield tally


def memory(lab: Laboratory, count: int) -> Iterator[Tally]:
    for job in lab.struck_by(MEMORY):
        tally = Tally(job.name, MEMORY)
        for replaces in lab.counted(job, count):
            extra = lab.random.randrange(1 << 20, 160 << 20)
            lab.trial(
                tally,
                job,
                lambda a, e=extra: lab.run(a, little_memory(e)),
                replaces=replaces,
                codes=(REFUSED, ABORTED, -signal.SIGABRT),
            )
        yield tally


def permissions(lab: Laboratory) -> Iterator[Tally]:
    for job in lab.jobs:
        unreadable = lab.inputs / job.reads[0]
        unreadable = next(iter(unreadable.glob("*.safetensors")), unreadable)
        for name, path, denied in (("unwritable folder", lab.folder, 0o555), ("unreadable file", unreadable, 0o000)):
            if job not in lab.struck_by(name):
                continue
            tally = Tally(job.name, name)

            def strike(arguments: list[str], path: Path = path, denied: int = denied) -> End:
                path.chmod(denied)
                return lab.run(arguments, bound_by_permissions)

            for replaces in lab.counted(job, 2):
                lab.trial(
                    tally, job, strike, replaces=replaces, codes=(REFUSED,), mend=lambda path=path: path.chmod(0o755)
                )
            yield tally


def full_disks(lab: Laboratory, count: int) -> Iterator[Tally]:
    """The folder written to is a file system that is full before the end; then it grows, and the command goes on."""
    libc = ctypes.CDLL(None, use_errno=True)
    for job in lab.struck_by("disk full"):
        tally = Tally(job.name, "disk full")
        whole = lab.whole[job.name]
        assert whole is not None
        size = sum(map(len, whole.values()))
        for _ in lab.counted(job, count):
            room = max(4096, lab.random.randrange(size))
            with small_disk(lab.folder, room) as mounted:
                if not mounted:
                    break
                arguments = job.arguments(lab.inputs, lab.folder)
                end = lab.run(arguments)
                tally.trials += 1
                tally.struck += end.code != OK
                where = f"{job.name}, disk full at {room}"
                told = any(words in end.errors for words in ("No space left", "are free"))
                if end.code != REFUSED or not told or "Traceback" in end.errors:
                    tally.violations.append(f"{where}: exit code {end.code}: {end.errors[-400:]}")
                if (lab.folder / "out").exists():
                    tally.violations.append(f"{where}: OUT exists")
                tally.left_over += any(lab.folder.iterdir())
                flags = 32  # MS_REMOUNT
                libc.mount(b"none", os.fsencode(lab.folder), b"tmpfs", flags, b"size=1073741824")
                again = lab.run(arguments)
                if again.code != OK or state(lab.folder / "out") != whole:
                    tally.violations.append(f"{where}: the next run ends with {again.code}: {again.errors[-400:]}")
                if left := sorted({path.name for path in lab.folder.iterdir()} - {"out"}):
                    tally.violations.append(f"{where}: the next run leaves {left}")
        if tally.trials:
            yield tally


def text(tallies: list[Tally], seconds: dict[str, float], kills: int, seed: int) -> str:
    lines = [
        "# What faults leave behind",
        "",
        f"`python bench/faults.py --kills {kills}`, {machine()}, float32, the demo models, seed {seed}.",
        "",
        "After each trial OUT must be absent, what it was, or complete, byte by byte; a foreseen fault must end in one",
        "line and exit code 2 (Ctrl-C: 130); the same command run again must give what an undisturbed run gives, byte",
        "by byte, and leave nothing else behind. Where a file was replaced by another model's, the result must be",
        "wholly of the one or of the other. Half of the trials replace an older output with `--overwrite`. Struck: the",
        "command did not succeed; one whose file was replaced before it was opened, or after it was read, does. Left",
        "over: trials after which finished parts or temporary files lay in the folder, which the next run used or",
        "removed. Out of memory is a limit on the address space little above",
        "what the process holds; where the C library itself aborts (code 127 or SIGABRT) it counts as a kill. There,",
        "and only there, a complete output may differ by rounding (1e-5 of a tensor's largest element), as it does",
        "where products find no room for their buffers and go another way: it did in",
        f"{sum(t.rounded for t in tallies)} trials. Moments",
        "are uniform over the undisturbed duration in a fork that has imported everything",
        "(" + ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items()) + ").",
        "",
        "| command | fault | trials | struck | left over | violations |",
        "|---|---|---:|---:|---:|---:|",
        *(f"| {t.job} | {t.fault} | {t.trials} | {t.struck} | {t.left_over} | {len(t.violations)} |" for t in tallies),
        "",
        f"{sum(t.trials for t in tallies)} faults, {sum(len(t.violations) for t in tallies)} violations.",
        "",
        *(f"- {what}" for t in tallies for what in t.violations),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs of each command; of the other faults a fifth")
    parser.add_argument("--seed", type=int, default=0)
    names = [job.name for job in JOBS]
    parser.add_argument("--jobs", nargs="*", metavar="JOB", choices=names, default=names, help=", ".join(names))
    parser.add_argument("--only", nargs="*", metavar="FAULT", help="kills, reads, files, memory, permissions, disks")
    parser.add_argument("--thin", action="store_true", help="strike each command with two or three faults, once each")
    parser.add_argument("--json", action="store_true", help="print the figures, write no report")
    options = parser.parse_args()
    if torch.get_num_threads() > 1:
        # Of a process that has made a pool of threads a fork is not a whole one.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_NUM_THREADS": "1"})
    transformers.utils.logging.disable_progress_bar()
    some = max(1, options.kills // 5)
    with tempfile.TemporaryDirectory() as root:
        lab = Laboratory(Path(root), [job for job in JOBS if job.name in options.jobs], options.seed, thin=options.thin)
        groups: dict[str, Callable[[], Iterator[Tally]]] = {
            "kills": lambda: kills(lab, options.kills),
            "reads": lambda: read_errors(lab, some),
            "files": lambda: changed_files(lab, some),
            "memory": lambda: memory(lab, some),
            "permissions": lambda: permissions(lab),
            "disks": lambda: full_disks(lab, some),
        }
        tallies = []
        for name, group in groups.items():
            if options.only and name not in options.only:
                continue
            for tally in group():
                tallies.append(tally)
                if not options.json:
                    print(tally.job, tally.fault, tally.trials, tally.struck, tally.violations, flush=True)
    if options.json:
        print(json.dumps([vars(tally) for tally in tallies]))
    elif not options.only and not options.thin and options.jobs == names:
        write_report("faults", text(tallies, lab.seconds, options.kills, options.seed))


if __name__ == "__main__":
    main()
