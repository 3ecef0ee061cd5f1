"""Where a report goes: checked before the work, written whole or not at all after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import LoraSuiteError
from .output import check_output, write_file

if TYPE_CHECKING:
    from .html_report import Subject

GENERATOR = '<meta name="generator" content="lorasuite-fast">'
"""What tells a report from any other file."""


def check_report(path: str | os.PathLike[str] | None) -> Path | None:
    """The report's path, refused before any work if it cannot be written, or is there already and no report."""
    if path is None:
        return None
    try:
        target = check_output(path, overwrite=True)
    except LoraSuiteError as error:
        raise LoraSuiteError(str(error).replace("OUT ", "--report ", 1)) from None
    if target.is_dir():
        raise LoraSuiteError(f"--report {path}: is a folder; name an HTML file in it")
    if target.exists():
        with target.open("rb") as file:
            if GENERATOR.encode() not in file.read(2000):
                raise LoraSuiteError(
                    f"--report {path}: exists already and is no report of lorasuite-fast; choose another path"
                )
    return target


def write_report(subject: Subject, path: str | os.PathLike[str] | None) -> None:
    """Writes a report where one is asked for; replaces an earlier report, and nothing else.

    Raises:
        LoraSuiteError: it cannot be written there.
    """
    target = check_report(path)
    if target is None:
        return
    from .html_report import report_html

    html = report_html(subject)
    write_file(target, lambda file: file.write_text(html, encoding="utf-8"), overwrite=True)
