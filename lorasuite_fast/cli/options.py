"""The options and arguments of the commands: names, help and types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..config.fields import OUTPUT

OldArgument = Annotated[str, typer.Argument(metavar="OLD", help="Model the adapter was trained on: folder or hub id.")]


NewArgument = Annotated[str, typer.Argument(metavar="NEW", help="Model to carry it to: folder or hub id.")]


AdapterArgument = Annotated[Path, typer.Argument(metavar="ADAPTER", help="PEFT LoRA folder.")]


PlanArgument = Annotated[
    Path,
    typer.Argument(metavar="PLAN", help="File `lorasuite-fast plan` wrote, or a folder or hub id of a saved plan."),
]


OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="PEFT LoRA folder to write.")]


def option(panel: str, metavar: str | None, help: str, *names: str, **settings: Any) -> Any:
    """An option whose help is one line on a terminal of 100 columns; defaults stand in the help."""
    shown = escape(help)
    return typer.Option(*names, metavar=metavar, help=shown, rich_help_panel=panel, show_default=False, **settings)


Overwrite = Annotated[bool, option(OUTPUT, None, "Replace what exists, once the new one is complete", "--overwrite")]


AsJson = Annotated[bool, option(OUTPUT, None, "Print one JSON object instead of tables", "--json")]
