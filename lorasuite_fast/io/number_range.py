"""Numbers too large or too small to compute with: one error that names whose they are, and no traceback or NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import LoraSuiteError

_ACTION = "look for values far too large or too small, and train, fetch or save it again"


def _out_of_range(thing: str) -> LoraSuiteError:
    return LoraSuiteError(f"{thing}: the numbers leave the range of floating point; {_ACTION}")


def check_range(thing: str, *values: Tensor | float | None) -> None:
    """Raises LoraSuiteError if one of the results of finite numbers is infinite or NaN; None is no result."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise _out_of_range(thing)
        elif value is not None and not math.isfinite(value):
            raise _out_of_range(thing)


@contextmanager
def in_range(thing: str) -> Iterator[None]:
    """Makes one error of what a matrix decomposition raises on numbers it cannot work with.

    Args:
        thing: whose numbers they are.

    Raises:
        LoraSuiteError: in the place of LinAlgError and OverflowError.
    """
    try:
        yield
    except (torch.linalg.LinAlgError, OverflowError):  # type: ignore[attr-defined]
        raise _out_of_range(thing) from None
