"""Passes through both models, a layer at a time, with and without updates."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, Update
from ..adapters.factors import Factors
from ..config import finite_hint
from ..errors import LoraSuiteError
from ..io.stored_tensors import StoredTensors
from ..io.work import Work
from ..models.checkpoint import Checkpoint
from ..models.families import Family
from ..models.hidden_states import LayerStream, StreamedLayer, padded
from ..models.unembedding import final_norm, unembedding
from ..transfer.magnitude import stored_factors
from .memory import Scratch
from .output_map import ROWS, ChunkedHead
from .settings import Settings


@dataclass(frozen=True)
class Run:
    """How one distillation computes, and where its states lie.

    Attributes:
        folder: of the files where states lie in such, None where they lie in memory. keep: see `LayerStream`.
    """

    dtype: torch.dtype
    trust_remote_code: bool
    scratch: Scratch
    folder: Path | None
    keep: torch.device | None

    def shelf(self, name: str, tensors: Iterable[Tensor] = ()) -> MutableSequence[Tensor]:
        """A list for states, under a name that is in use once at a time."""
        return list(tensors) if self.folder is None else StoredTensors(self.folder / name, tensors)

    def clear(self, *names: str) -> None:
        for name in names if self.folder else ():
            shutil.rmtree(self.folder / name, ignore_errors=True)  # type: ignore[operator]


class Side:
    """One model's half of the aligned texts."""

    def __init__(
        self, model: Checkpoint, ids: list[list[int]], positions: list[Tensor], settings: Settings, device: torch.device
    ) -> None:
        self.model, self.ids, self.device = model, ids, device
        self.micro_batch = settings.micro_batch
        self.at: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(ids), self.micro_batch):
            part = positions[start : start + self.micro_batch]
            row = torch.cat([torch.full_like(p, n) for n, p in enumerate(part)])
            self.at.append((row.to(device), torch.cat(part).to(device)))

    def stream(self, run: Run, name: str, *, first: int = 0) -> LayerStream:
        """A forward pass whose hidden states lie where the run keeps them, under a name."""
        return LayerStream(
            self.model,
            *padded(self.model, self.ids),
            device=self.device,
            dtype=run.dtype,
            micro_batch=self.micro_batch,
            first=first,
            keep=run.keep,
            hidden=run.shelf(name),
            trust_remote_code=run.trust_remote_code,
        )

    def take(self, n: int, hidden: Tensor) -> Tensor:
        """Micro-batch n's states (examples, tokens, d) at its aligned positions, (positions, d) float32."""
        row, column = self.at[n]
        return hidden.to(self.device)[row, column].float()

    def last(self, states: Tensor) -> Tensor:
        """(n, d) residual states -> what the head reads: behind the final norm."""
        family = self.model.family
        gain, shift = final_norm(self.model)
        centred = states - states.mean(-1, keepdim=True) if family.layer_norm else states
        normed = centred / self.rms(states) * gain.to(states)
        return normed if shift is None else normed + shift.to(states)

    def rms(self, states: Tensor) -> Tensor:
        """What the final norm divides by, (n, 1)."""
        if self.model.family.layer_norm:
            states = states - states.mean(-1, keepdim=True)
        return (states.square().mean(-1, keepdim=True) + self.model.epsilon).sqrt()

    def head(self, tokens: Tensor, rows: int = ROWS) -> ChunkedHead:
        """The head over the chosen tokens, of which `rows` at a time are there in float32."""
        name, config = self.model.head("bias"), self.model.config
        bias = None if name is None else self.model.tensors.view(name)[tokens].float().to(self.device)
        weight = unembedding(self.model)
        if self.device.type != "cpu":
            weight, tokens = weight[tokens].to(self.device), torch.arange(len(tokens))
        cap, scale = config.get("final_logit_softcapping") or None, self.model.logit_factor
        bias = None if bias is None else bias * scale
        head = ChunkedHead(weight, bias, scale, cap, tokens=tokens, rows=rows)
        stored = self.model.head() or self.model.embedding_name
        for _, part in head.parts():
            self.model.check_finite(part, stored)
        self.model.tensors.release([stored])
        if name is not None and bias is not None:
            self.model.check_finite(bias, name)
        return head


