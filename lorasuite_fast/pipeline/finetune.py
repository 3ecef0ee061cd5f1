"""Fine-tuning on labelled samples, from the model to the folder written."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.adapter import CONFIG, WEIGHTS, trained_config
from ..adapters.adapter_folder import adapter_digest
from ..adapters.aligned_states import LoadedModel, load_tokenizer
from ..adapters.peft_check import check_loads, empty_model
from ..config import FinetuneConfig, Machine, Runtime
from ..config.flat import takes_flat_keywords
from ..errors import LoraSuiteError
from ..io.hub_ids import shown
from ..io.json_files import read_json
from ..io.output import check_output, write_folder, writing
from ..io.phases import PhaseClock
from ..io.ranks import Ranks
from ..io.report_path import check_report
from ..io.work import Work, clean_up, remove_work, unless_unusable
from ..models.checkpoint import Checkpoint, resolve_folder
from ..models.families import ATTENTION, ROLES
from ..reporting.html_report import write_report
from ..reporting.model_card import card_files
from ..reporting.provenance import Step, without_machine
from ..text.samples import Data, Samples
from ..training.finetuning import (
    RANK,
    SAVE_STEPS,
    Course,
    Finetuning,
    new_adapter,
    split_samples,
    train_on_samples,
)
from ..training.loop import TRAINING
from ..training.retention import kept_samples, named_text


def finetuning_folder(out: str | os.PathLike[str]) -> Path:
    """Where a fine-tuning that is to write `out` keeps its work: a hidden sibling."""
    path = Path(out).expanduser().absolute()
    return path.with_name(f".{path.name}.finetune")


@takes_flat_keywords(config=FinetuneConfig, runtime=Runtime)
def finetune(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    data: Data,
    out: str | os.PathLike[str],
    *,
    config: FinetuneConfig | None = None,
    runtime: Runtime | None = None,
    overwrite: bool = False,
) -> Finetuning:
    """Trains an adapter on labelled samples, from the factors it has, and writes the result as another folder.

    AdamW without weight decay, a learning rate that falls linearly to 0 without a warm-up, gradients clipped to norm 1
    (the default of transformers' Trainer, which the paper's training code leaves as it is). The base model is frozen.
    Checkpoints are kept beside OUT until it is complete; the same call goes on from the last one after an interruption,
    and gives the same adapter to the bit.

    A run that diverges (see `Finetuning.diverged`) writes the adapter it started from, unchanged. ADAPTER itself is
    never written to.

    Args:
        model: Folder or hub id.
        adapter: A PEFT folder for it, or None for a new one that does nothing yet.
        data: What `FinetuneConfig.data` may be.
        out: PEFT folder to write.
        config: How it is trained.
        runtime: Device, dtype, report and progress. The adapter is float32 at least.
        overwrite: Replace what exists at out, once the new one is complete.

    Returns:
        What the training came to.

    Raises:
        LoraSuiteError: for input that cannot be used; OUT is then untouched.
    """
    config, runtime = config or FinetuneConfig(), runtime or Runtime()
    run = _open(_Named(model, adapter, data, out), config, runtime, overwrite=overwrite)
    read = _read(run)
    options = _options(run, read)
    loaded = _load(run, read, options)
    identity = _identity(run, read, options)
    folder = finetuning_folder(run.path)
    folder.mkdir(exist_ok=True)
    with run.ranks.in_turn():
        work = Work(folder / TRAINING, identity, owner=run.ranks.first)
        work.start()
    try:
        _announce(run, read, options["steps"])
        with unless_unusable(work, folder), writing(work.folder):
            course = train_on_samples(
                work.folder,
                loaded,
                run.start,
                read.training.samples,
                read.held_out.samples,
                read.retained.samples,
                run.clock,
                options,
                config.gradient_checkpointing,
            )
        told = _card(run, read, course, options, identity["model"])
        config_of = course.source if run.start is None else run.start
        run.ranks.wait()
        if run.ranks.first:
            work.complete()
            place = empty_model(run.checkpoint.folder, trust_remote_code=runtime.trust_remote_code)
            _write(run.path, course.source, config_of, run.checkpoint.name, told, place, overwrite)
            remove_work(folder)
        run.ranks.wait()
    finally:
        work.close()
    result = _result(run, read, course, loaded, options, identity["model"])
    if run.ranks.first:
        write_report(result, runtime.report)
    return result


@dataclass(frozen=True)
class _Named:
    """The model, the adapter, the data and the output as the caller names them."""

    model: str | os.PathLike[str]
    adapter: str | os.PathLike[str] | None
    data: Data
    out: str | os.PathLike[str]


@dataclass(frozen=True)
class _Run:
    """A fine-tuning whose arguments have been found usable; `start` is the adapter to start from."""

    named: _Named
    config: FinetuneConfig
    runtime: Runtime
    began: float
    ranks: Ranks
    path: Path
    machine: Machine
    clock: PhaseClock
    checkpoint: Checkpoint
    start: Path | None

    @property
    def seed(self) -> int:
        return self.config.seed or 0

    @property
    def wording(self) -> dict[str, Any]:
        """How a record becomes a sample."""
        return {
            "template": self.config.template,
            "max_tokens": self.config.max_tokens,
            "completion_only": self.config.completion_only,
        }


@dataclass(frozen=True)
class _Read:
    """The samples to learn, those held out and those of the text to retain."""

    training: Samples
    held_out: Samples
    retained: Samples

    def epoch(self, batch: int) -> int:
        """Steps that read every sample to learn once."""
        return math.ceil(len(self.training.samples) / batch)


def _open(named: _Named, config: FinetuneConfig, runtime: Runtime, *, overwrite: bool) -> _Run:
    """Checks the arguments before anything is read or loaded."""
    began = time.perf_counter()
    inputs = {
        "MODEL": named.model,
        "ADAPTER": named.adapter,
        "DATA": named.data,
        "`validation`": config.validation,
        "`retain`": config.retain,
    }
    check_report(runtime.report, named.out, inputs)
    ranks = Ranks.join()
    if ranks.first:
        clean_up(named.out, finetuning_folder(named.out), TRAINING)
    path = check_output(named.out, overwrite=overwrite, inputs=inputs)
    if named.adapter is not None and (config.rank, config.alpha, config.dropout, config.roles) != (None,) * 4:
        raise LoraSuiteError("rank, alpha, dropout and roles are those of a new adapter; ADAPTER has its own")
    machine = runtime.training_machine()
    clock = PhaseClock(runtime.progress, machine.device)
    checkpoint = Checkpoint(named.model, "model")
    start = None if named.adapter is None else resolve_folder(named.adapter, what="ADAPTER")
    return _Run(named, config, runtime, began, ranks, path, machine, clock, checkpoint, start)


def _read(run: _Run) -> _Read:
    config = run.config
    with run.clock.phase("read data", 1):
        tokenizer = load_tokenizer(run.named.model, "MODEL", trust_remote_code=run.runtime.trust_remote_code)
        training, held_out = split_samples(run.named.data, config.validation, tokenizer, run.wording, run.seed)
        retained = kept_samples(config.retain, tokenizer, config.max_tokens, run.seed)
    return _Read(training, held_out, retained)


def _options(run: _Run, read: _Read) -> dict[str, Any]:
    """Everything the training depends on but for the model, the adapter and the data."""
    config, epoch = run.config, read.epoch(run.config.batch)
    options: dict[str, Any] = {
        "steps": config.epochs * epoch if config.steps is None else config.steps,
        "batch": config.batch,
        "micro_batch": min(config.micro_batch or config.batch, config.batch),
        "learning_rate": config.learning_rate,
        "save_every": config.save_every or min(epoch, SAVE_STEPS),
        "seed": run.seed,
        "dtype": str(run.machine.dtype).removeprefix("torch."),
    }
    if read.retained.samples:
        options["retain_weight"] = config.retain_weight
    if run.start is None:
        options |= {
            "rank": config.rank or RANK,
            "alpha": config.alpha or config.rank or RANK,
            "dropout": config.dropout or 0.0,
            "roles": sorted(config.roles or ATTENTION, key=ROLES.index),
        }
    return options


def _load(run: _Run, read: _Read, options: dict[str, Any]) -> LoadedModel:
    """The model with the adapter to train."""
    checkpoint, machine = run.checkpoint, run.machine
    with run.clock.phase("load", 1):
        loaded = LoadedModel(
            checkpoint.folder,
            "MODEL",
            device=machine.device,
            dtype=machine.dtype,
            trust_remote_code=run.runtime.trust_remote_code,
        )
        checkpoint.tensors.check_same()
        parts = read.training, read.held_out, read.retained
        loaded.check_ids([sample.ids for part in parts for sample in part.samples])
        if run.start is None:
            new_adapter(loaded, checkpoint.family, options, run.seed)
        else:
            loaded.attach(run.start, trainable=True)
        # A name of the hub would be looked up there at every checkpoint.
        loaded.peft.peft_config["default"].base_model_name_or_path = checkpoint.name
    return loaded


def _identity(run: _Run, read: _Read, options: dict[str, Any]) -> dict[str, Any]:
    """Everything the adapter's bits depend on."""
    return options | {
        "model": run.checkpoint.fingerprint(),
        "adapter": None if run.start is None else adapter_digest(run.start),
        "data": read.training.digest(),
        "validation": read.held_out.digest(),
        **({"retain": read.retained.digest()} if read.retained.samples else {}),
        **({"processes": run.ranks.size} if run.ranks.size > 1 else {}),
    }


