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
import shutil
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapter import Adapter, Update
from .aligned_states import Head, States
from .alignment import AlignedText, Alignment
from .checkpoint import Checkpoint
from .effect import FEWEST, NEGLIGIBLE_KL, effect_sums, resamples, statistics
from .errors import LoraSuiteError
from .families import READING, Family
from .hidden_states import MICRO_BATCH, LayerStream, StreamedLayer, padded
from .magnitude import stored_factors
from .memory import WEIGHED, DistillDemand, DistillLimits, Scratch
from .number_range import check_range, in_range
from .phases import PhaseClock
from .phases import memory as process_memory
from .projection import Factors
from .stored_tensors import StoredTensors
from .work import Work

GAINS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Factors on the fitted updates from which held-out positions choose."""
OUTPUT_RIDGE = 1e-2
"""Of the output map, as a share of the mean diagonal."""
NORM_PENALTY = 0.1
"""Of changes in front of a norm, as a share of the mean diagonal of the metric there."""
_HELD_OUT = 10
_FEWEST_HELD = 4
_ROWS = 8192
_BOOTSTRAP = 500
_LEAST_TEXTS = 8
_LEAST_POSITIONS = 256
CONTROLS = ("none", "shuffled", "flipped", "rotated")


@dataclass(frozen=True)
class Settings:
    """How an adapter is distilled.

    Attributes:
        rank: of the result; None takes the adapter's largest. layers: how many of the last new layers are fitted; None
            takes half of them, and 1 is the cheap variant. roles: which projections, in this order.
        ridge: of each regression, as a share of its Gram matrix's mean diagonal.
        max_tokens: of each text, for each model, special tokens not counted.
        control: "none", or a control that has no business working: target positions "shuffled", targets "flipped" in
            sign, U followed by a random rotation ("rotated").
    """

    rank: int | None = None
    layers: int | None = None
    roles: tuple[str, ...] = ("o", "down")
    ridge: float = 1e-2
    max_tokens: int = 128
    micro_batch: int = MICRO_BATCH
    seed: int = 0
    control: str = "none"


@dataclass(frozen=True)
class Distilled:
    """Updates (scale 1) by (new layer, role), and how well they do on texts held out from the fit.

    Attributes:
        updates: what is handed out: `fitted` with B times the gain. fitted: as the regressions gave them.
        gain: the factor on the fitted updates that held-out texts chose.
        explained: layer -> share of the target explained behind it on held-out positions, before the gain.
        agreement: kl_share (1 - KL(target ‖ new + adapter) / KL(target ‖ new), target: the new model changed as the old
            one was), content_kl_share (the same less the better of two controls: the changes shuffled over positions,
            and their mean), cosine; each (value, low, high) with a 95 % bootstrap interval over texts. Each text is
            judged with the gain that the other held-out texts choose. 0 where `old_kl` is nothing.
        old_kl: mean KL(with ‖ without) of the old adapter on held-out positions, in nats.
        output_r2: of U on held-out tokens.
        positions, held_positions, texts, tokens: of the text; tokens are those read by either model.
        settings: it was fitted with. text: its name: "shipped", "self", or a file; "" where `distill` was called
            itself.
    """

    fitted: dict[tuple[int, str], Factors]
    gain: float
    explained: dict[int, float]
    agreement: dict[str, tuple[float, float, float]]
    old_kl: float
    output_r2: float
    positions: int
    held_positions: int
    texts: int
    tokens: tuple[int, int]
    settings: Settings
    gains: dict[float, float] = field(default_factory=dict)
    """KL share on held-out texts by gain."""
    text: str = ""
    others: dict[str, dict[str, tuple[float, float, float]]] = field(default_factory=dict)
    """Agreement of other adapters on the same held-out texts, by name; without those that give NaN or infinity."""

    @property
    def updates(self) -> dict[tuple[int, str], Factors]:
        return {key: Factors(self.gain * f.b, f.a) for key, f in self.fitted.items()}

    @property
    def warning(self) -> str | None:
        """A sentence for the user where the result cannot be trusted, None elsewhere."""
        share, content = self.agreement["kl_share"], self.agreement["content_kl_share"]
        if self.old_kl < NEGLIGIBLE_KL:
            return (
                "the old adapter does not change the old model on this text, so there was nothing to carry, and the "
                "written adapter changes nothing"
            )
        if self.gain == 0:
            return (
                "no part of the adapter's effect could be carried: on held-out text every size of the fitted update "
                "makes the new model agree less with the adapted old one, so the written adapter changes nothing"
            )
        if not share[1] > 0:
            return (
                "on held-out text the migrated adapter agrees with the old one no better than no adapter at all; do "
                "not use it without measuring"
            )
        if not content[1] > 0:
            return (
                "on held-out text the migrated adapter only shifts the new model's predictions by a constant; what the "
                "old adapter does depending on the text was not carried"
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for results and reports."""
        return {
            "gain": self.gain,
            "explained": {str(j): share for j, share in self.explained.items()},
            "agreement": {name: list(figures) for name, figures in self.agreement.items()},
            "old_kl": self.old_kl,
            "output_r2": self.output_r2,
            "positions": self.positions,
            "held_positions": self.held_positions,
            "texts": self.texts,
            "tokens": list(self.tokens),
            "text": self.text,
            "settings": asdict(self.settings),
        }


