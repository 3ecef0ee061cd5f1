"""A distilled update as a PEFT LoRA folder: the text it is fitted on, the fit, the files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapter import Adapter, Update, adapter_files, by_module
from .build import SELF
from .calibration import load_examples
from .checkpoint import Checkpoint
from .distillation import Distilled, Settings, distill
from .errors import LoraSuiteError
from .fill import SHARE, fill_layers
from .loader import Layer
from .phases import PhaseClock
from .projection import update_norm
from .result import LayerResult
from .self_text import self_written

if TYPE_CHECKING:
    from .plan import TransferPlan

TEXTS = 1024
"""Examples of the text that are read at most."""


@dataclass(frozen=True)
class DistilledAdapter:
    """The files of a PEFT LoRA folder for the new model, and how they came about."""

    files: dict[str, bytes]
    layers: list[LayerResult]
    distilled: Distilled


def distil_adapter(
    plan: TransferPlan,
    models: tuple[Checkpoint, Checkpoint],
    source: Adapter,
    text: str,
    settings: Settings | None,
    clock: PhaseClock,
    *,
    fill: tuple[str, float] = ("none", SHARE),
    trust_remote_code: bool = False,
) -> DistilledAdapter:
    """Distils an adapter with a plan's options. The result is a plain LoRA, whatever kind the source is.

    Args:
        fill: as `fill_layers` has it, with the share, for the layers that are not fitted.
        text: "shipped", "self", or a .jsonl or .txt file.

    Raises:
        LoraSuiteError: text that cannot be used, models that share too little.
    """
    old, new = models
    settings = settings or Settings(seed=plan.options["seed"])
    if settings.rank is not None and settings.rank < 1:
        raise LoraSuiteError(f"rank {settings.rank}: the result needs a rank of at least 1")
    device, dtype = torch.device(plan.options["device"]), getattr(torch, plan.options["dtype"])
    if text == SELF:
        with clock.phase("self-written text", TEXTS) as step:
            texts = self_written(
                old,
                source.where,
                count=TEXTS,
                seed=settings.seed,
                device=device,
                trust_remote_code=trust_remote_code,
                report=step,
            )
    else:
        texts = load_examples(None if text == "shipped" else text, TEXTS, settings.seed)
    tokenizers = old.tokenizer(trust_remote_code=trust_remote_code), new.tokenizer(trust_remote_code=trust_remote_code)
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
        trust_remote_code=trust_remote_code,
    )
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
        seed=settings.seed,
    )
    files = adapter_files(merged, replace(source, config=config), new.family.model_type, new.shape.L, new.name)
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
    return DistilledAdapter(files, layers, distilled)


def _norm(model: Checkpoint, layer: int, role: str) -> Tensor:
    weight = Layer.of(model, layer, (role,)).weight(role, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(weight)
    return norm.clamp_min(torch.finfo(torch.float32).tiny)
