"""The one training loop: an adapter is trained on a model that stays frozen, in one process or in several.

AdamW without weight decay, a learning rate that falls linearly to 0, gradients clipped to norm 1. A verb supplies the
loss of a batch and, if it has held-out data, a score; the loop knows neither texts nor targets.

Several processes (torchrun, accelerate launch) read the same batches. Each computes the rows that are its share,
divided by the counts of the whole batch, and the gradients of the adapter are summed over the processes before they
are clipped: the step is that of one process, to rounding. Only the first process writes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..io.ranks import Ranks

TRAINING = "training"
"""Of a work folder, the part in which a training keeps its checkpoints."""
CLIP = 1.0
"""Norm above which a gradient is scaled down to it."""
STATE = "state.json"
_TENSORS = "state.pt"

Batch = dict[str, Any]
Figures = dict[str, float]
Loss = Callable[[Batch, Callable[[Tensor], None]], Figures]
"""Computes a batch, hands every part of its loss to the second argument, which adds its gradient, and returns the
figures of the step: this process's share of sums that are already divided by the counts of the whole batch."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: optimizer steps. learning_rate: at the first one. save_every: steps between checkpoints, which are
            evaluated if there is a score. patience: evaluations without a better one after which training stops.
        seed: of the draws of dropout.
    """

    steps: int
    learning_rate: float
    save_every: int
    seed: int
    patience: int | None = None

    def rate(self, step: int) -> float:
        """Of the step after `step` finished ones."""
        return self.learning_rate * max(0.0, (self.steps - step) / self.steps)


@dataclass
class Progress:
    """Where a training stands; plain data, kept with every checkpoint.

    Attributes:
        step: finished ones. figures: of each. evaluations: step and score, higher is better. best: step of the best
            evaluation. waited: evaluations since then. diverged: the step whose loss, or behind which the score, was
            NaN or infinite.
    """

    step: int = 0
    figures: list[Figures] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    best: int | None = None
    waited: int = 0
    diverged: int | None = None

    def evaluated(self, score: float) -> None:
        scores = dict(self.evaluations)
        self.evaluations.append((self.step, score))
        if self.best is None or score > scores[self.best]:
            self.best, self.waited = self.step, 0
        else:
            self.waited += 1


class Training:
    """A model with a trainable adapter, and what its training needs.

    Args:
        model: a PEFT model on `device`. folder: of the checkpoints.
        autocast: compute products in bfloat16. checkpointing: recompute activations.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        schedule: Schedule,
        *,
        device: torch.device,
        autocast: bool = False,
        checkpointing: bool = False,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import set_seed

        refuse_sharding()
        self.ranks = Ranks.join()
        # A process may train more than once, and not always in the same precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if autocast else "no")
        self.model, self.folder, self.schedule, self.device = model, folder, schedule, device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.progress = Progress()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._optimizer = torch.optim.AdamW(self.trained, lr=schedule.learning_rate, weight_decay=0.0)
        set_seed(schedule.seed + self.ranks.rank)

    def precision(self) -> Any:
        """Context of a forward pass."""
        return self.accelerator.autocast()

    def on_device(self, batch: Batch) -> Batch:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def summed(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        found: list[float] = self.ranks.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()
        return found

    def run(
        self,
        batches: torch.utils.data.Dataset[Batch],
        loss: Loss,
        score: Callable[[], float] | None,
        report: Callable[[int], None],
    ) -> Progress:
        """Trains from the last checkpoint, or from the start, to the end of the schedule or of patience.

        Args:
            batches: one a step. score: of the model as it stands, higher is better. report: called with the number of
                finished steps.
        """
        state = self._resume()
        first, steps = self.progress.step, self.schedule.steps
        rest = torch.utils.data.Subset(batches, range(first, steps))
        loader = iter(torch.utils.data.DataLoader(rest, batch_size=None, pin_memory=self.device.type == "cuda"))
        if state is not None:
            # Behind the loader, which draws a seed of its own.
            self._restore_draws(state)
        while self.progress.step < steps and not self._out_of_patience():
            if not self._step(self.on_device(next(loader)), loss):
                break
            report(self.progress.step)
            if self.progress.step % self.schedule.save_every and self.progress.step < steps:
                continue
            if score is not None:
                value = score()
                if not math.isfinite(value):
                    self.progress.diverged = self.progress.step
                    self.progress.evaluated(-math.inf)
                    break
                self.progress.evaluated(value)
            self._save()
        return self.progress

    def _out_of_patience(self) -> bool:
        return self.schedule.patience is not None and self.progress.waited >= self.schedule.patience

    def _step(self, batch: Batch, loss: Loss) -> bool:
        """One optimizer step; False where its loss is NaN or infinite, in which case nothing is updated."""
        self.model.train()
        own = loss(batch, self.accelerator.backward)
        figures = dict(zip(own, self.summed(*own.values()), strict=True))
        self.progress.figures.append(figures)
        self.progress.step += 1
        if not all(math.isfinite(value) for value in figures.values()):
            self.progress.diverged = self.progress.step
            return False
        self._sum_gradients()
        self.accelerator.clip_grad_norm_(self.trained, CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.progress.step - 1)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return True

    def _sum_gradients(self) -> None:
        if self.ranks.size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        flat = self.ranks.sum(torch.cat([g.flatten() for g in gradients]))
        sizes = [p.numel() for p in self.trained]
        for p, part in zip(self.trained, flat.split(sizes), strict=True):
            p.grad = part.view_as(p)

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def _draws(self) -> dict[str, Tensor]:
        draws = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            draws["device"] = torch.cuda.get_rng_state(self.device)
        return draws

    def _restore_draws(self, state: dict[str, Any]) -> None:
        draws = state["draws"][self.ranks.rank]
        torch.set_rng_state(draws["cpu"])
        if "device" in draws:
            torch.cuda.set_rng_state(draws["device"], self.device)

    def _save(self) -> None:
        """A checkpoint that is there whole or not at all: adapter, optimizer, draws and progress, no frozen weight."""
        draws = self.ranks.merge({self.ranks.rank: self._draws()})
        if self.ranks.first:
            place = self.folder / f".checkpoint-{self.progress.step}.tmp"
            shutil.rmtree(place, ignore_errors=True)
            self.model.save_pretrained(place)
            parameters = [p.detach() for p in self.trained]
            tensors = {"parameters": parameters, "optimizer": self._optimizer.state_dict(), "draws": draws}
            torch.save(tensors, place / _TENSORS)
            (place / STATE).write_text(json.dumps(vars(self.progress)))
            place.rename(self.checkpoint(self.progress.step))
            self._forget()
        # No process is ahead of a checkpoint that could not be written.
        self.ranks.wait()

    def _forget(self) -> None:
        """Removes all checkpoints but the newest and the best."""
        for old in _checkpoints(self.folder):
            if _step_of(old) not in (self.progress.step, self.progress.best):
                shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> dict[str, Any] | None:
        """Goes to the last checkpoint, if there is one."""
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob(".checkpoint-*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
        found = self.ranks.share(max(_checkpoints(self.folder), key=_step_of, default=None))
        if found is None:
            return None
        try:
            kept = json.loads((found / STATE).read_text())
            state: dict[str, Any] = torch.load(found / _TENSORS, map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise LoraSuiteError(f"{found}: cannot be read ({error}); delete the folder to train anew") from None
        self.progress = Progress(**kept | {"evaluations": [(step, value) for step, value in kept["evaluations"]]})
        with torch.no_grad():
            for p, value in zip(self.trained, state["parameters"], strict=True):
                p.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        return state


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if (path / STATE).exists()]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def own_rows(batch: Batch, names: Sequence[str], ranks: Ranks) -> Batch:
    """This process's rows of tensors (rows, ...): every `size`-th, so that an order by length stays one."""
    return {name: batch[name][ranks.rank :: ranks.size] for name in names}


def refuse_sharding() -> None:
    """Training divides a batch, not a model.

    Raises:
        LoraSuiteError: accelerate was asked to shard the model.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes"):
            raise LoraSuiteError(
                f"{name}: training divides batches among processes, not the model; launch without it, and use "
                "gradient checkpointing or bfloat16 where the model does not fit"
            )
