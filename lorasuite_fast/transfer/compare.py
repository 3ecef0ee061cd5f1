"""Two models compared: the figures a plan and a verification share."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lorasuite_kernels import Gram

from ..io.number_range import check_range
from ..io.phases import PhaseClock
from ..io.phases import memory as process_memory
from ..io.ranks import Ranks
from ..io.work import Work, stacked, unstacked
from ..models.checkpoint import Checkpoint
from ..models.hidden_states import LayerStream, padded, pooled_layers
from ..models.products import tf32
from ..models.vocabulary import shared_tokens
from ..text.calibration import MIN_EXAMPLES
from .build_options import Inputs, Options
from .embeddings import Transfer, build_transfer, elsewhere, fit_bytes
from .mapping import map_layers
from .memory import Demand, Limits
from .similarity import layer_gram, streaming

_MINIBATCH = 512


_SAMPLE = 64
"""Examples on whose pooled hidden states the map between the models is measured."""


@dataclass(frozen=True)
class Compared:
    """Two models compared: the transfer matrices and their fit, the layers' similarity, which layer continues which,
    and R² of W_h on the states of each such pair."""

    carried: Transfer
    similarity: Tensor
    mapping: dict[int, int]
    layer_r2: dict[int, float]


def compare(
    inputs: Inputs, options: Options, limits: Limits, clock: PhaseClock, ranks: Ranks, work: Work | None
) -> Compared:
    """The part of the recipe that compares the models; `verify` tells the same figures by it."""
    with clock.phase("transfer matrix", 1, limits.predicted["transfer matrix"]) as step:
        carried = ranks.share(_transfer(inputs, options, limits, work) if ranks.first else None)
        step(1)
    passes = []
    for model, ids in zip((inputs.old, inputs.new), inputs.ids, strict=True):
        phase = f"{model.role} hidden states"
        with clock.phase(phase, model.shape.L, limits.predicted[phase]) as step:
            passes.append(_pass(model, ids, options, limits, ranks, work, step))
    with clock.phase("similarity", 1) as step:
        old, new = passes
        for model, found in zip((inputs.old, inputs.new), passes, strict=True):
            grams = [tensor for gram in found.grams.values() for tensor in gram]
            check_range(f"what {model.folder} gives on the text", *grams, *found.states.values())
        similarity = ranks.share(_similarity(options, old, new, len(inputs.ids[0])) if ranks.first else None)
        mapping = map_layers(similarity, options.layers)
        W_h = carried.W_h.to(next(iter(old.sample.values())).device)
        layer_r2 = {j: _layer_r2(old.sample[i], new.sample[j], W_h) for j, i in mapping.items()}
        check_range(f"{inputs.old.folder} and {inputs.new.folder}", *layer_r2.values())
        step(1)
    return Compared(carried, similarity, mapping, layer_r2)


def compare_bases(
    old: str | os.PathLike[str], new: str | os.PathLike[str], options: Options, clock: PhaseClock
) -> Compared:
    """`compare` of two models, alone.

    Raises:
        LoraSuiteError: as a plan of them would be refused; families that only transformers reads among it.
    """
    inputs = Inputs.open(old, new, options)
    return compare(inputs, options, _limits(inputs, options), clock, Ranks(), None)


def _limits(inputs: Inputs, options: Options) -> Limits:
    on_gpu = options.device.type == "cuda"
    base = torch.cuda.memory_allocated(options.device) if on_gpu else process_memory()[1]
    asked = Demand(
        inputs.old,
        inputs.new,
        options.roles,
        len(inputs.ids[0]),
        max(len(row) for side in inputs.ids for row in side),
        options.dtype,
        options.device,
        base,
    )
    limits = asked.fit(options.memory)
    if elsewhere(_transfer_device(inputs, options, limits)):
        limits.predicted["transfer matrix"] += _transfer_bytes(inputs, limits)
    return limits


def _transfer_bytes(inputs: Inputs, limits: Limits) -> int:
    return fit_bytes(inputs.old.shape.d, inputs.new.shape.d, limits.chunk_rows)


def _transfer_device(inputs: Inputs, options: Options, limits: Limits) -> torch.device:
    """Where W_h and S are fitted: on the GPU, unless the budget for it is too small."""
    fits = options.memory is None or _transfer_bytes(inputs, limits) <= options.memory
    return options.device if fits else torch.device("cpu")


def _transfer(inputs: Inputs, options: Options, limits: Limits, work: Work | None) -> Transfer:
    """W_h and S, from the embedding rows of the shared tokens."""
    found = work.load("transfer") if work else None
    if found is not None:
        tensors, note = found
        if {*tensors, *note} == {each.name for each in fields(Transfer)}:
            return Transfer(tensors["W_h"], tensors["S"], **note)
    tokens = shared_tokens(*inputs.tokenizers)
    carried = build_transfer(
        inputs.old,
        inputs.new,
        tokens,
        options.transfer,
        ridge=options.ridge,
        chunk=limits.chunk_rows,
        device=_transfer_device(inputs, options, limits),
    )
    if work:
        note = {name: value for name, value in vars(carried).items() if name not in ("W_h", "S")}
        work.save("transfer", {"W_h": carried.W_h, "S": carried.S}, **note)
    return carried


def _minibatches(examples: int) -> list[slice]:
    """At most 512 examples each, as equal in size as they can be."""
    parts = max(1, min(-(-examples // _MINIBATCH), examples // MIN_EXAMPLES))
    ends = [0, *torch.tensor([len(part) for part in torch.arange(examples).tensor_split(parts)]).cumsum(0).tolist()]
    return [slice(start, stop) for start, stop in pairwise(ends)]


@dataclass
class _Pass:
    """What a forward pass over the calibration text leaves.

    Attributes:
        grams: of every layer's pooled hidden states, by (minibatch, layer), on the CPU. sample: layer -> the pooled
            hidden states of the first examples, (n, d).
        states: layer -> the pooled hidden states of all examples, on the device, where all layers are compared there
            at once (`_together`); grams is then empty.
    """

    grams: dict[tuple[int, int], Gram]
    sample: dict[int, Tensor]
    states: dict[int, Tensor] = field(default_factory=dict)


def _together(options: Options, ranks: Ranks) -> bool:
    """Whether all layers of a model are compared in one call, on the device.

    Starting a kernel for each layer takes a GPU longer than the work itself. Several processes hand their layers to one
    another through the CPU.
    """
    return options.device.type == "cuda" and options.similarity == "cka" and ranks.size == 1


def _layer_r2(old: Tensor, new: Tensor, W_h: Tensor) -> float:
    """1 - |new - old W_h|² / |new - mean|² of paired states, (n, d_o) and (n, d_n)."""
    y = new.double()
    error = (y - old.double() @ W_h.double()).square().sum()
    spread = (y - y.mean(0)).square().sum()
    return float(1 - error / spread) if spread > 0 else 0.0


def _pass(
    model: Checkpoint,
    ids: list[list[int]],
    options: Options,
    limits: Limits,
    ranks: Ranks,
    work: Work | None,
    step: Any,
) -> _Pass:
    """Runs a model over the calibration text, as far as no interrupted run has done so."""
    parts, L = _minibatches(len(ids)), model.shape.L
    done = _finished(model, len(parts), options, ranks, work) if work and ranks.first else _Pass({}, {})
    # A saved state is of use where all earlier layers' Gram matrices are there too.
    complete = next((i for i in range(L) if i not in done.sample), L)
    start = complete if complete == L else _saved_state(model, work, complete)[0] if ranks.first else 0
    start = ranks.share(start)
    done.grams = {key: value for key, value in done.grams.items() if key[1] < start}
    done.sample = {i: value for i, value in done.sample.items() if i < start}
    done.states = {i: value for i, value in done.states.items() if i < start}
    block = ranks.block(start, L)
    if start < L:
        mine = _run_block(model, ids, parts, block, start, options, limits, ranks, work, step)
        states = done.states | mine.states
        return _Pass(ranks.merge(done.grams | mine.grams), ranks.merge(done.sample | mine.sample), states)
    return done


def _run_block(
    model: Checkpoint,
    ids: list[list[int]],
    parts: list[slice],
    block: range,
    start: int,
    options: Options,
    limits: Limits,
    ranks: Ranks,
    work: Work | None,
    step: Any,
) -> _Pass:
    """Runs this rank's layers; the hidden states come from the rank before and go to the next."""
    stream = LayerStream(
        model,
        *padded(model, ids),
        device=options.device,
        dtype=options.dtype,
        micro_batch=limits.micro_batch,
        first=block.start,
        last=block.stop,
        trust_remote_code=options.trust_remote_code,
    )
    if ranks.first and start and work:
        stream.hidden = _saved_state(model, work, start)[1](options.device)
    ranks.receive(list(stream.hidden))
    found, together = _Pass({}, {}), _together(options, ranks)
    with tf32(options.tf32) if options.tf32 else nullcontext():
        for i, vectors in pooled_layers(stream):
            if together:
                found.states[i] = vectors
            else:
                found.grams |= _layer_grams(options.similarity, i, vectors, parts)
            found.sample[i] = vectors[:_SAMPLE].clone() if together else vectors[:_SAMPLE].cpu().clone()
            if work:
                _save_layer(model, i, found, len(parts), work)
                if i + 1 < model.shape.L:
                    work.save_state(f"{model.role}.state.{ranks.rank}", stacked(list(stream.hidden)), layer=i + 1)
            step(i + 1)
    ranks.send(list(stream.hidden))
    return found


