"""The command that verifies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import LoraSuiteError
from .app import app
from .commands import check_models, checks
from .given_paths import check_file, check_folder
from .options import TEXT, AsJson, Device, Dtype, RemoteCode, Report, option
from .running import running
from .tables import phase_table, print_written


@app.command()
def verify(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="OLD [OLD_ADAPTER] NEW [NEW_ADAPTER]",
            help="Two models, or each with its adapter.",
        ),
    ],
    text: Annotated[
        Path | None,
        option(TEXT, "FILE", "Unlabelled, best of the domain: .jsonl, .txt [shipped]"),
    ] = None,
    labelled: Annotated[
        Path | None,
        option(TEXT, "FILE", "Adds bits per byte: .jsonl, `text` or `prompt`, `completion`"),
    ] = None,
    examples: Annotated[int, option(TEXT, "N", "Examples to read of either file [64]", min=4)] = 64,
    max_tokens: Annotated[int, option(TEXT, "N", "Tokens each model reads of an example [256]", min=2)] = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, option(TEXT, "N", "Of the examples, the shuffles and the bootstrap [0]")] = 0,
    trust_remote_code: RemoteCode = False,
    report_file: Report = None,
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
        check_file("--text", text)
        check_file("--labelled", labelled)
    with running(as_json) as report:
        from ..pipeline.verify import verify as run

        result = run(
            old,
            old_adapter,
            new,
            new_adapter,
            text=text,
            labelled=labelled,
            examples=examples,
            max_tokens=max_tokens,
            device=device,
            dtype=dtype,
            seed=seed,
            trust_remote_code=trust_remote_code,
            report=report_file,
            progress=report,
        )
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
    from ..reporting.verification_tables import print_verification

    console = Console()
    print_verification(console, result)
    console.print(phase_table(result.phases))
    print_written(console, report_file)