@dataclass(frozen=True)
class ChunkedHead(Head):
    """A head whose rows stay as they are stored, on a CPU in the mapped file; products are float32.

    Attributes:
        weight: (V, d), of all tokens. tokens: (s,), the chosen ones. rows: how many are there in float32 at a time.
    """

    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    rows: int = _ROWS

    @property
    def size(self) -> int:
        return len(self.tokens)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive chosen tokens and their rows times the scale, (at most `rows`, d) float32."""
        for start in range(0, self.size, self.rows):
            part = slice(start, start + self.rows)
            rows = self.weight[self.tokens[part]].float()
            yield part, rows if self.scale == 1 else rows * self.scale

    def logits(self, last: Tensor) -> Tensor:
        logits = last.new_empty(len(last), self.size)
        for part, rows in self.parts():
            logits[:, part] = functional.linear(last, rows, None if self.bias is None else self.bias[part])
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True)
class _Run:
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


class _Side:
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

    def stream(self, run: _Run, name: str, *, first: int = 0) -> LayerStream:
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

    def head(self, tokens: Tensor, rows: int = _ROWS) -> ChunkedHead:
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


def unembedding(model: Checkpoint) -> Tensor:
    """(V, d), a view: the head's own weight, or the embedding it is tied to."""
    return model.tensors.view(model.head() or model.embedding_name)


def final_norm(model: Checkpoint) -> tuple[Tensor, Tensor | None]:
    """Gain and shift (None where it has none) of the norm in front of the head, (d,) float32."""
    name = f"{model.prefix}{model.family.final_norm}"
    found = {kind: model.tensors.view(f"{name}.{kind}").float() for kind in model.family.stored_norm}
    for kind, tensor in found.items():
        model.check_finite(tensor, f"{name}.{kind}")
    gain = found["weight"] + model.family.gain_offset if "weight" in found else torch.ones(model.shape.d)
    return gain, found.get("bias")


def gained_rows(rows: Tensor, model: Checkpoint) -> Tensor:
    """Rows of the unembedding (s, d) as maps of the normed residual stream: the final norm's gain, and its centring."""
    rows = rows * final_norm(model)[0].to(rows)
    return rows - rows.mean(-1, keepdim=True) if model.family.layer_norm else rows


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


@dataclass(frozen=True)
class OutputMap:
    """U (d_n, d_o) float32; the metric (d_n, d_n) float64 in which a change of the new stream counts; R² of U.

    The metric is `Un^T diag(w) Un`, centred: the weighted variance of the logits a change brings about.
    """

    U: Tensor
    metric: Tensor
    r2: float


