"""The commands that train: refine and finetune."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..config import FinetuneConfig, RefineConfig, Runtime
from ..errors import LoraSuiteError
from ..reporting.escaping import printable
from .app import app
from .commands import check_data, check_models
from .given import Given, flags, options_of
from .given_paths import check_file, check_folder
from .options import AsJson, NewArgument, OldArgument, OutArgument, Overwrite
from .running import DIVERGED, checks, joined_ranks, running, say
from .tables import percent, phase_table, print_finetuned, print_written

_MOST_TEMPLATE = 1 << 20


@app.command()
@options_of(
    flags(
        RefineConfig, "text", "text_bytes", "steps", "learning_rate", "rank", "roles", "imitation", "kl_weight",
        "next_token_weight", "retain", "retain_weight", "batch_bytes", "top_k", "eval_every", "patience", "seed",
        "gradient_checkpointing", "cache",
    ),
    flags(
        Runtime, "device", "dtype", "memory", "trust_remote_code", report_file="report",
        help={"dtype": "float32, bfloat16 or float64 [auto: bfloat16 on a GPU]"},
    ),
)  # fmt: skip
def refine(
    given: Given,
    old: OldArgument,
    old_adapter: Annotated[str, typer.Argument(metavar="OLD_ADAPTER", help="PEFT LoRA folder trained on OLD.")],
    new: NewArgument,
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="PEFT LoRA folder for NEW to start from, or `none`.")
    ],
    out: OutArgument,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter of NEW, without labels, to do what OLD_ADAPTER does on OLD.

    Interrupted, the same command goes on from its last checkpoint.

    Example: lorasuite-fast refine old-model my-adapter new-model my-adapter-new my-adapter-refined
    """
    with checks():
        check_models(old, new)
        check_folder("OLD_ADAPTER", old_adapter)
        if adapter != "none":
            check_folder("ADAPTER", adapter)
        config, runtime = given.make(RefineConfig), given.make(Runtime)
        check_file("--text", _path(config.text), "self")
        check_file("--retain", config.retain, "shipped")
        written = config.text is None or str(config.text) == "self"
        given.only_for(written, "text the old model writes; leave out --text, or this", "text_bytes")
        given.only_for(config.retain is not None, "--retain; give both", "retain_weight")
    with running(as_json) as report, joined_ranks() as ranks:
        from ..pipeline.refine import refine as run

        result = run(
            old,
            old_adapter,
            new,
            None if adapter == "none" else adapter,
            out,
            config=config,
            runtime=replace(runtime, progress=report if ranks.first else None, say=say),
            overwrite=overwrite,
        )
    if not ranks.first:
        return
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    else:
        _print_refined(result, runtime.report)


def _path(text: Any) -> Any:
    """A text that is a file, None where it is texts."""
    return text if isinstance(text, str | Path) else None


def _print_refined(result: Any, report_file: Any) -> None:
    console = Console()
    table = Table(title="Evaluations on held-out text", title_justify="left")
    for name in ("step", "agreement", "KL, nats", "next token, nats", "retained text, nats"):
        table.add_column(name, justify="right")
    for e in result.evaluations:
        table.add_row(str(e.step), f"{e.agreement:.3f}", percent(e.kl), percent(e.next_token), percent(e.retained_kl))
    console.print(table)
    console.print(phase_table(result.phases))
    facts = result.teacher
    console.print(
        f"targets: {facts.k:,} of {facts.shared:,} shared tokens kept at {facts.positions:,} positions; the rest holds "
        f"{facts.rest:.2%} of the mass, and merging it loses {facts.as_dict()['truncation']:.2%} of the divergence",
        highlight=False,
        soft_wrap=True,
    )
    console.print(printable(result.summary), highlight=False, markup=False, soft_wrap=True)
    print_written(console, report_file, result.out)


@app.command()
@options_of(
    flags(
        FinetuneConfig, "epochs", "steps", "batch", "micro_batch", "learning_rate", "max_tokens", "template",
        "completion_only", "validation", "rank", "alpha", "dropout", "roles", "save_every", "retain", "retain_weight",
        "seed", "gradient_checkpointing",
    ),
    flags(
        Runtime, "device", "dtype", "trust_remote_code", report_file="report",
        help={"dtype": "Of the base model [bfloat16 on a GPU, else float32]"},
    ),
)  # fmt: skip
def finetune(
    given: Given,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model of the adapter: folder or hub id.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="PEFT folder to start from, or `none`: from zero.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Labelled: .json, .jsonl, .txt, `datasets` folder or hub id.",
        ),
    ],
    out: OutArgument,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter of MODEL on labelled data, from the factors it has.

    Records have instruction, output and perhaps input; prompt and completion; messages; or text.

    Interrupted, the same command goes on from its last checkpoint. Exit code 3: it diverged, and
    OUT got what ADAPTER holds.

    Example: lorasuite-fast finetune new-model my-adapter-new samples.jsonl my-adapter-tuned
    """
    with checks():
        check_folder("MODEL", model)
        if adapter != "none":
            check_folder("ADAPTER", adapter)
        check_data("DATA", data)
        config, runtime = given.make(FinetuneConfig), given.make(Runtime)
        if config.data is not None:
            raise LoraSuiteError("finetune.data: DATA names the samples of this command; leave it out of the file")
        if isinstance(config.validation, str):
            check_data("--validation", config.validation)
        check_file("--retain", config.retain, "shipped")
        anew = "a new adapter; leave it out, or give `none` as ADAPTER"
        given.only_for(adapter == "none", anew, "rank", "alpha", "dropout", "roles")
        given.only_for(config.steps is None, "trainings without --steps; give one of the two", "epochs")
        given.only_for(config.retain is not None, "--retain; give both", "retain_weight")
    with running(as_json) as report, joined_ranks() as ranks:
        from ..pipeline.finetune import finetune as run

        result = run(
            model,
            None if adapter == "none" else adapter,
            data,
            out,
            config=replace(config, template=_template(config.template)),
            runtime=replace(runtime, progress=report if ranks.first else None, say=say),
            overwrite=overwrite,
        )
    if not ranks.first:
        return
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    else:
        console = Console()
        if result.evaluations:
            table = Table()
            for name in ("step", "validation loss, nats a token"):
                table.add_column(name, justify="right")
            for e in result.evaluations:
                table.add_row(str(e.step), f"{e.loss:.4f}")
            console.print(table)
        console.print(phase_table(result.phases))
        print_finetuned(console, result)
        print_written(console, runtime.report, result.out)
    if result.diverged:
        raise typer.Exit(DIVERGED)


def _template(name: str) -> str:
    if name in ("alpaca", "chat"):
        return name
    from ..io.text_files import read_text

    try:
        return read_text(Path(name).expanduser(), most=_MOST_TEMPLATE)
    except LoraSuiteError as error:
        raise LoraSuiteError(f"--template {name}: is neither alpaca nor chat nor a text file ({error})") from None
