"""The fit of one layer after another, each on what the earlier ones reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Update
from ..adapters.factors import Factors
from ..io.number_range import check_range, in_range
from ..io.work import Work
from ..models.hidden_states import StreamedLayer
from ..models.layouts import READING
from .output_map import OutputMap
from .regression import ProjectionSums, in_front_of_norm, reduced_rank_ridge
from .settings import CONTROLS, GAINS, Settings
from .streams import Run, Side, batches, calls_of, check_finite, on_layer, run_layer, updated


def targets(before: Sequence[Tensor], after: Sequence[Tensor], U: Tensor, settings: Settings) -> Iterator[Tensor]:
    """The wanted change of what the new head reads, (positions, d_n) by micro-batch, or what a control makes of it."""
    if settings.control not in CONTROLS:
        raise ValueError(f"control {settings.control!r} is not one of {', '.join(CONTROLS)}")
    generator = torch.Generator().manual_seed(settings.seed or 0)
    if settings.control == "shuffled":
        change = torch.cat([(b - a) @ U for a, b in zip(before, after, strict=True)])
        change = change[torch.randperm(len(change), generator=generator)]
        yield from (part.clone() for part in change.split([len(part) for part in before]))
        return
    if settings.control == "rotated":
        U = U @ torch.linalg.qr(torch.randn(U.shape[1], U.shape[1], generator=generator)).Q
    sign = -1 if settings.control == "flipped" else 1
    for a, b in zip(before, after, strict=True):
        yield sign * ((b - a) @ U)


class Fit:
    """The pass over the new model that fits its last layers.

    Attributes:
        updates: (layer, role) -> factors on the CPU. explained: see `Distilled`. entering: the held-out examples'
            hidden states in front of the first fitted layer.

    With a carried adapter the new model is the one with it, of which every layer has it on.
    """

    def __init__(
        self,
        side: Side,
        change: Sequence[Tensor],
        held: Tensor,
        mapped: OutputMap,
        settings: Settings,
        rank: int,
        carried: Mapping[tuple[int, str], Update] | None = None,
    ) -> None:
        self.side, self.settings, self.rank = side, settings, settings.rank or rank
        self.carried = carried or {}
        sizes = [len(row) for row, _ in side.at]
        self.change, self.held = change, held.split(sizes)
        self.metric = mapped.metric
        self.updates: dict[tuple[int, str], Factors] = {}
        self.explained: dict[int, float] = {}
        self.entering: MutableSequence[Tensor] = []

    def run(self, start: int, run: Run, work: Work | None, step: Any) -> None:
        stream = self.side.stream(run, "new")
        base = stream.hidden
        adapted: MutableSequence[Tensor] = []
        for layer in stream:
            if layer.index == start:
                adapted = run.shelf("new-adapted", base)
                self.entering = run.shelf("entering", (self._held_examples(n, h) for n, h in enumerate(base)))
            with self.under(layer):
                run_layer(layer, base)
                if layer.index >= start:
                    self._layer(layer, base, adapted, work)
            step(layer.index + 1)
        for n, hidden in enumerate(base):
            check_finite(self.side.model, self.side.take(n, hidden), hidden.dtype)
        run.clear("new", "new-adapted")

    @contextmanager
    def under(self, layer: StreamedLayer) -> Iterator[None]:
        """The layer with the carried adapter on it while the context lasts."""
        factors, scales = on_layer(self.side, layer.index, self.carried)
        with updated(layer.module, self.side.model, factors, scales):
            yield

    def _held_examples(self, n: int, hidden: Tensor) -> Tensor:
        row, _ = self.side.at[n]
        return hidden[torch.unique(row[self.held[n].to(row.device)]).to(hidden.device)]

    def _kept(self, work: Work | None, layer: int) -> dict[str, Factors] | None:
        """A layer's factors, if an interrupted run fitted it."""
        kept = work.load(f"fit.{layer}") if work else None
        if kept is None:
            return None
        tensors, note = kept
        names = {f"{role}.{side}" for role in self.settings.roles for side in "ba"}
        if set(tensors) != names or not isinstance(note.get("explained"), float):
            return None
        self.explained[layer] = note["explained"]
        return {role: Factors(tensors[f"{role}.b"], tensors[f"{role}.a"]) for role in self.settings.roles}

    def _layer(
        self, layer: StreamedLayer, base: Sequence[Tensor], adapted: MutableSequence[Tensor], work: Work | None
    ) -> None:
        """Fits a layer's projections one after the other, or takes them as an interrupted run fitted them."""
        model, device = self.side.model, self.side.device
        kept = self._kept(work, layer.index)
        if kept is not None:
            self.updates |= {(layer.index, role): factors for role, factors in kept.items()}
            here = {role: Factors(f.b.to(device), f.a.to(device)) for role, f in kept.items()}
            with updated(layer.module, model, here):
                run_layer(layer, adapted)
            return
        found = self._fitted(layer, base, adapted)
        self.updates |= {(layer.index, role): Factors(f.b.cpu(), f.a.cpu()) for role, f in found.items()}
        left = wanted = 0.0
        with updated(layer.module, model, found):
            for n, output in enumerate(layer.run(adapted)):
                held = self.held[n].to(device)
                rest, target = self._left(n, base[n], output)
                left += float(rest[held].double().square().sum())
                wanted += float(target[held].double().square().sum())
        self.explained[layer.index] = 1 - left / wanted if wanted else 0.0
        if work:
            tensors = {f"{role}.{side}": getattr(f, side) for role, f in found.items() for side in "ba"}
            work.save(f"fit.{layer.index}", tensors, explained=self.explained[layer.index])

    def _fitted(
        self, layer: StreamedLayer, base: Sequence[Tensor], adapted: MutableSequence[Tensor]
    ) -> dict[str, Factors]:
        model, device = self.side.model, self.side.device
        found: dict[str, Factors] = {}
        for role in self.settings.roles:
            out, into = model.shape.expected(role)
            gain = self._gain_after(layer, role)
            sums = ProjectionSums(into, out, device)
            with updated(layer.module, model, found), calls_of(layer.module, model.family, role) as seen:
                for n, output in enumerate(layer.run(adapted, keep=False)):
                    train = ~self.held[n].to(device)
                    x, y = (self.side.take(n, states) for states in seen)
                    if gain is not None:
                        # What the norm behind the projection divides by; the rest of its derivative is left out.
                        x = x / (y.square().mean(-1, keepdim=True) + model.epsilon).sqrt()
                    elif role not in READING:
                        x = x * model.residual_factor
                    sums.add(x[train], self._left(n, base[n], output)[0][train])
            metric, cross = self.metric.to(device), sums.cross
            if gain is not None:
                with in_range(f"{model.folder}, layer {layer.index}, the norm behind {role}"):
                    pulled_back, metric = in_front_of_norm(metric, gain)
                cross = pulled_back @ cross
            with in_range(where := f"{model.folder} or the adapter, layer {layer.index}, {role}"):
                found[role] = reduced_rank_ridge(sums.gram, cross, self.rank, self.settings.ridge, metric)
            check_range(where, *found[role])
        return found

    def _gain_after(self, layer: StreamedLayer, role: str) -> Tensor | None:
        """Gain of the norm behind a projection, (d_n,), if there is one."""
        family = self.side.model.family
        norm = family.projections[role].after
        if norm is None:
            return None
        weight = layer.module.get_parameter(f"{norm}.weight")
        return weight.detach().float() + family.gain_offset

    def _left(self, n: int, base: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of the target at micro-batch n's positions, and the target; (positions, d_n) each.

        The norm in front of the head divides by the size of the state, so the target is multiplied by it.
        """
        reference = self.side.take(n, base)
        target = self.side.rms(reference) * self.change[n].to(reference)
        return target - (self.side.take(n, output) - reference), target


def new_states(side: Side, fit: Fit, start: int, run: Run, step: Any) -> dict[float, Sequence[Tensor]]:
    """What the new head reads at the held-out positions with each gain on the fitted updates: gain -> (positions, d_n)
    by micro-batch."""
    stream = side.stream(run, "held", first=start)
    tokens = stream.hidden[0].shape[1]
    entering = run.shelf("held", batches(fit.entering, side.micro_batch, tokens))
    stream.hidden = fit.entering = []
    hidden = {gain: run.shelf(f"held-{gain}", entering) for gain in GAINS}
    device = side.device
    for done, layer in enumerate(stream, 1):
        found = {role: f for (j, role), f in fit.updates.items() if j == layer.index}
        for gain in GAINS:
            factors = {role: Factors(gain * f.b.to(device), f.a.to(device)) for role, f in found.items()}
            with fit.under(layer), updated(layer.module, side.model, factors if gain else {}):
                run_layer(layer, hidden[gain])
        step(done)
    return {
        gain: run.shelf(f"last-{gain}", (side.last(side.take(n, h)).cpu() for n, h in enumerate(states)))
        for gain, states in hidden.items()
    }


def states_with(
    side: Side, adapters: Mapping[str, Mapping[tuple[int, str], Update]], run: Run, step: Any
) -> Iterator[tuple[str, Tensor]]:
    """What the new head reads at the aligned positions with each of several adapters, (positions, d_n), by name.

    One pass carries them all, so that each layer's weights are read once.
    """
    stream = side.stream(run, "candidates")
    hidden = {name: run.shelf(f"candidate-{name}", stream.hidden) for name in adapters}
    stream.hidden = []
    for layer in stream:
        for name, updates in adapters.items():
            factors, scales = on_layer(side, layer.index, updates)
            with updated(layer.module, side.model, factors, scales):
                run_layer(layer, hidden[name])
        step(layer.index + 1)
    for name, states in hidden.items():
        yield name, torch.cat([side.last(side.take(n, h)).cpu() for n, h in enumerate(states)])
