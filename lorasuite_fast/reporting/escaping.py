"""Text of foreign origin, made harmless for the place it is to stand in: Markdown, HTML, Python, a terminal."""

from __future__ import annotations

import html
import json
import re

_MARKDOWN = re.compile(r"[\\`*_\[\]<>|&~$]")
_LINE_START = re.compile(r"^(?:[#+=-]|\d+(?=[.)]))")
_LINKS = re.compile(r"(?<=[a-zA-Z]):(?=//)|(?<=mailto):|(?<=www)\.", re.IGNORECASE)


def printable(text: object) -> str:
    """On one line, with control characters, marks of writing direction and lone surrogates spelt out."""
    line = re.sub(r"\s", " ", str(text))
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def markdown(text: object) -> str:
    """Plain text within Markdown: no markup, no HTML, no link, no cell of a table and no block begins or ends in it."""
    line = _MARKDOWN.sub(lambda found: f"\\{found[0]}", " ".join(printable(text).split()))
    return _LINKS.sub(lambda found: f"\\{found[0]}", line)


def paragraph(text: object) -> str:
    """Plain text that begins a line of Markdown, where a number or a sign can begin a list or a heading."""
    line = markdown(text)
    if (start := _LINE_START.match(line)) is not None:
        cut = start.end() if start[0].isdigit() else 0
        line = f"{line[:cut]}\\{line[cut:]}"
    return line


def code_span(text: object) -> str:
    """Literal text between backticks, as many as it takes."""
    line = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def python_literal(text: object) -> str:
    """A string literal of Python, on one line and in double quotes."""
    return json.dumps(printable(text), ensure_ascii=False)


def html_text(text: object) -> str:
    """Text or an attribute's value in HTML."""
    return html.escape(printable(text))


def terminal(text: object) -> str:
    """Text within rich's markup."""
    from rich.markup import escape

    line = printable(text)
    rest = line.rstrip("\\")
    # A backslash before a bracket of ours would take its meaning away.
    return escape(rest) + 2 * line[len(rest) :]
