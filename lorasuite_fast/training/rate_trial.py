"""The learning rate of a refinement, by a few steps at each of several from the same start."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Machine
from ..io.phases import PhaseClock
from ..io.ranks import Ranks
from .loop import Batch, Schedule, Training
from .target_loss import RefinementBatches, TargetLoss

RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
"""From 2e-4 for large models to 1e-2, from which small ones learn most out of an adapter that does nothing yet."""
FIRST = 4
"""Index of the rate tried first."""
TRIAL_STEPS = 15
LEAST_STEPS = 50
"""A training of fewer steps is not worth a search for its rate."""
UNTRIED, UNTRIED_STARTED = 1e-2, 5e-3
"""What such a training takes: out of an adapter that does nothing, and out of one that does something."""


def best_rate(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Climbs from the first rate to higher ones as long as they are better, or else to lower ones.

    Args:
        score: of a trial at a rate, higher is better; minus infinity of one that diverged.

    Returns:
        The rate of the best score, of equal ones the higher, and the score of every rate that was tried. The lowest
        rate if all diverged.
    """
    scores = {RATES[FIRST]: score(RATES[FIRST])}
    for rates in (RATES[FIRST + 1 :], RATES[:FIRST][::-1]):
        for rate in rates:
            best = max(scores.values())
            scores[rate] = score(rate)
            if scores[rate] <= best and best > -math.inf:
                break
        if max(scores, key=scores.__getitem__) != RATES[FIRST]:
            break
    if max(scores.values()) == -math.inf:
        return min(scores), scores
    return max(scores, key=lambda rate: (scores[rate], rate)), scores


@dataclass
class Trainer:
    """A model with a trainable adapter, and all its trainings on the same targets have in common.

    Attributes:
        model: A PEFT model. tokens, weights, held_out: as `TargetLoss` takes them. bare_kl: of the held-out texts, once
            known.
    """

    model: Any
    machine: Machine
    checkpointing: bool
    tokens: Tensor
    weights: tuple[float, float, float]
    held_out: Sequence[Batch]
    bare_kl: float | None = field(default=None, init=False)

    def begin(self, folder: Path, schedule: Schedule) -> tuple[Training, TargetLoss]:
        """A training from the adapter as it stands."""
        training = Training(
            self.model,
            folder,
            schedule,
            device=self.machine.device,
            autocast=self.machine.half and self.machine.dtype == torch.bfloat16,
            checkpointing=self.checkpointing,
        )
        loss = TargetLoss(training, self.tokens, self.weights, self.held_out, self.bare_kl)
        self.bare_kl = loss.bare_kl
        return training, loss


def search_rate(
    trainer: Trainer, folder: Path, read: RefinementBatches, seed: int, clock: PhaseClock
) -> tuple[float, dict[float, float]]:
    """The learning rate of the best agreement behind a few steps, each trial from the start.

    An interrupted search goes on behind the last finished trial, and is not made again once it is finished.
    """
    ranks, found, done = Ranks.join(), folder / "rates.json", 0

    def score(rate: float) -> float:
        nonlocal done
        training, loss = trainer.begin(folder / f"rate-{rate:g}", Schedule(TRIAL_STEPS, rate, TRIAL_STEPS, seed))
        start = [p.detach().clone() for p in training.trained]
        progress = training.run(read, loss, loss.agreement, lambda step: report(done + step))
        with torch.no_grad():
            for p, value in zip(training.trained, start, strict=True):
                p.copy_(value)
                p.grad = None
        done += TRIAL_STEPS
        return progress.evaluations[-1][1] if progress.diverged is None else -math.inf

    known = ranks.share(json.loads(found.read_text()) if ranks.first and found.exists() else None)
    if known is not None:
        return known["rate"], {float(rate): score for rate, score in known["tried"].items()}
    with clock.phase("learning rate", len(RATES) * TRIAL_STEPS) as report:
        best, tried = best_rate(score)
    tried = {rate: value for rate, value in tried.items() if math.isfinite(value)}
    if ranks.first:
        new = found.with_suffix(".tmp")
        new.write_text(json.dumps({"rate": best, "tried": tried}))
        new.replace(found)
        for trial in folder.glob("rate-*"):
            shutil.rmtree(trial, ignore_errors=True)
    ranks.wait()
    return best, tried
