"""The commands that carry an adapter: migrate, plan, apply."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from ..config import ApplyConfig, DistillConfig, FinetuneConfig, PlanConfig, RefineConfig, Runtime
from ..config.fields import MACHINE, OUTPUT
from ..errors import LoraSuiteError, WriteError
from .app import app
from .commands import check_data, check_distils, check_fill, check_method, check_models
from .given import Given, flags, options_of
from .given_paths import check_file, check_folder
from .options import AdapterArgument, AsJson, NewArgument, OldArgument, OutArgument, Overwrite, PlanArgument, option
from .running import DIVERGED, checks, joined_ranks, running, say
from .tables import measure_name, phase_table, print_outcomes, print_result, print_transfer, print_written

if TYPE_CHECKING:
    from ..pipeline.plan import TransferPlan

_PLAN = flags(
    PlanConfig, "calibration", "examples", "layers", "similarity", "heads", "transfer", "method", "seed", "ridge"
)
_DISTILL = flags(DistillConfig, "rank", distill_layers="layers")
_FILL = flags(ApplyConfig, "fill", "fill_share")
_RUNTIME = flags(Runtime, "device", "dtype", "memory", "mapped", "trust_remote_code", report_file="report")
_REFINE = flags(
    RefineConfig,
    refine="steps",
    refine_text="text",
    help={"refine": "Then train without labels: N, auto; 0: no [auto on a GPU]"},
)
_FINETUNE = flags(
    FinetuneConfig,
    "completion_only",
    "retain",
    finetune="data",
    finetune_epochs="epochs",
    finetune_rate="learning_rate",
    help={"finetune_rate": "Learning rate of --finetune [1e-3]"},
)


@app.command()
@options_of(_PLAN, _DISTILL, _FILL, _REFINE, _FINETUNE, _RUNTIME)
def migrate(
    given: Given,
    old: OldArgument,
    new: NewArgument,
    adapter: AdapterArgument,
    out: OutArgument,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Carry an adapter from OLD to NEW: plan and apply in one step.

    Example: lorasuite-fast migrate Qwen/Qwen1.5-1.8B Qwen/Qwen2.5-3B my-adapter my-adapter-qwen2.5
    """
    with checks():
        check_models(old, new)
        check_folder("ADAPTER", adapter, hub=False)
        plan, runtime = given.make(PlanConfig), given.make(Runtime)
        apply = given.make(ApplyConfig, distill=given.make(DistillConfig))
        refine, finetune = _refinement(given), _finetuning(given)
        check_file("--calibration", plan.calibration, "self")
        distills = "distillation; leave it out, or pass --method distill"
        given.only_for(plan.method in ("auto", "distill"), distills, "rank", "distill_layers")
        check_method(given, plan)
        check_fill(given, apply.fill)
    with running(as_json) as report:
        from ..pipeline.migrate import default_refinement
        from ..pipeline.migrate import migrate as run

        if refine is None and given.has(RefineConfig):
            # A text alone goes with the refinement that is the default on a GPU.
            refine = default_refinement(runtime.device)
            if not refine:
                raise LoraSuiteError("--refine-text is for the training that --refine asks for; give both")
            refine = given.make(RefineConfig)
        result = run(
            old,
            new,
            adapter,
            out,
            plan=plan,
            apply=apply,
            refine=refine,
            finetune=finetune,
            runtime=replace(runtime, progress=report, say=say),
            overwrite=overwrite,
        )
    print_result(result, as_json, runtime.report)
    if result.finetuned is not None and result.finetuned.diverged:
        raise typer.Exit(DIVERGED)


def _refinement(given: Given) -> RefineConfig | Literal[False] | None:
    """What --refine and the file's section ask for; None leaves it to `migrate`."""
    values = given.values(RefineConfig)
    off = values.get("steps") == 0
    given.only_for(not off, "the training that --refine asks for; give both", "refine_text")
    if off:
        return False
    check_file("--refine-text", values.get("text"), "self")
    return given.make(RefineConfig) if given.in_file(RefineConfig) or "steps" in values else None


