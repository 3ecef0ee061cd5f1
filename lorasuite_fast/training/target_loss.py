"""The loss and the score of a refinement: how far the model's predictions are from their targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..text.samples import Sample
from .loop import Batch, Figures, Training, own_rows
from .predictions import Predictions, predictions
from .retention import KEPT, kept_batch, summed_shift
from .teacher import Target, Targets


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


_ALIGNED = ("position", "log_probs", "log_rest", "index")
"""Of a batch, what has a row for each aligned position."""


def _divergences(found: Predictions, batch: Batch, tokens: Tensor) -> Tensor:
    """KL(target ‖ model) at every aligned position of a batch; (n,) float32."""
    wanted = Target(batch["log_probs"], batch.get("index"), batch["log_rest"])
    return found.target_kl(batch["row"], batch["position"], wanted, tokens)


def _own(batch: Batch, training: Training) -> Batch:
    """This process's texts of a batch, with their targets."""
    ranks = training.ranks
    at = batch["row"] % ranks.size == ranks.rank
    own = own_rows(batch, ("input_ids", "attention_mask", "labels"), ranks)
    own |= {name: batch[name][at] for name in _ALIGNED if name in batch}
    return own | {"row": batch["row"][at] // ranks.size}


class TargetLoss:
    """The weighted losses of a batch of texts, and the agreement on held-out ones.

    Args:
        tokens: the shared ones, ids of the new model. weights: of the divergence from the targets, of the next tokens
            and of the text to retain. held_out: batches. bare_kl: their divergence without an adapter, where known.
    """

    def __init__(
        self,
        training: Training,
        tokens: Tensor,
        weights: tuple[float, float, float],
        held_out: Sequence[Batch],
        bare_kl: float | None = None,
    ) -> None:
        self._training, self._tokens = training, tokens.to(training.device)
        self._weights, self._held_out = weights, held_out
        if bare_kl is None:
            with training.model.disable_adapter():
                bare_kl = self._total_kl()
        self.bare_kl = bare_kl

    def _predictions(self, batch: Batch) -> Predictions:
        return predictions(self._training.model, batch["input_ids"], batch["attention_mask"])

    def __call__(self, batch: Batch, backward: Callable[[Tensor], None]) -> Figures:
        """Figures: loss, and of its parts those that have a weight: kl, next_token, retained_kl."""
        parts: dict[str, Tensor] = {}
        kl_weight, next_weight, kept_weight = self._weights
        weights = {"kl": kl_weight, "next_token": next_weight, "retained_kl": kept_weight}
        alone = self._training.ranks.size == 1
        own = batch if alone else _own(batch, self._training)
        with self._training.precision():
            if len(own["input_ids"]):
                found = self._predictions(own)
                if kl_weight:
                    parts["kl"] = _divergences(found, own, self._tokens).sum() / len(batch["row"])
                if next_weight:
                    parts["next_token"] = found.cross_entropy(own["labels"]) / (batch["labels"] != -100).sum()
            names = tuple(f"{KEPT}{name}" for name in ("input_ids", "attention_mask", "labels"))
            if names[0] in batch:
                kept = own_rows(batch, names, self._training.ranks)
                ids, mask, labels = (kept[name] for name in names)
                if len(ids):
                    shift = summed_shift(self._training.model, ids, mask, labels != -100)
                    parts["retained_kl"] = shift / (batch[names[2]] != -100).sum()
            # A process without a row of this batch still takes part in the sums.
            loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum() if parts else None
        if loss is not None:
            backward(loss)
        wanted = [name for name, weight in weights.items() if weight and (name != "retained_kl" or names[0] in batch)]
        figures = {name: float(parts[name].detach()) if name in parts else 0.0 for name in wanted}
        return {"loss": 0.0 if loss is None else float(loss.detach())} | figures

    def _total_kl(self) -> float:
        """Of the held-out texts, as the model stands."""
        training, total = self._training, 0.0
        was_training = training.model.training
        training.model.eval()
        with torch.no_grad(), training.precision():
            for batch in training.ranks.mine(list(self._held_out)):
                inputs = training.on_device(batch)
                total += float(_divergences(self._predictions(inputs), inputs, self._tokens).double().sum())
        training.model.train(was_training)
        return training.summed(total)[0]

    def agreement(self) -> float:
        """On the held-out texts, as the model stands."""
        return 1 - self._total_kl() / self.bare_kl if self.bare_kl > 0 else 0.0
