"""Refinement without labels, from the models to the folder written."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import CONFIG, WEIGHTS, broken_tensor, trained_config
from ..adapters.adapter_folder import adapter_digest
from ..adapters.aligned_states import load_tokenizer
from ..adapters.peft_check import check_loads, empty_model
from ..config import pick_device, pick_dtype
from ..errors import LoraSuiteError
from ..io.hub_ids import shown
from ..io.json_files import read_json
from ..io.output import check_output, write_folder, writing
from ..io.phases import PhaseClock, Progress, release_memory
from ..io.ranks import Ranks
from ..io.report_path import check_report
from ..io.work import Work, clean_up, remove_work, unless_unusable
from ..models.checkpoint import Checkpoint
from ..models.families import ROLES
from ..reporting.html_report import write_report
from ..reporting.model_card import card_files
from ..reporting.provenance import Step, without_machine
from ..text.samples import Samples
from ..text.self_text import self_written
from ..training.loop import TRAINING
from ..training.refinement import (
    BATCH_BYTES,
    CONTROLS,
    MAX_TOKENS,
    RATE,
    SELF_TEXT_BYTES,
    Course,
    Refinement,
    check_refinement,
    different,
    step_budget,
    texts_of,
    train_on_targets,
)
from ..training.retention import RETAIN_WEIGHT, check_retain_weight, kept_samples, named_text
from ..training.teacher import write_targets
from ..transfer.memory import parse_memory


def refinement_folder(out: str | os.PathLike[str]) -> Path:
    """Where a refinement that is to write `out` keeps its work: a hidden sibling."""
    path = Path(out).expanduser().absolute()
    return path.with_name(f".{path.name}.refine")


def refine(
    old: str | os.PathLike[str],
    old_adapter: str | os.PathLike[str],
    new: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | Sequence[str] | None = None,
    text_bytes: int = SELF_TEXT_BYTES,
    steps: int | str = "auto",
    learning_rate: float = RATE,
    rank: int | None = None,
    alpha: float | None = None,
    roles: Sequence[str] | None = None,
    imitation: float = 0.5,
    kl_weight: float = 1.0,
    next_token_weight: float = 0.0,
    retain: str | os.PathLike[str] | None = None,
    retain_weight: float = RETAIN_WEIGHT,
    batch_bytes: int = BATCH_BYTES,
    max_tokens: int = MAX_TOKENS,
    top_k: int | str | None = "auto",
    eval_every: int = 25,
    patience: int | None = 6,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    memory: str | int | None = None,
    gradient_checkpointing: bool = False,
    cache: str | os.PathLike[str] | None = None,
    control: str = "none",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    report: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Refinement:
    """Trains an adapter for NEW to do what OLD's adapter does, without labels.

    The old model writes the text unless one is given, once for all successors; the teacher's targets are worked out and
    kept on disk, one model in memory at a time; then the adapter is trained. Targets and training are kept beside OUT
    until it is complete, and the same call goes on from them after an interruption.

    Args:
        old, new: model folders or hub ids. old_adapter: PEFT folder trained on old.
        adapter: PEFT folder for new to start from; None starts from an adapter that does nothing.
        out: PEFT LoRA folder to write.
        text: None or "self" has the old model write with its adapter; else a .jsonl (field `text`) or .txt file, or
            texts. text_bytes: how much it writes.
        steps: optimizer steps, or "auto": `step_budget` of the text.
        learning_rate: at the first step, falling linearly to 0; AdamW without warm-up or weight decay. The default
            suits small models; large ones need less.
        rank, alpha, roles: of a new adapter; by default 8, twice the rank, and all projections. With `adapter`, rank or
            roles put it among further rows and modules, so that training starts from the same function.
        imitation: share of the adapted old model's own prediction in the targets, 0 to 1. 0 carries the change alone, 1
            copies the old model.
        kl_weight, next_token_weight: of the two losses, both means over their positions.
        retain: unlabelled text on which the model's predictions are to stay what they are without an adapter: a .jsonl
            (field `text`) or .txt file, or "shipped" for the general text that comes with the package. A step reads
            about as many tokens of it and takes two to three times as long. The old adapter has its effect on
            such text too, and less of it arrives. retain_weight: of that divergence beside the losses.
        batch_bytes: of text a step reads. max_tokens: of each text, for each model.
        top_k: most probable tokens kept of each target, the rest as one; None keeps all shared tokens, "auto" so many
            that 2 % of the divergence is lost at most, but not all where their targets would exceed 8 GiB.
        eval_every: steps between evaluations, each a checkpoint. patience: evaluations without a better one after which
            to stop; None never stops.
        dtype: auto is bfloat16 on a GPU that has it, else float32; the adapter is float32 always.
        memory: what may be resident on the device, e.g. "6GB"; turns gradient checkpointing on where needed.
        cache: folder that keeps the targets for further runs; by default they go when OUT is complete.
        report: HTML file to write (`html_report.write_report`); an earlier report there is replaced.
        say: called with one sentence, what will be done, before the training starts.
        control: "shuffled" trains on targets whose change belongs to another position, the text as it is, so that its
            next tokens still teach. "shuffled-labels" also puts those in random order: what is left is a constant.

    Raises:
        LoraSuiteError: for input that cannot be used; OUT is then untouched.
    """
    begin = time.perf_counter()
    inputs: dict[str, object] = {"OLD": old, "OLD_ADAPTER": old_adapter, "NEW": new, "ADAPTER": adapter, "`text`": text}
    inputs |= {"`retain`": retain, "`cache`": cache}
    check_report(report, out, inputs)
    ranks = Ranks.join()
    if ranks.first:
        clean_up(out, refinement_folder(out), TRAINING)
    path = check_output(out, overwrite=overwrite, inputs=inputs)
    check_retain_weight(retain_weight)
    if not 0 <= imitation <= 1:
        raise LoraSuiteError(f"imitation is {imitation}; it must be from 0 to 1")
    weights = kl_weight, next_token_weight
    check_refinement(steps, rank, alpha, learning_rate, weights, batch_bytes, max_tokens, top_k, eval_every, patience)
    if memory is not None:
        parse_memory(memory)
    if control not in CONTROLS:
        raise LoraSuiteError(f"control {control!r} is not one of {', '.join(CONTROLS)}")
    for role in roles or ():
        if role not in ROLES:
            raise LoraSuiteError(f"role {role!r} is not one of {', '.join(ROLES)}")
    run_device = pick_device(device)
    half = run_device.type == "cuda" and torch.cuda.is_bf16_supported()
    run_dtype = torch.bfloat16 if dtype == "auto" and half else pick_dtype(dtype)
    clock = PhaseClock(progress, run_device)
    checkpoint_o, checkpoint_n = Checkpoint(old, "old"), Checkpoint(new, "new")
    start = None if adapter is None else Path(adapter).expanduser()
    # Read before anything that takes long, so that what is missing is missed.
    digests = adapter_digest(old_adapter), None if start is None else adapter_digest(start)
    if start is not None and (broken := broken_tensor(start / WEIGHTS)) is not None:
        raise LoraSuiteError(f"{start / WEIGHTS}: {broken} holds NaN or infinity; train or save it again")
    kept_text = Samples([], 0, 0)
    if retain is not None:
        tokenizer = load_tokenizer(new, "NEW", trust_remote_code=trust_remote_code)
        kept_text = kept_samples(retain, tokenizer, max_tokens, seed)
    folder = refinement_folder(out)
    kept = folder if cache is None else Path(cache).expanduser()
    for place in {folder, kept}:
        place.mkdir(parents=True, exist_ok=True)

    if text is None or (isinstance(text, str | os.PathLike) and os.fspath(text) == "self"):
        source = "self"
        with ranks.in_turn(), clock.phase("write text", text_bytes) as step:
            texts = self_written(
                checkpoint_o,
                old_adapter,
                size=text_bytes,
                seed=seed,
                tokens=max_tokens,
                device=run_device,
                dtype=run_dtype,
                trust_remote_code=trust_remote_code,
                report=step,
            )
            texts = different(texts)
        texts = ranks.share(texts)
        release_memory()
    else:
        source = os.fspath(text) if isinstance(text, str | os.PathLike) else f"{len(text)} texts"
        texts = texts_of(text, seed)

    teaching: dict[str, Any] = {
        "old": checkpoint_o.fingerprint(),
        "old_adapter": digests[0],
        "new": checkpoint_n.fingerprint(),
        "text": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32],
        "imitation": imitation,
        "top_k": top_k,
        "max_tokens": max_tokens,
        "dtype": str(run_dtype),
        "shuffled": seed if control != "none" else None,
    }
    key = hashlib.sha256(json.dumps(teaching).encode()).hexdigest()[:16]
    options: dict[str, Any] = {
        "learning_rate": learning_rate,
        "rank": rank,
        "alpha": alpha,
        "roles": None if roles is None else sorted(roles),
        "kl_weight": kl_weight,
        "next_token_weight": next_token_weight,
        "batch_bytes": batch_bytes,
        "eval_every": eval_every,
        "patience": patience,
        "seed": seed,
        "control": control,
    }
    if retain is not None:
        options |= {"retain": kept_text.digest(), "retain_weight": retain_weight}
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
                    top_k=top_k,
                    max_tokens=max_tokens,
                    device=run_device,
                    dtype=run_dtype,
                    imitation=imitation,
                    shuffled=control != "none",
                    seed=seed,
                    trust_remote_code=trust_remote_code,
                )
                # Each model is opened more than once, and must be the same one every time.
                for model in (checkpoint_o, checkpoint_n):
                    model.tensors.check_same()
        release_memory()
        budget = step_budget(targets.facts.bytes, batch_bytes) if steps == "auto" else int(steps)
        started = {"start": digests[1], "steps": budget}
        with ranks.in_turn():
            works.append(Work(folder / TRAINING, teaching | options | started, owner=ranks.first))
            resumed = works[1].resumed
            works[1].start()
        if say and ranks.first:
            facts = targets.facts
            say(
                f"refining: {budget} steps of about {batch_bytes:,} bytes, from {facts.bytes / 1000:,.0f} KB of "
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
                memory,
                gradient_checkpointing,
                trust_remote_code,
            )
        summary = _summary(course, budget)
        taken = Step(
            "refinement",
            summary,
            without_machine(options) | {"imitation": imitation, "top_k": top_k, "max_tokens": max_tokens},
            {"old": teaching["old"], "new": teaching["new"]},
            {
                "from": f"{shown(old_adapter)} on {shown(checkpoint_o.name)}",
                "text": shown(source),
                "targets": "NEW's predictions changed as OLD's were"
                + (f", and to {imitation:.0%} OLD's own with its adapter" if imitation else ""),
                "started from": "a new adapter" if adapter is None else shown(adapter),
                "steps": f"{course.steps} of {budget}, of which {course.chosen} are in what was written",
                "tokens trained on": f"{course.tokens:,}",
                "learning rate": f"{learning_rate:g}",
                **({"retained": f"{named_text(retain)}, weight {retain_weight:g}"} if retain is not None else {}),
            },
        )
        told = card_files(checkpoint_n.name, taken, start, wrapped=checkpoint_n.family.wrapper is not None)
        ranks.wait()
        if ranks.first:
            works[1].complete()
            empty = empty_model(checkpoint_n.folder, trust_remote_code=trust_remote_code)
            _write(path, course.source, checkpoint_n.name, told, empty, overwrite)
            if cache is None:
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
            "imitation": imitation,
            "top_k": top_k,
            "max_tokens": max_tokens,
            "device": run_device.type,
            "dtype": str(run_dtype).removeprefix("torch."),
            "gradient_checkpointing": course.checkpointing,
        },
        phases=clock.phases,
        seconds=time.perf_counter() - begin,
        fingerprints={"old": teaching["old"], "new": teaching["new"]},
    )
    if ranks.first:
        write_report(result, report)
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