@contextmanager
def updated(
    module: nn.Module, model: Checkpoint, factors: dict[str, Factors], scales: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """Adds `B A x` to the named projections of a layer while the context lasts; the weights stay as they are.

    Args:
        scales: role -> factors (out,) on the outputs without their bias, the update included (DoRA).
    """

    def hook(role: str, b: Tensor, a: Tensor) -> Any:
        rows, scale = model.family.rows(role, model.shape), (scales or {}).get(role)

        def add(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            at = None if rows is None else rows.to(output.device)
            part = output if at is None else output[..., at]
            changed = part + inputs[0] @ a.T.to(output) @ b.T.to(output)
            if scale is not None:
                bias: Any = getattr(linear, "bias", None)
                shift = 0 if bias is None else bias if at is None else bias[at]
                changed = (changed - shift) * scale.to(output) + shift
            return changed if at is None else output.index_copy(-1, at, changed)

        return add

    handles = [
        module.get_submodule(model.family.projections[role].module).register_forward_hook(hook(role, b, a))
        for role, (b, a) in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calls_of(module: nn.Module, family: Family, role: str) -> Iterator[list[Tensor]]:
    """What a projection of a layer read and gave in the latest call, as the two elements of a list."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = inputs[0], output

    handle = module.get_submodule(family.projections[role].module).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def check_finite(model: Checkpoint, states: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 states that a model gave in a dtype."""
    if not torch.isfinite(states).all():
        raise LoraSuiteError(f"{model.folder}: gives NaN or infinity on the text; {finite_hint(dtype)}")
    return states


def old_states(
    side: Side, source: Adapter, run: Run, work: Work | None, step: Any
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What the old head reads at the aligned positions, without the adapter and with it; (positions, d_o) each, by
    micro-batch."""
    found = None if work is None else _kept_states(side, run, work)
    if found is not None:
        step(side.model.shape.L)
        return found
    stream = side.stream(run, "old")
    before, after = stream.hidden, run.shelf("old-adapted", stream.hidden)
    for layer in stream:
        factors, scales = on_layer(side, layer.index, source.updates)
        run_layer(layer, before)
        with updated(layer.module, side.model, factors, scales):
            run_layer(layer, after)
        step(layer.index + 1)
    taken = tuple(run.shelf(name) for name in _EFFECT)
    for n in range(len(side.at)):
        for hidden, rows in zip((before, after), taken, strict=True):
            rows.append(check_finite(side.model, side.last(side.take(n, hidden[n])).cpu(), hidden[n].dtype))
            hidden[n] = torch.empty(0)
    run.clear("old", "old-adapted")
    if work is not None:
        _keep_states(taken, work)
    return taken[0], taken[1]


_EFFECT = ("before", "after")


def _kept_states(side: Side, run: Run, work: Work) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
    """The result of `old_states`, if an interrupted run finished it."""
    kept = work.load("effect")
    if kept is None:
        return None
    shapes = [(len(row), side.model.shape.d) for row, _ in side.at]
    if run.folder is not None:
        before, after = (StoredTensors.found(run.folder / name, shapes, torch.float32) for name in _EFFECT)  # type: ignore[arg-type]
        return None if before is None or after is None else (before, after)
    lists = tuple([kept[0].get(f"{name}.{n}") for n in range(len(shapes))] for name in _EFFECT)
    whole = all(t is not None and t.shape == shape for rows in lists for t, shape in zip(rows, shapes, strict=True))
    return lists if whole else None  # type: ignore[return-value]


def _keep_states(taken: tuple[MutableSequence[Tensor], ...], work: Work) -> None:
    if isinstance(taken[0], StoredTensors):
        for rows in taken:
            rows.sync()  # type: ignore[attr-defined]
        work.save("effect", {})
        return
    named = zip(_EFFECT, taken, strict=True)
    work.save_state("effect", {f"{name}.{n}": t for name, rows in named for n, t in enumerate(rows)})


def run_layer(layer: StreamedLayer, hidden: MutableSequence[Tensor]) -> None:
    for _ in layer.run(hidden):
        pass


def batches(parts: Iterable[Tensor], size: int, tokens: int) -> Iterator[Tensor]:
    """(examples, tokens or more, d) tensors as ones of `size` examples, cut to `tokens`."""
    waiting: list[Tensor] = []
    for part in parts:
        waiting.append(part[:, :tokens])
        while sum(map(len, waiting)) >= size:
            whole = torch.cat(waiting)
            yield whole[:size]
            waiting = [whole[size:]]
    if sum(map(len, waiting)):
        yield torch.cat(waiting)


def on_layer(
    side: Side, index: int, updates: Mapping[tuple[int, str], Update]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """One layer's factors by role, their scale in them, and DoRA's factors on the outputs."""
    here = {role: u for (i, role), u in updates.items() if i == index}
    factors = {
        role: Factors(u.factors.b.float().to(side.device) * u.scale, u.factors.a.float().to(side.device))
        for role, u in here.items()
    }
    scales = {role: stored_factors(side.model, index, role, u) for role, u in here.items() if u.magnitude is not None}
    return factors, scales
