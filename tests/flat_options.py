"""Options by their names alone, where a test chooses them one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def given(verb: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The keywords that `verb` takes for the fields of its configurations named in `options`."""
    gathered: dict[str, Any] = verb.gather(options)  # type: ignore[attr-defined]
    return gathered
