"""A report of a plan or a result as one HTML file: pictures in SVG, no network, no script, no font of its own.

Pictures are drawn 360 units wide, the width of a phone, so that their text is as large there as on a desktop. Colours
are CSS variables; a value's strength is an opacity, so that the same picture is legible in dark and in light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .artifacts import REPORT_MARK
from .base_fit import layers_compared
from .build import EXACT_R2
from .escaping import html_text as escape
from .finetuning import Finetuning
from .inspection import inspect_plan
from .kinship import plan_kinship
from .model_card import shown
from .phases import Phase
from .plan import TransferPlan
from .refinement import Refinement
from .result import Migration
from .spectra import Spectra, migration_spectra
from .verification import Interval, Verification

if TYPE_CHECKING:
    from .base_fit import BaseFit
    from .verification import Effect

Subject = TransferPlan | Migration | Verification | Refinement | Finetuning

_WIDTH = 360
_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_MOST_NUMBERED = 100
"""Cells of a heat map up to which each shows its number."""


@dataclass(frozen=True)
class Part:
    """One section of a report."""

    title: str
    body: str


def report_html(subject: Subject) -> str:
    """The whole document."""
    title, parts = _parts(subject)
    links = "".join(f'<li><a href="#{_anchor(p.title)}">{escape(p.title)}</a></li>' for p in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{REPORT_MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{_PAGE_STYLE}</style></head>\n"
        f'<body><a class="skip" href="#report">Skip to the report</a>\n<div class="lsf"><h1>{escape(title)}</h1>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        f'<main id="report" tabindex="-1">{_sections(parts)}</main>\n'
        f"<footer>{escape(_versions())}</footer></div></body></html>\n"
    )


def fragment(subject: Subject) -> str:
    """The report without its page, for a notebook's cell."""
    title, parts = _parts(subject)
    return f'<style>{_STYLE}</style><div class="lsf"><h1>{escape(title)}</h1>{_sections(parts)}</div>'


def _sections(parts: Iterable[Part]) -> str:
    return "".join(
        f'<section id="{_anchor(part.title)}"><h2>{escape(part.title)}</h2>\n{part.body}</section>\n' for part in parts
    )


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _versions() -> str:
    names = ("torch", "transformers", "peft", "safetensors")
    return f"lorasuite-fast {__version__}, " + ", ".join(f"{name} {metadata.version(name)}" for name in names)


def _parts(subject: Subject) -> tuple[str, list[Part]]:
    if isinstance(subject, TransferPlan):
        title = f"Transfer plan: {shown(subject.old.name)} to {shown(subject.new.name)}"
        parts = [_plan_summary(subject), *_plan_parts(subject), _phases(subject.phases), _options(subject.options)]
    elif isinstance(subject, Migration):
        plan = subject.plan
        title = f"{shown(subject.adapter)}: {shown(plan.old.name)} to {shown(plan.new.name)}"
        parts = _migration_parts(subject)
    elif isinstance(subject, Verification):
        title = f"Verification: {shown(subject.old)} and {shown(subject.new)}"
        parts = [
            *_verification_parts(subject),
            _fingerprints(subject),
            _phases(subject.phases, subject.seconds),
            _options(subject.options),
        ]
    elif isinstance(subject, Refinement):
        title = f"Refinement: {shown(subject.old_adapter)} on {shown(subject.new)}"
        parts = [
            _refinement(subject),
            _fingerprints(subject),
            _phases(subject.phases, subject.seconds),
            _options(subject.options),
        ]
    else:
        title = f"Fine-tuning of {shown(subject.model)}"
        parts = [
            _finetuning(subject),
            _fingerprints(subject),
            _phases(subject.phases, subject.seconds),
            _options(subject.options),
        ]
    return title, [part for part in parts if part.body]


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _interval(figure: Interval | None, digits: int = 3) -> str:
    if figure is None or figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return _number(figure.value, digits)
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"


def _facts(rows: Mapping[str, object]) -> str:
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in rows.items())
    return f"<dl>{cells}</dl>"


