"""Draws the README's picture from the committed reports: how much of an adapter arrives, for a relative and a stranger.

python bench/picture.py          # writes docs/pictures/arrives.svg
"""

from __future__ import annotations

import re
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "bench/reports"
PICTURE = ROOT / "docs/pictures/arrives.svg"
RUNGS = {
    "150 steps at 1e-3": "A near relative: the old model trained on, share of the adapter's gain",
    "600 steps at 2e-3": "A far relative: trained on until its weights are 54 % apart",
}
WIDTH, BAR, LEFT, RIGHT = 760, 20, 250, 60


def relative_share(rung: str, candidate: str) -> float:
    """Share of the adapter's gain that a candidate keeps on a relative, in percent, from `kinship.md`."""
    found = re.search(
        rf"^\| {re.escape(rung)} \| {re.escape(candidate)} \|[^|]*\|[^|]*\| (-?[\d.]+)% \|$",
        _text("kinship.md"),
        re.MULTILINE,
    )
    if found is None:
        raise LookupError(f"kinship.md: no share of {candidate} on {rung}; run bench/kinship.py")
    return float(found[1])


def chosen(rung: str) -> str:
    """The candidate that `auto` takes on a relative."""
    row = next(line for line in _text("kinship.md").splitlines() if line.startswith(f"| {rung} | "))
    return row.split(" | ")[-2]


def stranger_share(row: str) -> float:
    """Share of LoRA(full)'s gain on the demo pair, in percent, from the table of `quality.md`."""
    found = re.search(rf"^\| {re.escape(row)} \| (-?[\d.]+)", _text("quality.md"), re.MULTILINE)
    if found is None:
        raise LookupError(f"quality.md: no row {row}; run bench/quality.py")
    return float(found[1])


def _text(name: str) -> str:
    return (REPORTS / name).read_text("utf-8")


def bars() -> list[tuple[str, list[tuple[str, float]]]]:
    """Groups of bars: a title, and labels with percentages."""
    groups = []
    for rung, title in RUNGS.items():
        ways = {"folder copied": "copy", "least squares": "lstsq", "distilled": "distill"}
        ways |= {"migrate (measures, takes the best)": chosen(rung)}
        rows = [(label, relative_share(rung, candidate)) for label, candidate in ways.items()]
        groups.append((title, [("new model alone", 0.0), *rows]))
    stranger = [
        ("new model alone", 0.0),
        ("Eq. (3) of LoRASuite", stranger_share("paper, Eq. (3)")),
        ("migrate (distilled, no labels)", stranger_share("distilled, sequential, self-written")),
        ("refined, no labels", stranger_share("refined, self-written")),
        ("LoRA on 100 labelled samples", stranger_share("100 samples from nothing, LoRA(100)")),
        ("refined, then 100 samples", stranger_share("100 samples from refined, self-written")),
        ("LoRA(full): all labelled samples", 100.0),
    ]
    return [*groups, ("A stranger: a model trained on its own, share of LoRA(full)'s gain", stranger)]


def svg() -> str:
    """The picture; one text for the same reports."""
    parts, y = [], 26
    for title, rows in bars():
        parts.append(f'<text x="8" y="{y}" class="t">{escape(title)}</text>')
        y += 12
        for label, share in rows:
            width = max(0.0, share) / 100 * (WIDTH - LEFT - RIGHT)
            kind = "ours" if label.startswith(("migrate", "refined")) else "other"
            parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" class="l">{escape(label)}</text>')
            parts.append(
                f'<rect x="{LEFT}" y="{y + 2}" width="{max(1.0, width):.1f}" height="{BAR - 4}" class="{kind}"/>'
            )
            parts.append(f'<text x="{LEFT + width + 6:.1f}" y="{y + 15}" class="v">{share:.0f} %</text>')
            y += BAR + 2
        y += 30
    style = (
        "text{font:13px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600}.l{text-anchor:end}"
        ".ours{fill:#0b5cad}.other{fill:#8c959f}"
        "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.ours{fill:#58a6ff}.other{fill:#6e7681}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - 18}" role="img" '
        f'aria-label="How much of an adapter arrives"><style>{style}</style>' + "".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg(), "utf-8")
    print(PICTURE.relative_to(ROOT))
