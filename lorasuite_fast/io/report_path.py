"""The path of a report, checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import LoraSuiteError
from .artifacts import Given
from .output import check_output


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
        raise LoraSuiteError(str(error).replace("OUT ", "`report` ", 1)) from None
    if out is not None and target == Path(out).expanduser().absolute():
        raise LoraSuiteError(f"`report` {path}: is OUT as well; choose another path")
    return target
