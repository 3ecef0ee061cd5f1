"""Fine-tuning on labelled samples, from the model to the folder written."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import CONFIG, WEIGHTS, trained_config
from ..adapters.adapter_folder import adapter_digest
from ..adapters.aligned_states import LoadedModel, load_tokenizer
from ..adapters.peft_check import check_loads, empty_model
from ..config import pick_device, pick_dtype
from ..errors import LoraSuiteError
from ..io.hub_ids import shown
from ..io.json_files import read_json
from ..io.output import check_output, write_folder, writing
from ..io.phases import PhaseClock, Progress
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
    BATCH,
    EPOCHS,
    LEARNING_RATE,
    MAX_TOKENS,
    RANK,
    SAVE_STEPS,
    Course,
    Finetuning,
    check_finetuning,
    new_adapter,
    split_samples,
    train_on_samples,
)
from ..training.loop import TRAINING
from ..training.retention import RETAIN_WEIGHT, check_retain_weight, kept_samples, named_text


def finetuning_folder(out: str | os.PathLike[str]) -> Path:
    """Where a fine-tuning that is to write `out` keeps its work: a hidden sibling."""
    path = Path(out).expanduser().absolute()
    return path.with_name(f".{path.name}.finetune")


def finetune(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    data: Data,
    out: str | os.PathLike[str],
    *,
    epochs: int = EPOCHS,
    steps: int | None = None,
    batch: int = BATCH,
    micro_batch: int | None = None,
    learning_rate: float = LEARNING_RATE,
    max_tokens: int = MAX_TOKENS,
    template: str = "alpaca",
    completion_only: bool = False,
    validation: float | Data | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    roles: Sequence[str] | None = None,
    save_every: int | None = None,
    retain: str | os.PathLike[str] | None = None,
    retain_weight: float = RETAIN_WEIGHT,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    gradient_checkpointing: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    report: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Finetuning:
    """Trains an adapter on labelled samples, from the factors it has, and writes the result as another folder.

    AdamW without weight decay, a learning rate that falls linearly to 0 without a warm-up, gradients clipped to norm 1
    (the default of transformers' Trainer, which the paper's training code leaves as it is). The base model is frozen.
    Checkpoints are kept beside OUT until it is complete; the same call goes on from the last one after an interruption,
    and gives the same adapter to the bit.

    A run that diverges (see `Finetuning.diverged`) writes the adapter it started from, unchanged. ADAPTER itself is
    never written to.

    Args:
        model: folder or hub id. adapter: a PEFT folder for it, or None for a new one that does nothing yet.
        data: a .json, .jsonl or .txt file, a folder saved by `datasets` or the hub id of a data set (both need that
            package), or a sequence of records: see `samples.read_records` and `samples.SampleMaker`.
        out: PEFT folder to write.
        epochs: how often each sample is read. steps: optimizer steps, in place of epochs.
        batch: samples a step reads. micro_batch: samples computed at once, all by default; changes memory and speed,
            but of the result only the rounding and the draws of dropout.
        max_tokens: of a row, special tokens included; the rest is cut off.
        template: "alpaca", "chat", or a text with {instruction} and {input}: how records become prompts.
        completion_only: count only what answers the prompt in the loss.
        validation: samples that are not trained on: a share of the data between 0 and 1, or data of its own. The
            adapter written is then the one of all checkpoints and the start that has the lowest loss on them.
        rank, alpha, dropout, roles: of a new adapter: 32, the rank, 0 and q, k, v, o.
        save_every: steps between checkpoints; by default an epoch, 50 at most.
        retain: unlabelled text on which the model's predictions are to stay what they are without an adapter: a .jsonl
            (field `text`) or .txt file, or "shipped" for the general text that comes with the package. A step reads
            about as many tokens of it as of samples, and takes two to three times as long. retain_weight: of that
            divergence beside the loss.
        dtype: of the base model and the products; auto is bfloat16 on a GPU that has it, else float32. The adapter is
            float32 at least.
        gradient_checkpointing: recompute activations: less memory, more time.
        say: called with one sentence, what will be done, before the training starts.
        report: HTML file to write (`html_report.write_report`); an earlier report there is replaced.

    Raises:
        LoraSuiteError: for input that cannot be used; OUT is then untouched.
    """
    begin = time.perf_counter()
    inputs = {"MODEL": model, "ADAPTER": adapter, "DATA": data, "`validation`": validation, "`retain`": retain}
    check_report(report, out, inputs)
    ranks = Ranks.join()
    if ranks.first:
        clean_up(out, finetuning_folder(out), TRAINING)
    path = check_output(out, overwrite=overwrite, inputs=inputs)
    check_finetuning(
        epochs, steps, batch, micro_batch, learning_rate, max_tokens, rank, alpha, dropout, roles, save_every
    )
    check_retain_weight(retain_weight)
    if adapter is not None and (rank, alpha, dropout, roles) != (None,) * 4:
        raise LoraSuiteError("rank, alpha, dropout and roles are those of a new adapter; ADAPTER has its own")
    run_device = pick_device(device)
    half = run_device.type == "cuda" and torch.cuda.is_bf16_supported()
    run_dtype = torch.bfloat16 if dtype == "auto" and half else pick_dtype(dtype)
    clock = PhaseClock(progress, run_device)
    checkpoint = Checkpoint(model, "model")
    start = None if adapter is None else resolve_folder(adapter, what="ADAPTER")
    with clock.phase("read data", 1):
        tokenizer = load_tokenizer(model, "MODEL", trust_remote_code=trust_remote_code)
        wording: dict[str, Any] = {"template": template, "max_tokens": max_tokens, "completion_only": completion_only}
        training, held_out = split_samples(data, validation, tokenizer, wording, seed)
        kept = kept_samples(retain, tokenizer, max_tokens, seed)
    epoch = math.ceil(len(training.samples) / batch)
    budget = epochs * epoch if steps is None else steps
    new: dict[str, Any] = {}
    if start is None:
        new = {"rank": rank or RANK, "alpha": alpha or rank or RANK, "dropout": dropout or 0.0}
        new["roles"] = sorted(roles or ATTENTION, key=ROLES.index)
    options: dict[str, Any] = {
        "steps": budget,
        "batch": batch,
        "micro_batch": min(micro_batch or batch, batch),
        "learning_rate": learning_rate,
        "save_every": save_every or min(epoch, SAVE_STEPS),
        "seed": seed,
        "dtype": str(run_dtype).removeprefix("torch."),
        **({"retain_weight": retain_weight} if kept.samples else {}),
        **new,
    }
    with clock.phase("load", 1):
        loaded = LoadedModel(
            checkpoint.folder, "MODEL", device=run_device, dtype=run_dtype, trust_remote_code=trust_remote_code
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
        if say and ranks.first:
            tokens = sum(sample.tokens for sample in training.samples)
            say(
                f"fine-tuning: {budget} steps of {batch} samples, from {len(training.samples):,} samples with "
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
                gradient_checkpointing,
            )
        summary = _summary(course, budget, len(training.samples))
        taken = Step(
            "fine-tuning",
            summary,
            without_machine(options) | {"max_tokens": max_tokens, "completion_only": completion_only},
            {"model": identity["model"]},
            {
                "started from": "a new adapter" if adapter is None else shown(adapter),
                "samples": f"{len(training.samples):,}, and {len(held_out.samples):,} for validation",
                "steps": f"{len(course.losses)} of {budget}, batches of {batch}",
                "learning rate": f"{learning_rate:g}",
                "prompts": template if template in ("alpaca", "chat") else "a template of one's own",
                "tokens trained on": f"{course.tokens:,}",
                **({"retained": f"{named_text(retain)}, weight {retain_weight:g}"} if retain is not None else {}),
            },
        )
        told = card_files(checkpoint.name, taken, start, wrapped=checkpoint.family.wrapper is not None)
        config_of = course.source if start is None else start
        ranks.wait()
        if ranks.first:
            work.complete()
            place = empty_model(checkpoint.folder, trust_remote_code=trust_remote_code)
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
        | ({} if retain is None else {"retain": os.fspath(retain)})
        | {"device": run_device.type, "epochs": budget / epoch, "gradient_checkpointing": gradient_checkpointing},
        phases=clock.phases,
        seconds=time.perf_counter() - begin,
        fingerprints={"model": identity["model"]},
    )
    if ranks.first:
        write_report(result, report)
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
