"""The commands that train: refine and finetune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from ..errors import LoraSuiteError
from ..reporting.escaping import printable
from .app import app
from .commands import check_data, check_models, checks, only_for, steps_of
from .given_paths import check_file, check_folder
from .options import (
    MACHINE,
    METHOD,
    TEXT,
    TRAINING,
    AsJson,
    Checkpointing,
    CompletionOnly,
    Device,
    Epochs,
    Memory,
    NewArgument,
    OldArgument,
    OutArgument,
    Overwrite,
    RefineText,
    RemoteCode,
    Report,
    Retain,
    RetainWeight,
    TrainingDtype,
    option,
)
from .running import DIVERGED, joined_ranks, running, say
from .tables import percent, phase_table, print_finetuned, print_written

_MOST_TEMPLATE = 1 << 20


def _kept(text: str) -> int | str | None:
    if text in ("auto", "all"):
        return None if text == "all" else text
    try:
        return int(text)
    except ValueError:
        raise LoraSuiteError(f"--top-k {text}: expected auto, all or a number") from None


@app.command()
def refine(
    context: typer.Context,
    old: OldArgument,
    old_adapter: Annotated[str, typer.Argument(metavar="OLD_ADAPTER", help="PEFT LoRA folder trained on OLD.")],
    new: NewArgument,
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="PEFT LoRA folder for NEW to start from, or `none`.")
    ],
    out: OutArgument,
    text: RefineText = None,
    text_bytes: Annotated[int, option(TEXT, "N", "Bytes of text the old model writes [600,000]", min=1000)] = 600_000,
    steps: Annotated[str, option(TRAINING, "N", "Steps; auto: as many as the text is worth [auto]")] = "auto",
    learning_rate: Annotated[float, option(TRAINING, "X", "Falls to 0; large models need less [1e-2]")] = 1e-2,
    rank: Annotated[int | None, option(METHOD, "N", "Of a new adapter [8]; widens ADAPTER", min=1)] = None,
    roles: Annotated[str | None, option(METHOD, "ROLES", "Projections to train [those of ADAPTER, or all]")] = None,
    imitation: Annotated[
        float, option(TRAINING, "X", "0: carry the change; 1: copy OLD [0.5]", min=0.0, max=1.0)
    ] = 0.5,
    kl_weight: Annotated[float, option(TRAINING, "X", "Of the divergence from the teacher [1]", min=0.0)] = 1.0,
    next_token_weight: Annotated[float, option(TRAINING, "X", "Of a next-token loss besides [0]", min=0.0)] = 0.0,
    retain: Retain = None,
    retain_weight: RetainWeight = 0.3,
    batch_bytes: Annotated[int, option(TRAINING, "N", "Text a step reads [2,000]", min=1)] = 2000,
    top_k: Annotated[str, option(TRAINING, "N", "Tokens kept of a target; all; auto loses 2 % [auto]")] = "auto",
    eval_every: Annotated[int, option(TRAINING, "N", "Steps between evaluations [25]", min=1)] = 25,
    patience: Annotated[int, option(TRAINING, "N", "Evaluations without gain to stop at; 0: never [6]")] = 6,
    device: Device = "auto",
    dtype: TrainingDtype = "auto",
    seed: Annotated[int, option(TRAINING, "N", "Of the text, its order and a new adapter [0]")] = 0,
    memory: Memory = None,
    gradient_checkpointing: Checkpointing = False,
    cache: Annotated[Path | None, option(MACHINE, "DIR", "Folder that keeps the targets for further runs")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    report_file: Report = None,
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
        check_file("--text", text, "self")
        check_file("--retain", retain, "shipped")
        written = text is None or str(text) == "self"
        only_for(context, written, "text the old model writes; leave out --text, or this", "text_bytes")
        only_for(context, retain is not None, "--retain; give both", "retain_weight")
    with running(as_json) as report, joined_ranks() as ranks:
        from ..pipeline.refine import refine as run

        result = run(
            old,
            old_adapter,
            new,
            None if adapter == "none" else adapter,
            out,
            text=text,
            text_bytes=text_bytes,
            steps=steps_of("--steps", steps),
            learning_rate=learning_rate,
            rank=rank,
            roles=None if roles is None else [role.strip() for role in roles.split(",")],
            imitation=imitation,
            kl_weight=kl_weight,
            next_token_weight=next_token_weight,
            retain=retain,
            retain_weight=retain_weight,
            batch_bytes=batch_bytes,
            top_k=_kept(top_k),
            eval_every=eval_every,
            patience=patience or None,
            device=device,
            dtype=dtype,
            seed=seed,
            memory=memory,
            gradient_checkpointing=gradient_checkpointing,
            cache=cache,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            report=report_file,
            progress=report if ranks.first else None,
            say=say,
        )
    if not ranks.first:
        return
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
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
def finetune(
    context: typer.Context,
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
    epochs: Epochs = 3,
    steps: Annotated[int | None, option(TRAINING, "N", "Optimizer steps, in place of epochs", min=1)] = None,
    batch: Annotated[int, option(TRAINING, "N", "Samples a step reads [16]", min=1)] = 16,
    micro_batch: Annotated[int | None, option(MACHINE, "N", "Samples computed at once [all of a step]", min=1)] = None,
    learning_rate: Annotated[float, option(TRAINING, "X", "At the first step; falls linearly to 0 [1e-3]")] = 1e-3,
    max_tokens: Annotated[int, option(TEXT, "N", "Of a sample; the rest is cut off [256]", min=2)] = 256,
    template: Annotated[
        str,
        option(TEXT, "FORM", "alpaca, chat, or a file with {instruction} and {input} [alpaca]"),
    ] = "alpaca",
    completion_only: CompletionOnly = False,
    validation: Annotated[
        str | None,
        option(TEXT, "DATA", "To choose the checkpoint on: a share such as 0.1, or data"),
    ] = None,
    rank: Annotated[int | None, option(METHOD, "N", "Of an adapter from zero [32]", min=1)] = None,
    alpha: Annotated[float | None, option(METHOD, "X", "Of an adapter from zero [its rank]")] = None,
    dropout: Annotated[float | None, option(METHOD, "X", "Of an adapter from zero [0]")] = None,
    roles: Annotated[str | None, option(METHOD, "ROLES", "Of an adapter from zero, like q,v [q,k,v,o]")] = None,
    save_every: Annotated[
        int | None, option(MACHINE, "N", "Steps between checkpoints [an epoch, 50 at most]", min=1)
    ] = None,
    retain: Retain = None,
    retain_weight: RetainWeight = 0.3,
    seed: Annotated[int, option(TRAINING, "N", "Of the order, dropout and an adapter from zero [0]")] = 0,
    device: Device = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"],
        option(MACHINE, "DTYPE", "Of the base model [bfloat16 on a GPU, else float32]"),
    ] = "auto",
    gradient_checkpointing: Checkpointing = False,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    report_file: Report = None,
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
        check_data("--validation", validation)
        check_file("--retain", retain, "shipped")
        anew = "a new adapter; leave it out, or give `none` as ADAPTER"
        only_for(context, adapter == "none", anew, "rank", "alpha", "dropout", "roles")
        only_for(context, steps is None, "trainings without --steps; give one of the two", "epochs")
        only_for(context, retain is not None, "--retain; give both", "retain_weight")
    with running(as_json) as report, joined_ranks() as ranks:
        from ..pipeline.finetune import finetune as run

        result = run(
            model,
            None if adapter == "none" else adapter,
            data,
            out,
            epochs=epochs,
            steps=steps,
            batch=batch,
            micro_batch=micro_batch,
            learning_rate=learning_rate,
            max_tokens=max_tokens,
            template=_template(template),
            completion_only=completion_only,
            validation=_validation(validation),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            roles=None if roles is None else [role.strip() for role in roles.split(",")],
            save_every=save_every,
            retain=retain,
            retain_weight=retain_weight,
            seed=seed,
            device=device,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            report=report_file,
            progress=report if ranks.first else None,
            say=say,
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
        print_written(console, report_file, result.out)
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


def _validation(text: str | None) -> float | str | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text
