"""What a carried adapter leaves undone, fitted as distillation fits, on top of it.

The new model with the carried adapter takes the place of the new model. The target is what is left of the old adapter's
effect at the head, `c - (h_c / rms(h_c) - h / rms(h))`: c is the target of distillation, h and h_c the last residual
states without and with the carried adapter. Fitted are modules the carried adapter leaves alone, so that its own
factors, and the rank, stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Update
from ..adapters.factors import Factors
from .choice import WHOLE, Figures, best
from .layer_fit import Fit, new_states
from .output_map import ChunkedHead, OutputMap
from .scores import best_gain, gains_by_others, held_out_agreement, rows_by_gain, text_divergences
from .settings import Rest, Settings
from .streams import Run, Side, on_layer, run_layer, updated

ENOUGH = 0.95
"""Share of the divergence a carried adapter has taken away from which on nothing is fitted on top of it."""

Updates = Mapping[tuple[int, str], Update]


@dataclass(frozen=True)
class HeldOut:
    """The held-out texts, and what the heads read at their positions.

    Attributes:
        side: the new model on them. old: (positions, d_o) without and with the adapter. bare: (positions, d_n), of the
            new model alone. text: (positions,), which text each belongs to.
    """

    side: Side
    heads: tuple[ChunkedHead, ChunkedHead]
    old: tuple[Tensor, Tensor]
    bare: Tensor
    text: Tensor


def best_start(judged: Mapping[str, Figures], others: Mapping[str, Updates], roles: tuple[str, ...]) -> str | None:
    """The carried candidate to fit a rest on; None where there is nothing to gain, or no module to fit.

    A DoRA adapter has no rest: the new modules would need magnitudes.
    """
    start = best(judged)
    if start is None or judged[start][WHOLE][0] >= ENOUGH:
        return None
    plain = all(update.magnitude is None for update in others[start].values())
    return start if plain and _free(others[start], roles) else None


def fit_rest(
    name: str,
    carried: Updates,
    side: Side,
    change: MutableSequence[Tensor],
    held: Tensor,
    mapped: OutputMap,
    held_out: HeldOut,
    run: Run,
    settings: Settings,
    step: Any,
) -> Rest | None:
    """Fits what a carried adapter leaves undone; None where that gives NaN or infinity, or nothing.

    Args:
        name: of the carried candidate. side, held, mapped: as `Fit` takes them. change: the targets of distillation by
            micro-batch, (positions, d_n); they become what is left of them. step: is told of layers, twice as many.
    """
    L = side.model.shape.L
    for n, part in enumerate(_achieved(side, carried, run, step)):
        change[n] = change[n] - part
    settings = replace(settings, roles=_free(carried, settings.roles))
    start = L - (settings.layers or max(1, L // 2))
    fit = Fit(side, change, held, mapped, settings, max(u.rank for u in carried.values()), carried)
    fit.run(start, run, None, lambda done: step(L + done))
    h, text, heads = held_out.side, held_out.text, held_out.heads
    states = new_states(h, fit, start, run, lambda _: None)
    bare = held_out.bare.split([len(row) for row, _ in h.at])
    # In the divergences 0 stands for the new model alone, so that a gain g on the rest is 1 + g there.
    shifted = {0.0: bare} | {1 + gain: rows for gain, rows in states.items()}
    found = text_divergences(heads, held_out.old, shifted, text, h.device, run.scratch.elements)
    divergences = {gain - 1: sums for gain, sums in found.items() if gain}
    gain = best_gain(divergences)
    rows = rows_by_gain(states, gains_by_others(divergences)[text])
    if gain == 0 or not torch.isfinite(rows).all():
        return None
    agreement, _ = held_out_agreement(
        heads, held_out.old, (held_out.bare, rows), text, h.device, settings.seed or 0, run.scratch.elements // 2
    )
    return Rest(name, {key: Factors(gain * f.b, f.a) for key, f in fit.updates.items()}, gain, agreement)


def _free(carried: Updates, roles: tuple[str, ...]) -> tuple[str, ...]:
    taken = {role for _, role in carried}
    return tuple(role for role in roles if role not in taken)


def _achieved(side: Side, carried: Updates, run: Run, step: Any) -> list[Tensor]:
    """By micro-batch, what a carried adapter changes in the last states over their RMS, (positions, d_n)."""
    stream = side.stream(run, "rest-plain")
    plain, adapted = stream.hidden, run.shelf("rest-carried", stream.hidden)
    for layer in stream:
        run_layer(layer, plain)
        factors, scales = on_layer(side, layer.index, carried)
        with updated(layer.module, side.model, factors, scales):
            run_layer(layer, adapted)
        step(layer.index + 1)
    found = []
    for n in range(len(side.at)):
        h, h_c = (side.take(n, hidden[n]) for hidden in (plain, adapted))
        found.append((h_c / side.rms(h_c) - h / side.rms(h)).cpu())
    run.clear("rest-plain", "rest-carried")
    return found