def _layer_grams(measure: str, layer: int, vectors: Tensor, parts: list[slice]) -> dict[tuple[int, int], Gram]:
    """One layer's Gram matrices, by (minibatch, layer), on the CPU."""
    with tf32(False) if vectors.is_cuda else nullcontext():
        grams = [layer_gram(measure, vectors[None, part]) for part in parts]
    return {(n, layer): Gram(*(tensor.cpu() for tensor in gram)) for n, gram in enumerate(grams)}


def _save_layer(model: Checkpoint, layer: int, found: _Pass, parts: int, work: Work) -> None:
    kept = [t for n in range(parts) for t in found.grams[n, layer]] if found.grams else [found.states[layer]]
    work.save(f"{model.role}.gram.{layer}", stacked([*kept, found.sample[layer]]))


def _finished(model: Checkpoint, parts: int, options: Options, ranks: Ranks, work: Work) -> _Pass:
    done, together = _Pass({}, {}), _together(options, ranks)
    for i in range(model.shape.L):
        found = work.load(f"{model.role}.gram.{i}")
        if found is None:
            break
        tensors = unstacked(found[0], options.device if together else torch.device("cpu"))
        if len(tensors) != (2 if together else 3 * parts + 1):
            break
        if together:
            done.states[i] = tensors[0]
        else:
            done.grams |= {(n, i): Gram(*tensors[3 * n : 3 * n + 3]) for n in range(parts)}
        done.sample[i] = tensors[-1]
    return done


