"""The command that checks whether an adapter does anything."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..config import Runtime
from ..reporting.escaping import printable, terminal
from .app import app
from .given import Given, flags, options_of
from .given_paths import check_folder
from .options import AdapterArgument, AsJson
from .running import checks, running

if TYPE_CHECKING:
    from ..adapters.readers import AdapterCheck


@app.command()
@options_of(flags(Runtime, "trust_remote_code"))
def check(
    given: Given,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model to use it on: folder or hub id.")],
    adapter: AdapterArgument,
    as_json: AsJson = False,
) -> None:
    """Tell what PEFT, vLLM, llama.cpp and SGLang would do with an adapter. No weight is read.

    Example: lorasuite-fast check new-model my-adapter-new

    Exit code 1 if PEFT would lose a tensor, or no module would be active.
    """
    with checks():
        check_folder("MODEL", model)
        check_folder("ADAPTER", adapter, hub=False)
        runtime = given.make(Runtime)
    with running(as_json) as report:
        from ..pipeline.check import check as run

        result = run(model, adapter, runtime=replace(runtime, progress=report))
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    else:
        print_check(Console(), result)
    if not result.fine:
        raise typer.Exit(1)


def print_check(console: Console, result: AdapterCheck) -> None:
    """Active modules and lost tensors by program, then what each refuses, ignores and loses."""

    def line(text: str, style: str | None = None) -> None:
        console.print(printable(text), style=style, highlight=False, markup=False, soft_wrap=True)

    table = Table(title=terminal(f"{result.modules} modules in {result.adapter}"), title_justify="left")
    table.add_column("program")
    for name in ("active modules", "tensors not read"):
        table.add_column(name, justify="right")
    for reader in result.readers:
        table.add_row(reader.name, "refused" if reader.refused else str(reader.active), str(reader.lost))
    console.print(table)
    for reader in result.readers:
        if reader.refused:
            line(f"{reader.name} refuses the adapter: {reader.refused}", "red")
        elif reader.lost:
            line(f"{reader.name} does not read {_names(reader.lost_keys, reader.lost)}", "yellow")
        for note in reader.notes:
            line(f"{reader.name}: {note}", "dim")
    if result.unread:
        line(f"none of them reads {_names(result.unread_keys, result.unread)}", "red")
    verdict = "PEFT reads every tensor" if result.fine else "PEFT does not read this adapter whole"
    line(verdict, "green" if result.fine else "red")


def _names(keys: tuple[str, ...], count: int) -> str:
    shown = ", ".join(keys[:3])
    return shown if count <= 3 else f"{shown} and {count - 3} more"
