"""The losses and the Trainer of a refinement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..text.samples import Sample
from .retention import KEPT, kept_batch, summed_shift
from .teacher import Target, Targets, divergence


class RefinementBatches(torch.utils.data.Dataset[dict[str, Any]]):
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


def refinement_trainer() -> Any:
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
