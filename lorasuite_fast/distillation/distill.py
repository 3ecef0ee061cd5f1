"""Output-side distillation in closed form: the effect of an adapter, carried without labels and without gradients.

Old model, old model with adapter and new model read the same unlabelled text, each in its own tokenization. Where both
tokenizers end a token at the same byte, the adapter's change of what the old head reads is carried to the new residual
stream: U (d_n, d_o) with `Un U ≈ Eo` over the rows of the shared tokens (Un: new unembedding with the final norm's gain
folded in, Eo: old unembedding), each token weighted by how probable the old models find it. Then the last new layers
are fitted one after the other, each to what the ones before it have not achieved yet: the attention's output projection
first, then the MLP's, by reduced-rank ridge regression from its input to the target.

Both models are streamed layer by layer, the old one first. Sums of products are taken in float32 within a micro-batch
and added up in float64; besides the hidden states of the streamed pass only the old last states at the aligned
positions are kept, all of them in files where a memory budget asks for that.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, Update
from ..errors import LoraSuiteError
from ..io.number_range import check_range, in_range
from ..io.phases import PhaseClock
from ..io.phases import memory as process_memory
from ..io.work import Work
from ..models.checkpoint import Checkpoint
from ..text.alignment import AlignedText, Alignment
from .correction import HeldOut, best_start, fit_rest
from .layer_fit import Fit, new_states, states_with, targets
from .memory import DistillDemand, DistillLimits, Scratch
from .output_map import chosen_rows, fit_output_map, token_weights
from .scores import best_gain, gains_by_others, held_out_agreement, kl_shares, rows_by_gain, text_divergences
from .settings import GAINS, Distilled, Settings
from .streams import Run, Side, old_states

_HELD_OUT = 10
_FEWEST_HELD = 4
_LEAST_TEXTS = 8
_LEAST_POSITIONS = 256


def distill(
    old: Checkpoint,
    new: Checkpoint,
    source: Adapter,
    tokenizers: tuple[Any, Any],
    texts: list[str],
    settings: Settings,
    clock: PhaseClock,
    *,
    device: torch.device,
    dtype: torch.dtype,
    memory: int | None = None,
    work: Work | None = None,
    others: Mapping[str, Mapping[tuple[int, str], Update]] | None = None,
    trust_remote_code: bool = False,
) -> Distilled:
    """Carries an adapter's effect from the old to the new model, from unlabelled text.

    Args:
        source: the adapter, read for `old`. tokenizers: of both models. texts: at least 8.
        memory: bytes that may be resident on the device (on a CPU, in the process); None sets no bound. The
            micro-batch, and whether the states between layers lie in files, follow from it.
        work: keeps what is finished, and those files; needed with `memory`. With an interrupted run's, the old model's
            pass and the fitted layers are not computed again.
        others: further adapters of the new model, each as updates by (layer, role), to judge on the held-out texts.

    Raises:
        LoraSuiteError: too little text, models that share too few tokens, NaN or infinity in a forward pass, a budget
            too small.
    """
    settings = replace(settings, roles=tuple(role for role in settings.roles if role in new.family.projections))
    aligned, shared = _align(old, new, tokenizers, texts, settings)
    of_text = torch.cat([torch.full((len(a.ends),), n) for n, a in enumerate(aligned)])
    held_texts = _held_texts(len(aligned))
    held = torch.tensor([n in held_texts for n in range(len(aligned))])[of_text]
    start = new.shape.L - (settings.layers or max(1, new.shape.L // 2))
    if not 0 <= start < new.shape.L:
        raise LoraSuiteError(f"{settings.layers} layers are to be fitted, the new model has {new.shape.L}")
    limits = _limits(
        (old, new), aligned, len(shared[0]), held_texts, settings, device, dtype, memory, work, bool(others)
    )
    settings = replace(settings, micro_batch=limits.micro_batch)
    on_cpu = device.type == "cpu"
    folder = work.folder / "states" if work and limits.away and on_cpu else None
    keep = torch.device("cpu") if limits.away and not on_cpu else None
    run = Run(dtype, trust_remote_code, limits.scratch, folder, keep)
    o = Side(old, [a.ids_o for a in aligned], [a.positions_o for a in aligned], settings, device)
    n = Side(new, [a.ids_n for a in aligned], [a.positions_n for a in aligned], settings, device)
    heads = o.head(shared[0], limits.scratch.rows), n.head(shared[1], limits.scratch.rows)
    parts = held.split([len(row) for row, _ in o.at])
    with clock.phase("adapter's effect", old.shape.L, limits.predicted["adapter's effect"]) as step:
        before, after = old_states(o, source, run, work, step)
    with clock.phase("output map", 1, limits.predicted["output map"]) as step:
        weights = token_weights(heads[0], before, after, parts, limits.scratch.elements, settings.seed or 0)
        with in_range(f"the heads of {old.folder} and {new.folder}"):
            mapped = fit_output_map(heads, new, weights)
        check_range(f"the heads of {old.folder} and {new.folder}", mapped.U, mapped.r2)
        change = run.shelf("change")
        change.extend(targets(before, after, mapped.U.T.cpu(), settings))
        sides = chosen_rows(before, parts), chosen_rows(after, parts)
        del before, after
        step(1)
    for side in (o, n):
        side.model.tensors.release([side.model.head() or side.model.embedding_name])
    fit = Fit(n, change, held, mapped, settings, max(u.rank for u in source.updates.values()))
    with clock.phase("fit", new.shape.L, limits.predicted["fit"]) as step:
        fit.run(start, run, work, step)
    if not others:
        change = []
        run.clear("change")
    fit.change = []
    with clock.phase("held-out agreement", new.shape.L - start, limits.predicted["held-out agreement"]) as step:
        ids = [aligned[k].ids_n for k in sorted(held_texts)]
        h = Side(new, ids, [aligned[k].positions_n for k in sorted(held_texts)], settings, device)
        found = new_states(h, fit, start, run, step)
        text = torch.unique(of_text[held], return_inverse=True)[1]
        divergences = text_divergences(heads, sides, found, text, device, limits.scratch.elements)
        gains, gain = kl_shares(divergences), best_gain(divergences)
        ends = torch.cat(list(found[0.0])), rows_by_gain(found, gains_by_others(divergences)[text])
        agreement, old_kl = held_out_agreement(
            heads, sides, ends, text, device, settings.seed or 0, limits.scratch.elements // 2
        )
        bare = ends[0]
        del found, ends
    judged: dict[str, dict[str, tuple[float, float, float]]] = {}
    if others:
        with clock.phase("candidates' agreement", new.shape.L, limits.predicted["held-out agreement"]) as step:
            for name, rows in states_with(h, others, run, step):
                if torch.isfinite(rows).all():
                    elements = limits.scratch.elements // 2
                    judged[name], _ = held_out_agreement(
                        heads, sides, (bare, rows), text, device, settings.seed or 0, elements
                    )
    rest = None
    if (best := best_start(judged, others or {}, settings.roles)) is not None:
        held_out = HeldOut(h, heads, sides, bare, text)
        run.clear("entering", "held", *(f"{name}-{size}" for name in ("held", "last") for size in GAINS))
        with clock.phase("rest of the effect", 2 * new.shape.L, limits.predicted["fit"]) as step:
            rest = fit_rest(best, (others or {})[best], n, change, held, mapped, held_out, run, settings, step)
    run.clear("change")
    return Distilled(
        fitted=fit.updates,
        gain=gain,
        explained=fit.explained,
        agreement=agreement,
        old_kl=old_kl,
        output_r2=mapped.r2,
        positions=len(of_text),
        held_positions=int(held.sum()),
        texts=len(aligned),
        tokens=(sum(map(len, o.ids)), sum(map(len, n.ids))),
        settings=settings,
        gains=gains,
        others=judged,
        rest=rest,
    )


def _held_texts(count: int) -> set[int]:
    """Which of so many texts, in random order, are held out: every tenth, of few texts 4, or a quarter."""
    held = max(count // _HELD_OUT, min(_FEWEST_HELD, count // 4))
    stride = min(_HELD_OUT, count // held)
    return set(range(stride - 1, count, stride)[:held])


def _limits(
    models: tuple[Checkpoint, Checkpoint],
    aligned: list[AlignedText],
    shared: int,
    held: set[int],
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    memory: int | None,
    work: Work | None,
    judged: bool,
) -> DistillLimits:
    """Sizes to work with: those the budget allows, or those of the run that goes on."""
    demand = DistillDemand(
        *models,
        shared,
        len(aligned),
        len(held),
        (max(len(a.ids_o) for a in aligned), max(len(a.ids_n) for a in aligned)),
        sum(len(a.ends) for a in aligned),
        sum(len(aligned[n].ends) for n in held),
        settings.roles,
        len(GAINS),
        dtype,
        device,
        torch.cuda.memory_allocated(device) if device.type == "cuda" else process_memory()[1],
        gathered=settings.control == "shuffled",
        judged=judged,
    )
    if work is None:
        if memory is not None:
            raise ValueError("a budget needs a work folder, where states can lie")
        return demand.fit(None, settings.micro_batch)
    if not work.resumed:
        limits = demand.fit(memory, settings.micro_batch)
        scratch = limits.scratch
        work.start(
            micro_batch=limits.micro_batch, rows=scratch.rows, elements=scratch.elements, away=1 + int(limits.away)
        )
        return limits
    sizes = [work.record.get(name, 0) for name in ("micro_batch", "rows", "elements", "away")]
    if not all(sizes):
        raise LoraSuiteError(f"{work.folder}: holds damaged work; delete the folder to start over")
    micro_batch, scratch, away = sizes[0], Scratch(sizes[1], sizes[2]), sizes[3] == 2
    return DistillLimits(micro_batch, scratch, away, demand.predict(micro_batch, scratch, away=away))


def _align(
    old: Checkpoint, new: Checkpoint, tokenizers: tuple[Any, Any], texts: list[str], settings: Settings
) -> tuple[list[AlignedText], tuple[Tensor, Tensor]]:
    """Texts in random order with their aligned positions, and the ids of the shared ordinary tokens."""
    alignment = Alignment(*tokenizers)
    texts = list(texts)
    random.Random(settings.seed or 0).shuffle(texts)
    aligned = alignment.align_all(texts, settings.max_tokens)
    positions = sum(len(a.ends) for a in aligned)
    both = alignment.ordinary
    inside = (both.old < old.shape.V) & (both.new < new.shape.V)
    if len(aligned) < _LEAST_TEXTS or positions < _LEAST_POSITIONS or int(inside.sum()) < 2:
        raise LoraSuiteError(
            f"distillation found {positions} aligned positions in {len(aligned)} texts and {int(inside.sum())} shared "
            f"tokens; it needs {_LEAST_POSITIONS} positions in {_LEAST_TEXTS} texts. Pass more text as `calibration`"
        )
    return aligned, (both.old[inside], both.new[inside])