def _fit_output_map(heads: tuple[ChunkedHead, ChunkedHead], new: Checkpoint, weights: Tensor) -> OutputMap:
    """Ridge regression `Un U ≈ Eo` over the shared tokens, weighted, rows centred by the weighted mean.

    Args:
        weights: (s,), ≥ 0.

    R² is measured on every 20th token, with a map fitted on the others.
    """
    w = weights.double() / weights.double().sum()
    held = torch.zeros(len(w), dtype=torch.bool, device=w.device)
    held[19::20] = True

    def rows() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for (part, old), (_, gainless) in zip(heads[0].parts(), heads[1].parts(), strict=True):
            yield part, old.double(), gained_rows(gainless, new).double()

    d_o, d_n = heads[0].weight.shape[1], heads[1].weight.shape[1]
    mean_o, mean_n = (torch.zeros(d, dtype=torch.float64, device=w.device) for d in (d_o, d_n))
    for part, old, gained in rows():
        mean_o += w[part] @ old
        mean_n += w[part] @ gained

    def centred() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for part, old, gained in rows():
            scale = w[part, None].sqrt()
            yield part, (old - mean_o) * scale, (gained - mean_n) * scale

    grams = [torch.zeros(d_n, d_n, dtype=torch.float64, device=w.device) for _ in range(2)]
    crosses = [torch.zeros(d_n, d_o, dtype=torch.float64, device=w.device) for _ in range(2)]
    for part, x_o, x_n in centred():
        for k, chosen in enumerate((~held[part], held[part])):
            grams[k] += x_n[chosen].T @ x_n[chosen]
            crosses[k] += x_n[chosen].T @ x_o[chosen]

    def solve(gram: Tensor, cross: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.solve(_ridged(gram, OUTPUT_RIDGE), cross)
        return solution

    trained = solve(grams[0], crosses[0])
    error = spread = 0.0
    for part, x_o, x_n in centred():
        error += float((x_o - x_n @ trained)[held[part]].square().sum())
        spread += float(x_o[held[part]].square().sum())
    metric = grams[0] + grams[1]
    return OutputMap(solve(metric, crosses[0] + crosses[1]).float(), metric, 1 - error / spread if spread else 0.0)


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    return gram + ridge * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def reduced_rank_ridge(gram: Tensor, cross: Tensor, rank: int, ridge: float, metric: Tensor | None = None) -> Factors:
    """The rank-r map from x to t, `t ≈ B A x`, from the sums over positions alone.

    With the ridge solution W, V holds the top eigenvectors of the fitted values' covariance in the metric L^T L:
    `B = L^{-1} V`, `A = V^T L W` (L = I without a metric).

    Args:
        gram: (d_in, d_in), Σ x x^T. cross: (d_out, d_in), Σ t x^T. Both float64.
        ridge: a share of gram's mean diagonal.
        metric: (d_out, d_out), in which errors of t are measured; a thousandth of its mean diagonal is added to it.

    Returns:
        B (d_out, r), A (r, d_in), float32.
    """
    W = torch.cholesky_solve(cross.T, torch.linalg.cholesky(_ridged(gram, ridge))).T
    fitted = W @ gram @ W.T
    r = min(rank, len(cross), len(gram))
    if metric is None:
        V = torch.linalg.eigh(fitted).eigenvectors[:, -r:]
        return Factors(V.float(), (V.T @ W).float())
    L = torch.linalg.cholesky(_ridged(metric, 1e-3)).T
    V = torch.linalg.eigh(L @ fitted @ L.T).eigenvectors[:, -r:]
    return Factors(torch.linalg.solve_triangular(L, V, upper=True).float(), (V.T @ L @ W).float())


def in_front_of_norm(metric: Tensor, gain: Tensor, penalty: float = NORM_PENALTY) -> tuple[Tensor, Tensor]:
    """The best change in front of a norm for a wanted change behind it, and the metric its errors count in.

    A change u in front, in units of what the norm divides by, becomes `gain ∘ u` behind, as long as u is small: a large
    one drowns what the projection said. Gains differ by orders of magnitude (Gemma 3 270M: 0.004 to 407 in one norm),
    so `t / gain` is large. Minimised is `(t - G u)^T M (t - G u) + λ |u|²`, G = diag(gain); up to a constant that is
    `(u - P t)^T N (u - P t)` with `N = G M G + λ I` and `P = N^{-1} G M`.

    Args:
        metric: M (d, d) float64. gain: (d,). penalty: λ as a share of the mean diagonal of G M G.

    Returns:
        P, N, both (d, d) float64.
    """
    G = gain.double()
    weighted = G[:, None] * metric
    N = _ridged(weighted * G, penalty)
    return torch.linalg.solve(N, weighted), N


class _Sums:
    """Σ x x^T and Σ t x^T over training positions."""

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        self.gram = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.cross = torch.zeros(d_out, d_in, dtype=torch.float64, device=device)

    def add(self, x: Tensor, t: Tensor) -> None:
        self.gram += x.T @ x
        self.cross += t.T @ x


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
    aligned, shared = _align(old, new, tokenizers, texts, settings)
    of_text = torch.cat([torch.full((len(a.ends),), n) for n, a in enumerate(aligned)])
    held_texts = _held_texts(len(aligned))
    held = torch.tensor([n in held_texts for n in range(len(aligned))])[of_text]
    start = new.shape.L - (settings.layers or max(1, new.shape.L // 2))
    if not 0 <= start < new.shape.L:
        raise LoraSuiteError(f"{settings.layers} layers are to be fitted, the new model has {new.shape.L}")
    limits = _limits(old, new, aligned, len(shared[0]), held_texts, settings, device, dtype, memory, work)
    settings = replace(settings, micro_batch=limits.micro_batch)
    on_cpu = device.type == "cpu"
    folder = work.folder / "states" if work and limits.away and on_cpu else None
    keep = torch.device("cpu") if limits.away and not on_cpu else None
    run = _Run(dtype, trust_remote_code, limits.scratch, folder, keep)
    o = _Side(old, [a.ids_o for a in aligned], [a.positions_o for a in aligned], settings, device)
    n = _Side(new, [a.ids_n for a in aligned], [a.positions_n for a in aligned], settings, device)
    heads = o.head(shared[0], limits.scratch.rows), n.head(shared[1], limits.scratch.rows)
    parts = held.split([len(row) for row, _ in o.at])
    with clock.phase("adapter's effect", old.shape.L, limits.predicted["adapter's effect"]) as step:
        before, after = _old_states(o, source, run, work, step)
    with clock.phase("output map", 1, limits.predicted["output map"]) as step:
        weights = _token_weights(heads[0], before, after, parts, limits.scratch.elements, settings.seed)
        with in_range(f"the heads of {old.folder} and {new.folder}"):
            mapped = _fit_output_map(heads, new, weights)
        check_range(f"the heads of {old.folder} and {new.folder}", mapped.U, mapped.r2)
        change = run.shelf("change")
        change.extend(_targets(before, after, mapped.U.T.cpu(), settings))
        sides = _chosen(before, parts), _chosen(after, parts)
        del before, after
        step(1)
    for side in (o, n):
        side.model.tensors.release([side.model.head() or side.model.embedding_name])
    fit = _Fit(n, change, held, mapped, settings, max(u.rank for u in source.updates.values()))
    with clock.phase("fit", new.shape.L, limits.predicted["fit"]) as step:
        fit.run(start, run, work, step)
    del change
    fit.change = []
    with clock.phase("held-out agreement", new.shape.L - start, limits.predicted["held-out agreement"]) as step:
        ids = [aligned[k].ids_n for k in sorted(held_texts)]
        h = _Side(new, ids, [aligned[k].positions_n for k in sorted(held_texts)], settings, device)
        found = _new_states(h, fit, start, run, step)
        text = torch.unique(of_text[held], return_inverse=True)[1]
        divergences = _divergences(heads, sides, found, text, device, limits.scratch.elements)
        gains, gain = _kl_shares(divergences), _best_gain(divergences)
        ends = torch.cat(list(found[0.0])), _rows_by_gain(found, _gains_by_others(divergences)[text])
        agreement, old_kl = _agreement(heads, sides, ends, text, device, settings.seed, limits.scratch.elements // 2)
        bare = ends[0]
        del found, ends
    judged: dict[str, dict[str, tuple[float, float, float]]] = {}
    if others:
        with clock.phase("candidates' agreement", new.shape.L, limits.predicted["held-out agreement"]) as step:
            for name, rows in states_with(h, others, run, step):
                if torch.isfinite(rows).all():
                    elements = limits.scratch.elements // 2
                    judged[name], _ = _agreement(heads, sides, (bare, rows), text, device, settings.seed, elements)
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
    )


def _held_texts(count: int) -> set[int]:
    """Which of so many texts, in random order, are held out: every tenth, of few texts 4, or a quarter."""
    held = max(count // _HELD_OUT, min(_FEWEST_HELD, count // 4))
    stride = min(_HELD_OUT, count // held)
    return set(range(stride - 1, count, stride)[:held])


def _limits(
    old: Checkpoint,
    new: Checkpoint,
    aligned: list[AlignedText],
    shared: int,
    held: set[int],
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    memory: int | None,
    work: Work | None,
) -> DistillLimits:
    """Sizes to work with: those the budget allows, or those of the run that goes on."""
    demand = DistillDemand(
        old,
        new,
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
    random.Random(settings.seed).shuffle(texts)
    aligned = alignment.align_all(texts, settings.max_tokens)
    positions = sum(len(a.ends) for a in aligned)
    both = alignment.ordinary
    inside = (both.old < old.shape.V) & (both.new < new.shape.V)
    if len(aligned) < _LEAST_TEXTS or positions < _LEAST_POSITIONS or int(inside.sum()) < 2:
        raise LoraSuiteError(
            f"distillation found {positions} aligned positions in {len(aligned)} texts and {int(inside.sum())} shared "
            f"tokens; it needs {_LEAST_POSITIONS} positions in {_LEAST_TEXTS} texts. Pass more text with --calibration"
        )
    return aligned, (both.old[inside], both.new[inside])


def _check_finite(model: Checkpoint, states: Tensor) -> Tensor:
    if not torch.isfinite(states).all():
        raise LoraSuiteError(f"{model.folder}: gives NaN or infinity on the text; try --dtype float32")
    return states


def _old_states(
    side: _Side, source: Adapter, run: _Run, work: Work | None, step: Any
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
        factors, scales = _on_layer(side, layer.index, source.updates)
        _run(layer, before)
        with updated(layer.module, side.model, factors, scales):
            _run(layer, after)
        step(layer.index + 1)
    taken = tuple(run.shelf(name) for name in _EFFECT)
    for n in range(len(side.at)):
        for hidden, rows in zip((before, after), taken, strict=True):
            rows.append(_check_finite(side.model, side.last(side.take(n, hidden[n])).cpu()))
            hidden[n] = torch.empty(0)
    run.clear("old", "old-adapted")
    if work is not None:
        _keep_states(taken, work)
    return taken[0], taken[1]


_EFFECT = ("before", "after")


def _kept_states(side: _Side, run: _Run, work: Work) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
    """The result of `_old_states`, if an interrupted run finished it."""
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


def _run(layer: StreamedLayer, hidden: MutableSequence[Tensor]) -> None:
    for _ in layer.run(hidden):
        pass


def _chosen(rows: Sequence[Tensor], chosen: Sequence[Tensor]) -> Tensor:
    """The rows a mask by micro-batch names, one after another."""
    return torch.cat([part[mask] for part, mask in zip(rows, chosen, strict=True)])


def _token_weights(
    head: ChunkedHead,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    held: Sequence[Tensor],
    elements: int,
    seed: int,
) -> Tensor:
    """(s,) summed probability of each token at a sample of the positions fitted on, with and without the adapter."""
    positions = torch.nonzero(~torch.cat(list(held))).flatten()
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    sampled = torch.zeros(sum(map(len, held)), dtype=torch.bool)
    sampled[positions[order[:WEIGHED]]] = True
    sample = sampled.split([len(part) for part in held])
    device = head.weight.device
    total = torch.zeros(head.size, dtype=torch.float64, device=device)
    for states in (before, after):
        for part in _chosen(states, sample).split(max(FEWEST, elements // head.size)):
            total += head.log_probs(part.to(device)).exp().double().sum(0)
    return total


def _targets(before: Sequence[Tensor], after: Sequence[Tensor], U: Tensor, settings: Settings) -> Iterator[Tensor]:
    """The wanted change of what the new head reads, (positions, d_n) by micro-batch, or what a control makes of it."""
    if settings.control not in CONTROLS:
        raise ValueError(f"control {settings.control!r} is not one of {', '.join(CONTROLS)}")
    generator = torch.Generator().manual_seed(settings.seed)
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


class _Fit:
    """The pass over the new model that fits its last layers.

    Attributes:
        updates: (layer, role) -> factors on the CPU. explained: see `Distilled`. entering: the held-out examples'
            hidden states in front of the first fitted layer.
    """

    def __init__(
        self,
        side: _Side,
        change: Sequence[Tensor],
        held: Tensor,
        mapped: OutputMap,
        settings: Settings,
        rank: int,
    ) -> None:
        self.side, self.settings, self.rank = side, settings, settings.rank or rank
        sizes = [len(row) for row, _ in side.at]
        self.change, self.held = change, held.split(sizes)
        self.metric = mapped.metric
        self.updates: dict[tuple[int, str], Factors] = {}
        self.explained: dict[int, float] = {}
        self.entering: MutableSequence[Tensor] = []

    def run(self, start: int, run: _Run, work: Work | None, step: Any) -> None:
        stream = self.side.stream(run, "new")
        base = stream.hidden
        adapted: MutableSequence[Tensor] = []
        for layer in stream:
            if layer.index == start:
                adapted = run.shelf("new-adapted", base)
                self.entering = run.shelf("entering", (self._held_examples(n, h) for n, h in enumerate(base)))
            _run(layer, base)
            if layer.index >= start:
                self._layer(layer, base, adapted, work)
            step(layer.index + 1)
        for n, hidden in enumerate(base):
            _check_finite(self.side.model, self.side.take(n, hidden))
        run.clear("new", "new-adapted", "change")

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
                _run(layer, adapted)
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
            sums = _Sums(into, out, device)
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


def _batches(parts: Iterable[Tensor], size: int, tokens: int) -> Iterator[Tensor]:
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


def _new_states(side: _Side, fit: _Fit, start: int, run: _Run, step: Any) -> dict[float, Sequence[Tensor]]:
    """What the new head reads at the held-out positions with each gain on the fitted updates: gain -> (positions, d_n)
    by micro-batch."""
    stream = side.stream(run, "held", first=start)
    tokens = stream.hidden[0].shape[1]
    entering = run.shelf("held", _batches(fit.entering, side.micro_batch, tokens))
    stream.hidden = fit.entering = []
    hidden = {gain: run.shelf(f"held-{gain}", entering) for gain in GAINS}
    device = side.device
    for done, layer in enumerate(stream, 1):
        found = {role: f for (j, role), f in fit.updates.items() if j == layer.index}
        for gain in GAINS:
            factors = {role: Factors(gain * f.b.to(device), f.a.to(device)) for role, f in found.items()}
            with updated(layer.module, side.model, factors if gain else {}):
                _run(layer, hidden[gain])
        step(done)
    return {
        gain: run.shelf(f"last-{gain}", (side.last(side.take(n, h)).cpu() for n, h in enumerate(states)))
        for gain, states in hidden.items()
    }


def states_with(
    side: _Side, adapters: Mapping[str, Mapping[tuple[int, str], Update]], run: _Run, step: Any
) -> Iterator[tuple[str, Tensor]]:
    """What the new head reads at the aligned positions with each of several adapters, (positions, d_n), by name.

    One pass carries them all, so that each layer's weights are read once.
    """
    stream = side.stream(run, "candidates")
    hidden = {name: run.shelf(f"candidate-{name}", stream.hidden) for name in adapters}
    stream.hidden = []
    for layer in stream:
        for name, updates in adapters.items():
            factors, scales = _on_layer(side, layer.index, updates)
            with updated(layer.module, side.model, factors, scales):
                _run(layer, hidden[name])
        step(layer.index + 1)
    for name, states in hidden.items():
        yield name, torch.cat([side.last(side.take(n, h)).cpu() for n, h in enumerate(states)])


def _on_layer(
    side: _Side, index: int, updates: Mapping[tuple[int, str], Update]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """One layer's factors by role, their scale in them, and DoRA's factors on the outputs."""
    here = {role: u for (i, role), u in updates.items() if i == index}
    factors = {
        role: Factors(u.factors.b.float().to(side.device) * u.scale, u.factors.a.float().to(side.device))
        for role, u in here.items()
    }
    scales = {role: stored_factors(side.model, index, role, u) for role, u in here.items() if u.magnitude is not None}
    return factors, scales


def _divergences(
    heads: tuple[ChunkedHead, ChunkedHead],
    old: tuple[Tensor, Tensor],
    new: dict[float, Sequence[Tensor]],
    text: Tensor,
    device: torch.device,
    elements: int,
) -> dict[float, Tensor]:
    """By gain, KL(target ‖ new + update) summed by text, (texts,) float64; the target is softmax(log p_n + change of
    old).

    Args:
        old: (positions, d_o) without and with the adapter. new: gain -> (positions, d_n), by micro-batch.
        text: (positions,) int64, which text each belongs to, counted from 0.
    """
    totals = {gain: torch.zeros(int(text.max()) + 1, dtype=torch.float64) for gain in new}
    done = 0
    for n in range(len(new[0.0])):
        states = {gain: rows[n] for gain, rows in new.items()}
        for part in torch.arange(len(states[0.0])).split(max(FEWEST, elements // heads[0].size)):
            o_0, o_1 = (heads[0].log_probs(side[done + part].to(device)) for side in old)
            target = functional.log_softmax(heads[1].log_probs(states[0.0][part].to(device)) + o_1 - o_0, dim=-1)
            for gain, rows in states.items():
                reached = heads[1].log_probs(rows[part].to(device))
                found = (target.exp() * (target - reached)).sum(-1)
                totals[gain].index_add_(0, text[done + part], found.double().cpu())
        done += len(states[0.0])
    return totals


def _kl_shares(divergences: dict[float, Tensor]) -> dict[float, float]:
    """By gain, the share of the divergence without an update that is gone with it."""
    totals = {gain: float(found.sum()) for gain, found in divergences.items()}
    return {gain: 1 - total / totals[0.0] if totals[0.0] > 0 else 0.0 for gain, total in totals.items()}


def _best_gain(divergences: dict[float, Tensor]) -> float:
    """The gain of least divergence over all texts; of equal ones the smallest."""
    return min(divergences, key=lambda gain: (float(divergences[gain].sum()), gain))


def _gains_by_others(divergences: dict[float, Tensor]) -> Tensor:
    """(texts,) float64: for each text the gain that is best on the others, so that none is judged by its own choice."""
    texts = len(next(iter(divergences.values())))
    left_out = ~torch.eye(texts, dtype=torch.bool)
    chosen = [_best_gain({gain: found[keep] for gain, found in divergences.items()}) for keep in left_out]
    return torch.tensor(chosen, dtype=torch.float64)


def _rows_by_gain(states: dict[float, Sequence[Tensor]], gains: Tensor) -> Tensor:
    """Each position's row with its own gain: gain -> (positions, d) by micro-batch, (positions,) -> (positions, d)."""
    rows, done = [], 0
    for n, plain in enumerate(states[0.0]):
        found, own = plain.clone(), gains[done : done + len(plain)]
        for gain in set(own.tolist()):
            found[own == gain] = states[gain][n][own == gain]
        rows.append(found)
        done += len(plain)
    return torch.cat(rows)


def _agreement(
    heads: tuple[ChunkedHead, ChunkedHead],
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    text: Tensor,
    device: torch.device,
    seed: int,
    elements: int,
) -> tuple[dict[str, tuple[float, float, float]], float]:
    """The figures of `Distilled.agreement`, and `old_kl`."""
    empty = torch.empty(0)
    sides = [
        tuple(States(last, empty, replace(head)) for last in pair) for head, pair in zip(heads, (old, new), strict=True)
    ]
    sums = effect_sums(sides[0], sides[1], text, device=device, seed=seed, elements=elements)  # type: ignore[arg-type]
    columns = sums.gram, sums.plain, sums.scalars
    once = statistics(*(c.sum(0) for c in columns))
    drawn = resamples(len(sums.scalars), _BOOTSTRAP, seed)
    often = statistics(*(torch.einsum("bt,t...->b...", drawn, c) for c in columns))
    names = {"kl_share": "carried_kl_share", "content_kl_share": "content_kl_share_gain", "cosine": "carried_cosine"}
    figures = {}
    for name, column in names.items():
        values = often[column].nan_to_num(0.0)
        low, high = (float(values.quantile(q)) for q in (0.025, 0.975))
        figures[name] = float(once[column].nan_to_num(0.0)), low, high
    return figures, float(once["old_kl"])
