"""The commands that carry an adapter: migrate, plan, apply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from ..errors import LoraSuiteError, WriteError
from .app import app
from .commands import (
    check_data,
    check_distils,
    check_fill,
    check_method,
    check_models,
    checks,
    only_for,
    steps_of,
)
from .given_paths import check_file, check_folder
from .options import (
    MACHINE,
    METHOD,
    OUTPUT,
    TEXT,
    TRAINING,
    AdapterArgument,
    AsJson,
    Calibration,
    CompletionOnly,
    Device,
    Dtype,
    Epochs,
    Examples,
    Fill,
    FillShare,
    Fitted,
    Heads,
    Layers,
    Mapped,
    Memory,
    MethodName,
    NewArgument,
    OldArgument,
    OutArgument,
    Overwrite,
    PlanArgument,
    Rank,
    RefineText,
    RemoteCode,
    Report,
    Retain,
    Ridge,
    Seed,
    Similarity,
    TransferKind,
    option,
)
from .running import DIVERGED, joined_ranks, running, say
from .tables import measure_name, phase_table, print_outcomes, print_result, print_transfer, print_written

if TYPE_CHECKING:
    from ..distillation.settings import Settings


def _settings(rank: int | None, layers: int | None, seed: int) -> Settings | None:
    if rank is None and layers is None:
        return None
    from ..distillation.settings import Settings

    return Settings(rank=rank, layers=layers, seed=seed)


@app.command()
def migrate(
    context: typer.Context,
    old: OldArgument,
    new: NewArgument,
    adapter: AdapterArgument,
    out: OutArgument,
    calibration: Calibration = None,
    examples: Examples = 64,
    layers: Layers = "cka",
    similarity: Similarity = "cka",
    heads: Heads = "hungarian",
    transfer: TransferKind = "embedding",
    method: MethodName = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    ridge: Ridge = 0.0,
    rank: Rank = None,
    distill_layers: Fitted = None,
    fill: Fill = "none",
    fill_share: FillShare = 0.5,
    refine: Annotated[
        str | None,
        option(TRAINING, "STEPS", "Then train without labels: N, auto; 0: no [auto on a GPU]"),
    ] = None,
    refine_text: RefineText = None,
    finetune: Annotated[
        str | None,
        option(TRAINING, "DATA", "Then train on labelled data, as `finetune` does"),
    ] = None,
    finetune_epochs: Epochs = 3,
    finetune_rate: Annotated[float, option(TRAINING, "X", "Learning rate of --finetune [1e-3]")] = 1e-3,
    retain: Retain = None,
    completion_only: CompletionOnly = False,
    memory: Memory = None,
    mapped: Mapped = True,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    report_file: Report = None,
    as_json: AsJson = False,
) -> None:
    """Carry an adapter from OLD to NEW: plan and apply in one step.

    Example: lorasuite-fast migrate Qwen/Qwen1.5-1.8B Qwen/Qwen2.5-3B my-adapter my-adapter-qwen2.5
    """
    with checks():
        check_models(old, new)
        check_folder("ADAPTER", adapter, hub=False)
        check_file("--calibration", calibration, "self")
        check_file("--refine-text", refine_text, "self")
        check_file("--retain", retain, "shipped")
        check_data("--finetune", finetune)
        check_method(context, method, transfer)
        check_fill(context, fill)
        tuned = "the training that --finetune asks for; give both"
        only_for(context, finetune is not None, tuned, "finetune_epochs", "finetune_rate", "retain", "completion_only")
        only_for(context, refine != "0", "the training that --refine asks for; give both", "refine_text")
    with running(as_json) as report:
        from ..pipeline.migrate import migrate as run

        result = run(
            old,
            new,
            adapter,
            out,
            calibration=calibration,
            examples=examples,
            layers=layers,
            similarity=similarity,
            heads=heads,
            transfer=transfer,
            method=method,
            device=device,
            dtype=dtype,
            seed=seed,
            ridge=ridge,
            memory=memory,
            mapped=mapped,
            settings=_settings(rank, distill_layers, seed),
            fill=fill,
            fill_share=fill_share,
            refine=None if refine is None else steps_of("--refine", refine),
            refine_text=refine_text,
            finetune=finetune,
            finetune_options=None
            if finetune is None
            else {
                "epochs": finetune_epochs,
                "learning_rate": finetune_rate,
                "completion_only": completion_only,
                "retain": retain,
            },
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            report=report_file,
            progress=report,
            say=say,
        )
    print_result(result, as_json, report_file)
    if result.finetuned is not None and result.finetuned.diverged:
        raise typer.Exit(DIVERGED)


@app.command()
def plan(
    context: typer.Context,
    old: OldArgument,
    new: NewArgument,
    out: Annotated[Path, typer.Argument(metavar="PLAN", help="File to write, e.g. old-to-new.plan.safetensors.")],
    roles: Annotated[str, option(METHOD, "ROLES", "Projections: all, attention, mlp, or names like q,v [all]")] = "all",
    calibration: Calibration = None,
    examples: Examples = 64,
    layers: Layers = "cka",
    similarity: Similarity = "cka",
    heads: Heads = "hungarian",
    transfer: TransferKind = "embedding",
    method: MethodName = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    ridge: Ridge = 0.0,
    memory: Memory = None,
    mapped: Mapped = True,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    report_file: Report = None,
    as_json: AsJson = False,
) -> None:
    """Work out how adapters travel from OLD to NEW and save it as one file, for any number of adapters.

    Interrupted, the same command goes on where it stopped. Under torchrun the processes share the layers.

    Example: lorasuite-fast plan old-model new-model old-to-new.plan.safetensors --memory 6GB
    """
    with checks():
        check_models(old, new)
        check_file("--calibration", calibration, "self")
        check_method(context, method, transfer)
    with running(as_json) as report, joined_ranks() as ranks:
        from ..io.output import check_output
        from ..io.work import clean_up, work_folder
        from ..models.families import ATTENTION, MLP, ROLES
        from ..pipeline.plan import TransferPlan

        if ranks.first:
            clean_up(out)
        given = {"OLD": old, "NEW": new, "--calibration": calibration}
        check_output(out, overwrite=overwrite, kind="plan", inputs=given)
        named = {"all": ROLES, "attention": ATTENTION, "mlp": MLP}
        built = TransferPlan.build(
            old,
            new,
            roles=named.get(roles) or tuple(role.strip() for role in roles.split(",")),
            calibration=calibration,
            examples=examples,
            layers=layers,
            similarity=similarity,
            heads=heads,
            transfer=transfer,
            method=method,
            device=device,
            dtype=dtype,
            seed=seed,
            ridge=ridge,
            memory=memory,
            mapped=mapped,
            work=work_folder(out),
            ranks=ranks,
            trust_remote_code=trust_remote_code,
            report=report_file,
            progress=report if ranks.first else None,
        )
        if ranks.first:
            try:
                built.save(out, overwrite=overwrite)
            except WriteError:
                raise
            except LoraSuiteError:
                built.finish()
                raise
            built.finish()
    if not ranks.first:
        return
    if as_json:
        typer.echo(json.dumps(built.summary() | {"plan": str(out)}))
        return
    console = Console()
    print_transfer(console, built)
    table = Table(title="Layers", title_justify="left")
    for name in ("new", "old", measure_name(built)):
        table.add_column(name, justify="right")
    for layer in built.summary()["layers"]:
        table.add_row(str(layer["new"]), str(layer["old"]), f"{layer['cka']:.3f}")
    console.print(table)
    console.print(phase_table(built.phases))
    print_written(console, report_file, out)


@app.command()
def apply(
    context: typer.Context,
    plan_file: PlanArgument,
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER [OUT]", help="PEFT LoRA folder, and where to write.")
    ],
    out: Annotated[Path | None, option(OUTPUT, "DIR", "Carry every ADAPTER given into DIR/<its name>", "--out")] = None,
    old: Annotated[str | None, option(MACHINE, "OLD", "Where the old model is now; it is checked")] = None,
    new: Annotated[str | None, option(MACHINE, "NEW", "Where the new model is now; it is checked")] = None,
    text: Annotated[Path | None, option(TEXT, "FILE", "For distill: .jsonl, .txt or self [the plan's text]")] = None,
    rank: Rank = None,
    distill_layers: Fitted = None,
    fill: Fill = "none",
    fill_share: FillShare = 0.5,
    memory: Memory = None,
    device: Device = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"] | None,
        option(MACHINE, "DTYPE", "For distill: float32, bfloat16 or float64 [the plan's]"),
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Carry one more adapter with a saved plan, or many; takes seconds each. Under torchrun the processes share them.

    Example: lorasuite-fast apply old-to-new.plan.safetensors my-adapter my-adapter-new

    Example: lorasuite-fast apply old-to-new.plan.safetensors adapters/* --out adapters-new
    """
    with checks():
        if out is None and len(adapters) != 2:
            raise LoraSuiteError("apply takes PLAN ADAPTER OUT, or PLAN ADAPTER... --out DIR")
        if "/" not in str(plan_file) or Path(plan_file).suffix:
            check_file("PLAN", plan_file)
        for what, model in (("--old", old), ("--new", new)):
            if model is not None:
                check_folder(what, model)
        if out is None:
            check_folder("ADAPTER", adapters[0], hub=False)
        check_file("--text", text, "self")
        check_fill(context, fill)
    given: dict[str, Any] = {"old": old, "new": new, "text": text, "fill": fill, "fill_share": fill_share}
    given |= {"memory": memory, "overwrite": overwrite, "device": device, "dtype": dtype}
    given["trust_remote_code"] = trust_remote_code
    if out is None:
        with running(as_json) as report:
            from ..pipeline.plan import TransferPlan

            loaded = TransferPlan.from_pretrained(plan_file)
            check_distils(context, loaded)
            settings = _settings(rank, distill_layers, loaded.options["seed"])
            result = loaded.apply(adapters[0], adapters[1], settings=settings, progress=report, **given)
        print_result(result, as_json)
        return
    with running(as_json) as report, joined_ranks() as ranks:
        from ..pipeline.plan import TransferPlan

        loaded = TransferPlan.from_pretrained(plan_file)
        check_distils(context, loaded)
        settings = _settings(rank, distill_layers, loaded.options["seed"])
        share = loaded.apply_all(adapters, out, settings=settings, ranks=ranks, progress=report, **given)
        outcomes = ranks.merge(
            {name: {"error": str(r)} if isinstance(r, LoraSuiteError) else {"out": r.out} for name, r in share.items()}
        )
    if ranks.first:
        print_outcomes(outcomes, as_json)
