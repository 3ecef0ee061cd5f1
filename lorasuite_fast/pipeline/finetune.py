"""Fine-tuning on labelled samples, from the model to the folder written."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import CONFIG, WEIGHTS, trained_config
from ..adapters.adapter_folder import adapter_digest
from ..adapters.aligned_states import LoadedModel, load_tokenizer
from ..adapters.peft_check import check_loads, empty_model
from ..config import FinetuneConfig, Runtime, pick_device, pick_dtype
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
from ..text.samples import Data
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
    seed = config.seed or 0
    begin = time.perf_counter()
    inputs = {
        "MODEL": model,
        "ADAPTER": adapter,
        "DATA": data,
        "`validation`": config.validation,
        "`retain`": config.retain,
    }
    check_report(runtime.report, out, inputs)
    ranks = Ranks.join()
    if ranks.first:
        clean_up(out, finetuning_folder(out), TRAINING)
    path = check_output(out, overwrite=overwrite, inputs=inputs)
    if adapter is not None and (config.rank, config.alpha, config.dropout, config.roles) != (None,) * 4:
        raise LoraSuiteError("rank, alpha, dropout and roles are those of a new adapter; ADAPTER has its own")
    run_device = pick_device(runtime.device)
    half = run_device.type == "cuda" and torch.cuda.is_bf16_supported()
    run_dtype = torch.bfloat16 if runtime.dtype == "auto" and half else pick_dtype(runtime.dtype)
    clock = PhaseClock(runtime.progress, run_device)
    checkpoint = Checkpoint(model, "model")
    start = None if adapter is None else resolve_folder(adapter, what="ADAPTER")
    with clock.phase("read data", 1):
        tokenizer = load_tokenizer(model, "MODEL", trust_remote_code=runtime.trust_remote_code)
        wording: dict[str, Any] = {
            "template": config.template,
            "max_tokens": config.max_tokens,
            "completion_only": config.completion_only,
        }
        training, held_out = split_samples(data, config.validation, tokenizer, wording, seed)
        kept = kept_samples(config.retain, tokenizer, config.max_tokens, seed)
    epoch = math.ceil(len(training.samples) / config.batch)
    budget = config.epochs * epoch if config.steps is None else config.steps
    new: dict[str, Any] = {}
    if start is None:
        new = {
            "rank": config.rank or RANK,
            "alpha": config.alpha or config.rank or RANK,
            "dropout": config.dropout or 0.0,
        }
        new["roles"] = sorted(config.roles or ATTENTION, key=ROLES.index)
    options: dict[str, Any] = {
        "steps": budget,
        "batch": config.batch,
        "micro_batch": min(config.micro_batch or config.batch, config.batch),
        "learning_rate": config.learning_rate,
        "save_every": config.save_every or min(epoch, SAVE_STEPS),
        "seed": seed,
        "dtype": str(run_dtype).removeprefix("torch."),
        **({"retain_weight": config.retain_weight} if kept.samples else {}),
        **new,
    }
    with clock.phase("load", 1):
        loaded = LoadedModel(
            checkpoint.folder, "MODEL", device=run_device, dtype=run_dtype, trust_remote_code=runtime.trust_remote_code
        )
        checkpoint.tensors.check_same()
        loaded.check_ids([sample.ids for part in (training, held_out, kept) for sample in part.samples])
        if start is None:
            new_adapter(loaded, checkpoint.family, new, seed)
        else:
            loaded.attach(start, trainable=True)
        # A name of the hub would be looked up there at every checkpoint.
        loaded.peft.peft_config["default"].base_model_name_or_path = checkpoint.name
    identity = options | {
        "model": checkpoint.fingerprint(),
        "adapter": None if start is None else adapter_digest(start),
        "data": training.digest(),
        "validation": held_out.digest(),
        **({"retain": kept.digest()} if kept.samples else {}),
        **({"processes": ranks.size} if ranks.size > 1 else {}),
    }
    folder = finetuning_folder(path)
    folder.mkdir(exist_ok=True)
    with ranks.in_turn():
        work = Work(folder / TRAINING, identity, owner=ranks.first)
        work.start()
    try:
        if runtime.say and ranks.first:
            tokens = sum(sample.tokens for sample in training.samples)
            runtime.say(
                f"fine-tuning: {budget} steps of {config.batch} samples, from {len(training.samples):,} samples with "
                f"{tokens:,} tokens to learn"
            )
        with unless_unusable(work, folder), writing(work.folder):
            course = train_on_samples(
                work.folder,
                loaded,
                start,
                training.samples,
                held_out.samples,
                kept.samples,
                clock,
                options,
                config.gradient_checkpointing,
            )
        summary = _summary(course, budget, len(training.samples))
        taken = Step(
            "fine-tuning",
            summary,
            without_machine(options) | {"max_tokens": config.max_tokens, "completion_only": config.completion_only},
            {"model": identity["model"]},
            {
                "started from": "a new adapter" if adapter is None else shown(adapter),
                "samples": f"{len(training.samples):,}, and {len(held_out.samples):,} for validation",
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
        told = card_files(checkpoint.name, taken, start, wrapped=checkpoint.family.wrapper is not None)
        config_of = course.source if start is None else start
        ranks.wait()
        if ranks.first:
            work.complete()
            place = empty_model(checkpoint.folder, trust_remote_code=runtime.trust_remote_code)
            _write(path, course.source, config_of, checkpoint.name, told, place, overwrite)
            remove_work(folder)
        ranks.wait()
    finally:
        work.close()
    result = Finetuning(
        model=os.fspath(model),
        adapter=None if adapter is None else os.fspath(adapter),
        out=os.fspath(out),
        steps=len(course.losses),
        budget=budget,
        chosen_step=course.chosen,
        diverged=course.diverged is not None,
        kept_start=course.chosen == 0,
        summary=summary,
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
        | wording
        | ({} if config.retain is None else {"retain": os.fspath(config.retain)})
        | {
            "device": run_device.type,
            "epochs": budget / epoch,
            "gradient_checkpointing": config.gradient_checkpointing,
        },
        phases=clock.phases,
        seconds=time.perf_counter() - begin,
        fingerprints={"model": identity["model"]},
    )
    if ranks.first:
        write_report(result, runtime.report)
    return result


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
