"""Light fine-tuning: an adapter is trained on a few labelled samples, starting from the factors it comes with.

The recipe of LoRASuite (arXiv 2505.13515) for adapters just projected: 3 epochs, batches of 16, AdamW, a learning
rate that falls linearly from 1e-3 without a warm-up, rows of at most 256 tokens. An adapter from zero is trained by the
same code, so that the two can be compared.

The loss of a step is the mean cross-entropy over all the tokens its batch counts, however the batch is divided.

With `retain` a step also reads about as many tokens of text whose predictions are to stay what they are (`retention`).
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapter import CONFIG, WEIGHTS, broken_tensor, trained_config
from .adapter_folder import adapter_digest
from .aligned_states import LoadedModel, load_tokenizer
from .checkpoint import Checkpoint, resolve_folder
from .errors import LoraSuiteError, WriteError
from .families import ATTENTION, ROLES, Family
from .json_files import finite, read_json
from .model_card import card_files, shown
from .output import check_output, write_folder, writing
from .peft_check import check_loads, empty_model
from .phases import Phase, PhaseClock, Progress
from .plan import migrate, pick_device, pick_dtype
from .provenance import Step, without_machine
from .refinement import TRAINING, last_checkpoint, step_batches
from .report_file import check_report, write_report
from .result import Migration
from .retention import KEPT, RETAIN_WEIGHT, check_retain_weight, kept_batch, kept_samples, named_text, summed_shift
from .samples import Data, Sample, Samples, load_samples, padded
from .text_files import refuse_pipe
from .work import Work, clean_up, remove_work, unless_unusable

EPOCHS, BATCH, LEARNING_RATE, MAX_TOKENS = 3, 16, 1e-3, 256
RANK = 32
"""Of an adapter from zero; its alpha is the same number."""
_SAVE_STEPS = 50
"""Most steps between two checkpoints where none are asked for."""
_COMPARED_STEPS = 16
"""Steps of the last third whose samples the start's loss is taken on, at most."""
_ROUNDING = 1e-3
"""Share by which the loss may lie above the start's by the dtype's rounding."""
_DRAWN = 1e-2
"""The same where dropout draws anew for every step."""


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats a token over the validation samples after a number of steps; step 0 is the start."""

    step: int
    loss: float


@dataclass(frozen=True)
class Finetuning:
    """The outcome of `finetune`; the adapter itself is in the folder `out`.

    Attributes:
        steps: taken. budget: steps planned. chosen_step: of the state written; 0 is the start.
        diverged: a loss was NaN or infinite, or the mean loss of the last third of the steps above the start's. The
            start was then written, unchanged. kept_start: so it was, for this or because nothing was better than it on
            the validation samples.
        start_loss, end_loss: nats a token on the same samples, of the start and in the steps of the last third that
            read them; None where training did not come so far.
        losses: of each step, before its update. evaluations: empty without validation samples.
        samples, truncated, left_out: trained on; of these cut off at `max_tokens`; left out because nothing was left to
            count there. Validation samples are included in the last two.
        trained_tokens: predictions the loss counted, over all steps.
        start_retained_kl, retained_kl: mean KL(bare model ‖ with adapter) in nats on the text to retain, of the start
            and in the steps of the last third, over the same text; None without such text.
        summary: the outcome in one sentence. fingerprints: of the model, under "model".
    """

    model: str
    adapter: str | None
    out: str
    steps: int
    budget: int
    chosen_step: int
    diverged: bool
    kept_start: bool
    summary: str
    start_loss: float
    end_loss: float | None
    losses: list[float]
    start_retained_kl: float | None
    retained_kl: float | None
    evaluations: list[Evaluation]
    samples: int
    validation_samples: int
    truncated: int
    left_out: int
    trained_tokens: int
    trainable_parameters: int
    options: dict[str, Any]
    phases: list[Phase]
    seconds: float
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def peak_memory(self) -> int:
        """Bytes the process allocated itself, at most."""
        return max(phase.peak_memory for phase in self.phases)

    @property
    def peak_device_memory(self) -> int | None:
        """Bytes of the GPU's allocator, at most; None on a CPU."""
        return max((p.peak_device_memory for p in self.phases if p.peak_device_memory is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, what `--json` prints; what is NaN or infinite is None."""
        costs = {phase.name: phase.seconds for phase in self.phases}
        memory = {"peak_memory": self.peak_memory, "peak_device_memory": self.peak_device_memory}
        plain = asdict(self) | {"losses": [finite(loss) for loss in self.losses]}
        plain |= {
            name: finite(getattr(self, name)) for name in ("start_loss", "end_loss", "start_retained_kl", "retained_kl")
        }
        plain["evaluations"] = [{"step": e.step, "loss": finite(e.loss)} for e in self.evaluations]
        return plain | memory | {"costs": costs}


def finetuning_folder(out: str | os.PathLike[str]) -> Path:
    """Where a fine-tuning that is to write `out` keeps its work: a hidden sibling."""
    path = Path(out).expanduser().absolute()
    return path.with_name(f".{path.name}.finetune")


def sample_batches(count: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Which samples each step reads: in every epoch each of them once, in another order; its last batch is the rest."""
    generator = random.Random(seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = list(range(count))
        generator.shuffle(order)
        batches += [order[first : first + batch] for first in range(0, count, batch)]
    return batches[:steps]


class _Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One padded batch an item: input_ids, attention_mask and labels, (samples, length) each, the longest row first.

    Args:
        kept: rows of the text to retain, and which of them each item holds besides, under the names with `KEPT`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        batches: list[list[int]],
        kept: tuple[Sequence[Sample], list[list[int]]] | None = None,
    ) -> None:
        self._samples, self._batches, self._kept = samples, batches, kept

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        item = padded([self._samples[i] for i in self._batches[n]])
        if self._kept is not None:
            rows, batches = self._kept
            item |= kept_batch([rows[i] for i in batches[n]])
        return item


def _parts(batch: dict[str, Tensor], size: int, prefix: str = "") -> Iterator[dict[str, Tensor]]:
    """Micro-batches of at most `size` rows, each no wider than its longest row, of what has the prefix."""
    names = ("input_ids", "attention_mask", "labels")
    batch = {name: batch[f"{prefix}{name}"] for name in names}
    for first in range(0, len(batch["input_ids"]), size):
        width = int(batch["attention_mask"][first].sum())
        yield {name: tensor[first : first + size, :width] for name, tensor in batch.items()}


def _summed_loss(model: Any, part: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every token that counts, in nats, summed; at least float32."""
    logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False).logits
    wanted = part["labels"][:, 1:]
    counted = wanted != -100
    chosen = logits[:, :-1][counted]
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    return functional.cross_entropy(chosen, wanted[counted], reduction="sum")


def _trainer_class() -> Any:
    """The Trainer, defined when first needed: importing this module must not import transformers."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback

    class FinetuningTrainer(Trainer):
        """Trainer that divides a batch by itself, so that its loss is the mean over the whole batch's tokens."""

        def __init__(self, *args: Any, micro_batch: int, autocast: bool, retain_weight: float, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.micro_batch, self.autocast, self.retain_weight = micro_batch, autocast, retain_weight
            self.diverged_at: int | None = None
            self.shift: float | None = None

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            # The batches are in their order already, one item each.
            return SequentialSampler(self.train_dataset)

        def precision(self) -> Any:
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.autocast)

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
            model.train()
            inputs = self._prepare_inputs(inputs)
            tokens = (inputs["labels"] != -100).sum()
            total = torch.zeros((), device=tokens.device)
            for part in _parts(inputs, self.micro_batch):
                with self.precision():
                    loss = _summed_loss(model, part) / tokens
                self.accelerator.backward(loss)
                total = total + loss.detach()
            shift = self.retaining(inputs, learning=True)
            self.shift = None if shift is None else float(shift)
            if not math.isfinite(float(total)) or not math.isfinite(self.shift or 0.0):
                self.diverged_at = self.state.global_step + 1
            return total

        def retaining(self, inputs: dict[str, Tensor], *, learning: bool) -> Tensor | None:
            """Mean shift of the predictions on the text to retain, if a batch has such text."""
            if f"{KEPT}labels" not in inputs:
                return None
            tokens = (inputs[f"{KEPT}labels"] != -100).sum()
            total = torch.zeros((), device=tokens.device)
            for part in _parts(inputs, self.micro_batch, KEPT):
                with self.precision():
                    counted = part["labels"] != -100
                    shift = summed_shift(self.model, part["input_ids"], part["attention_mask"], counted) / tokens
                if learning:
                    self.accelerator.backward(self.retain_weight * shift)
                total = total + shift.detach()
            return total

        def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs and self.shift is not None:
                logs["retained_kl"] = self.shift
            super().log(logs, *args, **kwargs)

        def mean_loss(self, batches: Sequence[dict[str, Tensor]], *, training: bool) -> float:
            """Over all counted tokens of the batches, as the model stands; `training` leaves its dropout on."""
            was_training = self.model.training
            self.model.train(training)
            summed, tokens = 0.0, 0
            device = self.args.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                torch.manual_seed(self.args.seed)
                for batch in batches:
                    inputs = self._prepare_inputs(dict(batch))
                    tokens += int((inputs["labels"] != -100).sum())
                    for part in _parts(inputs, self.micro_batch):
                        with self.precision():
                            summed += float(_summed_loss(self.model, part))
            self.model.train(was_training)
            return summed / tokens

        def mean_shift(self, batches: Sequence[dict[str, Tensor]]) -> float:
            """The same of the text to retain, every batch with equal weight; dropout is left on."""
            self.model.train()
            device = self.args.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                torch.manual_seed(self.args.seed)
                found = [self.retaining(self._prepare_inputs(dict(batch)), learning=False) for batch in batches]
            return sum(float(shift) for shift in found if shift is not None) / len(found)

        def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, Any]:
            loss = self.mean_loss(self.eval_dataset, training=False)
            if not math.isfinite(loss):
                self.diverged_at, loss = self.state.global_step, math.inf
            metrics: dict[str, Any] = {f"{metric_key_prefix}_loss": loss}
            self.log(metrics)
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    class Course(TrainerCallback):
        """Reports steps, ends a diverged run, and has the last step evaluated and saved."""

        trainer: Any = None

        def __init__(self, report: Any, evaluated: bool) -> None:
            self._report, self._evaluated = report, evaluated

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if self.trainer.diverged_at is not None:
                control.should_training_stop = True
                control.should_save = control.should_evaluate = False
                return control
            if state.global_step >= state.max_steps:
                control.should_save, control.should_evaluate = True, self._evaluated
            self._report(state.global_step)
            return control

    return FinetuningTrainer, Course


def _new_adapter(loaded: LoadedModel, family: Family, new: Mapping[str, Any], seed: int) -> None:
    """Puts an adapter that does nothing yet on the model: B zero, A random."""
    from peft import LoraConfig, get_peft_model

    lacking = [role for role in new["roles"] if role not in family.projections]
    if lacking:
        raise LoraSuiteError(f"a {family.model_type} layer has no {', '.join(lacking)}; its roles: {family.roles}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=new["rank"],
        lora_alpha=new["alpha"],
        lora_dropout=new["dropout"],
        target_modules=family.targets(new["roles"]),
    )
    torch.manual_seed(seed)
    loaded.peft = get_peft_model(loaded.model, config).to(loaded.device)


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
        report: HTML file to write (`report_file.write_report`); an earlier report there is replaced.

    Raises:
        LoraSuiteError: for input that cannot be used; OUT is then untouched.
    """
    begin = time.perf_counter()
    inputs = {"MODEL": model, "ADAPTER": adapter, "DATA": data, "--validation": validation, "--retain": retain}
    check_report(report, out, inputs)
    clean_up(out, finetuning_folder(out), TRAINING)
    path = check_output(out, overwrite=overwrite, inputs=inputs)
    _check(epochs, steps, batch, micro_batch, learning_rate, max_tokens, rank, alpha, dropout, roles, save_every)
    check_retain_weight(retain_weight)
    if adapter is not None and (rank, alpha, dropout, roles) != (None,) * 4:
        raise LoraSuiteError("rank, alpha, dropout and roles are those of a new adapter; ADAPTER has its own")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LoraSuiteError("finetune runs in one process; start it without torchrun")
    run_device = pick_device(device)
    half = run_device.type == "cuda" and torch.cuda.is_bf16_supported()
    run_dtype = torch.bfloat16 if dtype == "auto" and half else pick_dtype(dtype)
    clock = PhaseClock(progress, run_device)
    checkpoint = Checkpoint(model, "model")
    start = None if adapter is None else resolve_folder(adapter, what="ADAPTER")
    with clock.phase("read data", 1):
        tokenizer = load_tokenizer(model, "MODEL", trust_remote_code=trust_remote_code)
        wording: dict[str, Any] = {"template": template, "max_tokens": max_tokens, "completion_only": completion_only}
        training, held_out = _split(data, validation, tokenizer, wording, seed)
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
        "save_every": save_every or min(epoch, _SAVE_STEPS),
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
            _new_adapter(loaded, checkpoint.family, new, seed)
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
    }
    folder = finetuning_folder(path)
    folder.mkdir(exist_ok=True)
    work = Work(folder / TRAINING, identity)
    try:
        work.start()
        if say:
            tokens = sum(sample.tokens for sample in training.samples)
            say(
                f"fine-tuning: {budget} steps of {batch} samples, from {len(training.samples):,} samples with "
                f"{tokens:,} tokens to learn"
            )
        with unless_unusable(work, folder), writing(work.folder):
            course = _train(
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
        work.complete()
        place = empty_model(checkpoint.folder, trust_remote_code=trust_remote_code)
        _write(path, course.source, config_of, checkpoint.name, told, place, overwrite)
        remove_work(folder)
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
    write_report(result, report)
    return result


_CHECKED: dict[str, Any] = {
    "epochs": EPOCHS,
    "steps": None,
    "batch": BATCH,
    "micro_batch": None,
    "learning_rate": LEARNING_RATE,
    "max_tokens": MAX_TOKENS,
    "rank": None,
    "alpha": None,
    "dropout": None,
    "roles": None,
    "save_every": None,
}
"""Arguments of `finetune` whose values are looked at before anything is read, and their defaults."""


def _check(
    epochs: int,
    steps: int | None,
    batch: int,
    micro_batch: int | None,
    learning_rate: float,
    max_tokens: int,
    rank: int | None,
    alpha: float | None,
    dropout: float | None,
    roles: Sequence[str] | None,
    save_every: int | None,
) -> None:
    whole = {"epochs": epochs, "steps": steps, "batch": batch, "micro_batch": micro_batch, "rank": rank,
             "save_every": save_every}  # fmt: skip
    for name, value in whole.items():
        if value is not None and value < 1:
            raise LoraSuiteError(f"{name} is {value}; it must be at least 1")
    if max_tokens < 2:
        raise LoraSuiteError(f"max_tokens is {max_tokens}; it must be at least 2")
    for name, number in (("learning_rate", learning_rate), ("alpha", alpha)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise LoraSuiteError(f"{name} is {number}; it must be above 0")
    if dropout is not None and not 0 <= dropout < 1:
        raise LoraSuiteError(f"dropout is {dropout}; it must be at least 0 and below 1")
    for role in roles or ():
        if role not in ROLES:
            raise LoraSuiteError(f"role {role!r} is not one of {', '.join(ROLES)}")


def _split(
    data: Data, validation: float | Data | None, tokenizer: Any, wording: dict[str, Any], seed: int
) -> tuple[Samples, Samples]:
    """The samples to train on and those held out."""
    found = load_samples(data, tokenizer, **wording)
    if validation is None:
        return found, Samples([], 0, 0)
    if not isinstance(validation, int | float):
        return found, load_samples(validation, tokenizer, **wording)
    count = len(found.samples)
    held = round(validation * count)
    if not (0 < validation < 1 and 0 < held < count):
        raise LoraSuiteError(
            f"validation is {validation}; a share must be between 0 and 1 and leave at least one of the {count} "
            "samples on either side"
        )
    chosen = set(random.Random(seed).sample(range(count), held))
    rest = [sample for n, sample in enumerate(found.samples) if n not in chosen]
    return replace(found, samples=rest), Samples([found.samples[n] for n in sorted(chosen)], 0, 0)


@dataclass(frozen=True)
class _Course:
    """What a training came to; `source` holds the adapter chosen, `diverged` says in what way it did."""

    source: Path
    chosen: int
    diverged: str | None
    start_loss: float
    end_loss: float | None
    losses: list[float]
    start_retained_kl: float | None
    retained_kl: float | None
    evaluations: list[Evaluation]
    tokens: int


def _train(
    folder: Path,
    loaded: LoadedModel,
    start: Path | None,
    samples: list[Sample],
    held_out: list[Sample],
    kept: list[Sample],
    clock: PhaseClock,
    options: dict[str, Any],
    checkpointing: bool,
) -> _Course:
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    steps, batch = options["steps"], options["batch"]
    batches = sample_batches(len(samples), batch, steps, options["seed"])
    kept_batches = None
    if kept:
        read = sum(len(sample.ids) for sample in samples) * min(batch, len(samples)) // len(samples)
        sizes = [len(sample.ids) for sample in kept]
        kept_batches = kept, step_batches(sizes, max(1, read), steps, options["seed"])
    dataset = _Batches(samples, batches, kept_batches)
    evaluated = _Batches(held_out, [list(range(len(held_out)))[n : n + batch] for n in range(0, len(held_out), batch)])
    compared = _last_third(steps)
    trainer_class, course_class = _trainer_class()
    source = start
    if source is None:
        source = folder / "start"
        loaded.peft.save_pretrained(source)
    recomputed: dict[str, Any] = {}
    if checkpointing:
        recomputed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=options["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        seed=options["seed"],
        **recomputed,
        eval_strategy="steps" if held_out else "no",
        eval_steps=options["save_every"],
        save_strategy="steps",
        save_steps=options["save_every"],
        save_total_limit=2,
        metric_for_best_model="loss" if held_out else None,
        greater_is_better=False if held_out else None,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=loaded.device.type == "cpu",
        dataloader_pin_memory=loaded.device.type == "cuda",
    )
    if loaded.device.type == "cuda":
        # Trainer would split the one batch over every GPU it sees.
        arguments._n_gpu = 1
    with clock.phase("start's loss", 1):
        trainer = trainer_class(
            model=loaded.peft,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=evaluated,
            data_collator=lambda items: items[0],
            micro_batch=options["micro_batch"],
            autocast=loaded.model.dtype == torch.bfloat16,
            retain_weight=options.get("retain_weight", 0.0),
        )
        trainer.remove_callback(PrinterCallback)
        first = trainer.mean_loss([dataset[n] for n in compared], training=True)
        first_shift = trainer.mean_shift([dataset[n] for n in compared]) if kept else None
        if not math.isfinite(first):
            raise LoraSuiteError(
                f"{loaded.name} with this adapter gives NaN or infinity on the data in {loaded.model.dtype}; check its "
                "weights, or try --dtype float32"
            )
        evaluations = [Evaluation(0, trainer.mean_loss(evaluated, training=False))] if held_out else []
    with clock.phase("train", steps) as report:
        course = course_class(report, bool(held_out))
        course.trainer = trainer
        trainer.add_callback(course)
        last = last_checkpoint(folder / "trainer")
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations += [Evaluation(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    shifts = [entry["retained_kl"] for entry in history if "retained_kl" in entry]
    tokens = [sum(samples[i].tokens for i in part) for part in batches]
    end, shift = None, None
    if len(losses) == steps:
        shift = sum(shifts[n] for n in compared) / len(compared) if kept else None
        end = sum(losses[n] * tokens[n] for n in compared) / sum(tokens[n] for n in compared)
    chosen = steps
    weight = options.get("retain_weight", 0.0)
    # What is minimised: --retain trades some of the loss for closeness.
    objective = None if end is None else end + weight * (shift or 0.0)
    tolerance = _DRAWN if loaded.peft.peft_config["default"].lora_dropout else _ROUNDING
    last = folder / "trainer" / f"checkpoint-{steps}"
    before = first + weight * (first_shift or 0.0)
    what = "loss with its retained part" if kept else "loss"
    diverged = _divergence(trainer.diverged_at, what, before, objective, tolerance, last)
    if diverged is not None:
        chosen = 0
    elif evaluations:
        chosen = min(evaluations, key=lambda e: e.loss).step
    if chosen:
        source = folder / "trainer" / f"checkpoint-{chosen}"
    seen = sum(tokens[: len(losses)])
    return _Course(source, chosen, diverged, first, end, losses, first_shift, shift, evaluations, seen)


def _last_third(steps: int) -> list[int]:
    """Steps of the last third, at most _COMPARED_STEPS of them, spread evenly."""
    third = range(steps - max(1, steps // 3), steps)
    count = min(len(third), _COMPARED_STEPS)
    return [third[n * len(third) // count] for n in range(count)]


def _divergence(at: int | None, what: str, first: float, end: float | None, tolerance: float, last: Path) -> str | None:
    """In what way a run diverged, None if it did not. `last` is the folder of its last state.

    Args:
        what: is minimised. first, end: its mean before and in the last third. tolerance: as a share of `first`.
    """
    if at is not None:
        return f"the loss was NaN or infinite at step {at}"
    if end is not None and end > first * (1 + tolerance):
        return f"the mean {what} of the last third was {end:.3f}, above the start's {first:.3f}"
    broken = broken_tensor(last / WEIGHTS)
    return f"{broken} holds NaN or infinity at the end" if broken else None


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


def _summary(course: _Course, budget: int, samples: int) -> str:
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
    given = {"OLD": old, "NEW": new, "ADAPTER": adapter, "--finetune": data, "--retain": tuning.get("retain")}
    further = {"--calibration": options.get("calibration"), "--refine-text": options.get("refine_text")}
    check_output(out, overwrite=overwrite, inputs=given | further | {"--validation": tuning.get("validation")})
    _check(**{name: tuning.get(name, default) for name, default in _CHECKED.items()})
    check_retain_weight(tuning.get("retain_weight", RETAIN_WEIGHT))
    remote = options.get("trust_remote_code", False)
    shared = {"seed": options.get("seed", 0), "device": options.get("device", "auto"), "trust_remote_code": remote}
    shared["dtype"] = options.get("dtype", "auto")
    wording = {name: tuning[name] for name in ("template", "max_tokens", "completion_only") if name in tuning}
    tokenizer = load_tokenizer(new, "NEW", trust_remote_code=remote)
    _split(data, tuning.get("validation"), tokenizer, wording, shared["seed"])
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
