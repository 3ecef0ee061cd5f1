"""What the site holds that is written elsewhere: the commands' help, the measurements, the changelog."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "bench/reports"


def on_files(files: Files, config: Any) -> Files:
    """Adds every report of bench/reports, a page that lists them, and the changelog."""
    rows = []
    for path in sorted(REPORTS.iterdir()):
        if path.suffix in (".md", ".png", ".json"):
            files.append(File.generated(config, f"reports/{path.name}", abs_src_path=str(path)))
        if path.suffix == ".md":
            title = path.read_text("utf-8").splitlines()[0].removeprefix("# ")
            rows.append(f"- [{title}]({path.name})")
    index = (
        "# Measurements\n\nAs `bench/` wrote them. Every figure of this site and the README is from one of these, but "
        "for the table of the demo's bits per byte, which `make demo` prints.\n\n"
    )
    files.append(File.generated(config, "reports/index.md", content=index + "\n".join(rows) + "\n"))
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts what `lorasuite-fast COMMAND --help` prints in the place of `{{ help COMMAND }}`."""

    def help_of(match: re.Match[str]) -> str:
        from typer.testing import CliRunner

        from lorasuite_fast.cli.app import app

        shown = CliRunner(env={"COLUMNS": "82", "NO_COLOR": "1"}).invoke(app, [match[1], "--help"])
        return f"```output\n{shown.stdout.strip()}\n```"

    return re.sub(r"\{\{ help (\w+) \}\}", help_of, markdown)
