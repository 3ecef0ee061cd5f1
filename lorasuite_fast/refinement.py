"""Label-free refinement by gradient: an adapter learns to change the new model as the old one was changed.

The loss at every byte-aligned position is `KL(target ‖ new + adapter)` over the shared tokens, where the target
(`teacher`) is the new model's own prediction changed as the old adapter changes the old model's, mixed with what the
old model itself predicts with its adapter. A next-token cross-entropy on the same text, by default text the old model
writes with its adapter, can be added, and text whose predictions are to stay what they are (`retention`).

The agreement, on held-out texts, is the share of that divergence the adapter takes away:
`1 - Σ KL(target ‖ new + adapter) / Σ KL(target ‖ new)`. It decides which state is kept and when to stop.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapter import CONFIG, WEIGHTS, broken_tensor, by_module, read_adapter, trained_config
from .adapter_folder import adapter_digest
from .aligned_states import LoadedModel, load_tokenizer
from .calibration import load_examples, whole_characters
from .checkpoint import Checkpoint
from .errors import LoraSuiteError
from .families import ROLES
from .json_files import finite, read_json
from .memory import parse_memory
from .model_card import card_files, shown
from .output import check_output, write_folder, writing
from .peft_check import check_loads, empty_model
from .phases import Phase, PhaseClock, Progress, release_memory
from .plan import pick_device, pick_dtype
from .provenance import Step, without_machine
from .report_file import check_report, write_report
from .retention import KEPT, RETAIN_WEIGHT, check_retain_weight, kept_batch, kept_samples, named_text, summed_shift
from .samples import Sample, Samples
from .self_text import self_written
from .teacher import Target, Targets, TeacherFacts, divergence, write_targets
from .work import Work, clean_up, remove_work, unless_unusable

SELF_TEXT_BYTES = 600_000
"""Bytes of text the old model writes where no text is given."""
MAX_TOKENS = 256
RATE = 1e-2
"""Learning rate from an adapter that does nothing, or from a distilled one."""
CARRIED_RATE = 5e-3
"""From one that was copied or carried by least squares.

