"""What strangers write stands in cards, reports and on terminals as text, and does nothing there."""

from __future__ import annotations

import ast
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from rich.console import Console

from lorasuite_fast.io.artifacts import PROVENANCE
from lorasuite_fast.reporting.escaping import (
    code_span,
    html_text,
    markdown,
    paragraph,
    printable,
    python_literal,
    terminal,
)
from lorasuite_fast.reporting.model_card import card_files, model_card
from lorasuite_fast.reporting.provenance import Step

EVIL = [
    "<script>alert(1)</script>",
    "<!-- lorasuite-fast: end -->",
    "![x](https://evil.example/x.png)",
    "[click](javascript:alert(1))",
    "https://evil.example www.evil.example",
    "a | b | c",
    "`code` ``` more",
    "```\n# Heading\n\n- list",
    "# Heading",
    "1. list",
    "- list",
    "=====",
    "> quote",
    "**bold** _it_ ~~gone~~ $x$",
    "&lt;b&gt; &#60;b&#62;",
    "back\\slash\\",
    '"); import os; os.system("true") #',
    "'''\nimport os\n'''",
    "---\nbase_model: evil\n---",
    "[red]red[/red] [link=https://evil.example]x[/link] [/]",
    "\x1b]0;title\x07\x1b[31m\x00 \u202egnp.exe \u2028 \ud800",
]
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
INERT = {"text", "text_special", "softbreak"}


def tokens(text: str) -> list[Any]:
    found = []
    for token in MARKDOWN.parse(text):
        found += [token, *(token.children or [])]
    return found


@pytest.mark.parametrize("evil", EVIL)
def test_markdown_shows_the_text_and_nothing_else(evil: str) -> None:
    for wrapped in (paragraph(evil), f"before {markdown(evil)} after", f"before {markdown(evil)}"):
        blocks = MARKDOWN.parse(wrapped)
        assert [block.type for block in blocks] == ["paragraph_open", "inline", "paragraph_close"]
        inline = blocks[1].children
        assert {token.type for token in inline} <= INERT
        shown = "".join(token.content for token in inline)
        assert " ".join(printable(evil).split()) in shown


@pytest.mark.parametrize("evil", EVIL)
def test_a_cell_stays_one_cell(evil: str) -> None:
    table = f"| a | b |\n|---|---|\n| {markdown(evil)} | end |\n"
    found = tokens(table)
    assert [token.type for token in found].count("td_open") == 2
    assert {token.type for token in found if token.level and token.type not in INERT} <= {
        *(f"{part}_{end}" for part in ("thead", "tbody", "tr", "th", "td") for end in ("open", "close")),
        "inline",
    }


@pytest.mark.parametrize("evil", EVIL)
def test_code_and_literals_hold_the_text(evil: str) -> None:
    (_, inline, _) = MARKDOWN.parse(f"the folder {code_span(evil)}, so")
    assert [token.type for token in inline.children] == ["text", "code_inline", "text"]
    literal = python_literal(evil)
    assert "\n" not in literal
    assert ast.literal_eval(literal) == printable(evil)


@pytest.mark.parametrize("evil", EVIL)
def test_html_holds_the_text(evil: str) -> None:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.text = ""

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.append(tag)
            self.text += dict(attrs).get("title", "")

        def handle_data(self, data: str) -> None:
            self.text += data

    reader = Reader()
    reader.feed(f'<p title="{html_text(evil)}">{html_text(evil)}</p>')
    reader.close()
    assert reader.tags == ["p"]
    assert reader.text == printable(evil) * 2
    assert html_text(evil).isprintable()


@pytest.mark.parametrize("evil", EVIL)
def test_a_terminal_shows_the_text(evil: str) -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=500).print(f"[bold]{terminal(evil)}[/bold]", highlight=False)
    assert out.getvalue() == f"\x1b[1m{printable(evil)}\x1b[0m\n"


@pytest.mark.parametrize("evil", EVIL)
def test_a_card_is_inert_wherever_foreign_text_stands(evil: str, tmp_path: Path) -> None:
    """A step of a start's data in which every text is foreign, and a model of that name."""
    step = {
        "step": evil, "outcome": evil, "config": {evil: [evil]}, "versions": {evil: evil}, "fingerprints": {evil: evil},
        "figures": {evil: evil}, "layers": [[evil, "b"], [evil, evil]], "warning": True,
    }  # fmt: skip
    record = {"format": "lorasuite-fast provenance", "version": 1, "steps": [step]}
    (tmp_path / PROVENANCE).write_text(json.dumps(record))
    files = card_files(evil, Step("migration", evil, figures={"method": evil}), tmp_path)
    text = files["README.md"].decode()
    head, _, body = text[4:].partition("\n---\n")
    assert set(yaml.safe_load(head)) == {"library_name", "pipeline_tag", "tags"}
    found = tokens(body)
    steps = [Step("a", "b", figures={"c": "d"}, layers=[["a", "b"], ["c", "d"]], warning=True), Step("a", "b")]
    plain = tokens(model_card("plain", steps).decode()[4:].partition("\n---\n")[2])
    kinds = {token.type for token in found}
    assert kinds <= {token.type for token in plain} | INERT
    assert not {"link_open", "image", "html_inline"} & kinds
    comments = [token.content.strip() for token in found if token.type == "html_block"]
    assert comments == [token.content.strip() for token in plain if token.type == "html_block"]
    (code,) = [token.content for token in found if token.type == "fence"]
    assert len(ast.parse(code).body) == 4
    title = next(token.content for token in found if token.type == "inline" and token.level == 1)
    assert title.startswith("LoRA adapter")
    headings = [token for token in found if token.type == "heading_open"]
    assert len(headings) == len([token for token in plain if token.type == "heading_open"])
    assert len(json.loads(files[PROVENANCE])["steps"]) == 2
    assert all(line.isprintable() for line in text.splitlines())