def _announce(run: _Run, read: _Read, budget: int) -> None:
    if run.runtime.say and run.ranks.first:
        samples = read.training.samples
        run.runtime.say(
            f"fine-tuning: {budget} steps of {run.config.batch} samples, from {len(samples):,} samples with "
            f"{sum(sample.tokens for sample in samples):,} tokens to learn"
        )


def _card(run: _Run, read: _Read, course: Course, options: dict[str, Any], fingerprint: str) -> dict[str, bytes]:
    """The files that say how the adapter came about."""
    config, adapter, budget = run.config, run.named.adapter, options["steps"]
    taken = Step(
        "fine-tuning",
        _summary(course, budget, len(read.training.samples)),
        without_machine(options) | {"max_tokens": config.max_tokens, "completion_only": config.completion_only},
        {"model": fingerprint},
        {
            "started from": "a new adapter" if adapter is None else shown(adapter),
            "samples": f"{len(read.training.samples):,}, and {len(read.held_out.samples):,} for validation",
            "steps": f"{len(course.losses)} of {budget}, batches of {config.batch}",
            "learning rate": f"{config.learning_rate:g}",
            "prompts": config.template if config.template in ("alpaca", "chat") else "a template of one's own",
            "tokens trained on": f"{course.tokens:,}",
            **(
                {"retained": f"{named_text(config.retain)}, weight {config.retain_weight:g}"}
                if config.retain is not None
                else {}
            ),
        },
    )
    return card_files(run.checkpoint.name, taken, run.start, wrapped=run.checkpoint.family.wrapper is not None)


