"""How well a distilled adapter agrees with the old one on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ..adapters.aligned_states import States
from ..evaluation.effect import FEWEST, effect_sums, resamples, statistics
from .output_map import ChunkedHead

_BOOTSTRAP = 500


def text_divergences(
    heads: tuple[ChunkedHead, ChunkedHead],
    old: tuple[Tensor, Tensor],
    new: dict[float, Sequence[Tensor]],
    text: Tensor,
    device: torch.device,
    elements: int,
) -> dict[float, Tensor]:
    """By gain, KL(target ‖ new + update) summed by text, (texts,) float64; the target is softmax(log p_n + change of
    old).

    Args:
        old: (positions, d_o) without and with the adapter. new: gain -> (positions, d_n), by micro-batch.
        text: (positions,) int64, which text each belongs to, counted from 0.
    """
    totals = {gain: torch.zeros(int(text.max()) + 1, dtype=torch.float64) for gain in new}
    done = 0
    for n in range(len(new[0.0])):
        states = {gain: rows[n] for gain, rows in new.items()}
        for part in torch.arange(len(states[0.0])).split(max(FEWEST, elements // heads[0].size)):
            o_0, o_1 = (heads[0].log_probs(side[done + part].to(device)) for side in old)
            target = functional.log_softmax(heads[1].log_probs(states[0.0][part].to(device)) + o_1 - o_0, dim=-1)
            for gain, rows in states.items():
                reached = heads[1].log_probs(rows[part].to(device))
                found = (target.exp() * (target - reached)).sum(-1)
                totals[gain].index_add_(0, text[done + part], found.double().cpu())
        done += len(states[0.0])
    return totals


def kl_shares(divergences: dict[float, Tensor]) -> dict[float, float]:
    """By gain, the share of the divergence without an update that is gone with it."""
    totals = {gain: float(found.sum()) for gain, found in divergences.items()}
    return {gain: 1 - total / totals[0.0] if totals[0.0] > 0 else 0.0 for gain, total in totals.items()}


def best_gain(divergences: dict[float, Tensor]) -> float:
    """The gain of least divergence over all texts; of equal ones the smallest."""
    return min(divergences, key=lambda gain: (float(divergences[gain].sum()), gain))


def gains_by_others(divergences: dict[float, Tensor]) -> Tensor:
    """(texts,) float64: for each text the gain that is best on the others, so that none is judged by its own choice."""
    texts = len(next(iter(divergences.values())))
    left_out = ~torch.eye(texts, dtype=torch.bool)
    chosen = [best_gain({gain: found[keep] for gain, found in divergences.items()}) for keep in left_out]
    return torch.tensor(chosen, dtype=torch.float64)


def rows_by_gain(states: dict[float, Sequence[Tensor]], gains: Tensor) -> Tensor:
    """Each position's row with its own gain: gain -> (positions, d) by micro-batch, (positions,) -> (positions, d)."""
    rows, done = [], 0
    for n, plain in enumerate(states[0.0]):
        found, own = plain.clone(), gains[done : done + len(plain)]
        for gain in set(own.tolist()):
            found[own == gain] = states[gain][n][own == gain]
        rows.append(found)
        done += len(plain)
    return torch.cat(rows)


def held_out_agreement(
    heads: tuple[ChunkedHead, ChunkedHead],
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    text: Tensor,
    device: torch.device,
    seed: int,
    elements: int,
) -> tuple[dict[str, tuple[float, float, float]], float]:
    """The figures of `Distilled.agreement`, and `old_kl`."""
    empty = torch.empty(0)
    sides = [
        tuple(States(last, empty, replace(head)) for last in pair) for head, pair in zip(heads, (old, new), strict=True)
    ]
    sums = effect_sums(sides[0], sides[1], text, device=device, seed=seed, elements=elements)  # type: ignore[arg-type]
    columns = sums.gram, sums.plain, sums.scalars
    once = statistics(*(c.sum(0) for c in columns))
    drawn = resamples(len(sums.scalars), _BOOTSTRAP, seed)
    often = statistics(*(torch.einsum("bt,t...->b...", drawn, c) for c in columns))
    names = {
        "kl_share": "carried_kl_share",
        "content_kl_share": "content_kl_share_gain",
        "imitated_share": "carried_imitated_share",
        "content_imitated_share": "content_imitated_share_gain",
        "cosine": "carried_cosine",
        "content_cosine": "content_cosine",
    }
    figures = {}
    for name, column in names.items():
        values = often[column].nan_to_num(0.0)
        low, high = (float(values.quantile(q)) for q in (0.025, 0.975))
        figures[name] = float(once[column].nan_to_num(0.0)), low, high
    return figures, float(once["old_kl"])