Between relatives 2e-3, 5e-3 and 1e-2 reached 86, 93 and 95 % of a training on all labels from least squares on a pruned
model; copies, which already do most of it, were best kept at 2e-3.
"""
BATCH_BYTES = 2_000
CONTROLS = ("none", "shuffled", "shuffled-labels")
TRAINING = "training"
"""Of a work folder, the part in which a training keeps its checkpoints."""
STATE = "trainer_state.json"
LEAST_STEPS, MOST_STEPS = 150, 600
"""Bounds of an automatic step budget, which otherwise reads the text once."""
_HELD_OUT_SHARE = 10
_HELD_OUT_BYTES = 24_000
_ALL_TEXTS = 10**9


@dataclass(frozen=True)
class Evaluation:
    """Figures after a number of steps.

    Attributes:
        agreement: on held-out texts, 1 for the target itself and 0 for the bare new model.
        kl, next_token: mean losses in nats over the steps since the last evaluation; None at step 0, and where a loss
            has no weight.
        retained_kl: of the same steps, KL(bare model ‖ with adapter) on the text to retain, if there is such text.
    """

    step: int
    agreement: float
    kl: float | None
    next_token: float | None
    retained_kl: float | None = None


@dataclass(frozen=True)
class Refinement:
    """The outcome of `refine`; the adapter itself is in the folder `out`.

    Attributes:
        steps: taken. budget: steps planned. chosen_step: of the state written; 0 is the start.
        kept_start: nothing was better on held-out texts than the start, which was written. stopped: "budget",
            "patience" or "diverged". summary: the outcome in one sentence.
        start_agreement, agreement: on held-out texts, of the start and of what was written.
        teacher: what the teacher pass saw. text: where the text came from. fingerprints: of the models, old and new.
    """

    old: str
    old_adapter: str
    new: str
    start: str | None
    out: str
    steps: int
    budget: int
    chosen_step: int
    kept_start: bool
    stopped: str
    summary: str
    start_agreement: float
    agreement: float
    evaluations: list[Evaluation]
    teacher: TeacherFacts
    text: str
    held_out_texts: int
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

    def as_dict(self) -> dict[str, Any]:
        """Plain data, what `--json` prints."""
        costs = {phase.name: phase.seconds for phase in self.phases}
        evaluations = [{name: finite(value) for name, value in asdict(e).items()} for e in self.evaluations]
        further = {"teacher": self.teacher.as_dict(), "peak_memory": self.peak_memory, "costs": costs}
        return asdict(self) | {"evaluations": evaluations} | further


def refinement_folder(out: str | os.PathLike[str]) -> Path:
    """Where a refinement that is to write `out` keeps its work: a hidden sibling."""
    path = Path(out).expanduser().absolute()
    return path.with_name(f".{path.name}.refine")


def step_budget(size: int, batch_bytes: int = BATCH_BYTES) -> int:
    """Steps for a text of `size` bytes: as many as read it once, within LEAST_STEPS and MOST_STEPS."""
    return max(LEAST_STEPS, min(MOST_STEPS, round(size / batch_bytes)))


def step_batches(sizes: Sequence[int], budget: int, steps: int, seed: int) -> list[list[int]]:
    """Which texts each step reads: `budget` bytes of them or a little more, every text once before any comes again."""
    order: list[int] = []
    generator = random.Random(seed)
    batches: list[list[int]] = []
    for _ in range(steps):
        batch: list[int] = []
        size = 0
        while size < budget and len(batch) < len(sizes):
            if not order:
                order = list(range(len(sizes)))
                generator.shuffle(order)
            size += sizes[order[-1]]
            batch.append(order.pop())
        batches.append(batch)
    return batches


class _Batches(torch.utils.data.Dataset[dict[str, Any]]):
    """Texts with their targets, one padded batch an item.

    Args:
        shuffled_labels: a control: the next tokens of every batch in random order, drawn from this seed.
        kept: rows of the text to retain, and which of them each item holds besides, under the names with KEPT.
    """

    def __init__(
        self,
        targets: Targets,
        batches: list[list[int]],
        shuffled_labels: int | None = None,
        kept: tuple[Sequence[Sample], list[list[int]]] | None = None,
    ) -> None:
        self._targets, self._batches, self._seed, self._kept = targets, batches, shuffled_labels, kept

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, n: int) -> dict[str, Any]:
        texts = [self._targets.aligned[i] for i in self._batches[n]]
        found = [self._targets[i] for i in self._batches[n]]
        ids = torch.zeros(len(texts), max(len(t.ids_n) for t in texts), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text.ids_n)] = torch.tensor(text.ids_n)
            mask[row, : len(text.ids_n)] = 1
        item: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": self._labels(ids, mask, n),
            "row": torch.cat([torch.full((len(t.ends),), row) for row, t in enumerate(texts)]),
            "position": torch.cat([t.positions_n for t in texts]),
            "log_probs": torch.cat([t.log_probs for t in found]),
            "log_rest": torch.cat([t.log_rest for t in found]),
        }
        if found[0].index is not None:
            item["index"] = torch.cat([t.index for t in found if t.index is not None])
        if self._kept is not None:
            rows, batches = self._kept
            item |= kept_batch([rows[i] for i in batches[n]])
        return item

    def _labels(self, ids: Tensor, mask: Tensor, n: int) -> Tensor:
        """What follows each position, (texts, length - 1); -100 where that is padding."""
        labels = ids.masked_fill(mask == 0, -100)[:, 1:]
        if self._seed is not None:
            counted = labels != -100
            order = torch.randperm(int(counted.sum()), generator=torch.Generator().manual_seed(self._seed + n))
            labels = labels.masked_scatter(counted, labels[counted][order])
        return labels


def _divergences(logits: Tensor, batch: dict[str, Any], tokens: Tensor) -> Tensor:
    """KL(target ‖ model) at every aligned position of a batch; logits (texts, length, V) -> (n,) float32."""
    wanted = Target(batch["log_probs"], batch.get("index"), batch["log_rest"])
    return divergence(wanted, logits[batch["row"], batch["position"]][:, tokens].float())


def _next_token_loss(logits: Tensor, batch: dict[str, Any]) -> Tensor:
    """Mean cross-entropy of every token behind the first of its text, in nats."""
    predicted = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(predicted, batch["labels"].flatten(), ignore_index=-100)


def _number(loss: Tensor | None) -> float | None:
    return None if loss is None else float(loss.detach())


def _mean(values: list[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _trainer_class() -> Any:
    """The Trainer, defined when first needed: importing this module must not import transformers."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback

    class RefinementTrainer(Trainer):
        """Trainer with the two losses, the agreement as its evaluation, and the figures of both."""

        def __init__(
            self, *args: Any, tokens: Tensor, weights: tuple[float, float, float], held_out: list[Any], **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)
            self.tokens = tokens.to(self.args.device)
            self.weights, self.held_out = weights, held_out
            self.figures: list[tuple[float | None, ...]] = []
            self.diverged = False
            self.base_kl = 0.0

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            # The batches are in their order already, one item each.
            return SequentialSampler(self.train_dataset)

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            kl_weight, next_weight, _ = self.weights
            kl = _divergences(logits, inputs, self.tokens).mean() if kl_weight else None
            following = _next_token_loss(logits, inputs) if next_weight else None
            shift = None
            if f"{KEPT}labels" in inputs:
                counted = inputs[f"{KEPT}labels"] != -100
                ids, mask = inputs[f"{KEPT}input_ids"], inputs[f"{KEPT}attention_mask"]
                shift = summed_shift(self.model, ids, mask, counted) / counted.sum()
            losses = kl, following, shift
            parts = [w * part for w, part in zip(self.weights, losses, strict=True) if part is not None]
            loss = torch.stack(parts).sum()
            self.figures.append(tuple(_number(part) for part in losses))
            if not math.isfinite(float(loss.detach())):
                self.diverged = True
            return loss

        def total_kl(self) -> float:
            """Of the held-out texts, as the model stands."""
            was_training = self.model.training
            self.model.eval()
            total = 0.0
            with torch.no_grad():
                for batch in self.held_out:
                    inputs = self._prepare_inputs(dict(batch))
                    with self.compute_loss_context_manager():
                        logits = self.model(
                            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
                        ).logits
                    total += float(_divergences(logits, inputs, self.tokens).double().sum())
            self.model.train(was_training)
            return total

        def agreement(self) -> float:
            return 1 - self.total_kl() / self.base_kl if self.base_kl > 0 else 0.0

        def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, Any]:
            value = self.agreement()
            means = [_mean([f[i] for f in self.figures]) for i in range(3)]
            self.figures.clear()
            if not math.isfinite(value):
                self.diverged, value = True, -math.inf
            metrics: dict[str, Any] = {
                f"{metric_key_prefix}_agreement": value,
                f"{metric_key_prefix}_kl": means[0],
                f"{metric_key_prefix}_next_token": means[1],
                f"{metric_key_prefix}_retained_kl": means[2],
            }
            self.log(metrics)
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    class Course(TrainerCallback):
        """Reports steps, ends a diverged run, and has the last step evaluated and saved."""

        trainer: Any = None

        def __init__(self, report: Any) -> None:
            self._report = report

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if self.trainer.diverged:
                control.should_training_stop = True
                control.should_save = control.should_evaluate = False
                return control
            if state.global_step >= state.max_steps:
                control.should_evaluate = control.should_save = True
            self._report(state.global_step)
            return control

    return RefinementTrainer, Course


