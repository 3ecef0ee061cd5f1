"""A distilled update as a PEFT LoRA folder: the text it is fitted on, the fit, the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._version import __version__
from ..adapters.adapter import Adapter, Update, adapter_files, by_module
from ..adapters.adapter_folder import adapter_digest
from ..adapters.factors import update_norm
from ..adapters.fill import SHARE, fill_layers
from ..errors import LoraSuiteError
from ..io.number_range import in_range
from ..io.phases import PhaseClock
from ..io.phases import memory as process_memory
from ..io.tensor_files import DTYPES
from ..io.work import Work
from ..models.checkpoint import Checkpoint
from ..models.loader import Layer
from ..text.calibration import load_examples
from ..text.self_text import self_written
from ..transfer.build_options import SELF, files_identity
from ..transfer.projection import LayerResult
from .candidates import Candidate
from .distill import distill
from .settings import Distilled, Settings

if TYPE_CHECKING:
    from ..transfer.plan import Plan

TEXTS = 1024
"""Examples of the text that are read at most."""


@dataclass(frozen=True)
class DistilledAdapter:
    """The files of a PEFT LoRA folder for the new model, and how they came about."""

    files: dict[str, bytes]
    layers: list[LayerResult]
    distilled: Distilled
    work: Work
    """To be completed and discarded once the files are on disk."""


def distil_adapter(
    plan: Plan,
    models: tuple[Checkpoint, Checkpoint],
    source: Adapter,
    text: str,
    settings: Settings,
    clock: PhaseClock,
    *,
    folder: Path,
    memory: int | None = None,
    fill: tuple[str, float] = ("none", SHARE),
    text_given: bool = False,
    others: Mapping[str, Candidate] | None = None,
    trust_remote_code: bool = False,
) -> DistilledAdapter:
    """Distils an adapter with a plan's options. The result is a plain LoRA, whatever kind the source is.

    Args:
        folder: of the work, which an interrupted run leaves. memory: bytes that may be resident; see `distill`.
        fill: as `fill_layers` has it, with the share, for the layers that are not fitted.
        text: "shipped", "self", or a .jsonl or .txt file. text_given: it is the caller's, who may pass a pipe; a plan,
            which may come from anyone, may name a regular file alone. others: adapters to judge on the same text.

    Raises:
        LoraSuiteError: text that cannot be used, models that share too little.
    """
    old, new = models
    seed: int = plan.options["seed"] if settings.seed is None else settings.seed
    settings = replace(settings, seed=seed)
    device, dtype = plan.device, plan.dtype
    if text == SELF:
        _check_room(old, memory, device)
        with clock.phase("self-written text", TEXTS) as step:
            texts = self_written(
                old,
                source.where,
                count=TEXTS,
                seed=seed,
                device=device,
                trust_remote_code=trust_remote_code,
                report=step,
            )
    else:
        texts = load_examples(None if text == "shipped" else text, TEXTS, seed, pipe=text_given)
    tokenizers = old.tokenizer(trust_remote_code=trust_remote_code), new.tokenizer(trust_remote_code=trust_remote_code)
    work = Work(folder, _identity(models, source, texts, settings, device, dtype))
    with work, in_range(f"{source.where}, {old.folder} or {new.folder}"):
        distilled = distill(
            old,
            new,
            source,
            tokenizers,
            texts,
            settings,
            clock,
            device=device,
            dtype=dtype,
            memory=memory,
            work=work,
            others={name: candidate.updates for name, candidate in (others or {}).items()},
            trust_remote_code=trust_remote_code,
        )
        files, sizes = _files(distilled, source, new, fill, seed)
    cka = plan.tensors["cka"]
    layers = [
        LayerResult(
            new_layer=j,
            old_layer=plan.layers.get(j),
            cka=float(cka[plan.layers[j], j]) if j in plan.layers else None,
            head_similarity=None,
            neuron_similarity=None,
            update=sizes[j],
            explained=distilled.explained[j],
        )
        for j in sorted(sizes)
    ]
    return DistilledAdapter(files, layers, replace(distilled, text=text), work)


def _files(
    distilled: Distilled, source: Adapter, new: Checkpoint, fill: tuple[str, float], seed: int
) -> tuple[dict[str, bytes], dict[int, dict[str, float]]]:
    """The files of the adapter, and how large its updates are: layer -> role -> share of the weight's norm."""
    dtype = next(iter(source.updates.values())).factors.a.dtype
    updates: dict[tuple[int, str], Update] = {}
    sizes: dict[int, dict[str, float]] = {}
    for (j, role), factors in sorted(distilled.updates.items()):
        # The scale is in the factors: alpha = r.
        updates[j, role] = Update(factors, float(factors.a.shape[0]), rslora=False)
        sizes.setdefault(j, {})[role] = update_norm(factors) / float(_norm(new, j, role))
    rank = max(update.rank for update in updates.values())
    config = source.config | {"r": rank, "lora_alpha": rank, "use_rslora": False, "use_dora": False}
    merged = fill_layers(
        by_module(updates, new.family, new.shape, dtype),
        new.family,
        new.shape,
        fill[0],
        rank=rank,
        alpha=rank,
        share=fill[1],
        seed=seed,
    )
    files = adapter_files(merged, replace(source, config=config), new.family.model_type, new.shape, new.name)
    return files, sizes


def _check_room(old: Checkpoint, memory: int | None, device: torch.device) -> None:
    """Raises LoraSuiteError where the old model, which writes its text whole and in float32, does not fit a budget."""
    numbers = sum(entry.size // DTYPES[entry.dtype].itemsize for entry in old.tensors.entries.values())
    needed = 4 * numbers + (process_memory()[1] if device.type == "cpu" else 0)
    if memory is not None and needed > memory:
        raise LoraSuiteError(
            f"`memory={memory / 2**20:.0f}MiB`: {old.name} writes text only as a whole, which takes about "
            f"{needed / 2**20:.0f} MiB; give a larger budget, or unlabelled text in a file in the place of {SELF}"
        )


def _identity(
    models: tuple[Checkpoint, Checkpoint],
    source: Adapter,
    texts: list[str],
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything the updates' bits depend on, for telling whether unfinished work belongs to them."""
    import transformers

    return {
        "old model": files_identity(models[0]),
        "new model": files_identity(models[1]),
        "adapter": adapter_digest(source.where),
        "text": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32],
        "versions": [__version__, torch.__version__, transformers.__version__],
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    } | {f"setting {name}": value for name, value in asdict(settings).items()}


def _norm(model: Checkpoint, layer: int, role: str) -> Tensor:
    weight = Layer.of(model, layer, (role,)).weight(role, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(weight)
    return norm.clamp_min(torch.finfo(torch.float32).tiny)
