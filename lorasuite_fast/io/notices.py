"""What a user should know of an input that is used all the same: one line each, told once."""

from __future__ import annotations

import logging

_LOG = logging.getLogger("lorasuite_fast")
_told: set[str] = set()


def notice(text: str) -> None:
    """Logs one line as a warning of the logger `lorasuite_fast`, once in a process; logging prints it on stderr."""
    line = " ".join(text.split())
    line = line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if line not in _told:
        _told.add(line)
        _LOG.warning("%s", line)
