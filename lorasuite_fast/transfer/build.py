"""Building a transfer plan: the steps of LoRASuite's algorithm (arXiv 2505.13515) over two streamed checkpoints.

Each step first looks for what an interrupted run has finished, and each is divided among the ranks, if there are
several; neither changes a bit of the result.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError, WriteError
from ..io.number_range import check_range, in_range
from ..io.phases import PhaseClock
from ..io.ranks import Ranks
from ..io.work import Work
from ..models.families import ATTENTION, MLP
from ..models.loader import Layer, stream_layers
from .build_options import AUTO, EXACT_R2, Built, Inputs, Options
from .compare import _limits, compare
from .copying import applicable, check_copy
from .embeddings import Transfer
from .head_fit import head_r2
from .kinship import WeightDistance, comparable, kinship, weight_distance
from .memory import Limits
from .projection import METHODS, Pair


def choose_method(asked: str, r2: float | None, r2_back: float | None, layer_r2: float) -> tuple[str, str]:
    """The method that is used, and why: `auto` takes lstsq where a linear map between the models fits exactly.

    Args:
        r2, r2_back: of both maps on held-out tokens' embeddings, None where none were held out or the maps are given.
        layer_r2: of W_h on what the mapped layers give on the calibration text, of the worst of them; models may share
            their embeddings and little else.
    """
    if asked != AUTO:
        return asked, "asked for"
    if r2 is None or r2_back is None:
        fit = f"R² of the transfer matrix on the layers' states on text at least {layer_r2:.4f}"
        if layer_r2 < EXACT_R2:
            return "distill", f"the transfer matrix does not carry one model onto the other ({fit})"
        return "lstsq", f"the transfer matrix carries one model onto the other ({fit}, {EXACT_R2} is exact)"
    fit = f"R² of the maps between the embeddings on held-out tokens {r2:.4f} and {r2_back:.4f}"
    if min(r2, r2_back) < EXACT_R2:
        return "distill", f"no linear map carries one model onto the other ({fit}, {EXACT_R2} would be exact)"
    fit += f", of the layers' states on text at least {layer_r2:.4f}"
    if layer_r2 < EXACT_R2:
        return "distill", f"the embeddings are linear images of one another, the layers are not ({fit})"
    return "lstsq", f"a linear map carries one model onto the other ({fit}, {EXACT_R2} is exact)"


def build(
    inputs: Inputs, options: Options, clock: PhaseClock, ranks: Ranks, folder: Path | None
) -> tuple[Built, Work | None]:
    """The whole recipe. The work folder, if one is given, is left for the caller to discard once the plan is saved."""
    if options.method == "copy":
        check_copy(inputs.old, inputs.new, options.roles)
    limits = _limits(inputs, options)
    work = None
    if folder is not None:
        work = _open_work(folder, inputs.identity(options), limits, ranks)
        limits = Limits(work.record["micro_batch"], work.record["chunk_rows"], limits.predicted, limits.budget)
    try:
        with in_range(f"{inputs.old.folder} and {inputs.new.folder}"):
            built = _steps(inputs, options, limits, clock, ranks, work)
        if work is not None and ranks.first:
            work.complete()
        return built, work
    except WriteError:
        raise
    except LoraSuiteError:
        # Input that cannot be used: there is nothing to go on with.
        if work is not None and ranks.first:
            work.discard()
        raise
    finally:
        if work is not None:
            work.close()


def _steps(
    inputs: Inputs, options: Options, limits: Limits, clock: PhaseClock, ranks: Ranks, work: Work | None
) -> Built:
    weights: WeightDistance | None = None
    if comparable(inputs.old, inputs.new):
        with clock.phase("weights", 1) as step:
            weights = ranks.share(weight_distance(inputs.old, inputs.new) if ranks.first else None)
            step(1)
    compared = compare(inputs, options, limits, clock, ranks, work)
    carried, mapping, layer_r2 = compared.carried, compared.mapping, compared.layer_r2
    method, reason = choose_method(options.method, carried.r2, carried.r2_back, min(layer_r2.values()))
    head = head_r2(inputs.old, inputs.new, inputs.tokenizers, carried.W_h) if method == "lstsq" else None
    if options.method == AUTO and head is not None and head < EXACT_R2:
        method = "distill"
        reason = f"the models are linear images of one another up to their heads, which are not (R² {head:.4f})"
    same = _equal(weights) and carried.same_vocabulary
    near = weights is not None and weights.near and (same or not _equal(weights))
    if weights is not None and near and options.method == AUTO and options.transfer == "embedding":
        far = max(weights.distances.values())
        method, reason = "copy", f"the weights of the two models differ by at most {far:.2%} (a copy needs no more)"
    measured = options.method == AUTO and method == "distill"
    families, shapes = (inputs.old.family, inputs.new.family), (inputs.old.shape, inputs.new.shape)
    candidates = applicable(families, shapes, options.roles) if measured else ()
    options = replace(options, method=method, roles=_roles(inputs, options.roles, method))
    phase = "heads and projections"
    with clock.phase(phase, len(mapping), limits.predicted[phase]) as step:
        pairs = _pairs(inputs, options, carried, mapping, ranks, work, step)
    tensors = {"W_h": carried.W_h, "S": carried.S, "cka": compared.similarity}
    for j in mapping:
        tensors |= {f"layers.{j}.{name}": tensor for name, tensor in pairs[j].items()}
    facts = {
        "same_vocabulary": carried.same_vocabulary,
        "shared_tokens": carried.shared,
        "untrained_tokens": carried.dropped,
        "rank": carried.rank,
        "rms_ratio": carried.rms_ratio,
        "embedding_factor": carried.factor,
        "r2": carried.r2,
        "r2_back": carried.r2_back,
        "head_r2": head,
        "layer_r2": {str(j): r2 for j, r2 in layer_r2.items()},
        "method_reason": reason,
        "kinship": kinship(
            weights, (carried.r2, carried.r2_back), same_depth=shapes[0].L == shapes[1].L, same=same
        ).as_dict(),
    }
    return Built(mapping, tensors, facts, len(inputs.ids[0]), limits, method, options.roles, candidates)


def _equal(weights: WeightDistance | None) -> bool:
    return weights is not None and weights.same_config and not any(weights.distances.values())


def _roles(inputs: Inputs, asked: tuple[str, ...], method: str) -> tuple[str, ...]:
    """The roles to plan for: of those asked for, the ones the old family has.

    Raises:
        LoraSuiteError: the method would carry them one by one, and the new family lacks some.
    """
    old, new = inputs.old.family, inputs.new.family
    wanted = tuple(role for role in asked if role in old.projections)
    lacking = [role for role in wanted if role not in new.projections]
    if lacking and method != "distill":
        raise LoraSuiteError(
            f"a {new.model_type} layer has no {', '.join(lacking)} as the {old.model_type} layers do, so that method "
            f"{method} cannot carry it; pass `method=distill`, or `roles` without it"
        )
    return tuple(role for role in wanted if role in new.projections)


def _open_work(folder: Path, identity: dict[str, Any], limits: Limits, ranks: Ranks) -> Work:
    work = None
    if ranks.first:
        work = Work(folder, identity)
        if not work.resumed:
            work.start(micro_batch=limits.micro_batch, chunk_rows=limits.chunk_rows)
    ranks.share(None)
    work = work or Work(folder, identity, owner=False)
    if not {"micro_batch", "chunk_rows"} <= work.record.keys():
        raise LoraSuiteError(f"{folder}: holds damaged work; delete the folder to start over")
    return work


def _pairs(
    inputs: Inputs,
    options: Options,
    carried: Transfer,
    mapping: dict[int, int],
    ranks: Ranks,
    work: Work | None,
    step: Any,
) -> dict[int, dict[str, Tensor]]:
    """What the method stores for each new layer with a partner; both checkpoints are walked together."""
    pairs: dict[int, dict[str, Tensor]] = {}
    if work:
        for j in mapping:
            found = work.load(f"pair.{j}")
            if found is not None and found[1] == {"partner": mapping[j]}:
                pairs[j] = found[0]
    pairs = ranks.share(pairs)
    todo = ranks.mine([j for j in mapping if j not in pairs])
    W_h, S = (w.to(options.device, options.dtype) for w in (carried.W_h, carried.S))
    wanted = tuple(role for group in (ATTENTION, MLP) if set(group) & set(options.roles) for role in group)
    olds = stream_layers(inputs.old, options.device, layers=[mapping[j] for j in todo], roles=wanted)
    news = stream_layers(inputs.new, options.device, layers=todo, roles=wanted)
    step(len(mapping) - len(todo))
    for count, (j, old, new) in enumerate(zip(todo, olds, news, strict=True), 1):
        pairs[j] = _pair(
            Pair(old, new, W_h, S, carried.rms_ratio, carried.factor, options.heads, inputs.texts), options
        )
        if work:
            work.save(f"pair.{j}", pairs[j], partner=mapping[j])
        step(len(mapping) - len(todo) + count)
    return ranks.merge(pairs)


def _pair(pair: Pair, options: Options) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in METHODS[options.method].build(pair, options.roles).items():
        tensors[name] = (tensor if name.endswith("match") else tensor.float()).cpu().contiguous()
        check_range(_named(pair), tensors[name])
    for role in options.roles:
        tensors[f"{role}.norm"] = _norm(pair.new, role)
        check_range(_named(pair), tensors[f"{role}.norm"])
    return tensors


def _named(pair: Pair) -> str:
    return " and ".join(f"{side.checkpoint.folder}, layer {side.index}" for side in (pair.old, pair.new))


def _norm(layer: Layer, role: str) -> Tensor:
    """(1,) Frobenius norm of a weight."""
    norm: Tensor = torch.linalg.vector_norm(layer.weight(role, torch.float32))
    return norm.view(1).cpu()
