"""The loss of a fine-tuning: mean cross-entropy over the tokens of a batch that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..text.samples import Sample, padded
from .loop import Batch, Figures, Training, own_rows
from .predictions import predictions
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


_NAMES = ("input_ids", "attention_mask", "labels")


def _summed_loss(model: Any, part: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every token that counts, in nats, summed; at least float32."""
    return predictions(model, part["input_ids"], part["attention_mask"]).cross_entropy(part["labels"][:, 1:])


class SampleLoss:
    """The loss of a batch of samples and of the text to retain, each computed in micro-batches.

    Args:
        micro_batch: rows computed at once. retain_weight: of the text to retain. seed: of dropout where a mean is taken
            with dropout on.
    """

    def __init__(self, training: Training, micro_batch: int, retain_weight: float, seed: int) -> None:
        self._training, self._micro_batch = training, micro_batch
        self._retain_weight, self._seed = retain_weight, seed

    def _parts(self, batch: Batch, prefix: str = "") -> Iterator[dict[str, Tensor]]:
        """Micro-batches of this process's rows of what has the prefix, each no wider than its longest row."""
        own = own_rows(batch, [f"{prefix}{name}" for name in _NAMES], self._training.ranks)
        rows = {name: own[f"{prefix}{name}"] for name in _NAMES}
        for first in range(0, len(rows["input_ids"]), self._micro_batch):
            width = int(rows["attention_mask"][first].sum())
            yield {name: tensor[first : first + self._micro_batch, :width] for name, tensor in rows.items()}

    def __call__(self, batch: Batch, backward: Callable[[Tensor], None]) -> Figures:
        """Figures: loss, and retained_kl where the batch has text to retain."""
        tokens = (batch["labels"] != -100).sum()
        total = torch.zeros((), device=tokens.device)
        for part in self._parts(batch):
            with self._training.precision():
                loss = _summed_loss(self._training.model, part) / tokens
            backward(loss)
            total = total + loss.detach()
        shift = self._shift(batch, backward)
        return {"loss": float(total)} | ({} if shift is None else {"retained_kl": shift})

    def _shift(self, batch: Batch, backward: Callable[[Tensor], None] | None) -> float | None:
        """Mean shift of the predictions on the text to retain, if a batch has such text."""
        if f"{KEPT}labels" not in batch:
            return None
        tokens = (batch[f"{KEPT}labels"] != -100).sum()
        total = torch.zeros((), device=tokens.device)
        for part in self._parts(batch, KEPT):
            with self._training.precision():
                counted = part["labels"] != -100
                shift = summed_shift(self._training.model, part["input_ids"], part["attention_mask"], counted) / tokens
            if backward is not None:
                backward(self._retain_weight * shift)
            total = total + shift.detach()
        return float(total)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Without gradients, and with draws of dropout that leave the training's as they are."""
        device = self._training.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(self._seed)
            yield

    def mean_loss(self, batches: Sequence[Batch], *, training: bool) -> float:
        """Over all counted tokens of the batches, as the model stands; `training` leaves its dropout on."""
        model = self._training.model
        was_training = model.training
        model.train(training)
        summed, tokens = 0.0, 0
        with self._drawing():
            for batch in batches:
                inputs = self._training.on_device(batch)
                tokens += int((inputs["labels"] != -100).sum())
                for part in self._parts(inputs):
                    with self._training.precision():
                        summed += float(_summed_loss(model, part))
        model.train(was_training)
        return self._training.summed(summed)[0] / tokens

    def mean_shift(self, batches: Sequence[Batch]) -> float:
        """The same of the text to retain, every batch with equal weight; dropout is left on."""
        self._training.model.train()
        with self._drawing():
            shifts = [self._shift(self._training.on_device(batch), None) or 0.0 for batch in batches]
        return self._training.summed(sum(shifts))[0] / len(shifts)
