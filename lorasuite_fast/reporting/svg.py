"""The pictures of a report, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.measures import Interval
from .escaping import html_text as escape
from .html_parts import interval

_WIDTH = 360


_MOST_NUMBERED = 100
"""Cells of a heat map up to which each shows its number."""


def _svg(height: float, title: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(text)}</text>'


def _ticks(count: int, room: float) -> list[int]:
    """Positions of a grid to label, so that labels of some 22 units do not touch."""
    step = max(1, math.ceil(count * 22 / room))
    return list(range(0, count, step))


def _cell(x: float, y: float, w: float, h: float, value: float, title: str) -> str:
    kind = "plus" if value >= 0 else "minus"
    opacity = min(1.0, 0.04 + 0.96 * abs(value))
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" fill-opacity="{opacity:.3f}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _legend(y: float, low: str, high: str) -> str:
    """A bar from weak to strong."""
    steps = "".join(
        f'<rect class="plus" x="{210 + 10 * n}" y="{y}" width="10" height="9" fill-opacity="{opacity:.2f}"/>'
        for n, opacity in enumerate(0.04 + 0.96 * k / 9 for k in range(10))
    )
    return _text(205, y + 8, low, "end") + steps + _text(315, y + 8, high)


def heatmap(values: list[list[float]], path: Mapping[int, int], measure: str) -> str:
    """(L_o, L_n) as a map, old layers upwards and new ones to the right, with the chosen pairs outlined and joined."""
    L_o, L_n = len(values), len(values[0])
    left, top, size = 42, 26, 306
    w, h = size / L_n, min(size / L_n, 28.0) if L_o <= L_n else size / L_o
    height = top + h * L_o + 44
    body, numbers = [], []
    for i in range(L_o):
        y = top + h * (L_o - 1 - i)
        for j in range(L_n):
            value, x = values[i][j], left + w * j
            body.append(_cell(x, y, w, h, max(0.0, value), f"old layer {i}, new layer {j}: {value:.3f}"))
            if L_o * L_n <= _MOST_NUMBERED and w >= 24 and h >= 14:
                ink = "on" if value > 0.55 else ""
                numbers.append(_text(x + w / 2, y + h / 2 + 4, f"{value:.2f}", "middle", f'class="value {ink}"'))
    points = [(left + w * (j + 0.5), top + h * (L_o - 0.5 - i)) for j, i in sorted(path.items())]
    # Outlines of cells a few units wide must not fill them.
    stroke = f'style="stroke-width:{max(0.5, min(2.0, w / 8, h / 8)):.2f}"'
    body.append(f'<polyline class="path" {stroke} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    for j, i in sorted(path.items()):
        x, y = left + w * j, top + h * (L_o - 1 - i)
        box = f'x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}"'
        body.append(f'<rect class="chosen" {stroke} {box}/>')
    bottom = top + h * L_o
    body += numbers
    body += [_text(left + w * (j + 0.5), bottom + 14, str(j), "middle") for j in _ticks(L_n, size)]
    body += [_text(left - 6, top + h * (L_o - 0.5 - i) + 4, str(i), "end") for i in _ticks(L_o, h * L_o)]
    body += [_text(left + size / 2, bottom + 30, "new layer", "middle"), _text(4, 14, "old layer")]
    body.append(_legend(6, f"{measure} 0", "1"))
    return _svg(height, f"{measure} of every old layer with every new layer, the chosen pairs outlined", "".join(body))


def strips(rows: Sequence[tuple[int, list[float | None], list[int]]]) -> str:
    """A row of heads for each new layer: (new layer, cosine of each new head with its partner, partner or -1)."""
    heads = max(len(match) for _, _, match in rows)
    left, top, room = 42, 26, 306
    w, h = room / heads, 20 if len(rows) <= 16 else 12
    body = [_text(4, 14, "new layer"), _legend(6, "cosine 0", "1")]
    for n, (layer, cosines, match) in enumerate(rows):
        y = top + n * (h + 3)
        body.append(_text(left - 6, y + h / 2 + 4, str(layer), "end"))
        for b, (cosine, a) in enumerate(zip(cosines, match, strict=True)):
            x = left + w * b
            if cosine is None:
                title = f"layer {layer}, new head {b}: no partner"
                body.append(f'<rect class="none" x="{x:.2f}" y="{y}" width="{w - 1:.2f}" height="{h}"><title>{title}')
                body.append("</title></rect>")
                continue
            body.append(_cell(x, y, w - 1, h, cosine, f"layer {layer}, new head {b}, old head {a}: {cosine:.3f}"))
            if w >= 14 and h >= 14:
                ink = "on" if abs(cosine) > 0.55 else ""
                body.append(_text(x + w / 2 - 0.5, y + 14, str(a), "middle", f'class="value {ink}"'))
    bottom = top + len(rows) * (h + 3)
    body += [_text(left + w * (b + 0.5), bottom + 12, str(b), "middle") for b in _ticks(heads, room)]
    body.append(_text(left + room / 2, bottom + 28, "new head", "middle"))
    return _svg(bottom + 36, "Cosine of every new head with the old head it continues, layer by layer", "".join(body))


@dataclass(frozen=True)
class Series:
    """A line: its name, points, and class: a (new, solid) or b (old, dashed)."""

    name: str
    points: list[tuple[float, float]]
    kind: str = "a"


def _scale(low: float, high: float, start: float, stop: float, log: bool = False) -> Callable[[float], float]:
    def value(x: float) -> float:
        return math.log10(x) if log else x

    low, high = value(low), value(high)
    span = high - low or 1.0
    return lambda x: start + (value(x) - low) / span * (stop - start)


def _nice(low: float, high: float) -> list[float]:
    """About four round numbers that cover a range."""
    span = (high - low) or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 3))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 4)
    return [n * step for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


def line_chart(
    series: Sequence[Series], title: str, x_label: str, y_label: str, log: bool = False, mark: int = -1
) -> str:
    """Lines over a common axis; points that are not finite, or on a log axis not above 0, are left out."""
    drawn = [
        Series(s.name, [(x, y) for x, y in s.points if math.isfinite(y) and (y > 0 or not log)], s.kind) for s in series
    ]
    points = [point for s in drawn for point in s.points]
    if not points:
        return ""
    left, top, right, bottom = 50, 24, _WIDTH - 8, 176
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if log:
        exponents = range(math.floor(math.log10(max(min(ys), max(ys) * 1e-8))), math.ceil(math.log10(max(ys))) + 1)
        marks = [10.0**e for e in exponents]
        marks = marks if len(marks) > 1 else [marks[0], 10 * marks[0]]
    else:
        marks = _nice(min(ys), max(ys))
    at_x = _scale(min(xs), max(xs), left + 6, right - 6)
    at_y = _scale(marks[0], marks[-1], bottom, top, log)
    body = [_text(4, 12, y_label)]
    for y in marks[:: max(1, len(marks) // 6)]:
        body.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        body.append(_text(left - 5, at_y(y) + 4, f"{y:g}", "end"))
    if mark >= 0:
        body.append(f'<line class="mark" x1="{at_x(mark):.1f}" x2="{at_x(mark):.1f}" y1="{top}" y2="{bottom}"/>')
        body.append(_text(at_x(mark), top - 4, "written", "end" if at_x(mark) > 300 else "middle"))
    for s in drawn:
        # Below a log axis a value is as good as 0.
        inside = [(at_x(x), min(at_y(y), bottom)) for x, y in s.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in inside)
        body.append(f'<polyline class="line {s.kind}" points="{path}"><title>{escape(s.name)}</title></polyline>')
        if len(inside) <= 20:
            body += [f'<circle class="dot {s.kind}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in inside]
    body += [_text(at_x(x), bottom + 15, f"{x:g}", "middle") for x in {min(xs), max(xs)}]
    body.append(_text((left + right) / 2, bottom + 30, x_label, "middle"))
    return _svg(bottom + 38, title, "".join(body))


def chart_key(*entries: tuple[str, str]) -> str:
    """What the lines of a picture stand for: (name, class)."""
    items = "".join(
        f'<li><svg viewBox="0 0 30 8" width="30" height="8" aria-hidden="true">'
        f'<line class="line {kind}" x1="1" x2="29" y1="4" y2="4"/></svg> {escape(name)}</li>'
        for name, kind in entries
    )
    return f'<ul class="key">{items}</ul>'


def bar_chart(rows: Sequence[tuple[str, float | None, str]], title: str, high: float, mark: float | None = None) -> str:
    """Horizontal bars from 0: (label, value, what stands beside it); `mark` is a line across all."""
    left, room, step = 136, 150, 22
    at = _scale(0, high or 1, left, left + room)
    body = []
    for n, (label, value, text) in enumerate(rows):
        y = 6 + n * step
        body.append(_text(left - 6, y + 13, label if len(label) <= 21 else f"{label[:20]}…", "end"))
        width = 0.0 if value is None else max(0.0, min(at(value), left + room) - left)
        body.append(f'<rect class="track" x="{left}" y="{y}" width="{room}" height="16"/>')
        body.append(f'<rect class="bar" x="{left}" y="{y}" width="{width:.1f}" height="16"/>')
        body.append(_text(left + room + 6, y + 13, text))
    height = 6 + step * len(rows)
    if mark is not None:
        body.append(f'<line class="mark" x1="{at(mark):.1f}" x2="{at(mark):.1f}" y1="2" y2="{height - 2}"/>')
    return _svg(height, title, "".join(body))


def interval_chart(rows: Sequence[tuple[str, Interval]], title: str) -> str:
    """Values with their intervals, around 0."""
    known = [v for _, f in rows for v in (f.value, f.low, f.high) if v is not None and math.isfinite(v)]
    if not known:
        return ""
    left, right, step = 126, _WIDTH - 10, 22
    marks = _nice(max(min([*known, 0.0]), -3.0), min(max([*known, 0.0]), 3.0))
    at = _scale(marks[0], marks[-1], left, right)
    bottom = 6 + step * len(rows)
    body = []
    for x in marks:
        kind = "mark" if x == 0 else "grid"
        body.append(f'<line class="{kind}" x1="{at(x):.1f}" x2="{at(x):.1f}" y1="2" y2="{bottom}"/>')
        body.append(_text(at(x), bottom + 14, f"{x:g}", "end" if at(x) > right - 8 else "middle"))
    for n, (label, figure) in enumerate(rows):
        y = 6 + n * step + 10
        body.append(_text(left - 10, y + 4, label, "end"))
        if figure.value is None:
            continue
        ends = [min(max(v, marks[0]), marks[-1]) for v in (figure.low, figure.value, figure.high) if v is not None]
        kind = "a" if n == 0 else "b"
        body.append(f'<line class="line {kind}" x1="{at(ends[0]):.1f}" x2="{at(ends[-1]):.1f}" y1="{y}" y2="{y}"/>')
        body.append(f'<circle class="dot {kind}" cx="{at(ends[len(ends) // 2]):.1f}" cy="{y}" r="4">')
        body.append(f"<title>{escape(label)}: {interval(figure)}</title></circle>")
    return _svg(bottom + 20, title, "".join(body))
