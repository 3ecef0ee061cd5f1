"""Gives every argument its own entry in the reference, where a docstring describes several together."""

from __future__ import annotations

import re
from typing import Any

import griffe

_NEXT = re.compile(r"(?<=[.;]) (\w+(?:, \w+)*):(?= |$)")
_ENTRY = re.compile(r"    (\w+(?:, \w+)*):(.*)")


class Entries(griffe.Extension):
    """Splits `old: the old model. new: the new one.` in two, and so `old, new: the models.`

    Only where all the names are arguments of the function, or attributes of the class.
    """

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        self._split(func, {parameter.name.lstrip("*") for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        self._split(cls, set(cls.members))

    @staticmethod
    def _split(described: griffe.Object, names: set[str]) -> None:
        if described.docstring is None:
            return

        def entry(match: re.Match[str]) -> str:
            return f"\n    {match[1]}:" if names.issuperset(match[1].split(", ")) else match[0]

        text = described.docstring.value
        lines = "\n".join(_NEXT.sub(entry, x) if x.startswith("    ") else x for x in text.split("\n")).split("\n")
        result: list[str] = []
        while lines:
            line = lines.pop(0)
            found = _ENTRY.fullmatch(line)
            if not found or not names.issuperset(found[1].split(", ")):
                result.append(line)
                continue
            rest = []
            while lines and lines[0].startswith("        "):
                rest.append(lines.pop(0))
            for name in found[1].split(", "):
                result += [f"    {name}:{found[2]}", *rest]
        described.docstring.value = "\n".join(result)