def _result(
    run: _Run, read: _Read, course: Course, loaded: LoadedModel, options: dict[str, Any], fingerprint: str
) -> Finetuning:
    named, config, training, held_out = run.named, run.config, read.training, read.held_out
    return Finetuning(
        model=os.fspath(named.model),
        adapter=None if named.adapter is None else os.fspath(named.adapter),
        out=os.fspath(named.out),
        steps=len(course.losses),
        budget=options["steps"],
        chosen_step=course.chosen,
        diverged=course.diverged is not None,
        kept_start=course.chosen == 0,
        summary=_summary(course, options["steps"], len(training.samples)),
        start_loss=course.start_loss,
        end_loss=course.end_loss,
        losses=course.losses,
        start_retained_kl=course.start_retained_kl,
        retained_kl=course.retained_kl,
        evaluations=course.evaluations,
        samples=len(training.samples),
        validation_samples=len(held_out.samples),
        truncated=training.truncated + held_out.truncated,
        left_out=training.left_out + held_out.left_out,
        trained_tokens=course.tokens,
        trainable_parameters=sum(p.numel() for p in loaded.peft.parameters() if p.requires_grad),
        options=options
        | run.wording
        | ({} if config.retain is None else {"retain": os.fspath(config.retain)})
        | {
            "device": run.machine.device.type,
            "epochs": options["steps"] / read.epoch(config.batch),
            "gradient_checkpointing": config.gradient_checkpointing,
        },
        phases=run.clock.phases,
        seconds=time.perf_counter() - run.began,
        fingerprints={"model": fingerprint},
    )


def _write(
    path: Path, weights: Path, config_of: Path, base: str, told: dict[str, bytes], place: nn.Module, overwrite: bool
) -> None:
    """Puts an adapter at OUT in the name of the model, with its configuration, once PEFT has put it on `place`."""
    files = {
        CONFIG: trained_config(read_json(config_of / CONFIG), base),
        WEIGHTS: (weights / WEIGHTS).read_bytes(),
        **told,
    }
    check_loads(files, place, base)
    write_folder(path, files, overwrite=overwrite)


def _summary(course: Course, budget: int, samples: int) -> str:
    if course.diverged is not None:
        return f"Diverged: {course.diverged}; the adapter it started from was written unchanged."
    if course.chosen == 0:
        best = course.evaluations[0].loss
        return (
            f"Nothing gained: no checkpoint has a lower loss on the validation samples than the start's {best:.3f}; "
            "the adapter it started from was written unchanged."
        )
    end = f"{course.start_loss:.3f} before, {course.end_loss:.3f} in the last third"
    text = f"Fine-tuned: {budget} steps over {samples:,} samples; loss {end}"
    if course.evaluations:
        chosen = next(e.loss for e in course.evaluations if e.step == course.chosen)
        before = course.evaluations[0].loss
        text += f"; on the validation samples {before:.3f} before, {chosen:.3f} after step {course.chosen}"
    if course.retained_kl is not None:
        text += (
            f"; on the text to retain {course.start_retained_kl:.3f} nats from the bare model before, "
            f"{course.retained_kl:.3f} in the last third"
        )
    return f"{text}."
