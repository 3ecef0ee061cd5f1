"""Refinement without labels, from the models to the folder written."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import CONFIG, WEIGHTS, broken_tensor, trained_config
from ..adapters.adapter_folder import adapter_digest
from ..adapters.aligned_states import load_tokenizer
from ..adapters.peft_check import check_loads, empty_model
from ..config import RefineConfig, Runtime, pick_device, pick_dtype
from ..config.flat import takes_flat_keywords
from ..errors import LoraSuiteError
from ..io.hub_ids import shown
from ..io.json_files import read_json
from ..io.output import check_output, write_folder, writing
from ..io.phases import PhaseClock, release_memory
from ..io.ranks import Ranks
from ..io.report_path import check_report
from ..io.work import Work, clean_up, remove_work, unless_unusable
from ..models.checkpoint import Checkpoint
from ..reporting.html_report import write_report
from ..reporting.model_card import card_files
from ..reporting.provenance import Step, without_machine
from ..text.samples import Samples
from ..text.self_text import self_written
from ..training.loop import TRAINING
from ..training.refinement import (
    RATE,
    Course,
    Refinement,
    different,
    step_budget,
    texts_of,
    train_on_targets,
)
from ..training.retention import kept_samples, named_text
from ..training.teacher import write_targets


def refinement_folder(out: str | os.PathLike[str]) -> Path:
    """Where a refinement that is to write `out` keeps its work: a hidden sibling."""
    path = Path(out).expanduser().absolute()
    return path.with_name(f".{path.name}.refine")


@takes_flat_keywords(config=RefineConfig, runtime=Runtime)
def refine(
    old: str | os.PathLike[str],
    old_adapter: str | os.PathLike[str],
    new: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    config: RefineConfig | None = None,
    runtime: Runtime | None = None,
    overwrite: bool = False,
) -> Refinement:
    """Trains an adapter for NEW to do what OLD's adapter does, without labels.

    The old model writes the text unless one is given, once for all successors; the teacher's targets are worked out and
    kept on disk, one model in memory at a time; then the adapter is trained. Targets and training are kept beside OUT
    until it is complete, and the same call goes on from them after an interruption.

    Args:
        old: Model folder or hub id.
        old_adapter: PEFT folder trained on old.
        new: Model folder or hub id.
        adapter: PEFT folder for new to start from; None starts from an adapter that does nothing.
        out: PEFT LoRA folder to write.
        config: How it is trained.
        runtime: Device, dtype, memory, report and progress. The adapter is float32 always.
        overwrite: Replace what exists at out, once the new one is complete.

    Returns:
        What the training came to.

    Raises:
        LoraSuiteError: for input that cannot be used; OUT is then untouched.
    """
    config, runtime = config or RefineConfig(), runtime or Runtime()
    begin = time.perf_counter()
    inputs: dict[str, object] = {
        "OLD": old,
        "OLD_ADAPTER": old_adapter,
        "NEW": new,
        "ADAPTER": adapter,
        "`text`": config.text,
    }
    inputs |= {"`retain`": config.retain, "`cache`": config.cache}
    check_report(runtime.report, out, inputs)
    ranks = Ranks.join()
    if ranks.first:
        clean_up(out, refinement_folder(out), TRAINING)
    path = check_output(out, overwrite=overwrite, inputs=inputs)
    seed = config.seed or 0
    run_device = pick_device(runtime.device)
    half = run_device.type == "cuda" and torch.cuda.is_bf16_supported()
    run_dtype = torch.bfloat16 if runtime.dtype == "auto" and half else pick_dtype(runtime.dtype)
    clock = PhaseClock(runtime.progress, run_device)
    checkpoint_o, checkpoint_n = Checkpoint(old, "old"), Checkpoint(new, "new")
    start = None if adapter is None else Path(adapter).expanduser()
    # Read before anything that takes long, so that what is missing is missed.
    digests = adapter_digest(old_adapter), None if start is None else adapter_digest(start)
    if start is not None and (broken := broken_tensor(start / WEIGHTS)) is not None:
        raise LoraSuiteError(f"{start / WEIGHTS}: {broken} holds NaN or infinity; train or save it again")
    kept_text = Samples([], 0, 0)
    if config.retain is not None:
        tokenizer = load_tokenizer(new, "NEW", trust_remote_code=runtime.trust_remote_code)
        kept_text = kept_samples(config.retain, tokenizer, config.max_tokens, seed)
    folder = refinement_folder(out)
    kept = folder if config.cache is None else Path(config.cache).expanduser()
    for place in {folder, kept}:
        place.mkdir(parents=True, exist_ok=True)

    if config.text is None or (isinstance(config.text, str | os.PathLike) and os.fspath(config.text) == "self"):
        source = "self"
        with ranks.in_turn(), clock.phase("write text", config.text_bytes) as step:
            texts = self_written(
                checkpoint_o,
                old_adapter,
                size=config.text_bytes,
                seed=seed,
                tokens=config.max_tokens,
                device=run_device,
                dtype=run_dtype,
                trust_remote_code=runtime.trust_remote_code,
                report=step,
            )
            texts = different(texts)
        texts = ranks.share(texts)
        release_memory()
    else:
        source = os.fspath(config.text) if isinstance(config.text, str | os.PathLike) else f"{len(config.text)} texts"
        texts = texts_of(config.text, seed)

    teaching: dict[str, Any] = {
        "old": checkpoint_o.fingerprint(),
        "old_adapter": digests[0],
        "new": checkpoint_n.fingerprint(),
        "text": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32],
        "imitation": config.imitation,
        "top_k": config.top_k,
        "max_tokens": config.max_tokens,
        "dtype": str(run_dtype),
        "shuffled": seed if config.control != "none" else None,
    }
    key = hashlib.sha256(json.dumps(teaching).encode()).hexdigest()[:16]
    options: dict[str, Any] = {
        "learning_rate": config.learning_rate or RATE,
        "rank": config.rank,
        "alpha": config.alpha,
        "roles": None if config.roles is None else sorted(config.roles),
        "kl_weight": config.kl_weight,
        "next_token_weight": config.next_token_weight,
        "batch_bytes": config.batch_bytes,
        "eval_every": config.eval_every,
        "patience": config.patience,
        "seed": seed,
        "control": config.control,
    }
    if config.retain is not None:
        options |= {"retain": kept_text.digest(), "retain_weight": config.retain_weight}
    if ranks.size > 1:
        options |= {"processes": ranks.size}
    works: list[Work] = []
    try:
        with ranks.in_turn():
            works.append(Work(kept / f"targets-{key}", teaching, owner=ranks.first))
            with unless_unusable(works[0], folder):
                targets = write_targets(
                    works[0],
                    old,
                    old_adapter,
                    new,
                    texts,
                    clock,
                    top_k=config.top_k,
                    max_tokens=config.max_tokens,
                    device=run_device,
                    dtype=run_dtype,
                    imitation=config.imitation,
                    shuffled=config.control != "none",
                    seed=seed,
                    trust_remote_code=runtime.trust_remote_code,
                )
                # Each model is opened more than once, and must be the same one every time.
                for model in (checkpoint_o, checkpoint_n):
                    model.tensors.check_same()
        release_memory()
        budget = step_budget(targets.facts.bytes, config.batch_bytes) if config.steps == "auto" else int(config.steps)
        started = {"start": digests[1], "steps": budget}
        with ranks.in_turn():
            works.append(Work(folder / TRAINING, teaching | options | started, owner=ranks.first))
            resumed = works[1].resumed
            works[1].start()
        if runtime.say and ranks.first:
            facts = targets.facts
            runtime.say(
                f"refining: {budget} steps of about {config.batch_bytes:,} bytes, from {facts.bytes / 1000:,.0f} KB of "
                f"{'text the old model wrote' if source == 'self' else 'text'} with {facts.positions:,} positions"
            )
        # What an interrupted run has trained stays, whatever this one was asked besides.
        with nullcontext() if resumed else unless_unusable(works[1], folder), writing(works[1].folder):
            course = train_on_targets(
                works[1].folder,
                checkpoint_o,
                checkpoint_n,
                start,
                targets,
                kept_text.samples,
                clock,
                budget,
                options,
                run_device,
                run_dtype,
                half,
                runtime.memory,
                config.gradient_checkpointing,
                runtime.trust_remote_code,
            )
        summary = _summary(course, budget)
        taken = Step(
            "refinement",
            summary,
            without_machine(options)
            | {"imitation": config.imitation, "top_k": config.top_k, "max_tokens": config.max_tokens},
            {"old": teaching["old"], "new": teaching["new"]},
            {
                "from": f"{shown(old_adapter)} on {shown(checkpoint_o.name)}",
                "text": shown(source),
                "targets": "NEW's predictions changed as OLD's were"
                + (f", and to {config.imitation:.0%} OLD's own with its adapter" if config.imitation else ""),
                "started from": "a new adapter" if adapter is None else shown(adapter),
                "steps": f"{course.steps} of {budget}, of which {course.chosen} are in what was written",
                "tokens trained on": f"{course.tokens:,}",
                "learning rate": f"{options['learning_rate']:g}",
                **(
                    {"retained": f"{named_text(config.retain)}, weight {config.retain_weight:g}"}
                    if config.retain is not None
                    else {}
                ),
            },
        )
        told = card_files(checkpoint_n.name, taken, start, wrapped=checkpoint_n.family.wrapper is not None)
        ranks.wait()
        if ranks.first:
            works[1].complete()
            empty = empty_model(checkpoint_n.folder, trust_remote_code=runtime.trust_remote_code)
            _write(path, course.source, checkpoint_n.name, told, empty, overwrite)
            if config.cache is None:
                works[0].discard()
            remove_work(folder)
        ranks.wait()
    finally:
        for work in works:
            work.close()
    result = Refinement(
        old=os.fspath(old),
        old_adapter=os.fspath(old_adapter),
        new=os.fspath(new),
        start=None if adapter is None else os.fspath(adapter),
        out=os.fspath(out),
        steps=course.steps,
        budget=budget,
        chosen_step=course.chosen,
        kept_start=course.chosen == 0,
        stopped=course.stopped,
        summary=summary,
        start_agreement=course.evaluations[0].agreement,
        agreement=next(e.agreement for e in course.evaluations if e.step == course.chosen),
        evaluations=course.evaluations,
        teacher=targets.facts,
        text=source,
        held_out_texts=course.held_out,
        trained_tokens=course.tokens,
        trainable_parameters=course.parameters,
        options=options
        | {
            "imitation": config.imitation,
            "top_k": config.top_k,
            "max_tokens": config.max_tokens,
            "device": run_device.type,
            "dtype": str(run_dtype).removeprefix("torch."),
            "gradient_checkpointing": course.checkpointing,
        },
        phases=clock.phases,
        seconds=time.perf_counter() - begin,
        fingerprints={"old": teaching["old"], "new": teaching["new"]},
    )
    if ranks.first:
        write_report(result, runtime.report)
    return result


def _write(path: Path, source: Path, base: str, told: dict[str, bytes], place: nn.Module, overwrite: bool) -> None:
    """Puts an adapter PEFT has saved at OUT, in the name of the new model, once PEFT has put it on `place`."""
    files = {
        CONFIG: trained_config(read_json(source / CONFIG), base),
        WEIGHTS: (source / WEIGHTS).read_bytes(),
        **told,
    }
    check_loads(files, place, base)
    write_folder(path, files, overwrite=overwrite)


def _summary(course: Course, budget: int) -> str:
    first = course.evaluations[0].agreement
    if course.chosen == 0:
        why = "the training diverged" if course.stopped == "diverged" else "no step agreed better with the old adapter"
        return f"Nothing gained: {why}; the adapter it started from was kept (agreement {first:.1%} on held-out text)."
    best = next(e.agreement for e in course.evaluations if e.step == course.chosen)
    end = {
        "budget": "",
        "patience": ", stopped early",
        "diverged": ", before the training diverged",
    }[course.stopped]
    return (
        f"Refined: agreement with the old adapter {first:.1%} before, {best:.1%} after step {course.chosen} of "
        f"{budget}{end}, on held-out text."
    )
