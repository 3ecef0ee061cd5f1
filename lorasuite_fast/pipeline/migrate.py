"""A whole migration: a plan, an adapter carried through it, and the trainings asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..adapters.adapter import Adapter, read_adapter
from ..adapters.aligned_states import load_tokenizer
from ..adapters.base_match import check_base
from ..config import ApplyConfig, FinetuneConfig, PlanConfig, RefineConfig, Runtime, pick_device, pick_dtype
from ..config.flat import takes_flat_keywords
from ..errors import LoraSuiteError, WriteError
from ..io.output import check_output
from ..io.report_path import check_report
from ..io.text_files import refuse_pipe
from ..io.work import clean_up, work_folder
from ..models.checkpoint import Checkpoint
from ..models.family_table import family_named
from ..reporting.html_report import write_report
from ..results import Migration
from ..training.finetuning import split_samples
from ..training.loop import TRAINING
from ..training.retention import kept_samples
from .finetune import finetune as run_finetune
from .finetune import finetuning_folder
from .identical import give_back
from .plan import TransferPlan, check_distilled
from .refine import refine as run_refine
from .refine import refinement_folder

Refine = RefineConfig | Literal[False]
"""What a migration refines with; False: not at all."""


def older_keywords(given: dict[str, Any]) -> Iterator[str]:
    """The keywords of 0.1 that named a part of the migration by a number, a file or a dictionary."""
    steps, text = given.get("refine"), given.pop("refine_text", None)
    if steps is True:
        raise LoraSuiteError("refine: is True; pass RefineConfig(), or False for none")
    if isinstance(steps, int | str) and steps is not False:
        given["refine"] = RefineConfig(steps=steps) if steps != 0 else False  # type: ignore[arg-type]
        yield f"refine={steps!r} is RefineConfig.steps now, pass refine=RefineConfig(steps=…), or False for none"
    if text is not None:
        if given.get("refine") is False:
            raise LoraSuiteError("refine_text is for the training that refine asks for; give both")
        given["refine"] = replace(given.get("refine") or RefineConfig(), text=text)
        yield "refine_text is RefineConfig.text now, pass refine=RefineConfig(text=…)"
    data, further = given.get("finetune"), given.pop("finetune_options", None) or {}
    if data is None and further:
        raise LoraSuiteError("finetune_options are for the training that finetune asks for; give both")
    if data is not None and not isinstance(data, FinetuneConfig):
        given["finetune"] = FinetuneConfig(data=data, **further)
        yield "data and finetune_options are FinetuneConfig now, pass finetune=FinetuneConfig(data, …)"
    settings = given.pop("settings", None)
    if settings is not None:
        given["apply"] = replace(given.get("apply") or ApplyConfig(), distill=settings)
        yield "settings is ApplyConfig.distill now, pass apply=ApplyConfig(distill=…)"


@dataclass(frozen=True)
class _Asked:
    """A migration as it was asked for, with its defaults settled."""

    old: str | os.PathLike[str]
    new: str | os.PathLike[str]
    adapter: str | os.PathLike[str]
    plan: PlanConfig
    apply: ApplyConfig
    refine: Refine
    runtime: Runtime
    overwrite: bool

    @property
    def inputs(self) -> dict[str, object]:
        """What an output must not replace."""
        text = self.refine.text if self.refine else None
        return {
            "OLD": self.old,
            "NEW": self.new,
            "ADAPTER": self.adapter,
            "`calibration`": self.plan.calibration,
            "`refine_text`": text,
        }


@takes_flat_keywords(older_keywords, plan=PlanConfig, apply=ApplyConfig, runtime=Runtime)
def migrate(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    plan: PlanConfig | None = None,
    apply: ApplyConfig | None = None,
    refine: RefineConfig | Literal[False] | None = None,
    finetune: FinetuneConfig | None = None,
    runtime: Runtime | None = None,
    overwrite: bool = False,
) -> Migration:
    """Carries a PEFT LoRA adapter from OLD to NEW: `TransferPlan.build` for the roles it targets, then `apply`.

    With `refine` the result is then the start of a training without labels (`refine`). A start that was copied or
    carried by least squares keeps its rank and modules. With `finetune` it is
    trained on labelled data last (`finetune`).

    Args:
        old: Model folder or hub id.
        new: Model folder or hub id.
        adapter: A PEFT LoRA folder trained on old.
        out: The folder to write.
        plan: How the models are compared; its roles are the adapter's.
        apply: How the adapter is carried; a rank or a number of layers makes method auto distill, which alone gives it.
        refine: The training without labels; False for none, and None, the default, for one on a GPU and none without
            it, here and on the command line. With steps "auto" there is none where the adapter arrives whole.
        finetune: The training on labelled data, with the data.
        runtime: Device, dtype, memory, report and progress of all of it.
        overwrite: Replace what exists at out, once the new one is complete.

    Returns:
        What was written, and how it came about.

    Raises:
        LoraSuiteError: for input that cannot be used; OUT is then untouched.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LoraSuiteError("migrate: runs in one process; start plan, apply, refine and finetune with torchrun")
    runtime, apply = runtime or Runtime(), apply or ApplyConfig()
    plan = _only_distill(plan or PlanConfig(), apply)
    wanted = default_refinement(runtime.device) if refine is None else refine
    asked = _Asked(old, new, adapter, plan, apply, wanted, runtime, overwrite)
    check_options(asked, finetune)
    check_report(runtime.report, out, asked.inputs | {"`finetune`": None if finetune is None else finetune.data})
    if runtime.say and (wanted or finetune is not None):
        runtime.say(announcement(plan, wanted, refine is not None, finetune))
    if finetune is None:
        result = _migrate(asked, out)
    else:
        result = _migrate_and_finetune(asked, finetune, out)
    write_report(result, runtime.report)
    return result


