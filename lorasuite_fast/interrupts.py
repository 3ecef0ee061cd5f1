"""Ctrl-C as one line and one exit code, however often it is pressed and whatever it meets."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
_LINE = b"interrupted; OUT is what it was, or complete; the same command goes on from what is done\n"
_AT_ONCE = 3
"""The Ctrl-C that waits for nothing any more."""
_AGAIN = 0.05
"""Seconds after which a Ctrl-C is repeated that nobody could hear."""


def say_interrupted() -> None:
    sys.stderr.flush()
    os.write(2, _LINE)


@contextmanager
def interrupts() -> Iterator[None]:
    """Ends the process with one line and INTERRUPTED once Ctrl-C has been pressed.

    The first one raises KeyboardInterrupt, and what is open is cleaned up; the second changes nothing in that; the
    third ends the process at once, as a kill does. One that arrives where Python can only report an exception, in a
    finalizer, is repeated. An error on the way out is the interruption's doing.

    Raises:
        SystemExit: in the place of whatever left the block behind a Ctrl-C.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        try:
            yield
        except KeyboardInterrupt:
            say_interrupted()
            raise SystemExit(INTERRUPTED) from None
        return
    pressed = 0

    def heard(*_: Any) -> None:
        nonlocal pressed
        pressed += 1
        if pressed == 1:
            raise KeyboardInterrupt
        if pressed >= _AT_ONCE:
            os.write(2, _LINE)
            os._exit(INTERRUPTED)

    def repeat() -> None:
        nonlocal pressed
        pressed = 0
        os.kill(os.getpid(), signal.SIGINT)

    report = sys.unraisablehook

    def unraisable(problem: Any) -> None:
        if problem.exc_type is KeyboardInterrupt:
            timer = threading.Timer(_AGAIN, repeat)
            timer.daemon = True
            timer.start()
        elif not pressed:
            report(problem)

    sys.unraisablehook = unraisable
    signal.signal(signal.SIGINT, heard)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt) and (not pressed or isinstance(error, SystemExit)):
            raise
        say_interrupted()
        raise SystemExit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = report
