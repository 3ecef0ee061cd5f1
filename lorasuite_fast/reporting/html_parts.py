"""The parts that reports are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.measures import Interval
from ..io.hub_ids import shown
from .escaping import html_text as escape


@dataclass(frozen=True)
class Part:
    """One section of a report."""

    title: str
    body: str


def sections(parts: Iterable[Part]) -> str:
    return "".join(
        f'<section id="{anchor(part.title)}"><h2>{escape(part.title)}</h2>\n{part.body}</section>\n' for part in parts
    )


def anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def number_text(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def interval(figure: Interval | None, digits: int = 3) -> str:
    if figure is None or figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return number_text(figure.value, digits)
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"


def facts_table(rows: Mapping[str, object]) -> str:
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in rows.items())
    return f"<dl>{cells}</dl>"


def verdict_box(text: str, kind: str) -> str:
    """A sentence that has to be seen; kind: good, part or bad."""
    return f'<p class="verdict {kind}">{escape(text)}</p>'


def table_of(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def folded_table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    """A picture's figures, folded; the table may be wider than a phone, and then scrolls by itself."""
    return (
        "<details><summary>The figures as a table</summary>"
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"{table_of(columns, rows, caption)}</div></details>"
    )


def figure_of(svg: str, caption: str, details: str = "") -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption>{details}</figure>"


def options_part(options: Mapping[str, Any]) -> Part:
    def plain(value: Any) -> object:
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value))
        if isinstance(value, float):
            return f"{value:.4g}"
        text = "not set" if value is None else str(value)
        return shown(text) if "/" in text else text.strip()

    return Part("Options", facts_table({name.replace("_", " "): plain(value) for name, value in options.items()}))


def listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.0f}"
