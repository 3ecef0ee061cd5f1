"""A whole migration: a plan, an adapter carried through it, and the trainings asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import read_adapter
from ..adapters.aligned_states import load_tokenizer
from ..adapters.base_match import check_base
from ..adapters.fill import FILLS, SHARE
from ..config import check_choice, pick_device, pick_dtype
from ..errors import LoraSuiteError, WriteError
from ..io.output import check_output
from ..io.phases import Progress
from ..io.report_path import check_report
from ..io.text_files import refuse_pipe
from ..io.work import clean_up, work_folder
from ..models.checkpoint import Checkpoint
from ..models.family_table import family_named
from ..reporting.html_report import write_report
from ..results import Migration
from ..training.checkpoints import TRAINING
from ..training.finetuning import CHECKED, MAX_TOKENS, check_finetuning, split_samples
from ..training.retention import RETAIN_WEIGHT, check_retain_weight, kept_samples
from ..transfer.build_options import AUTO
from ..transfer.memory import parse_memory
from ..transfer.plan import CHOICES
from .finetune import finetune, finetuning_folder
from .identical import give_back
from .plan import TransferPlan, check_settings

if TYPE_CHECKING:
    from ..distillation.settings import Settings
    from ..text.samples import Data


def migrate(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    settings: Settings | None = None,
    fill: str = "none",
    fill_share: float = SHARE,
    refine: int | str | None = None,
    refine_text: str | os.PathLike[str] | None = None,
    finetune: Data | None = None,
    finetune_options: dict[str, Any] | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Migration:
    """Carries a PEFT LoRA adapter from OLD to NEW: `TransferPlan.build` for the roles it targets, then `apply`.

    With `refine` the result is then the start of a training without labels (`refinement.refine`) of as many steps;
    "auto" takes as many as the text is worth, and none where the adapter arrives whole. None, the default, is "auto" on
    a GPU and 0 without one, here and on the command line. A start that was copied or carried by least squares keeps its
    rank and modules and is trained at half the usual rate. With `finetune` it is trained on labelled data last
    (`finetuning.finetune`).

    Args:
        old, new: model folders or hub ids. adapter: a PEFT LoRA folder trained on old. out: the folder to write.
        settings: rank of the result and the rest of distill's settings; where a rank or a number of layers is asked
            for, method auto is distill, which alone gives it. fill, fill_share: as `Plan.apply` has them. options:
            those of `TransferPlan.build`.
        refine_text: None has the old model write it with its adapter; else a .jsonl or .txt file.
        finetune: labelled data, as `finetuning.finetune` takes them. finetune_options: its further arguments.
        report: HTML file to write (`html_report.write_report`); an earlier report there is replaced.
        say: called with one sentence, what will be run, at the start, and with the steps planned before a training.

    Raises:
        LoraSuiteError: for input that cannot be used; OUT is then untouched.
    """
    given = {"OLD": old, "NEW": new, "ADAPTER": adapter, "`calibration`": options.get("calibration")}
    inputs = given | {"`refine_text`": refine_text, "`finetune`": finetune}
    check_options(options, settings, fill)
    options |= _only_distill(options, settings)
    check_report(report, out, inputs)
    if finetune is None and finetune_options:
        raise LoraSuiteError("finetune_options are for the training that finetune asks for; give both")
    asked = refine is not None
    refine = refine if refine is not None else default_refinement(options.get("device", "auto"))
    if refine != "auto" and (isinstance(refine, str) or refine < 0):
        raise LoraSuiteError(f"refine is {refine!r}; it must be auto, or a number of steps, 0 for none")
    if refine_text is not None and not refine:
        raise LoraSuiteError("refine_text is for the training that refine asks for; give both")
    if say and (refine or finetune is not None):
        say(announcement(options, refine, asked, finetune))
    if finetune is not None:
        options |= {"settings": settings, "fill": fill, "fill_share": fill_share}
        options |= {"refine": refine, "refine_text": refine_text}
        tuned = migrate_and_finetune(old, new, adapter, out, finetune, finetune_options or {}, overwrite=overwrite,
                                     progress=progress, say=say, **options)  # fmt: skip
        write_report(tuned, report)
        return tuned
    start = time.perf_counter()
    if options.get("method", "auto") in ("auto", "distill"):
        refuse_pipe(options.get("calibration"))
    clean_up(out)
    if refine:
        from ..training.checkpoints import TRAINING
        from .refine import refinement_folder

        clean_up(out, refinement_folder(out), TRAINING)
    path = check_output(out, overwrite=overwrite, inputs=inputs)
    model = Checkpoint(old, "old")
    source = read_adapter(adapter, model.family, model.shape, model.name)
    check_base(source, model.fingerprint(), model.name, passed=(new,))
    if refine in (0, AUTO) and (settings is None or settings.rank is settings.layers is None):
        returned = give_back(model, new, source, path, options, overwrite=overwrite, progress=progress)
        if returned is not None:
            returned = returned.with_seconds(time.perf_counter() - start)
            write_report(returned, report)
            return returned
    options.setdefault("work", work_folder(out))
    plan = TransferPlan.build(old, new, roles=source.roles, progress=progress, **options)
    if refine == "auto" and plan.exact:
        refine = 0
    unrefined = path
    if refine:
        unrefined = refinement_folder(out) / "migrated"
        unrefined.parent.mkdir(exist_ok=True)
    try:
        result = plan.apply(
            adapter,
            unrefined if refine else out,
            settings=settings,
            fill=fill,
            fill_share=fill_share,
            memory=options.get("memory"),
            device=options.get("device", "auto"),
            trust_remote_code=options.get("trust_remote_code", False),
            overwrite=overwrite or bool(refine),
            progress=progress,
        )
    except WriteError:
        raise
    except LoraSuiteError:
        plan.finish()
        raise
    if refine:
        from ..training.refinement import CARRIED_RATE, RATE
        from .refine import refine as run

        # Such a start is trained as it is: its rank and modules are the old adapter's.
        method = result.plan.options["method"]
        carried = method in ("copy", "lstsq") or (source.dora and method != "distill")
        refined = run(
            old,
            adapter,
            new,
            unrefined,
            out,
            text=refine_text,
            steps=refine,
            roles=None if carried else family_named(plan.new.family).roles,
            rank=None if carried else int(source.config["r"]),
            learning_rate=CARRIED_RATE if method in ("copy", "lstsq") else RATE,
            seed=plan.options["seed"],
            device=plan.options["device"],
            dtype=options.get("dtype", "auto"),
            memory=options.get("memory"),
            trust_remote_code=options.get("trust_remote_code", False),
            overwrite=overwrite,
            progress=progress,
            say=say,
        )
        result = replace(result, out=os.fspath(out), refined=refined, phases=[*result.phases, *refined.phases])
    plan.finish()
    result = result.with_seconds(time.perf_counter() - start)
    write_report(result, report)
    return result


def migrate_and_finetune(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: Data,
    tuning: Mapping[str, Any],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Migration:
    """`plan.migrate` with `options`, then `finetune` of what it wrote with `tuning`; the data are read first."""
    begin = time.perf_counter()
    for text in (data, tuning.get("validation"), tuning.get("retain")):
        refuse_pipe(text)
    clean_up(out, finetuning_folder(out), TRAINING)
    given = {"OLD": old, "NEW": new, "ADAPTER": adapter, "`finetune`": data, "`retain`": tuning.get("retain")}
    further = {"`calibration`": options.get("calibration"), "`refine_text`": options.get("refine_text")}
    check_output(out, overwrite=overwrite, inputs=given | further | {"`validation`": tuning.get("validation")})
    check_finetuning(**{name: tuning.get(name, default) for name, default in CHECKED.items()})
    check_retain_weight(tuning.get("retain_weight", RETAIN_WEIGHT))
    remote = options.get("trust_remote_code", False)
    shared = {"seed": options.get("seed", 0), "device": options.get("device", "auto"), "trust_remote_code": remote}
    shared["dtype"] = options.get("dtype", "auto")
    wording = {name: tuning[name] for name in ("template", "max_tokens", "completion_only") if name in tuning}
    tokenizer = load_tokenizer(new, "NEW", trust_remote_code=remote)
    split_samples(data, tuning.get("validation"), tokenizer, wording, shared["seed"])
    kept_samples(tuning.get("retain"), tokenizer, tuning.get("max_tokens", MAX_TOKENS), shared["seed"])
    folder = finetuning_folder(out)
    folder.mkdir(exist_ok=True)
    migrated = folder / "migrated"
    told: list[str] = []

    def quiet(sentence: str) -> None:
        """Passes on all but the first sentence, which `migrate` has said already for the whole."""
        if say and told:
            say(sentence)
        told.append(sentence)

    try:
        result = migrate(old, new, adapter, migrated, overwrite=True, progress=progress, say=quiet, **options)
    except WriteError:
        raise
    except LoraSuiteError:
        with suppress(OSError):
            folder.rmdir()
        raise
    tuned = finetune(
        new, migrated, data, out, overwrite=overwrite, progress=progress, say=say, **(shared | dict(tuning))
    )
    phases = [*result.phases, *tuned.phases]
    return replace(result, out=os.fspath(out), finetuned=tuned, phases=phases, seconds=time.perf_counter() - begin)


def check_options(options: dict[str, Any], settings: Settings | None, fill: str) -> None:
    """The options of a build that can be judged without a model."""
    for name, (what, known) in CHOICES.items():
        if name in options:
            check_choice(what, known, options[name])
    check_choice("fill", FILLS, fill)
    pick_device(options.get("device", "auto"))
    pick_dtype(options.get("dtype", "auto"))
    if options.get("memory") is not None:
        parse_memory(options["memory"])
    check_settings(options.get("method", AUTO), settings)


def _only_distill(options: dict[str, Any], settings: Settings | None) -> dict[str, Any]:
    """The method that a rank or a number of layers leaves to choose from: refused after the plan, it would cost one."""
    free = settings is None or settings.rank is settings.layers is None
    return {} if free or options.get("method", AUTO) != AUTO else {"method": "distill"}


def default_refinement(device: str) -> int | str:
    """Steps of the refinement a migration ends with: without a GPU it can take hours, and has to be asked for."""
    return "auto" if pick_device(device).type == "cuda" else 0


def announcement(options: dict[str, Any], refine: int | str, asked: bool, finetune: Data | None) -> str:
    """What a migration will run, in one sentence."""
    parts = [f"migrating by method {options.get('method', AUTO)}"]
    if refine:
        steps = "as many steps as the text is worth" if refine == "auto" else f"{refine} steps"
        reason = "" if asked else " (the default on a GPU; refine 0: not)"
        parts.append(f"then refining without labels, {steps}{reason}")
    if finetune is not None:
        parts.append("then fine-tuning on labelled data")
    return ", ".join(parts)
