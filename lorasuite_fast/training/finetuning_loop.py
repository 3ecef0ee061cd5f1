"""The loss and the Trainer of a fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..text.samples import Sample, padded
from .retention import KEPT, kept_batch, summed_shift


class FinetuningBatches(torch.utils.data.Dataset[dict[str, Tensor]]):
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


def finetuning_trainer() -> Any:
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
