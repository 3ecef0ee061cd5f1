"""The command line: one command for each thing lorasuite-fast does."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .._version import __version__
from ..errors import one_line
from ..interrupts import INTERRUPTED, interrupts
from .app import app
from .given_paths import check_file, check_folder, same_model
from .options import (
    AsJson,
    PlanArgument,
)
from .running import MEMORY_WORDS, OUT_OF_MEMORY, checks, complain, running
from .tables import (
    measure_name,
    print_diagnosis,
    print_transfer,
)

if TYPE_CHECKING:
    from ..config import PlanConfig
    from ..pipeline.plan import TransferPlan
    from .given import Given

UNEXPECTED = 70
"""Exit code of an error nobody has foreseen, a fault of this program."""
_DEBUG = "--debug"


def check_models(old: str, new: str) -> None:
    check_folder("OLD model", old)
    check_folder("NEW model", new)
    if same_model(old, new):
        typer.echo(f"note: OLD and NEW are the same model, {one_line(old)}", err=True)


def check_data(what: str, data: str | None) -> None:
    """Labelled data may be a file, a folder or the id of a data set on the hub, which has no such ending."""
    if data is not None and Path(data).suffix in (".json", ".jsonl", ".txt"):
        check_file(what, data)


def check_method(given: Given, plan: PlanConfig) -> None:
    """Options of `migrate` and `plan` that go with some methods alone; what `auto` takes is not known yet."""
    given.only_for(plan.method != "distill", "the methods lstsq and paper; leave it out", "heads")
    fitted = "a fitted transfer matrix; leave it out, or pass --transfer embedding"
    given.only_for(plan.transfer == "embedding", fitted, "ridge")


def check_fill(given: Given, fill: str) -> None:
    given.only_for(fill == "nearest", "--fill nearest; give both", "fill_share")


def check_distils(given: Given, loaded: TransferPlan) -> None:
    """Options of `apply` that only a plan by distillation uses."""
    method = loaded.options["method"]
    purpose = f"plans whose method is distill; this one's is {method}, leave it out"
    given.only_for(method == "distill", purpose, "memory", "dtype")


@app.command()
def inspect(
    plan_file: PlanArgument,
    as_json: AsJson = False,
) -> None:
    """Show what is in a plan: models, layers, matches, fit, options and sizes. Neither model is opened.

    Example: lorasuite-fast inspect old-to-new.plan.safetensors
    """
    with checks():
        if "/" not in str(plan_file) or Path(plan_file).suffix:
            check_file("PLAN", plan_file)
    with running(as_json=True):
        from ..pipeline.plan import TransferPlan
        from ..reporting.inspection import inspect_plan, print_plan

        loaded = TransferPlan.from_pretrained(plan_file)
        if as_json:
            typer.echo(json.dumps(inspect_plan(loaded) | {"plan": str(plan_file)}))
            return
        console = Console()
        print_plan(console, loaded, measure_name(loaded))
        print_transfer(console, loaded)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices, how kernels run here, free memory and disk, and what to do about gaps.

    Example: lorasuite-fast doctor

    Exit code 1 if something needed is missing.
    """
    from .doctor import examine

    found = examine()
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    else:
        print_diagnosis(Console(), found)
    if found.problems:
        raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lorasuite-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show the traceback of an unexpected error.")] = False,
) -> None:
    pass


def _unexpected(error: Exception, debug: bool) -> str:
    """One line about an error nobody has foreseen, whatever it says of itself."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    hint = (
        "please report it with the lines above" if debug else f"run it again with {_DEBUG} to see where, and report it"
    )
    return f"unexpected {one_line(what)}; OUT is what it was, or complete; {hint}"


def main(arguments: list[str] | None = None) -> Any:
    """Entry point of the console script: whatever is raised ends in one line and an exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = _DEBUG in given
    with interrupts():
        try:
            return app(args=[argument for argument in given if argument != _DEBUG])
        except SystemExit as end:
            if end.code == INTERRUPTED:
                raise KeyboardInterrupt from None
            raise
        except Exception as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                # What goes wrong on the way out is the interruption's doing.
                raise KeyboardInterrupt from None
            if debug:
                traceback.print_exc()
            # torch has a class of its own for GPUs alone, and what is imported late may not find room.
            late = isinstance(error, RuntimeError | ImportError)
            if isinstance(error, MemoryError) or (late and any(words in str(error).lower() for words in MEMORY_WORDS)):
                complain(OUT_OF_MEMORY)
                raise SystemExit(2) from None
            complain(_unexpected(error, debug))
            raise SystemExit(UNEXPECTED) from None
