"""How a command runs: progress, errors as one line, exit codes."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors import LoraSuiteError, one_line
from ..reporting.escaping import printable

if TYPE_CHECKING:
    from ..io.phases import Progress as Reporter
    from ..io.ranks import Ranks


DIVERGED = 3
"""Exit code of a training that diverged; what it started from is then in OUT."""


@contextmanager
def _bus_errors() -> Iterator[None]:
    """A file cut off under its memory map ends in SIGBUS at the next touch; this makes it one line and exit code 2.

    The faulting instruction is tried again and again meanwhile, so a thread of its own has to notice.
    """
    if not hasattr(signal, "SIGBUS") or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while got := os.read(reader, 1):
            if got[0] == signal.SIGBUS:
                message = (
                    b"error: a model file was cut off while it was being read, or its disk failed; fetch it again\n"
                )
                os.write(2, message)
                os._exit(2)

    before = signal.signal(signal.SIGBUS, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGBUS, before)
        os.close(writer)
        thread.join()
        os.close(reader)


class _PlainProgress:
    """Lines instead of bars, for what is no terminal: of phases over 2 s, and no more than one in 10 s."""

    FIRST, EVERY = 2.0, 10.0

    def __init__(self, write: Any | None, clock: Any = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._phase, self._start, self._last = "", 0.0, 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = self._clock()
        if phase != self._phase:
            self._phase, self._start, self._last = phase, now, now + self.FIRST - self.EVERY
        elapsed = now - self._start
        # The last line of a phase only where earlier ones have been printed.
        finished = done >= total and self._last >= self._start
        if self._write is None or not done or not (finished or now - self._last >= self.EVERY):
            return
        self._last = now
        left = f", {(total - done) * elapsed / done:.0f} s left" if done < total else f" in {elapsed:.0f} s"
        self._write(f"{phase}: {done} of {total}, {done / elapsed:.1f}/s{left}", err=True)


OUT_OF_MEMORY = (
    "out of memory; OUT is what it was, or complete. Free some, or pass --memory, where the command has it; "
    "what is finished is kept, and the same command goes on from there"
)


MEMORY_WORDS = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "can't start new thread",
    "failed to map segment",
)


_PARAMETERS = (
    *(
        "calibration",
        "cache",
        "device",
        "dtype",
        "examples",
        "finetune",
        "labelled",
        "max_tokens",
        "memory",
        "method",
        "overwrite",
    ),
    *(
        "refine_text",
        "report",
        "retain",
        "ridge",
        "roles",
        r"distill\.layers",
        "template",
        "text",
        "transfer",
        "trust_remote_code",
    ),
    "validation",
)
_PARAMETER = re.compile(rf"`({'|'.join(_PARAMETERS)})(?:=([^`]*))?`")
_OTHER_FLAGS = {"distill.layers": "distill-layers"}


def with_flags(message: str) -> str:
    """A message in the words of the command line: where the core names a parameter in backquotes, its flag."""

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        spelled = "--" + _OTHER_FLAGS.get(name, name.replace("_", "-"))
        return spelled if value in (None, "True") else f"{spelled} {value}"

    return _PARAMETER.sub(flag, message)


def complain(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    message = with_flags(message)
    typer.echo(f"error{f' (rank {printable(rank)})' if rank != '0' else ''}: {one_line(message)}", err=True)


def fail(message: str) -> NoReturn:
    complain(message)
    raise typer.Exit(2) from None


@contextmanager
def checks() -> Iterator[None]:
    """Before anything that takes long to import: what was given is looked at, and refused in one line."""
    try:
        yield
    except LoraSuiteError as error:
        fail(str(error))


@contextmanager
def running(as_json: bool) -> Iterator[Reporter | None]:
    """Progress on stderr, and every foreseen failure as one line and exit code 2."""
    # What transformers remarks about its own internals is no business of the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    console = Console(stderr=True)
    bars: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    live = console.is_terminal
    plain = _PlainProgress(None if as_json or live else typer.echo)
    try:
        with (
            _bus_errors(),
            Progress(*columns, console=console, disable=as_json or not live) as progress,
        ):

            def report(phase: str, done: int, total: int) -> None:
                if phase not in bars:
                    bars[phase] = progress.add_task(phase, total=total, rate="")
                elapsed = progress.tasks[bars[phase]].elapsed or 0.0
                rate = f"{done / elapsed:.1f}/s" if done and elapsed > 0 else ""
                progress.update(bars[phase], completed=done, rate=rate)
                plain(phase, done, total)

            yield report
    except LoraSuiteError as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror or error}")


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes torchrun started, if it did; alone otherwise."""
    from ..io.ranks import Ranks

    ranks = Ranks.join()
    yield ranks
    ranks.leave()


def say(sentence: str) -> None:
    typer.echo(printable(sentence), err=True)
