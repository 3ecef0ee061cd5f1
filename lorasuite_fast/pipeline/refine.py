"""Refinement without labels, from the models to the folder written."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.adapter import CONFIG, WEIGHTS, broken_tensor, trained_config
from ..adapters.adapter_folder import adapter_digest
from ..adapters.aligned_states import load_tokenizer
from ..adapters.peft_check import check_loads, empty_model
from ..config import Machine, RefineConfig, Runtime
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
    Course,
    Refinement,
    different,
    step_budget,
    texts_of,
    train_on_targets,
)
from ..training.retention import kept_samples, named_text
from ..training.teacher import Targets, write_targets


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
    run = _open(_Named(old, old_adapter, new, adapter, out), config, runtime, overwrite=overwrite)
    texts, source = _read_or_write_texts(run)
    teaching, options = _teaching(run, texts), _options(run)
    works: list[Work] = []
    try:
        with run.ranks.in_turn():
            key = hashlib.sha256(json.dumps(teaching).encode()).hexdigest()[:16]
            works.append(Work(run.cache / f"targets-{key}", teaching, owner=run.ranks.first))
            targets = _teach(run, works[0], texts)
        release_memory()
        budget = step_budget(targets.facts.bytes, config.batch_bytes) if config.steps == "auto" else int(config.steps)
        started = {"start": run.digests[1], "steps": budget}
        with run.ranks.in_turn():
            works.append(Work(run.folder / TRAINING, teaching | options | started, owner=run.ranks.first))
            resumed = works[1].resumed
            works[1].start()
        _announce(run, targets, source, budget)
        # What an interrupted run has trained stays, whatever this one was asked besides.
        with nullcontext() if resumed else unless_unusable(works[1], run.folder), writing(works[1].folder):
            course = _train(run, works[1].folder, targets, budget, options)
        options |= {"learning_rate": course.learning_rate}
        told = _card(run, course, source, budget, options)
        run.ranks.wait()
        if run.ranks.first:
            works[1].complete()
            empty = empty_model(run.new.folder, trust_remote_code=runtime.trust_remote_code)
            _write(run.path, course.source, run.new.name, told, empty, overwrite)
            if config.cache is None:
                works[0].discard()
            remove_work(run.folder)
        run.ranks.wait()
    finally:
        for work in works:
            work.close()
    result = _result(run, course, targets, source, budget, options)
    if run.ranks.first:
        write_report(result, runtime.report)
    return result


@dataclass(frozen=True)
class _Named:
    """The models, the adapters and the output as the caller names them."""

    old: str | os.PathLike[str]
    old_adapter: str | os.PathLike[str]
    new: str | os.PathLike[str]
    adapter: str | os.PathLike[str] | None
    out: str | os.PathLike[str]


@dataclass(frozen=True)
class _Run:
    """A refinement whose input has been found usable.

    Attributes:
        start: The adapter to start from. digests: Of the old adapter and of the start.
        retained: Samples of the text to retain.
        folder: Of the work. cache: Of the targets.
    """

    named: _Named
    config: RefineConfig
    runtime: Runtime
    began: float
    ranks: Ranks
    path: Path
    machine: Machine
    clock: PhaseClock
    old: Checkpoint
    new: Checkpoint
    start: Path | None
    digests: tuple[str, str | None]
    retained: Samples
    folder: Path
    cache: Path

    @property
    def seed(self) -> int:
        return self.config.seed or 0

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        return {"old": self.old.fingerprint(), "new": self.new.fingerprint()}


def _open(named: _Named, config: RefineConfig, runtime: Runtime, *, overwrite: bool) -> _Run:
    """Checks everything that can be checked before a model is loaded, and makes the folders of the work."""
    began = time.perf_counter()
    inputs: dict[str, object] = {
        "OLD": named.old,
        "OLD_ADAPTER": named.old_adapter,
        "NEW": named.new,
        "ADAPTER": named.adapter,
        "`text`": config.text,
        "`retain`": config.retain,
        "`cache`": config.cache,
    }
    check_report(runtime.report, named.out, inputs)
    ranks = Ranks.join()
    folder = refinement_folder(named.out)
    if ranks.first:
        clean_up(named.out, folder, TRAINING)
    path = check_output(named.out, overwrite=overwrite, inputs=inputs)
    machine = runtime.training_machine()
    clock = PhaseClock(runtime.progress, machine.device)
    old, new = Checkpoint(named.old, "old"), Checkpoint(named.new, "new")
    start = None if named.adapter is None else Path(named.adapter).expanduser()
    digests = adapter_digest(named.old_adapter), None if start is None else adapter_digest(start)
    if start is not None and (broken := broken_tensor(start / WEIGHTS)) is not None:
        raise LoraSuiteError(f"{start / WEIGHTS}: {broken} holds NaN or infinity; train or save it again")
    retained = Samples([], 0, 0)
    if config.retain is not None:
        tokenizer = load_tokenizer(named.new, "NEW", trust_remote_code=runtime.trust_remote_code)
        retained = kept_samples(config.retain, tokenizer, config.max_tokens, config.seed or 0)
    cache = folder if config.cache is None else Path(config.cache).expanduser()
    for place in {folder, cache}:
        place.mkdir(parents=True, exist_ok=True)
    return _Run(
        named, config, runtime, began, ranks, path, machine, clock, old, new, start, digests, retained, folder, cache
    )


def _read_or_write_texts(run: _Run) -> tuple[list[str], str]:
    """The texts to learn from, each once, and where they come from; the old model writes them unless some are given."""
    text = run.config.text
    if text is not None and not (isinstance(text, str | os.PathLike) and os.fspath(text) == "self"):
        source = os.fspath(text) if isinstance(text, str | os.PathLike) else f"{len(text)} texts"
        return texts_of(text, run.seed), source
    with run.ranks.in_turn(), run.clock.phase("write text", run.config.text_bytes) as step:
        texts = self_written(
            run.old,
            run.named.old_adapter,
            size=run.config.text_bytes,
            seed=run.seed,
            tokens=run.config.max_tokens,
            device=run.machine.device,
            dtype=run.machine.dtype,
            trust_remote_code=run.runtime.trust_remote_code,
            report=step,
        )
        texts = different(texts)
    texts = run.ranks.share(texts)
    release_memory()
    return texts, "self"


def _teaching(run: _Run, texts: list[str]) -> dict[str, Any]:
    """Everything the targets depend on."""
    config, prints = run.config, run.fingerprints
    return {
        "old": prints["old"],
        "old_adapter": run.digests[0],
        "new": prints["new"],
        "text": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32],
        "imitation": config.imitation,
        "top_k": config.top_k,
        "max_tokens": config.max_tokens,
        "dtype": str(run.machine.dtype),
        "shuffled": run.seed if config.control != "none" else None,
    }


def _options(run: _Run) -> dict[str, Any]:
    """Everything the training depends on besides, but for the number of steps."""
    config = run.config
    options: dict[str, Any] = {
        "learning_rate": config.learning_rate,
        "rank": config.rank,
        "alpha": config.alpha,
        "roles": None if config.roles is None else sorted(config.roles),
        "kl_weight": config.kl_weight,
        "next_token_weight": config.next_token_weight,
        "batch_bytes": config.batch_bytes,
        "eval_every": config.eval_every,
        "patience": config.patience,
        "seed": run.seed,
        "control": config.control,
    }
    if config.retain is not None:
        options |= {"retain": run.retained.digest(), "retain_weight": config.retain_weight}
    if run.ranks.size > 1:
        options |= {"processes": run.ranks.size}
    return options


def _teach(run: _Run, work: Work, texts: list[str]) -> Targets:
    config = run.config
    with unless_unusable(work, run.folder):
        targets = write_targets(
            work,
            run.named.old,
            run.named.old_adapter,
            run.named.new,
            texts,
            run.clock,
            top_k=config.top_k,
            max_tokens=config.max_tokens,
            device=run.machine.device,
            dtype=run.machine.dtype,
            imitation=config.imitation,
            shuffled=config.control != "none",
            seed=run.seed,
            trust_remote_code=run.runtime.trust_remote_code,
        )
        # Each model is opened more than once, and must be the same one every time.
        for model in (run.old, run.new):
            model.tensors.check_same()
    return targets


def _announce(run: _Run, targets: Targets, source: str, budget: int) -> None:
    if run.runtime.say and run.ranks.first:
        facts = targets.facts
        run.runtime.say(
            f"refining: {budget} steps of about {run.config.batch_bytes:,} bytes, from {facts.bytes / 1000:,.0f} KB of "
            f"{'text the old model wrote' if source == 'self' else 'text'} with {facts.positions:,} positions"
        )


def _train(run: _Run, folder: Path, targets: Targets, budget: int, options: dict[str, Any]) -> Course:
    return train_on_targets(
        folder,
        (run.old, run.new),
        run.start,
        targets,
        run.retained.samples,
        run.clock,
        budget,
        options,
        run.machine,
        run.config.gradient_checkpointing,
    )


def _card(run: _Run, course: Course, source: str, budget: int, options: dict[str, Any]) -> dict[str, bytes]:
    """The files that say how the adapter came about."""
    config, adapter = run.config, run.named.adapter
    taken = Step(
        "refinement",
        _summary(course, budget),
        without_machine(options)
        | {"imitation": config.imitation, "top_k": config.top_k, "max_tokens": config.max_tokens},
        run.fingerprints,
        {
            "from": f"{shown(run.named.old_adapter)} on {shown(run.old.name)}",
            "text": shown(source),
            "targets": "NEW's predictions changed as OLD's were"
            + (f", and to {config.imitation:.0%} OLD's own with its adapter" if config.imitation else ""),
            "started from": "a new adapter" if adapter is None else shown(adapter),
            "steps": f"{course.steps} of {budget}, of which {course.chosen} are in what was written",
            "tokens trained on": f"{course.tokens:,}",
            "learning rate": f"{course.learning_rate:g}{_tried(course)}",
            **(
                {"retained": f"{named_text(config.retain)}, weight {config.retain_weight:g}"}
                if config.retain is not None
                else {}
            ),
        },
    )
    return card_files(run.new.name, taken, run.start, wrapped=run.new.family.wrapper is not None)


def _tried(course: Course) -> str:
    tried = ", ".join(f"{value:.3f} at {rate:g}" for rate, value in sorted(course.rates.items()))
    return f", found by trials (agreement {tried})" if tried else ""


def _result(
    run: _Run, course: Course, targets: Targets, source: str, budget: int, options: dict[str, Any]
) -> Refinement:
    named, config = run.named, run.config
    return Refinement(
        old=os.fspath(named.old),
        old_adapter=os.fspath(named.old_adapter),
        new=os.fspath(named.new),
        start=None if named.adapter is None else os.fspath(named.adapter),
        out=os.fspath(named.out),
        steps=course.steps,
        budget=budget,
        chosen_step=course.chosen,
        kept_start=course.chosen == 0,
        stopped=course.stopped,
        summary=_summary(course, budget),
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
            "device": run.machine.device.type,
            "dtype": str(run.machine.dtype).removeprefix("torch."),
            "gradient_checkpointing": course.checkpointing,
            "rates_tried": {f"{rate:g}": value for rate, value in sorted(course.rates.items())},
        },
        phases=run.clock.phases,
        seconds=time.perf_counter() - run.began,
        fingerprints=run.fingerprints,
    )


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
