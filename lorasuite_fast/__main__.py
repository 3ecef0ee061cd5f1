"""The program, `lorasuite-fast` or `python -m lorasuite_fast`."""

import signal
from typing import Any

from .interrupts import interrupts


def main() -> Any:
    """Runs the command line; Ctrl-C ends it in one line from the imports to the end of the process."""
    try:
        with interrupts():
            from .cli.commands import main as run

            return run()
    finally:
        # All is said and done: the interpreter's own end is not worth a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
