"""A new model that is the old one: every weight is compared, and the adapter's files are given back as they are."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import CONFIG, WEIGHTS, Adapter
from ..adapters.factors import update_norm
from ..config import PlanConfig, Runtime
from ..errors import LoraSuiteError
from ..evaluation.identical import same_tensors, same_weights
from ..io.json_files import read_json
from ..io.output import write_folder
from ..io.phases import PhaseClock
from ..models.checkpoint import Checkpoint
from ..models.loader import Layer
from ..reporting.model_card import card_files, migration_step
from ..results import Migration
from ..transfer.build_options import AUTO
from ..transfer.kinship import SAME, Kinship
from ..transfer.plan import ModelRecord, make_options
from ..transfer.projection import LayerResult
from .plan import TransferPlan


def returned_files(source: Adapter, base: str) -> dict[str, bytes]:
    """The adapter's own files; only the base model's name in its configuration is the new one's.

    Raises:
        LoraSuiteError: a file that cannot be read.
    """
    folder = Path(source.where)
    try:
        files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    except OSError as error:
        raise LoraSuiteError(
            f"ADAPTER {folder}: cannot be read ({error.strerror or error}); check the folder"
        ) from None
    config = read_json(folder / CONFIG)
    if config.get("base_model_name_or_path") != base:
        config |= {"base_model_name_or_path": base, "revision": None}
        files[CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return files


def update_sizes(source: Adapter, new: Checkpoint) -> list[LayerResult]:
    """One result a layer: every layer is its own partner."""
    found: dict[int, dict[str, float]] = {}
    for (layer, role), update in sorted(source.updates.items()):
        weight = Layer.of(new, layer, (role,)).weight(role, torch.float32)
        size = float(torch.linalg.vector_norm(weight))
        share = abs(update.scale) * update_norm(update.factors) / size if size else 0.0
        found.setdefault(layer, {})[role] = share
    return [LayerResult(layer, layer, None, None, None, sizes) for layer, sizes in found.items()]


def identity_tensors(new: Checkpoint, roles: tuple[str, ...]) -> dict[str, Tensor]:
    """What a plan of method copy holds where both models are one. Layers are not compared: each is its own partner."""
    d, L = new.shape.d, new.shape.L
    tensors = {"W_h": torch.eye(d), "S": torch.eye(d), "cka": torch.eye(L)}
    for layer in range(L):
        read = Layer.of(new, layer, roles)
        for role in roles:
            tensors[f"layers.{layer}.{role}.norm"] = torch.linalg.vector_norm(read.weight(role, torch.float32)).view(1)
        read.release()
    return tensors


def identity_facts(vocabulary: int, rank: int) -> dict[str, Any]:
    """The facts of such a plan."""
    return {
        "same_vocabulary": True,
        "shared_tokens": vocabulary,
        "untrained_tokens": 0,
        "rank": rank,
        "rms_ratio": 1.0,
        "embedding_factor": 1.0,
        "r2": 1.0,
        "r2_back": 1.0,
    }


def give_back(
    old: Checkpoint,
    new: str | os.PathLike[str],
    source: Adapter,
    out: Path,
    config: PlanConfig,
    runtime: Runtime,
    *,
    overwrite: bool,
) -> Migration | None:
    """The adapter as it is, written to `out`, where NEW is OLD, a copy of it, or OLD in another dtype; else None.

    Args:
        config: of `TransferPlan.build`; a method or transfer matrix asked for is not passed over.
    """
    chosen = make_options(replace(config, roles=source.roles), runtime)
    if chosen.method != AUTO or chosen.transfer != "embedding":
        return None
    successor, clock = Checkpoint(new, "new", mapped=chosen.mapped), PhaseClock(runtime.progress)
    if not same_tensors(old, successor):
        return None
    with clock.phase("weights", 1) as step:
        same = same_weights(old, successor)
        step(1)
    if not same:
        return None
    shape = successor.shape
    facts = identity_facts(shape.V, shape.d) | {"kinship": Kinship(SAME, None).as_dict()}
    facts["method_reason"] = "the new model's weights are the old one's, so that the adapter is given back as it is"
    plan = TransferPlan(
        ModelRecord.of(old),
        ModelRecord.of(successor),
        chosen.as_dict() | {"method": "copy", "examples": 0},
        {layer: layer for layer in range(shape.L)},
        identity_tensors(successor, source.roles),
        facts,
    )
    results = update_sizes(source, successor)
    done = migration_step(plan, source, results, None)
    told = card_files(successor.name, done, wrapped=successor.family.wrapper is not None)
    write_folder(out, returned_files(source, successor.name) | told, overwrite=overwrite)
    return Migration(plan, source.where, str(out), results, clock.phases, [])