def _saved_state(model: Checkpoint, work: Work | None, last: int) -> tuple[int, Any]:
    """The latest layer, up to `last`, that a saved state enters, and what reads that state."""
    best: tuple[int, Any] = 0, None
    if work is None:
        return best
    for path in sorted(work.folder.glob(f"{model.role}.state.*.safetensors")):
        name = path.name.removesuffix(".safetensors")
        found = work.load(name)
        if found is not None and isinstance(found[1].get("layer"), int) and best[0] < found[1]["layer"] <= last:
            best = found[1]["layer"], (lambda device, tensors=found[0]: unstacked(tensors, device))
    return best


def _similarity(options: Options, old: _Pass, new: _Pass, examples: int) -> Tensor:
    """(L_o, L_n), over all minibatches; on the CPU."""
    if old.states:
        return _similarity_together(old.states, new.states, _minibatches(examples))
    return _similarity_of_grams(options.similarity, old.grams, new.grams)


def _similarity_together(old: dict[int, Tensor], new: dict[int, Tensor], parts: list[slice]) -> Tensor:
    """CKA where the states are: one `gram` for all layers of a model and minibatch, and one `hsic`."""
    sides = [torch.stack([states[i] for i in sorted(states)]) for states in (old, new)]
    stream = streaming("cka", len(old), len(new))
    for part in parts:
        stream.update_grams(*(layer_gram("cka", side[:, part]) for side in sides))
    return stream.compute().cpu()


def _similarity_of_grams(measure: str, old: dict[tuple[int, int], Gram], new: dict[tuple[int, int], Gram]) -> Tensor:
    """The same from Gram matrices made layer by layer, any measure."""

    def stack(grams: dict[tuple[int, int], Gram], minibatch: int) -> Gram:
        layers = [grams[key] for key in sorted(grams) if key[0] == minibatch]
        return Gram(*(torch.cat(tensors) for tensors in zip(*layers, strict=True)))

    minibatches = 1 + max(n for n, _ in old)
    L_o, L_n = (sum(n == 0 for n, _ in grams) for grams in (old, new))
    stream = streaming(measure, L_o, L_n)
    for n in range(minibatches):
        stream.update_grams(stack(old, n), stack(new, n))
    return stream.compute()