def _new_peft(
    model: LoadedModel,
    checkpoint: Checkpoint,
    start: Path | None,
    roles: tuple[str, ...] | None,
    rank: int | None,
    alpha: float | None,
    seed: int,
) -> Any:
    """The new model with a trainable adapter: the start itself, the start among further modules, or a new one."""
    from peft import LoraConfig, get_peft_model

    if start is not None and roles is None and rank is None:
        model.attach(start, trainable=True)
        return model.peft
    family = checkpoint.family
    source = None if start is None else read_adapter(start, family, checkpoint.shape, checkpoint.name)
    if source is not None and source.dora:
        raise LoraSuiteError(f"{start}: a DoRA start is trained as it is; leave out roles and rank")
    known = source.roles if source else ()
    wanted = {*(roles or known or family.roles), *known}
    known_updates = by_module(source.updates, family, checkpoint.shape, torch.float32) if source else {}
    largest = max((u.rank for u in known_updates.values()), default=1)
    r = max(rank or 8, largest)
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha or 2 * r,
        target_modules=family.targets(wanted),
    )
    peft_model = get_peft_model(model.model, config)
    if source is not None:
        scale = config.lora_alpha / r
        for (layer, inside), update in known_updates.items():
            module = peft_model.base_model.model.get_submodule(f"{family.layer(layer)}.{inside}")
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            with torch.no_grad():
                a[: update.rank] = update.factors.a
                b[:, : update.rank] = update.factors.b * (update.scale / scale)
    return peft_model


