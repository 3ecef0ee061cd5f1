"""What a notebook shows of a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar


class Rendered:
    """A result that a notebook shows as its report; the room that writes reports says how."""

    renderer: ClassVar[Callable[[Any], str] | None] = None

    def _repr_html_(self) -> str | None:
        return None if Rendered.renderer is None else Rendered.renderer(self)
