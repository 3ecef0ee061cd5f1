"""Where a report goes: checked before the work, written whole or not at all after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .artifacts import Given
from .errors import LoraSuiteError
from .output import check_output, write_file

if TYPE_CHECKING:
    from .html_report import Subject


def check_report(
    path: str | os.PathLike[str] | None, out: str | os.PathLike[str] | None = None, inputs: Given | None = None
) -> Path | None:
    """The report's path, refused before any work if it cannot be written, or is there already and no report.

    Args:
        out: the run's other output, which is not to be the same path. inputs: as `output.check_output` has them.
    """
    if path is None:
        return None
    try:
        target = check_output(path, overwrite=True, kind="report", inputs=inputs)
    except LoraSuiteError as error:
        raise LoraSuiteError(str(error).replace("OUT ", "--report ", 1)) from None
    if out is not None and target == Path(out).expanduser().absolute():
        raise LoraSuiteError(f"--report {path}: is OUT as well; choose another path")
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
    write_file(target, lambda file: file.write_text(html, encoding="utf-8"), overwrite=True, kind="report")
