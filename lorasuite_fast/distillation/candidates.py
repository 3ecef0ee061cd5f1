"""Adapters carried by the weights alone, to be judged on text beside a distilled one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, Update, adapter_files, by_module, by_role
from ..adapters.factors import Factors, update_norm
from ..errors import LoraSuiteError
from ..io.phases import memory as process_memory
from ..models.checkpoint import Checkpoint
from ..models.families import ATTENTION, MLP
from ..models.loader import Layer, stream_layers
from ..transfer.copying import applicable
from ..transfer.memory import Demand
from ..transfer.projection import METHODS, LayerResult, Pair

if TYPE_CHECKING:
    from ..transfer.plan import Plan
    from .settings import Rest


@dataclass(frozen=True)
class Candidate:
    """One adapter for the new model: what would be written of it, and what came of each layer.

    Attributes:
        plan: with what the method stores. files: of a PEFT LoRA folder. updates: the same by (new layer, role).
        modules: the same by (new layer, module), as they are written.
    """

    plan: Plan
    files: dict[str, bytes]
    updates: dict[tuple[int, str], Update]
    layers: list[LayerResult]
    modules: dict[tuple[int, str], Update]


def without_candidates(plan: Plan) -> dict[str, Any]:
    """The options of a plan whose method is settled."""
    return {name: value for name, value in plan.options.items() if name != "candidates"}


def weight_candidates(
    plan: Plan,
    models: tuple[Checkpoint, Checkpoint],
    source: Adapter,
    fill: tuple[str, float],
    memory: int | None,
    step: Any,
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The plan's candidates but for distill, and why others of them could not be made.

    Args:
        fill: as `fill_layers` has it, with the share. memory: bytes that may be resident.

    Raises:
        LoraSuiteError: a budget that is too small for what they need.
    """
    old, new = models
    names = [name for name in plan.options["candidates"] if name != "distill"]
    possible = applicable((old.family, new.family), (old.shape, new.shape), source.roles)
    left_out = {name: "does not apply to this adapter's modules" for name in names if name not in possible}
    names = [name for name in names if name in possible]
    _check_room(plan, models, source.roles, memory)
    stored: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for done, pair in enumerate(_pairs(plan, models, source.roles) if names else (), 1):
        j = pair.new.index
        norms = {f"{role}.norm": _norm(pair, role) for role in source.roles}
        for name in names:
            found = METHODS[name].build(pair, source.roles) | norms
            stored[name] |= {f"layers.{j}.{key}": _kept(key, tensor) for key, tensor in found.items()}
        step(done)
    found_candidates: dict[str, Candidate] = {}
    for name in names:
        shared = {key: plan.tensors[key] for key in ("W_h", "S", "cka")}
        options = without_candidates(plan) | {"method": name, "roles": list(source.roles)}
        carried = replace(plan, options=options, tensors=shared | stored.pop(name))
        try:
            found_candidates[name] = _candidate(carried, models, source, fill)
        except LoraSuiteError as error:
            left_out[name] = str(error)
    return found_candidates, left_out


def _candidate(
    plan: Plan, models: tuple[Checkpoint, Checkpoint], source: Adapter, fill: tuple[str, float]
) -> Candidate:
    updates, layers = plan._project(source, lambda: models, *fill, lambda _: None)
    new = models[1]
    files = adapter_files(updates, source, new.family.model_type, new.shape, new.name)
    return Candidate(plan, files, by_role(updates, new.family, new.shape), layers, updates)


def with_rest(plan: Plan, carried: Candidate, rest: Rest, source: Adapter, new: Checkpoint) -> Candidate:
    """A candidate with a rest fitted on top of it. Its plan is the one given, which judges again when it is applied."""
    like = next(iter(carried.updates.values()))
    rank = max(update.rank for update in carried.updates.values())
    updates: dict[tuple[int, str], Update] = {}
    sizes: dict[int, dict[str, float]] = {}
    for (j, role), (b, a) in sorted(rest.updates.items()):
        plain = Update(Factors(b, a), like.alpha * len(a) / rank, like.rslora)
        updates[j, role] = replace(plain, factors=Factors(b / plain.scale, a))
        weight = Layer.of(new, j, (role,)).weight(role, torch.float32)
        sizes.setdefault(j, {})[role] = update_norm(rest.updates[j, role]) / max(float(weight.norm()), 1e-30)
    modules = carried.modules | by_module(updates, new.family, new.shape, like.factors.a.dtype)
    files = adapter_files(modules, source, new.family.model_type, new.shape, new.name)
    layers = [replace(layer, update=layer.update | sizes.get(layer.new_layer, {})) for layer in carried.layers]
    return Candidate(plan, files, carried.updates | updates, layers, modules)


def _kept(name: str, tensor: Tensor) -> Tensor:
    return (tensor if name.endswith("match") else tensor.float()).cpu().contiguous()


def _norm(pair: Pair, role: str) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(pair.new.weight(role, torch.float32))
    return norm.view(1).cpu()


def _pairs(plan: Plan, models: tuple[Checkpoint, Checkpoint], roles: tuple[str, ...]) -> Iterator[Pair]:
    """The plan's layer pairs, both checkpoints walked together and read once."""
    device, dtype = plan.device, plan.dtype
    W_h, S = (plan.tensors[name].to(device, dtype) for name in ("W_h", "S"))
    wanted = tuple(role for group in (ATTENTION, MLP) if set(group) & set(roles) for role in group)
    order = sorted(plan.layers)
    olds = stream_layers(models[0], device, layers=[plan.layers[j] for j in order], roles=wanted)
    news = stream_layers(models[1], device, layers=order, roles=wanted)
    scales = float(plan.facts["rms_ratio"]), float(plan.facts["embedding_factor"])
    for old, new in zip(olds, news, strict=True):
        yield Pair(old, new, W_h, S, *scales, plan.options["heads"])


def _check_room(plan: Plan, models: tuple[Checkpoint, Checkpoint], roles: tuple[str, ...], memory: int | None) -> None:
    """Raises LoraSuiteError where carrying a layer pair takes more than the budget."""
    if memory is None:
        return
    device, dtype = plan.device, plan.dtype
    base = torch.cuda.memory_allocated(device) if device.type == "cuda" else process_memory()[1]
    phase = "heads and projections"
    needed = Demand(*models, roles, 1, 1, dtype, device, base).predict(1, 1)[phase]
    if needed > memory:
        enough = -(-needed // 2**20)
        raise LoraSuiteError(
            f"`memory={memory / 2**20:.0f}MiB`: the phase 'candidates' needs {enough} MiB; pass `memory={enough}MiB`, "
            "or build the plan with `method=distill`"
        )