def _verdict(text: str, kind: str) -> str:
    """A sentence that has to be seen; kind: good, part or bad."""
    return f'<p class="verdict {kind}">{escape(text)}</p>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _details(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    """A picture's figures, folded; the table may be wider than a phone, and then scrolls by itself."""
    return (
        "<details><summary>The figures as a table</summary>"
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"{_table(columns, rows, caption)}</div></details>"
    )


def _figure(svg: str, caption: str, details: str = "") -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption>{details}</figure>"


def _options(options: Mapping[str, Any]) -> Part:
    def plain(value: Any) -> object:
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value))
        if isinstance(value, float):
            return f"{value:.4g}"
        text = "not set" if value is None else str(value)
        return shown(text) if "/" in text else text.strip()

    return Part("Options", _facts({name.replace("_", " "): plain(value) for name, value in options.items()}))


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


def _heatmap(values: list[list[float]], path: Mapping[int, int], measure: str) -> str:
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


def _strips(rows: Sequence[tuple[int, list[float | None], list[int]]]) -> str:
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


def _lines(series: Sequence[Series], title: str, x_label: str, y_label: str, log: bool = False, mark: int = -1) -> str:
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


def _key(*entries: tuple[str, str]) -> str:
    """What the lines of a picture stand for: (name, class)."""
    items = "".join(
        f'<li><svg viewBox="0 0 30 8" width="30" height="8" aria-hidden="true">'
        f'<line class="line {kind}" x1="1" x2="29" y1="4" y2="4"/></svg> {escape(name)}</li>'
        for name, kind in entries
    )
    return f'<ul class="key">{items}</ul>'


def _bars(rows: Sequence[tuple[str, float | None, str]], title: str, high: float, mark: float | None = None) -> str:
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


def _intervals(rows: Sequence[tuple[str, Interval]], title: str) -> str:
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
        body.append(f"<title>{escape(label)}: {_interval(figure)}</title></circle>")
    return _svg(bottom + 20, title, "".join(body))


def _models(plan: TransferPlan) -> str:
    rows = []
    for name, value in (
        ("model", lambda m: shown(m.name)),
        ("fingerprint", lambda m: m.fingerprint),
        ("family", lambda m: m.family),
        ("layers", lambda m: m.shape.L),
        ("width", lambda m: f"{m.shape.d:,}"),
        ("MLP width", lambda m: f"{m.shape.f:,}"),
        ("heads", lambda m: f"{m.shape.H} of {m.shape.h}, {m.shape.attention}"),
        ("vocabulary", lambda m: f"{m.shape.V:,}"),
    ):
        rows.append((name, value(plan.old), value(plan.new)))
    return _table(("", "old", "new"), rows, "The two models")


def _plan_summary(plan: TransferPlan) -> Part:
    facts = plan.facts
    rows = {
        "method": f"{plan.method}, {facts.get('method_reason', 'asked for')}",
        "shared tokens": f"{facts['shared_tokens']:,}",
        "same vocabulary": "yes" if facts["same_vocabulary"] else "no",
        "layers with a partner": f"{len(plan.layers)} of {plan.new.shape.L}",
        "relatives": plan_kinship(facts) or "–",
    }
    return Part("Summary", _expectation(plan) + _facts(rows) + _models(plan))


def _expectation(plan: TransferPlan) -> str:
    """What the fit of the transfer matrices lets one expect of an adapter."""
    fits = plan.linear_fits
    if plan.options["method"] == "copy" and plan.exact:
        return _verdict("The new model's weights are the old one's: the adapter is what it was.", "good")
    if plan.exact:
        return _verdict("A linear map carries one model onto the other: an adapter should arrive whole.", "good")
    if fits and min(fits) < EXACT_R2 and plan.options["method"] != "copy":
        return _verdict(
            f"No linear map carries one model onto the other (R² below {EXACT_R2}): measure what an adapter still does "
            "before you rely on it (lorasuite-fast verify).",
            "part",
        )
    return _verdict("Measure what an adapter still does before you rely on it (lorasuite-fast verify).", "part")


def _plan_parts(plan: TransferPlan) -> list[Part]:
    measure = str(plan.options.get("similarity", "cka"))
    measure = "CKA" if measure == "cka" else measure
    cka = plan.tensors["cka"].tolist()
    caption = (
        f"{measure} of the hidden states over the calibration text. The line joins the chosen pairs; a new layer "
        "without one has no partner."
    )
    table = _details(
        ["old \\ new", *map(str, range(plan.new.shape.L))],
        ([i, *(f"{value:.3f}" for value in row)] for i, row in enumerate(cka)),
        f"{measure} of old layers (rows) with new layers (columns)",
    )
    parts = [Part("Layers", _figure(_heatmap(cka, plan.layers, measure), caption, table))]
    parts.append(_heads(plan))
    parts.append(_residual(plan))
    return parts


def _heads(plan: TransferPlan) -> Part:
    rows: list[tuple[int, list[float | None], list[int]]] = []
    for j in sorted(plan.layers):
        if f"layers.{j}.heads.match" not in plan.tensors:
            continue
        match = plan.tensors[f"layers.{j}.heads.match"].tolist()
        similarity = plan.tensors[f"layers.{j}.heads.similarity"]
        rows.append((j, [float(similarity[a, b]) if a >= 0 else None for b, a in enumerate(match)], match))
    if not rows:
        text = "This method does not match heads." if plan.options["method"] in ("copy", "distill") else ""
        return Part("Heads", f"<p>{text}</p>" if text else "")
    table = _details(
        ("layer", "new head", "old head", "cosine"),
        (
            (j, b, a if a >= 0 else "–", _number(c))
            for j, cs, m in rows
            for b, (c, a) in enumerate(zip(cs, m, strict=True))
        ),
        "Matched heads",
    )
    caption = (
        "Each square is a new head, its strength the cosine with the old head it continues, whose number it has where "
        "there is room; another colour is a cosine below 0. Near 0 nothing was found to match."
    )
    return Part("Heads", _figure(_strips(rows), caption, table))


def _residual(plan: TransferPlan) -> Part:
    facts = plan.facts
    rows = [
        (name, r2, "–" if r2 is None else f"{1 - r2:.4f}")
        for name, r2 in (("old to new, W_h", facts["r2"]), ("new to old, S", facts["r2_back"]))
    ]
    layers = _layer_residual(plan)
    if all(r2 is None for _, r2, _ in rows):
        words = "<p>The transfer matrix was given, not fitted: there is no residual on tokens.</p>"
        return Part("Transfer matrix", words + layers)
    shares = [(name, None if r2 is None else 1 - r2, text) for name, r2, text in rows]
    svg = _bars(shares, "Residual of the transfer matrices on held-out shared tokens, 1 − R²", 1.0, 1 - EXACT_R2)
    caption = (
        f"1 − R² on every 20th shared token, fitted on the others: 0 is a perfect linear map, 1 no map at all. Up to "
        f"{1 - EXACT_R2:.3f} (the line) counts as exact."
    )
    table = _details(("", "R²", "1 − R²"), [(n, _number(r2, 5), t) for n, r2, t in rows], "Fit on held-out tokens")
    return Part("Transfer matrix", _figure(svg, caption, table) + layers)


def _layer_residual(plan: TransferPlan) -> str:
    """1 - R² of W_h on what the mapped layers give, where the plan holds it."""
    found = sorted((int(j), r2) for j, r2 in plan.facts.get("layer_r2", {}).items())
    if not found:
        return ""
    bars = [(f"layer {j}", 1 - r2, f"{1 - r2:.4f}") for j, r2 in found]
    caption = "1 − R² of W_h on the pooled states behind each new layer and its partner; more than 1 is drawn as 1."
    return _figure(_bars(bars, caption, 1.0, 1 - EXACT_R2), caption)


def _migration_parts(result: Migration) -> list[Part]:
    plan = result.plan
    rows: dict[str, object] = {
        "adapter": shown(result.adapter),
        "written": shown(result.out),
        "method": f"{plan.method}, {plan.facts.get('method_reason', 'asked for')}",
        "relatives": plan_kinship(plan.facts) or "–",
        "seconds": _number(result.seconds, 1),
        "new layers without a partner": _listed(j for j in range(plan.new.shape.L) if j not in plan.layers),
        "old layers left out": _listed(result.unused_old_layers),
    }
    if (choice := result.choice) is not None:
        rows["candidates, agreement on held-out text that depends on the text"] = choice.table
        rows["candidates not judged"] = "; ".join(f"{name}: {why}" for name, why in choice.left_out.items()) or "none"
    if (distilled := result.distilled) is not None:
        share, content = distilled.agreement["kl_share"], distilled.agreement["content_kl_share"]
        rows |= {
            "agreement on held-out text": _interval(Interval(*share)),
            "of which depends on the text": _interval(Interval(*content)),
            "gain": f"{distilled.gain:g}",
            "R² of the output map": _number(distilled.output_r2),
            "text": shown(distilled.text),
            "aligned positions": f"{distilled.positions:,} in {distilled.texts:,} texts",
        }
    verdict = ""
    if result.warning:
        verdict = _verdict(result.warning, "bad")
    elif distilled is None and choice is not None:
        share = choice.agreement[choice.chosen]["kl_share"]
        verdict = _verdict(f"On held-out text {share[0]:.0%} of the effect arrived.", "part")
    elif distilled is not None:
        verdict = _verdict(f"On held-out text {distilled.agreement['kl_share'][0]:.0%} of the effect arrived.", "part")
    elif result.finetuned is None and result.refined is None:
        verdict = _expectation(plan)
    parts = [Part("Summary", verdict + _facts(rows) + _models(plan)), *_plan_parts(plan)]
    parts += [_fidelity(result), _spectra(result)]
    if result.refined is not None:
        parts.append(_refinement(result.refined))
    if result.finetuned is not None:
        parts.append(_finetuning(result.finetuned))
    return [*parts, _phases(result.phases, result.seconds), _options(plan.options)]


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _fidelity(result: Migration) -> Part:
    plan = result.plan
    matches = {layer["new"]: layer for layer in inspect_plan(plan)["layers"]}
    rows: list[tuple[object, ...]] = []
    for layer in result.layers:
        heads = layer.head_similarity
        if heads is None and "heads" in matches.get(layer.new_layer, {}):
            heads = matches[layer.new_layer]["heads"]["mean_cosine"]
        sizes = ", ".join(f"{role} {size:.3f}" for role, size in layer.update.items()) or "–"
        old = "–" if layer.old_layer is None else layer.old_layer
        figures = (layer.cka, heads, layer.neuron_similarity, layer.explained)
        rows.append((layer.new_layer, old, *map(_number, figures), sizes))
    columns = ("new", "old", "sim.", "heads", "neurons", "expl.", "update")
    caption = (
        "sim.: similarity with the partner; heads, neurons: mean cosine of the matched; expl.: share of distillation's "
        "target reached behind the layer on held-out text; update: its norm over that of the weight"
    )
    svg = ""
    if any(layer.explained is not None for layer in result.layers):
        bars = [(f"layer {x.new_layer}", x.explained, _number(x.explained)) for x in result.layers]
        words = "Share of the target reached behind each fitted layer, on held-out text, before the gain."
        svg = _figure(_bars(bars, words, 1.0), words)
    return Part("Fidelity by layer", svg + f'<div class="fit">{_table(columns, rows, caption)}</div>' if rows else "")


def _spectra(result: Migration) -> Part:
    old, new = migration_spectra(result)
    if not old and not new:
        return Part("Singular values", "<p>The adapters' folders are not there any more.</p>")
    figures = []
    for role in _ROLES:
        series = [
            *(Series(f"old layer {i}", list(enumerate(s, 1)), "b") for (i, r), s in old.items() if r == role),
            *(Series(f"new layer {j}", list(enumerate(s, 1)), "a") for (j, r), s in new.items() if r == role),
        ]
        svg = _lines([_drawn(s) for s in series], f"Singular values of the updates of {role}", "index", role, log=True)
        if svg:
            figures.append(f"<figure>{svg}</figure>")
    caption = "Singular values of the update s·BA of each module, a line for each layer; those of 0 are left out."
    table = _details(
        ("module", "rank", "largest", "norm"),
        [row for name, spectra in (("old", old), ("new", new)) for row in _spectrum_rows(name, spectra)],
        "Singular values by module",
    )
    key = _key(("old", "b"), ("new", "a"))
    return Part("Singular values", f'{key}<div class="panels">{"".join(figures)}</div><p>{escape(caption)}</p>{table}')


def _drawn(series: Series) -> Series:
    """Without what rounding left of singular values that are 0."""
    points = [(float(x), y) for x, y in series.points]
    largest = max((y for _, y in points), default=0.0)
    return Series(series.name, [(x, y) for x, y in points if y > 1e-7 * largest], series.kind)


def _spectrum_rows(side: str, spectra: Spectra) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for (layer, role), values in spectra.items():
        largest = max(values, default=0.0)
        rank = sum(value > 1e-7 * largest for value in values) if largest else 0
        norm = math.sqrt(sum(v * v for v in values))
        rows.append((f"{side} {layer} {role}", rank, f"{largest:.4g}", f"{norm:.4g}"))
    return rows


def _phases(phases: Sequence[Phase], seconds: float | None = None) -> Part:
    if not phases:
        return Part("Time and memory", "")
    longest = max(phase.seconds for phase in phases)
    bars = [(phase.name, phase.seconds, f"{phase.seconds:.2f} s") for phase in phases]
    on_gpu = any(phase.peak_device_memory is not None for phase in phases)
    columns = ("phase", "s", "anon.", "resident", *(["GPU"] if on_gpu else []), "expected")
    rows = []
    for phase in phases:
        sizes = [phase.peak_memory, phase.peak_resident, *([phase.peak_device_memory] if on_gpu else [])]
        rows.append((phase.name, f"{phase.seconds:.2f}", *map(_mib, [*sizes, phase.predicted])))
    total = f"{seconds if seconds is not None else sum(phase.seconds for phase in phases):.1f} s in all. "
    caption = f"{total}Peak memory in MiB: what the process allocated itself, its resident set, and what was expected"
    svg = _figure(_bars(bars, "Seconds of each phase", longest), "Seconds of each phase.")
    return Part("Time and memory", svg + f'<div class="fit">{_table(columns, rows, caption)}</div>')


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.0f}"


_KINDS = {
    "carried": "good",
    "exact": "good",
    "constant shift only": "bad",
    "nothing carried": "bad",
    "nothing": "bad",
    "reversed": "bad",
}
_CONTROLS = {"carried": "new adapter", "shuffled": "shuffled", "flipped": "sign flipped", "constant": "constant shift"}


def _fingerprints(result: Verification | Refinement | Finetuning) -> Part:
    """By which a reader can tell whether a model at hand is the one of the report."""
    rows = {f"{role} model" if role != "model" else role: found or "–" for role, found in result.fingerprints.items()}
    return Part("Fingerprints", _facts(rows) if rows else "")


def _verification_parts(result: Verification) -> list[Part]:
    facts = result.facts
    rows = {
        "old": shown(result.old) + (f" with {shown(result.old_adapter)}" if result.old_adapter else ""),
        "new": shown(result.new) + (f" with {shown(result.new_adapter)}" if result.new_adapter else ""),
        "text": shown(str(result.options["text"])),
        "aligned positions": f"{facts['positions']:,} in {facts['texts']} texts",
        "shared tokens": f"{facts['shared_tokens']:,}",
    }
    parts = [Part("Verdict", _verdict(result.verdict, _KINDS.get(result.kind, "part")) + _facts(rows))]
    if result.effect is not None:
        parts.append(_effect(result.effect))
        parts.append(_changes(result))
    if result.fit is not None:
        parts.append(_fit(result.fit))
    if result.relatives is not None:
        parts.append(_relatives(result.relatives))
    if (bits := result.bits_per_byte) is not None:
        table = _table(
            ("", "alone", "adapted", "gain"),
            [
                ("old", *(_interval(f) for f in (bits.old, bits.old_adapted, bits.old_gain))),
                ("new", *(_interval(f) for f in (bits.new, bits.new_adapted, bits.new_gain))),
            ],
            f"Bits per byte of {bits.examples} labelled examples, with 95 % intervals",
        )
        share = f"<p>Share of the old gain reached: {_interval(bits.gain_share, 2)}</p>" if bits.gain_share else ""
        parts.append(Part("Labelled text", f'<div class="fit">{table}</div>{share}'))
    return parts


def _effect(effect: Effect) -> Part:
    figures = []
    for name, label, tempered in (
        ("cosine", "Cosine with the old change", effect.tempered_cosine),
        ("explained_share", "Explained share of the old change", effect.tempered_share),
        ("kl_share", "KL share", None),
        ("gain_share", "Gain share", None),
    ):
        rows = [(words, getattr(getattr(effect, row), name)) for row, words in _CONTROLS.items()]
        if tempered is not None:
            rows.append(("temperature", tempered))
        if name in effect.content:
            rows.append(("content alone", effect.content[name]))
        svg = _intervals(rows, f"{label} of the new adapter and of its controls")
        figures.append(
            f"<figure>{svg}<figcaption>{escape(label)}, with 95 % intervals over texts</figcaption></figure>"
        )
    rows_ = [
        (
            words,
            *(
                _interval(getattr(getattr(effect, row), name), 2)
                for name in ("cosine", "explained_share", "kl_share", "gain_share")
            ),
        )
        for row, words in _CONTROLS.items()
    ]
    sizes = _facts(
        {
            "KL with and without the adapter, old": f"{_interval(effect.old_kl)} nats",
            "the same, new": f"{_interval(effect.new_kl)} nats",
            "size of the new change over the old": _interval(effect.size_ratio, 2),
            "best size": _interval(effect.best_gain, 2),
            "cosine without constant shift and temperature": _interval(effect.content_cosine),
        }
    )
    table = _details(
        ("", "cosine", "explained", "KL share", "gain share"), rows_, "Likeness to the old change, and that of controls"
    )
    return Part("Effect", f'<div class="panels">{"".join(figures)}</div>{table}{sizes}')


def _changes(result: Verification) -> Part:
    bars = [(f"layer {x.new_layer}", x.cka, _number(x.cka)) for x in result.layers]
    if not bars:
        return Part("Fidelity by layer", "")
    caption = "CKA of the change of the residual stream behind each new layer with that of the old layer most like it."
    rows = [
        (
            layer.new_layer,
            "–" if layer.old_layer is None else layer.old_layer,
            *map(_number, (layer.new_update, layer.old_update, layer.new_change, layer.old_change, layer.cka)),
        )
        for layer in result.layers
    ]
    columns = ("new", "old", "update, new", "old", "change, new", "old", "CKA")
    table = _table(columns, rows, "Updates over the weights' norm; changes over the stream's")
    return Part("Fidelity by layer", _figure(_bars(bars, caption, 1.0), caption) + f'<div class="fit">{table}</div>')


def _fit(fit: BaseFit) -> Part:
    tables = [
        ("embeddings", _number(fit.embedding_r2, 4), _number(fit.embedding_r2_back, 4)),
        ("unembeddings", _number(fit.unembedding_r2, 4), _number(fit.unembedding_r2_back, 4)),
    ]
    words = [
        ("same best token", _number(fit.top1_agreement), _number(fit.top1_shuffled)),
        ("KL, nats", _number(fit.kl), _number(fit.kl_shuffled)),
    ]
    bars = [(f"new {x.new_layer}, old {x.old_layer}", x.r2, _number(x.r2)) for x in fit.layers]
    caption = f"Held-out R² of linear maps from new to old hidden states, {layers_compared(fit)}."
    return Part(
        "Fit of the models",
        _table(("held-out R²", "old to new", "new to old"), tables, "Linear maps between the shared tokens' rows")
        + _table(("", "as they are", "shuffled"), words, "Next token at the aligned positions")
        + _figure(_bars(bars, caption, 1.0), caption),
    )


def _relatives(relatives: dict[str, Any]) -> Part:
    rows = [(kind, f"{distance:.2%}") for kind, distance in relatives.get("distances", {}).items()]
    table = _table(("module", "distance"), rows, "Distance of the weights from the old ones, relative to their size")
    return Part("Relatives", f"<p>{escape(relatives['sentence'])}</p>" + (table if rows else ""))


def _refinement(result: Refinement) -> Part:
    evaluations = result.evaluations
    agreement = [Series("agreement", [(float(e.step), e.agreement) for e in evaluations])]
    svg = _lines(
        agreement,
        "Agreement with the old adapter on held-out text over steps",
        "step",
        "agreement",
        mark=result.chosen_step,
    )
    losses = [
        Series("KL", [(float(e.step), e.kl) for e in evaluations if e.kl is not None]),
        Series("next token", [(float(e.step), e.next_token) for e in evaluations if e.next_token is not None], "b"),
    ]
    lost = _lines(losses, "Mean losses between evaluations", "step", "nats")
    kind = "bad" if result.agreement <= 0 else "part" if result.kept_start else "good"
    facts = {
        "text": shown(result.text),
        "held-out texts": result.held_out_texts,
        "steps": f"{result.steps} of {result.budget}, stopped by {result.stopped}",
        "tokens trained on": f"{result.trained_tokens:,}",
        "trainable parameters": f"{result.trainable_parameters:,}",
        "shared tokens kept of a target": f"{result.teacher.k:,} of {result.teacher.shared:,}",
    }
    table = _details(
        ("step", "agreement", "KL", "next token", "retained text"),
        ((e.step, *map(_number, (e.agreement, e.kl, e.next_token, e.retained_kl))) for e in evaluations),
        "Evaluations on held-out text",
    )
    first = _figure(svg, "Agreement on held-out text: 1 is the target itself, 0 the bare new model.", table)
    second = f"<figure>{lost}{_key(('KL', 'a'), ('next token', 'b'))}</figure>" if lost else ""
    body = _verdict(result.summary, kind) + _facts(facts) + f'<div class="panels">{first}{second}</div>'
    return Part("Refinement", body)


def _finetuning(result: Finetuning) -> Part:
    losses = Series("training", [(float(n), loss) for n, loss in enumerate(result.losses, 1)])
    held_out = Series("validation", [(float(e.step), e.loss) for e in result.evaluations], "b")
    mark = result.chosen_step if result.evaluations else -1
    svg = _lines([losses, held_out], "Loss over steps", "step", "nats a token", mark=mark)
    facts = {
        "started from": "a new adapter" if result.adapter is None else shown(result.adapter),
        "samples": f"{result.samples:,}, and {result.validation_samples:,} for validation",
        "cut off": f"{result.truncated:,}",
        "left out": f"{result.left_out:,}",
        "tokens trained on": f"{result.trained_tokens:,}",
        "trainable parameters": f"{result.trainable_parameters:,}",
    }
    if result.retained_kl is not None:
        facts["distance from the bare model on the text to retain"] = (
            f"{_number(result.start_retained_kl)} nats before, {_number(result.retained_kl)} in the last third"
        )
    key = _key(("training", "a"), *([("validation", "b")] if result.evaluations else []))
    table = _details(
        ("step", "loss"),
        [(n, _number(loss, 4)) for n, loss in enumerate(result.losses, 1)],
        "Training loss by step",
    )
    kind = "bad" if result.diverged else "part" if result.kept_start else "good"
    picture = f"<figure>{svg}{key}<figcaption>Loss of each step before its update.</figcaption>{table}</figure>"
    return Part("Fine-tuning", _verdict(result.summary, kind) + _facts(facts) + (picture if svg else ""))


_STYLE = """
.lsf{--ink:#1b1f24;--paper:#fff;--soft:#f3f5f7;--rule:#d0d7de;--dim:#57606a;--a:#0b5cad;--b:#b3470b;--on:#fff;
--good:#116329;--part:#7d4e00;--bad:#a40e26;color:var(--ink);background:var(--paper);line-height:1.5;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;font-size:16px}
@media (prefers-color-scheme:dark){.lsf{--ink:#e6edf3;--paper:#0d1117;--soft:#161b22;--rule:#3d444d;--dim:#9aa4af;
--a:#6cb6ff;--b:#ff9d5c;--on:#0d1117;--good:#57d272;--part:#e3b341;--bad:#ff8a80}}
.lsf *{box-sizing:border-box}
.lsf h1{font-size:1.5rem;line-height:1.25;margin:0 0 .75rem;overflow-wrap:anywhere}
.lsf h2{font-size:1.15rem;margin:2rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--rule)}
.lsf p{max-width:44rem}
.lsf svg{display:block;width:100%;max-width:560px;height:auto}
.lsf .key svg{display:inline-block;width:30px;height:8px;vertical-align:middle}
.lsf svg text{fill:var(--ink);font-size:11px;font-family:inherit}
.lsf svg .value{font-size:10px}.lsf svg .value.on{fill:var(--on)}
.lsf .plus{fill:var(--a)}.lsf .minus{fill:var(--b)}.lsf .none{fill:none;stroke:var(--rule);stroke-dasharray:2 2}
.lsf .path{fill:none;stroke:var(--b);stroke-linejoin:round}
.lsf .chosen{fill:none;stroke:var(--b)}
.lsf line.grid{stroke:var(--rule);stroke-width:.5}
.lsf line.mark{stroke:var(--b);stroke-width:1;stroke-dasharray:3 2}
.lsf .line{fill:none;stroke-width:1.5}.lsf .line.a{stroke:var(--a)}.lsf .line.b{stroke:var(--b);stroke-dasharray:4 3}
.lsf .dot.a{fill:var(--a)}.lsf .dot.b{fill:var(--b)}
.lsf .bar{fill:var(--a)}.lsf .track{fill:var(--soft)}
.lsf figure{margin:0 0 1rem}
.lsf figcaption,.lsf caption{color:var(--dim);font-size:.875rem;text-align:left;max-width:44rem;padding:.25rem 0}
.lsf .panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 1.5rem}
.lsf table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;margin:.5rem 0 1rem;
color:inherit}
.lsf td,.lsf th{padding:.2rem .6rem .2rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule);
overflow-wrap:anywhere;background:none;font-weight:400}
.lsf thead th{font-weight:600}.lsf th,.lsf .fit td{overflow-wrap:normal}
.lsf .wide{overflow-x:auto;max-width:100%}.lsf .wide th,.lsf .wide td{overflow-wrap:normal}
.lsf dl{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:.4rem 1.5rem;margin:.5rem 0 1rem}
.lsf dt{color:var(--dim);font-size:.8125rem}.lsf dd{margin:0;overflow-wrap:anywhere}
.lsf .verdict{border-left:4px solid;padding:.4rem .8rem;background:var(--soft)}
.lsf .good{border-color:var(--good)}.lsf .part{border-color:var(--part)}.lsf .bad{border-color:var(--bad)}
.lsf .key{list-style:none;padding:0;margin:.25rem 0;display:flex;gap:1.25rem;font-size:.875rem}
.lsf summary{cursor:pointer;color:var(--a);font-size:.875rem}
.lsf a{color:var(--a)}
.lsf :focus-visible{outline:2px solid var(--b);outline-offset:2px}
"""
_PAGE_STYLE = """
html{background:#fff}@media (prefers-color-scheme:dark){html{background:#0d1117}}
body{margin:0}.lsf{max-width:60rem;margin:0 auto;padding:1.25rem 1rem 3rem}
.lsf nav ul{list-style:none;padding:0;margin:0 0 1rem;display:flex;flex-wrap:wrap;gap:.25rem 1rem}
.lsf main:focus{outline:none}
.skip{position:absolute;left:-999rem}.skip:focus{left:1rem;top:.5rem;background:#fff;color:#0b5cad;padding:.3rem .6rem}
footer{margin-top:2rem;font-size:.8125rem;color:var(--dim)}
@media (max-width:30rem){.lsf .fit td,.lsf .fit th{padding-right:.35rem;font-size:.78rem}}
@media print{.lsf{--ink:#000;--paper:#fff;--soft:#eee;--rule:#bbb;--dim:#333;--a:#0b5cad;--b:#b3470b;--on:#fff;
--good:#116329;--part:#7d4e00;--bad:#a40e26;max-width:none;padding:0;font-size:11pt}
html{background:#fff}.lsf svg{max-width:420px}.lsf nav,.skip,.lsf details:not([open]){display:none}
.lsf figure,.lsf tr,.lsf .verdict{break-inside:avoid}.lsf h2{break-after:avoid}
.lsf *{print-color-adjust:exact;-webkit-print-color-adjust:exact}@page{margin:15mm}}
"""
