"""Label-free refinement by gradient: an adapter learns to change the new model as the old one was changed.

The loss at every byte-aligned position is `KL(target ‖ new + adapter)` over the shared tokens, where the target
(`teacher`) is the new model's own prediction changed as the old adapter changes the old model's, mixed with what the
old model itself predicts with its adapter. A next-token cross-entropy on the same text, by default text the old model
writes with its adapter, can be added, and text whose predictions are to stay what they are (`retention`).

The agreement, on held-out texts, is the share of that divergence the adapter takes away:
`1 - Σ KL(target ‖ new + adapter) / Σ KL(target ‖ new)`. It decides which state is kept and when to stop.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import by_module, read_adapter
from ..adapters.aligned_states import LoadedModel
from ..config import Machine, finite_hint, parse_memory
from ..errors import LoraSuiteError
from ..io.json_files import finite
from ..io.notebook import Rendered
from ..io.phases import Phase, PhaseClock
from ..io.ranks import Ranks
from ..models.checkpoint import Checkpoint
from ..text.calibration import load_examples, whole_characters
from ..text.samples import Sample
from .batches import step_batches
from .loop import Progress, Schedule
from .rate_trial import LEAST_STEPS, UNTRIED, UNTRIED_STARTED, Trainer, search_rate
from .target_loss import RefinementBatches
from .teacher import Targets, TeacherFacts

SELF_TEXT_BYTES = 600_000
"""Bytes of text the old model writes where no text is given."""
MAX_TOKENS = 256
BATCH_BYTES = 2_000
CONTROLS = ("none", "shuffled", "shuffled-labels")
FEWEST_STEPS, MOST_STEPS = 150, 600
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
class Refinement(Rendered):
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


def step_budget(size: int, batch_bytes: int = BATCH_BYTES) -> int:
    """Steps for a text of `size` bytes: as many as read it once, within FEWEST_STEPS and MOST_STEPS."""
    return max(FEWEST_STEPS, min(MOST_STEPS, round(size / batch_bytes)))


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
        f"`memory={budget}`: refining {new.name} in {str(dtype).removeprefix('torch.')} needs about "
        f"{needed / 2**20:.0f} MiB with gradient checkpointing; give more, or a smaller dtype or fewer batch bytes"
    )


def texts_of(text: str | os.PathLike[str] | Sequence[str], seed: int) -> list[str]:
    """The texts of a .jsonl or .txt file, or those given, each once."""
    if isinstance(text, str | os.PathLike):
        return load_examples(text, _ALL_TEXTS, seed)
    return different(whole_characters(t) for t in text if t.strip())


def different(texts: Iterable[str]) -> list[str]:
    """Each text once: one that stood on both sides of the split would make the agreement too good."""
    return list(dict.fromkeys(texts))


@dataclass(frozen=True)
class Course:
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
    learning_rate: float
    rates: dict[float, float]
    """Agreement of every learning rate that was tried."""


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


@dataclass(frozen=True)
class _Batches:
    """What the steps read.

    Attributes:
        texts: Indices of texts, by step. retained: Samples of the text to retain and their indices by step, if any.
        lengths: Tokens of each text. widest: Tokens of the largest batch, padding included.
    """

    texts: list[list[int]]
    retained: tuple[list[Sample], list[list[int]]] | None
    lengths: list[int]
    widest: int


def _batches(
    targets: Targets, others: list[int], retained: list[Sample], steps: int, options: dict[str, Any]
) -> _Batches:
    sizes = [int(targets.aligned[i].ends[-1]) for i in range(len(targets))]
    batches = [
        [others[i] for i in batch]
        for batch in step_batches([sizes[i] for i in others], options["batch_bytes"], steps, options["seed"])
    ]
    lengths = [len(a.ids_n) for a in targets.aligned]
    widest = max(len(b) * max(lengths[i] for i in b) for b in batches)
    if not retained:
        return _Batches(batches, None, lengths, widest)
    wanted = sum(lengths[i] for b in batches for i in b) // len(batches)
    rows = [len(sample.ids) for sample in retained]
    kept = step_batches(rows, max(1, wanted), steps, options["seed"])
    # Both graphs are there until the one backward pass.
    widest += max(len(b) * max(rows[i] for i in b) for b in kept)
    return _Batches(batches, (retained, kept), lengths, widest)


def train_on_targets(
    folder: Path,
    models: tuple[Checkpoint, Checkpoint],
    start: Path | None,
    targets: Targets,
    retained: list[Sample],
    clock: PhaseClock,
    steps: int,
    options: dict[str, Any],
    machine: Machine,
    checkpointing: bool,
) -> Course:
    """Trains an adapter of the new model on the targets; goes on from the last checkpoint in the folder.

    Args:
        models: Old and new.
        start: The adapter to start from; None for a new one.
        retained: Samples of the text to retain, if any.
        options: Of the training, as the unfinished work records them.
        checkpointing: Recompute activations even where the memory budget does not ask for it.

    Raises:
        LoraSuiteError: The memory budget is too small, or the start gives NaN or infinity.
    """
    new = models[1]
    held, others = _split(targets, options["seed"])
    batches = _batches(targets, others, retained, steps, options)
    checkpointing = _checkpointing(*models, machine.dtype, batches.widest, machine.memory, checkpointing)
    held_out = _held_out_batches(targets, held, options)
    labels = options["seed"] if options["control"] == CONTROLS[2] else None
    read = RefinementBatches(targets, batches.texts, labels, batches.retained)
    with clock.phase("load", 1):
        model = _loaded(new, start, retained, options, machine)
        beginning = folder / "start"
        if Ranks.join().first:
            model.save_pretrained(beginning)

    weights = options["kl_weight"], options["next_token_weight"], options.get("retain_weight", 0.0)
    trainer = Trainer(model, machine, checkpointing, targets.tokens, weights, held_out)
    rate: float | None = options["learning_rate"]
    tried: dict[float, float] = {}
    if rate is None and steps < LEAST_STEPS:
        rate = UNTRIED if start is None else UNTRIED_STARTED
    elif rate is None:
        rate, tried = search_rate(trainer, folder / "trainer", read, options["seed"], clock)
    with clock.phase("train", steps) as report:
        schedule = Schedule(steps, rate, options["eval_every"], options["seed"], patience=options["patience"])
        training, loss = trainer.begin(folder / "trainer", schedule)
        first = loss.agreement()
        if not math.isfinite(first):
            raise LoraSuiteError(
                f"{new.name} with {start or 'a new adapter'} gives NaN or infinity on the text in {model.dtype}; "
                f"{finite_hint(model.dtype)}"
            )
        progress = training.run(read, loss, loss.agreement, report)
    evaluations = _evaluations(first, progress)
    best = max(evaluations, key=lambda e: e.agreement)
    better = bool(best.step) and best.agreement > max(first, 0.0)
    return Course(
        training.checkpoint(best.step) if better else beginning,
        progress.step,
        best.step if better else 0,
        "diverged" if progress.diverged else "budget" if progress.step >= steps else "patience",
        evaluations,
        len(held),
        sum(batches.lengths[i] for batch in batches.texts[: progress.step] for i in batch),
        sum(p.numel() for p in training.trained),
        checkpointing,
        rate,
        tried,
    )


def _loaded(
    new: Checkpoint, start: Path | None, retained: list[Sample], options: dict[str, Any], machine: Machine
) -> Any:
    """The new model with the adapter to train."""
    loaded = LoadedModel(
        new.folder,
        "NEW",
        device=machine.device,
        dtype=machine.dtype,
        trust_remote_code=machine.trust_remote_code,
    )
    model = _new_peft(loaded, new, start, options["roles"], options["rank"], options["alpha"], options["seed"]).to(
        machine.device
    )
    new.tensors.check_same()
    # Another name would be looked up at every checkpoint, and the embeddings saved besides if it is unlike NEW.
    model.peft_config["default"].base_model_name_or_path = new.name
    if retained:
        loaded.check_ids([sample.ids for sample in retained])
    return model


def _held_out_batches(targets: Targets, held: list[int], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The held-out texts, each once."""
    sizes = [int(targets.aligned[i].ends[-1]) for i in held]
    seen: set[int] = set()
    kept: list[list[int]] = []
    for batch in step_batches(sizes, options["batch_bytes"], len(held), options["seed"]):
        fresh = [held[i] for i in batch if held[i] not in seen]
        seen.update(fresh)
        if fresh:
            kept.append(fresh)
    read = RefinementBatches(targets, kept)
    return [read[n] for n in range(len(kept))]


def _evaluations(first: float, progress: Progress) -> list[Evaluation]:
    """With the mean figures of the steps since the evaluation before."""

    def mean(name: str, begin: int, end: int) -> float | None:
        found = [figures[name] for figures in progress.figures[begin:end] if name in figures]
        return sum(found) / len(found) if found else None

    evaluations = [Evaluation(0, first, None, None)]
    for step, agreement in progress.evaluations:
        begin = evaluations[-1].step
        means = [mean(name, begin, step) for name in ("kl", "next_token", "retained_kl")]
        evaluations.append(Evaluation(step, agreement, *means))
    return evaluations