def _migrate(asked: _Asked, out: str | os.PathLike[str]) -> Migration:
    """`migrate` without labelled data."""
    start = time.perf_counter()
    if asked.plan.method in ("auto", "distill"):
        refuse_pipe(asked.plan.calibration)
    clean_up(out)
    if asked.refine:
        clean_up(out, refinement_folder(out), TRAINING)
    path = check_output(out, overwrite=asked.overwrite, inputs=asked.inputs)
    model = Checkpoint(asked.old, "old")
    source = read_adapter(asked.adapter, model.family, model.shape, model.name)
    check_base(source, model.fingerprint(), model.name, passed=(asked.new,))
    distill = asked.apply.distill
    if not (asked.refine and asked.refine.steps != "auto") and distill.rank is distill.layers is None:
        returned = give_back(model, asked.new, source, path, asked.plan, asked.runtime, overwrite=asked.overwrite)
        if returned is not None:
            return returned.with_seconds(time.perf_counter() - start)
    planned = replace(asked.plan, roles=source.roles)
    quiet = replace(asked.runtime, report=None)
    plan = TransferPlan.build(asked.old, asked.new, config=planned, runtime=quiet, work=work_folder(out))
    refine = False if asked.refine and asked.refine.steps == "auto" and plan.exact else asked.refine
    unrefined = path
    if refine:
        unrefined = refinement_folder(out) / "migrated"
        unrefined.parent.mkdir(exist_ok=True)
    try:
        result = plan.apply(
            asked.adapter,
            unrefined if refine else out,
            config=asked.apply,
            runtime=replace(quiet, dtype="auto"),
            overwrite=asked.overwrite or bool(refine),
        )
    except WriteError:
        raise
    except LoraSuiteError:
        plan.finish()
        raise
    if refine:
        result = _refined(asked, refine, result, source, unrefined, out)
    plan.finish()
    return result.with_seconds(time.perf_counter() - start)


def _refined(
    asked: _Asked,
    config: RefineConfig,
    result: Migration,
    source: Adapter,
    start: Path,
    out: str | os.PathLike[str],
) -> Migration:
    """The migration, refined."""
    # Such a start is trained as it is: its rank and modules are the old adapter's.
    method = result.plan.options["method"]
    carried = method in ("copy", "lstsq") or (source.dora and method != "distill")
    if not carried:
        roles, rank = family_named(result.plan.new.family).roles, int(source.config["r"])
        config = replace(config, roles=config.roles or roles, rank=config.rank or rank)
    config = replace(config, seed=result.plan.options["seed"] if config.seed is None else config.seed)
    refined = run_refine(
        asked.old,
        asked.adapter,
        asked.new,
        start,
        out,
        config=config,
        runtime=replace(asked.runtime, report=None, device=result.plan.options["device"]),
        overwrite=asked.overwrite,
    )
    return replace(result, out=os.fspath(out), refined=refined, phases=[*result.phases, *refined.phases])


