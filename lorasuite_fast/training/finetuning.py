"""Light fine-tuning: an adapter is trained on a few labelled samples, starting from the factors it comes with.

The recipe of LoRASuite (arXiv 2505.13515) for adapters just projected: 3 epochs, batches of 16, AdamW, a learning
rate that falls linearly from 1e-3 without a warm-up, rows of at most 256 tokens. An adapter from zero is trained by the
same code, so that the two can be compared.

The loss of a step is the mean cross-entropy over all the tokens its batch counts, however the batch is divided.

With `retain` a step also reads about as many tokens of text whose predictions are to stay what they are (`retention`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import WEIGHTS, broken_tensor
from ..adapters.aligned_states import LoadedModel
from ..config import finite_hint
from ..errors import LoraSuiteError
from ..io.json_files import finite
from ..io.notebook import Rendered
from ..io.phases import Phase, PhaseClock
from ..io.ranks import Ranks
from ..models.families import Family
from ..text.samples import Data, Sample, Samples, load_samples
from .batches import sample_batches, step_batches
from .loop import Schedule, Training
from .sample_loss import FinetuningBatches, SampleLoss

EPOCHS, BATCH, LEARNING_RATE, MAX_TOKENS = 3, 16, 1e-3, 256
RANK = 32
"""Of an adapter from zero; its alpha is the same number."""
SAVE_STEPS = 50
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
class Finetuning(Rendered):
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


def new_adapter(loaded: LoadedModel, family: Family, new: Mapping[str, Any], seed: int) -> None:
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


def split_samples(
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
class Course:
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


def train_on_samples(
    folder: Path,
    loaded: LoadedModel,
    start: Path | None,
    samples: list[Sample],
    held_out: list[Sample],
    kept: list[Sample],
    clock: PhaseClock,
    options: dict[str, Any],
    checkpointing: bool,
) -> Course:
    steps, batch = options["steps"], options["batch"]
    batches = sample_batches(len(samples), batch, steps, options["seed"])
    kept_batches = None
    if kept:
        read = sum(len(sample.ids) for sample in samples) * min(batch, len(samples)) // len(samples)
        sizes = [len(sample.ids) for sample in kept]
        kept_batches = kept, step_batches(sizes, max(1, read), steps, options["seed"])
    dataset = FinetuningBatches(samples, batches, kept_batches)
    evaluated = FinetuningBatches(
        held_out, [list(range(len(held_out)))[n : n + batch] for n in range(0, len(held_out), batch)]
    )
    compared = _last_third(steps)
    source = start
    if source is None:
        source = folder / "start"
        if Ranks.join().first:
            loaded.peft.save_pretrained(source)
    training = Training(
        loaded.peft,
        folder / "trainer",
        Schedule(steps, options["learning_rate"], options["save_every"], options["seed"]),
        device=loaded.device,
        autocast=loaded.model.dtype == torch.bfloat16,
        checkpointing=checkpointing,
    )
    weight = options.get("retain_weight", 0.0)
    loss = SampleLoss(training, options["micro_batch"], weight, options["seed"])
    held_batches = [evaluated[n] for n in range(len(evaluated))]
    with clock.phase("start's loss", 1):
        first = loss.mean_loss([dataset[n] for n in compared], training=True)
        first_shift = loss.mean_shift([dataset[n] for n in compared]) if kept else None
        if not math.isfinite(first):
            raise LoraSuiteError(
                f"{loaded.name} with this adapter gives NaN or infinity on the data in {loaded.model.dtype}; "
                f"{finite_hint(loaded.model.dtype)}"
            )
        evaluations = [Evaluation(0, loss.mean_loss(held_batches, training=False))] if held_out else []
    with clock.phase("train", steps) as report:
        score = (lambda: -loss.mean_loss(held_batches, training=False)) if held_out else None
        progress = training.run(dataset, loss, score, report)
    losses = [figures["loss"] for figures in progress.figures]
    evaluations += [Evaluation(step, -score) for step, score in progress.evaluations]
    shifts = [figures["retained_kl"] for figures in progress.figures if "retained_kl" in figures]
    tokens = [sum(samples[i].tokens for i in part) for part in batches]
    end, shift = None, None
    if len(losses) == steps:
        shift = sum(shifts[n] for n in compared) / len(compared) if kept else None
        end = sum(losses[n] * tokens[n] for n in compared) / sum(tokens[n] for n in compared)
    chosen = steps
    # What is minimised: --retain trades some of the loss for closeness.
    objective = None if end is None else end + weight * (shift or 0.0)
    tolerance = _DRAWN if loaded.peft.peft_config["default"].lora_dropout else _ROUNDING
    last = training.checkpoint(steps)
    before = first + weight * (first_shift or 0.0)
    what = "loss with its retained part" if kept else "loss"
    diverged = _divergence(progress.diverged, what, before, objective, tolerance, last)
    if diverged is not None:
        chosen = 0
    elif evaluations:
        chosen = min(evaluations, key=lambda e: e.loss).step
    if chosen:
        source = training.checkpoint(chosen)
    seen = sum(tokens[: len(losses)])
    return Course(source, chosen, diverged, first, end, losses, first_shift, shift, evaluations, seen)


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
