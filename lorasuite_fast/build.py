"""Building a transfer plan: the steps of LoRASuite's algorithm (arXiv 2505.13515) over two streamed checkpoints.

Each step first looks for what an interrupted run has finished, and each is divided among the ranks, if there are
several; neither changes a bit of the result.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasuite_kernels import Gram

from ._version import __version__
from .calibration import MIN_EXAMPLES, load_examples
from .candidates import applicable
from .checkpoint import Checkpoint
from .copying import check_copy
from .errors import LoraSuiteError, WriteError
from .families import ATTENTION, MLP
from .head_fit import head_r2
from .hidden_states import LayerStream, padded, pooled_layers
from .kinship import WeightDistance, comparable, kinship, weight_distance
from .loader import Layer, stream_layers
from .mapping import map_layers
from .memory import Demand, Limits
from .number_range import check_range, in_range
from .phases import PhaseClock
from .phases import memory as process_memory
from .products import tf32
from .projection import METHODS, Pair
from .ranks import Ranks
from .similarity import layer_gram, streaming
from .transfer import Transfer, build_transfer, elsewhere, fit_bytes
from .vocabulary import common_ids, shared_tokens
from .work import Work, stacked, unstacked

MAX_TOKENS = 128
"""Of each calibration example."""
_MINIBATCH = 512
_SAMPLE = 64
"""Examples on whose pooled hidden states the map between the models is measured."""
EXACT_R2 = 0.999
"""From here on, on held-out tokens, the models' residual streams count as linear images of one another."""
AUTO = "auto"
SELF = "self"
"""As calibration text: what the old model with its adapter writes itself."""


@dataclass(frozen=True)
class Options:
    """How a plan is built; see `TransferPlan.build`."""

    calibration: str | os.PathLike[str] | None
    examples: int
    layers: str
    similarity: str
    heads: str
    transfer: str
    method: str
    roles: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    seed: int
    ridge: float
    memory: int | None
    mapped: bool
    trust_remote_code: bool
    tf32: bool = False
    """Whether the forward passes may round the operands of float32 products to TF32."""

    def as_dict(self) -> dict[str, Any]:
        """Those the result depends on, as plain data."""
        return {
            "calibration": "shipped" if self.calibration is None else os.fspath(self.calibration),
            "max_tokens": MAX_TOKENS,
            "layers": self.layers,
            "similarity": self.similarity,
            "heads": self.heads,
            "transfer": self.transfer,
            "method": self.method,
            "roles": list(self.roles),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": self.seed,
            "ridge": self.ridge,
        } | ({"tf32": True} if self.tf32 else {})


@dataclass
class Inputs:
    """Both models opened, and the calibration text as token ids of each."""

    old: Checkpoint
    new: Checkpoint
    tokenizers: tuple[Any, Any]
    texts: list[str]
    ids: tuple[list[list[int]], list[list[int]]]

    @classmethod
    def open(cls, old: str | os.PathLike[str], new: str | os.PathLike[str], options: Options) -> Inputs:
        models = Checkpoint(old, "old", mapped=options.mapped), Checkpoint(new, "new", mapped=options.mapped)
        tokenizers = tuple(m.tokenizer(trust_remote_code=options.trust_remote_code) for m in models)
        # Text an adapter writes is not there yet, and CKA compares the models without one.
        calibration = options.calibration
        source = None if calibration is not None and os.fspath(calibration) == SELF else calibration
        texts = load_examples(source, options.examples, options.seed)
        ids = common_ids(tokenizers[0], tokenizers[1], texts, MAX_TOKENS)
        if len(ids[0]) < MIN_EXAMPLES:
            raise LoraSuiteError(
                f"only {len(ids[0])} calibration examples hold tokens both vocabularies know; CKA needs {MIN_EXAMPLES}"
            )
        return cls(*models, (tokenizers[0], tokenizers[1]), texts, ids)

    def identity(self, options: Options) -> dict[str, Any]:
        """Everything a plan's bits depend on, for telling whether unfinished work belongs to it."""
        import transformers

        text = hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()[:32]
        return {
            "old model": files_identity(self.old),
            "new model": files_identity(self.new),
            "calibration text": text,
            "versions": [__version__, torch.__version__, transformers.__version__],
        } | {f"option {name}": value for name, value in options.as_dict().items() if name != "calibration"}


def files_identity(model: Checkpoint) -> dict[str, Any]:
    """What tells a model's weights and configuration from others, without reading the weights."""
    files = sorted({entry.file for entry in model.tensors.entries.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"fingerprint": model.fingerprint(), "files": hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}


@dataclass(frozen=True)
class Built:
    """What a plan is made of."""

    mapping: dict[int, int]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    examples: int
    limits: Limits
    method: str
    roles: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    """The methods `apply` is to judge; none where the method was asked for, or needs no measurement."""


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
    if weights is not None and weights.near and options.method == AUTO and options.transfer == "embedding":
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
            weights, (carried.r2, carried.r2_back), same_depth=shapes[0].L == shapes[1].L, same=_equal(weights)
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
            f"{method} cannot carry it; pass --method distill, or --roles without it"
        )
    return tuple(role for role in wanted if role in new.projections)


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