def _memory_of_training(
    old: Checkpoint, new: Checkpoint, dtype: torch.dtype, tokens: int, *, checkpointing: bool
) -> int:
    """Bytes at most at once, an estimate from the shapes: the larger model, or the new one in training.

    Args:
        tokens: of one batch, padding included.
    """
    weights = [dtype.itemsize * sum(math.prod(e.shape) for e in c.tensors.entries.values()) for c in (old, new)]
    s = new.shape
    layer = tokens * (8 * s.d + 4 * (s.H + s.G) * s.h + 5 * s.f) * dtype.itemsize
    kept = s.L * tokens * s.d * dtype.itemsize + layer if checkpointing else s.L * layer
    # Logits, their log-softmax and the gradient of both losses, all float32.
    logits = 6 * 4 * tokens * s.V
    return max(weights[0], weights[1] + kept + logits)


def _checkpointing(
    old: Checkpoint, new: Checkpoint, dtype: torch.dtype, tokens: int, budget: str | int | None, wanted: bool
) -> bool:
    """Whether to recompute activations: if asked to, or if the budget asks for it.

    Raises:
        LoraSuiteError: what even that needs is over the budget.
    """
    if budget is None:
        return wanted
    size = parse_memory(budget)
    for checkpointing in (wanted, True):
        needed = _memory_of_training(old, new, dtype, tokens, checkpointing=checkpointing)
        if needed <= size:
            return checkpointing
    raise LoraSuiteError(
        f"--memory {budget}: refining {new.name} in {str(dtype).removeprefix('torch.')} needs about "
        f"{needed / 2**20:.0f} MiB with gradient checkpointing; give more, or a smaller dtype or fewer batch bytes"
    )


def _texts_of(text: str | os.PathLike[str] | Sequence[str], seed: int) -> list[str]:
    """The texts of a .jsonl or .txt file, or those given, each once."""
    if isinstance(text, str | os.PathLike):
        return load_examples(text, _ALL_TEXTS, seed)
    return _different(whole_characters(t) for t in text if t.strip())