def _finetuning(given: Given) -> FinetuneConfig | None:
    """What --finetune and the file's section ask for."""
    values = given.values(FinetuneConfig)
    check_file("--retain", values.get("retain"), "shipped")
    check_data("--finetune", values.get("data"))
    asked = "data" in values or given.in_file(FinetuneConfig)
    tuned = "the training that --finetune asks for; give both"
    given.only_for(asked, tuned, "finetune_epochs", "finetune_rate", "retain", "completion_only")
    return given.make(FinetuneConfig) if asked else None


@app.command()
@options_of(flags(PlanConfig, "roles"), _PLAN, _RUNTIME)
def plan(
    given: Given,
    old: OldArgument,
    new: NewArgument,
    out: Annotated[Path, typer.Argument(metavar="PLAN", help="File to write, e.g. old-to-new.plan.safetensors.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Work out how adapters travel from OLD to NEW and save it as one file, for any number of adapters.

    Interrupted, the same command goes on where it stopped. Under torchrun the processes share the layers.

    Example: lorasuite-fast plan old-model new-model old-to-new.plan.safetensors --memory 6GB
    """
    with checks():
        check_models(old, new)
        config, runtime = given.make(PlanConfig), given.make(Runtime)
        check_file("--calibration", config.calibration, "self")
        check_method(given, config)
    with running(as_json) as report, joined_ranks() as ranks:
        from ..io.output import check_output
        from ..io.work import clean_up, work_folder
        from ..pipeline.plan import TransferPlan

        if ranks.first:
            clean_up(out)
        check_output(
            out, overwrite=overwrite, kind="plan", inputs={"OLD": old, "NEW": new, "--calibration": config.calibration}
        )
        built = TransferPlan.build(
            old,
            new,
            config=config,
            runtime=replace(runtime, progress=report if ranks.first else None),
            work=work_folder(out),
            ranks=ranks,
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
    if ranks.first:
        _print_plan(built, out, as_json, runtime.report)


def _print_plan(built: TransferPlan, out: Path, as_json: bool, report: Any) -> None:
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
    print_written(console, report, out)


@app.command()
@options_of(
    flags(ApplyConfig, "text"),
    _DISTILL,
    _FILL,
    flags(
        Runtime,
        "memory",
        "device",
        "dtype",
        "trust_remote_code",
        help={"dtype": "For distill: float32, bfloat16 or float64 [the plan's]"},
    ),
)
def apply(
    given: Given,
    plan_file: PlanArgument,
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER [OUT]", help="PEFT LoRA folder, and where to write.")
    ],
    out: Annotated[Path | None, option(OUTPUT, "DIR", "Carry every ADAPTER given into DIR/<its name>", "--out")] = None,
    old: Annotated[str | None, option(MACHINE, "OLD", "Where the old model is now; it is checked")] = None,
    new: Annotated[str | None, option(MACHINE, "NEW", "Where the new model is now; it is checked")] = None,
    overwrite: Overwrite = False,
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
        config, runtime = given.make(ApplyConfig, distill=given.make(DistillConfig)), given.make(Runtime)
        check_file("--text", config.text, "self")
        check_fill(given, config.fill)
    where: dict[str, Any] = {"old": old, "new": new, "config": config, "overwrite": overwrite}
    if out is None:
        with running(as_json) as report:
            from ..pipeline.plan import TransferPlan

            loaded = TransferPlan.from_pretrained(plan_file)
            check_distils(given, loaded)
            result = loaded.apply(adapters[0], adapters[1], runtime=replace(runtime, progress=report), **where)
        print_result(result, as_json)
        return
    with running(as_json) as report, joined_ranks() as ranks:
        from ..pipeline.plan import TransferPlan

        loaded = TransferPlan.from_pretrained(plan_file)
        check_distils(given, loaded)
        share = loaded.apply_all(adapters, out, ranks=ranks, runtime=replace(runtime, progress=report), **where)
        outcomes = ranks.merge(
            {name: {"error": str(r)} if isinstance(r, LoraSuiteError) else {"out": r.out} for name, r in share.items()}
        )
    if ranks.first:
        print_outcomes(outcomes, as_json)
