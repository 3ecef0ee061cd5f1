"""The command that verifies."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from ..config import Runtime, VerifyConfig
from ..errors import LoraSuiteError
from .app import app
from .commands import check_models
from .given import Given, flags, options_of
from .given_paths import check_file, check_folder
from .options import AsJson
from .running import checks, running
from .tables import phase_table, print_written


@app.command()
@options_of(
    flags(VerifyConfig, "text", "labelled", "examples", "max_tokens", "seed"),
    flags(Runtime, "device", "dtype", "trust_remote_code", report_file="report"),
)
def verify(
    given: Given,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="OLD [OLD_ADAPTER] NEW [NEW_ADAPTER]",
            help="Two models, or each with its adapter.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Tell what a migrated adapter still does, or of two base models whether a migration will carry.

    Example: lorasuite-fast verify old-model my-adapter new-model my-adapter-new --text domain.txt

    Before a migration: lorasuite-fast verify old-model new-model

    Exit code 0 whatever the verdict.
    """
    with checks():
        if len(models) not in (2, 4):
            raise LoraSuiteError(
                f"verify takes OLD NEW, or OLD OLD_ADAPTER NEW NEW_ADAPTER; {len(models)} arguments were given"
            )
        old, old_adapter, new, new_adapter = models if len(models) == 4 else (models[0], None, models[1], None)
        check_models(old, new)
        for what, folder in (("OLD_ADAPTER", old_adapter), ("NEW_ADAPTER", new_adapter)):
            if folder is not None:
                check_folder(what, folder)
        config, runtime = given.make(VerifyConfig), given.make(Runtime)
        check_file("--text", config.text)
        check_file("--labelled", config.labelled)
    with running(as_json) as report:
        from ..pipeline.verify import verify as run

        result = run(old, old_adapter, new, new_adapter, config=config, runtime=replace(runtime, progress=report))
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
    from ..reporting.verification_tables import print_verification

    console = Console()
    print_verification(console, result)
    console.print(phase_table(result.phases))
    print_written(console, runtime.report)