def _different(texts: Iterable[str]) -> list[str]:
    """Each text once: one that stood on both sides of the split would make the agreement too good."""
    return list(dict.fromkeys(texts))


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
        report: HTML file to write (`report_file.write_report`); an earlier report there is replaced.
        say: called with one sentence, what will be done, before the training starts.
        control: "shuffled" trains on targets whose change belongs to another position, the text as it is, so that its
            next tokens still teach. "shuffled-labels" also puts those in random order: what is left is a constant.

    Raises:
        LoraSuiteError: for input that cannot be used; OUT is then untouched.
    """
    begin = time.perf_counter()
    inputs: dict[str, object] = {"OLD": old, "OLD_ADAPTER": old_adapter, "NEW": new, "ADAPTER": adapter, "--text": text}
    inputs |= {"--retain": retain, "--cache": cache}
    check_report(report, out, inputs)
    clean_up(out, refinement_folder(out), TRAINING)
    path = check_output(out, overwrite=overwrite, inputs=inputs)
    check_retain_weight(retain_weight)
    if not 0 <= imitation <= 1:
        raise LoraSuiteError(f"imitation is {imitation}; it must be from 0 to 1")
    weights = kl_weight, next_token_weight
    _check(steps, rank, alpha, learning_rate, weights, batch_bytes, max_tokens, top_k, eval_every, patience)
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
        with clock.phase("write text", text_bytes) as step:
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
            texts = _different(texts)
        release_memory()
    else:
        source = os.fspath(text) if isinstance(text, str | os.PathLike) else f"{len(text)} texts"
        texts = _texts_of(text, seed)

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
    works: list[Work] = []
    try:
        works.append(Work(kept / f"targets-{key}", teaching))
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
        works.append(Work(folder / TRAINING, teaching | options | started))
        resumed = works[1].resumed
        works[1].start()
        if say:
            facts = targets.facts
            say(
                f"refining: {budget} steps of about {batch_bytes:,} bytes, from {facts.bytes / 1000:,.0f} KB of "
                f"{'text the old model wrote' if source == 'self' else 'text'} with {facts.positions:,} positions"
            )
        # What an interrupted run has trained stays, whatever this one was asked besides.
        with nullcontext() if resumed else unless_unusable(works[1], folder), writing(works[1].folder):
            course = _train(
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
        works[1].complete()
        empty = empty_model(checkpoint_n.folder, trust_remote_code=trust_remote_code)
        _write(path, course.source, checkpoint_n.name, told, empty, overwrite)
        if cache is None:
            works[0].discard()
        remove_work(folder)
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
    write_report(result, report)
    return result


def _check(
    steps: int | str,
    rank: int | None,
    alpha: float | None,
    learning_rate: float,
    weights: tuple[float, float],
    batch_bytes: int,
    max_tokens: int,
    top_k: int | str | None,
    eval_every: int,
    patience: int | None,
) -> None:
    if steps != "auto" and (isinstance(steps, str) or steps < 1):
        raise LoraSuiteError(f"steps is {steps!r}; it must be auto or at least 1")
    for name, number in (("learning_rate", learning_rate), ("alpha", alpha)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise LoraSuiteError(f"{name} is {number}; it must be above 0")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise LoraSuiteError(f"kl_weight is {weights[0]}, next_token_weight {weights[1]}; one must be above 0")
    least = {"batch_bytes": (batch_bytes, 1), "max_tokens": (max_tokens, 2), "eval_every": (eval_every, 1)}
    if isinstance(top_k, str) and top_k != "auto":
        raise LoraSuiteError(f"top_k is {top_k!r}; it must be auto, None for all, or a number")
    least |= {"top_k": (1 if top_k is None or isinstance(top_k, str) else top_k, 1)}
    least |= {"patience": (1 if patience is None else patience, 1), "rank": (1 if rank is None else rank, 1)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise LoraSuiteError(f"{name} is {value}; it must be at least {bound}")


@dataclass(frozen=True)
class _Course:
    """What a training came to; `source` holds the adapter chosen."""

    source: Path
    steps: int
    chosen: int
    stopped: str
    evaluations: list[Evaluation]
    held_out: int
    tokens: int
    parameters: int
    checkpointing: bool


def _split(targets: Targets, seed: int) -> tuple[list[int], list[int]]:
    """Held-out texts and the others."""
    sizes = [int(a.ends[-1]) for a in targets.aligned]
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    held: list[int] = []
    share = min(_HELD_OUT_BYTES, sum(sizes) // _HELD_OUT_SHARE)
    while len(held) < 2 or (sum(sizes[i] for i in held) < share and len(order) > len(sizes) // 2):
        held.append(order.pop())
    return sorted(held), sorted(order)


def _out_of_patience(checkpoint: Path, patience: int) -> bool:
    """Whether a training stopped early at its last checkpoint."""
    kept = json.loads((checkpoint / STATE).read_text()).get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    # Of several callbacks of a kind there would be a list.
    counter = kept.get("attributes", {}).get("early_stopping_patience_counter", 0) if isinstance(kept, dict) else 0
    return int(counter) >= patience


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a Trainer; its state is written last."""

    def complete(checkpoint: Path) -> bool:
        try:
            json.loads((checkpoint / STATE).read_text())
        except (OSError, ValueError):
            return False
        return True

    found = [p for p in folder.glob("checkpoint-*") if complete(p)]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _train(
    folder: Path,
    old: Checkpoint,
    new: Checkpoint,
    start: Path | None,
    targets: Targets,
    retained: list[Sample],
    clock: PhaseClock,
    steps: int,
    options: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    half: bool,
    memory: str | int | None,
    checkpointing: bool,
    trust_remote_code: bool,
) -> _Course:
    from transformers import EarlyStoppingCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, TrainerState

    held, others = _split(targets, options["seed"])
    sizes = [int(targets.aligned[i].ends[-1]) for i in range(len(targets))]
    batches = [
        [others[i] for i in batch]
        for batch in step_batches([sizes[i] for i in others], options["batch_bytes"], steps, options["seed"])
    ]
    lengths = [len(a.ids_n) for a in targets.aligned]
    widest = max(len(b) * max(lengths[i] for i in b) for b in batches)
    kept_rows = None
    if retained:
        wanted = sum(lengths[i] for b in batches for i in b) // len(batches)
        rows = [len(sample.ids) for sample in retained]
        kept_rows = retained, step_batches(rows, max(1, wanted), steps, options["seed"])
        # Both graphs are there until the one backward pass.
        widest += max(len(b) * max(rows[i] for i in b) for b in kept_rows[1])
    checkpointing = _checkpointing(old, new, dtype, widest, memory, checkpointing)
    evaluated = step_batches([sizes[i] for i in held], options["batch_bytes"], len(held), options["seed"])
    seen: set[int] = set()
    kept: list[list[int]] = []
    for batch in evaluated:
        fresh = [held[i] for i in batch if held[i] not in seen]
        seen.update(fresh)
        if fresh:
            kept.append(fresh)
    held_out = [_Batches(targets, kept)[n] for n in range(len(kept))]
    trainer_class, course_class = _trainer_class()
    with clock.phase("train", steps) as report:
        loaded = LoadedModel(new.folder, "NEW", device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        model = _new_peft(loaded, new, start, options["roles"], options["rank"], options["alpha"], options["seed"]).to(
            device
        )
        new.tensors.check_same()
        # Another name would be looked up at every checkpoint, and the embeddings saved besides if it is unlike NEW.
        model.peft_config["default"].base_model_name_or_path = new.name
        if retained:
            loaded.check_ids([sample.ids for sample in retained])
        beginning = folder / "start"
        model.save_pretrained(beginning)
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=options["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            optim="adamw_torch",
            seed=options["seed"],
            bf16=half and dtype == torch.bfloat16,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            eval_strategy="steps",
            eval_steps=options["eval_every"],
            save_strategy="steps",
            save_steps=options["eval_every"],
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="agreement",
            greater_is_better=True,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            restore_callback_states_from_checkpoint=True,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
        )
        if device.type == "cuda":
            # Trainer would split the one batch over every GPU it sees.
            arguments._n_gpu = 1
        course = course_class(report)
        callbacks: list[Any] = [course]
        if options["patience"] is not None:
            callbacks.append(EarlyStoppingCallback(options["patience"]))
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=_Batches(
                targets, batches, options["seed"] if options["control"] == CONTROLS[2] else None, kept_rows
            ),
            eval_dataset=held_out,
            data_collator=lambda items: items[0],
            callbacks=callbacks,
            tokens=targets.tokens,
            weights=(options["kl_weight"], options["next_token_weight"], options.get("retain_weight", 0.0)),
            held_out=held_out,
        )
        trainer.remove_callback(PrinterCallback)
        course.trainer = trainer
        with model.disable_adapter():
            trainer.base_kl = trainer.total_kl()
        first = trainer.agreement()
        if not math.isfinite(first):
            raise LoraSuiteError(
                f"{new.name} with {start or 'a new adapter'} gives NaN or infinity on the text in {model.dtype}; check "
                "the weights, or try --dtype float32"
            )
        last = last_checkpoint(folder / "trainer")
        if last is not None and options["patience"] is not None and _out_of_patience(last, options["patience"]):
            # Trained to its end already: the Trainer would forget that it had stopped, and go on.
            trainer.state = TrainerState.load_from_json(str(last / STATE))
        else:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    state = trainer.state
    evaluations = [Evaluation(0, first, None, None)] + [
        Evaluation(e["step"], e["eval_agreement"], e["eval_kl"], e["eval_next_token"], e["eval_retained_kl"])
        for e in state.log_history
        if "eval_agreement" in e
    ]
    best = max(evaluations, key=lambda e: e.agreement)
    chosen, source = 0, beginning
    if best.step and best.agreement > max(first, 0.0) and state.best_model_checkpoint is not None:
        chosen, source = best.step, Path(state.best_model_checkpoint)
    stopped = "diverged" if trainer.diverged else "budget" if state.global_step >= steps else "patience"
    taken = batches[: state.global_step]
    return _Course(
        source,
        state.global_step,
        chosen,
        stopped,
        evaluations,
        len(held),
        sum(lengths[i] for batch in taken for i in batch),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        checkpointing,
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


def _summary(course: _Course, budget: int) -> str:
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