def _migrate_and_finetune(asked: _Asked, config: FinetuneConfig, out: str | os.PathLike[str]) -> Migration:
    """The migration, then `finetune` of what it wrote; the data are read first."""
    begin = time.perf_counter()
    data, runtime = config.data, replace(asked.runtime, report=None)
    assert data is not None
    for text in (data, config.validation, config.retain):
        refuse_pipe(text)
    clean_up(out, finetuning_folder(out), TRAINING)
    further = {"`finetune`": data, "`retain`": config.retain, "`validation`": config.validation}
    check_output(out, overwrite=asked.overwrite, inputs=asked.inputs | further)
    seed = asked.plan.seed if config.seed is None else config.seed
    wording = {
        "template": config.template,
        "max_tokens": config.max_tokens,
        "completion_only": config.completion_only,
    }
    tokenizer = load_tokenizer(asked.new, "NEW", trust_remote_code=runtime.trust_remote_code)
    split_samples(data, config.validation, tokenizer, wording, seed)
    kept_samples(config.retain, tokenizer, config.max_tokens, seed)
    folder = finetuning_folder(out)
    folder.mkdir(exist_ok=True)
    migrated = folder / "migrated"
    try:
        result = _migrate(replace(asked, overwrite=True, runtime=runtime), migrated)
    except WriteError:
        raise
    except LoraSuiteError:
        with suppress(OSError):
            folder.rmdir()
        raise
    tuned = run_finetune(
        asked.new,
        migrated,
        data,
        out,
        config=replace(config, data=None, seed=seed),
        runtime=runtime,
        overwrite=asked.overwrite,
    )
    phases = [*result.phases, *tuned.phases]
    return replace(result, out=os.fspath(out), finetuned=tuned, phases=phases, seconds=time.perf_counter() - begin)


def check_options(asked: _Asked, finetune: FinetuneConfig | None) -> None:
    """What can be judged without a model."""
    pick_device(asked.runtime.device)
    pick_dtype(asked.runtime.dtype)
    check_distilled(asked.plan.method, asked.apply)
    for name, value, config in (("refine", asked.refine or None, RefineConfig), ("finetune", finetune, FinetuneConfig)):
        if value is not None and not isinstance(value, config):
            raise LoraSuiteError(f"{name}: is a {type(value).__name__}; pass {config.__name__}(…)")
    if asked.plan.roles is not None:
        raise LoraSuiteError("plan.roles: a migration plans for the adapter's own projections; leave it out")
    if finetune is not None and finetune.data is None:
        raise LoraSuiteError("finetune.data: there is none to fine-tune on; give labelled data")


def _only_distill(plan: PlanConfig, apply: ApplyConfig) -> PlanConfig:
    """Where auto is to give a rank or a number of layers, only distillation can."""
    distill = apply.distill
    asked = distill.rank is not None or distill.layers is not None
    return replace(plan, method="distill") if asked and plan.method == "auto" else plan


def default_refinement(device: str) -> Refine:
    """The refinement a migration ends with: without a GPU it can take hours, and has to be asked for."""
    return RefineConfig() if pick_device(device).type == "cuda" else False


def announcement(plan: PlanConfig, refine: Refine, asked: bool, finetune: FinetuneConfig | None) -> str:
    """What a migration will run, in one sentence."""
    parts = [f"migrating by method {plan.method}"]
    if refine:
        steps = "as many steps as the text is worth" if refine.steps == "auto" else f"{refine.steps} steps"
        reason = "" if asked else " (the default on a GPU; refine 0: not)"
        parts.append(f"then refining without labels, {steps}{reason}")
    if finetune is not None:
        parts.append("then fine-tuning on labelled data")
    return ", ".join(parts)
