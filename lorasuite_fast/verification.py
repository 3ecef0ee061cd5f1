"""What a migrated adapter still does, told from unlabelled text, and what to expect before a migration."""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasuite_kernels import StreamingCKA

from .aligned_states import LoadedModel, States, load_tokenizer, read_sizes
from .alignment import Alignment, TokenEnds
from .base_fit import BaseFit, TokenRows, base_fit, depth_pairs, mapped_pairs, prediction, token_rows
from .build import AUTO, Compared, Options, compare_bases
from .calibration import MIN_EXAMPLES, load_examples, whole_characters
from .checkpoint import Checkpoint
from .effect import NEGLIGIBLE_KL, EffectSums, effect_sums, resamples, statistics
from .errors import LoraSuiteError
from .families import ROLES
from .identical import same_tensors, same_weights
from .json_files import parse_json
from .kinship import comparable, kinship, weight_distance
from .mapping import map_layers
from .number_range import in_range
from .phases import Phase, PhaseClock, Progress, release_memory
from .plan import pick_device, pick_dtype
from .report_file import check_report, write_report
from .text_files import read_text

CARRIED_SHARE = 0.8
"""Explained share from which on a change counts as carried."""
CARRIED_COSINE = 0.9
"""Content cosine from which on a change counts as the right one."""
SCALED_SHARE = 0.6
"""What the right change explains, scaled as would be best, from which on it counts as carried at another size."""
PARTLY_COSINE = 0.2
"""Content cosine from which on, with its interval above 0, part of a change counts as carried.

At the best size a change of cosine c explains c² of the other: below this it is less than 4 %.
"""
CONSTANT_SHARE = 0.04
"""Explained share of the new change's mean alone from which on at least a constant shift counts as carried."""
WORSE_SHARE = 0.05
"""Of a change that explains less than minus this share it is said that no adapter would be closer."""
REVERSED_COSINE = -0.2
"""Cosine down from which, with its interval below 0, a change counts as reversed."""
_FIGURES = {"cosine": "cosine", "explained_share": "share", "kl_share": "kl_share"}
_SAMPLED = 512
"""Positions at which the residual stream is compared layer by layer after a migration."""
_STORED = 2**28
"""Elements of residual stream kept of one model."""


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap interval over texts; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Likeness:
    """How well a change of the new model's log-probabilities stands in for the old one's, in the metric of `effect`.

    Attributes:
        cosine: with the old change. explained_share: 1 - |d_o - d|² / |d_o|², 0 for no change at all, 1 for the same.
        kl_share: 1 - KL(target ‖ new with the change) / KL(target ‖ new), the target being the new model changed just
            as the old one was; the explained share without its second-order approximation.
        gain_share: the log-likelihood the change adds to what the adapted old model predicts, less what it adds to what
            the bare one predicts, over the same of the old change: Σ (p_o1 - p_o0) d / Σ (p_o1 - p_o0) d_o. 1 for the
            same change; twice the change has twice the share. Whatever else a change does, such as what a training on
            labels teaches besides, costs nothing here, and copying the old model as such earns nothing.
        top1: of the positions where the old adapter changed the old model's best token, the share where the new model
            with the change has that best token.
    """

    cosine: Interval
    explained_share: Interval
    kl_share: Interval
    gain_share: Interval
    top1: Interval


@dataclass(frozen=True)
class Effect:
    """The comparison of both adapters' effects, over byte-aligned positions and shared ordinary tokens.

    Attributes:
        old_kl, new_kl: mean KL(with ‖ without adapter) in nats. old_rms, new_rms: root mean square change of a
            log-probability, weighted by probability. size_ratio: new over old.
        best_gain: the factor on the new change that would bring it closest to the old.
        carried: the new adapter itself. shuffled: its changes permuted among the positions. flipped: with the opposite
            sign. constant: its mean over the positions at every one of them.
        tempered_cosine, tempered_share: of the best change of the new model's temperature, the fourth control: any
            disturbance flattens predictions, and does so alike in models that predict alike.
        content_cosine: cosine once both changes have lost their mean over the positions and their temperature.
        content: cosine, explained and KL share of the headline minus the best of shuffled, constant, tempered (not for
            the KL share) and no change.
        top1_changed: share of positions where the old adapter changed the old model's best token. top1_alone: of
            those, the share where the new model without an adapter has the adapted old model's best token.
        unweighted: cosine, explained share and content cosine with all tokens weighted alike.
    """

    old_kl: Interval
    new_kl: Interval
    old_rms: Interval
    new_rms: Interval
    size_ratio: Interval
    best_gain: Interval
    carried: Likeness
    shuffled: Likeness
    flipped: Likeness
    constant: Likeness
    tempered_cosine: Interval
    tempered_share: Interval
    content_cosine: Interval
    content: dict[str, Interval]
    top1_changed: Interval
    top1_alone: Interval
    unweighted: dict[str, Interval]


@dataclass(frozen=True)
class LayerEffect:
    """One new layer beside the old layer whose change it resembles most, layers taken in order.

    Attributes:
        new_update, old_update: norm of the adapter's updates in the layer over that of the weights; None without any.
        new_change, old_change: norm of the change of the residual stream behind the layer over that of the stream,
            its mean taken off, at sampled aligned positions.
        cka: linear CKA (unbiased HSIC) of the two changes; None where one of them is zero.
    """

    new_layer: int
    old_layer: int | None
    new_update: float | None
    old_update: float | None
    new_change: float
    old_change: float | None
    cka: float | None


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of the labelled text, without and with adapter, and what each adapter gains (positive is better).

    `gain_share` is the new side's gain over the old side's; None where the old adapter gains nothing.
    """

    old: Interval
    old_adapted: Interval | None
    new: Interval
    new_adapted: Interval | None
    old_gain: Interval | None
    new_gain: Interval | None
    gain_share: Interval | None
    examples: int


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`.

    Attributes:
        kind: after a migration one of carried, carried at another size, partly carried, constant shift only, nothing
            carried, reversed, nothing to carry; before one exact, close, distillation, nothing.
        verdict: the same in one sentence.
        effect, layers: None and empty before a migration. fit: None after one.
        facts: texts, aligned positions, shared tokens, tokens of either model.
        fingerprints: of the models, old and new; None for one of a family that only transformers reads.
    """

    old: str
    old_adapter: str | None
    new: str
    new_adapter: str | None
    kind: str
    verdict: str
    effect: Effect | None
    layers: list[LayerEffect]
    fit: BaseFit | None
    bits_per_byte: BitsPerByte | None
    facts: dict[str, Any]
    options: dict[str, Any]
    phases: list[Phase]
    seconds: float
    fingerprints: dict[str, str | None] = field(default_factory=dict)
    relatives: dict[str, Any] | None = None
    """Before a migration: which kind of relatives the two models are (`kinship.Kinship`), with a sentence that says
    what to expect; None for a family that only transformers reads."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, what `--json` prints."""
        return asdict(self)


@dataclass(frozen=True)
class _Side:
    """What is kept of one model once it is dropped.

    Attributes:
        rows: for the form before a migration, what `token_rows` gives.
        nats: of each labelled example, without and with the adapter. counted: its bytes.
    """

    before: States
    after: States | None
    updates: dict[int, float]
    rows: TokenRows | None
    nats: list[Tensor]
    counted: Tensor | None


@dataclass(frozen=True)
class _Reading:
    """What both models are asked for."""

    answers: list[tuple[str, str]]
    max_tokens: int
    clock: PhaseClock
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool

    def side(
        self,
        source: str | os.PathLike[str],
        adapter: str | os.PathLike[str] | None,
        what: str,
        rows: list[list[int]],
        positions: list[Tensor],
        tokens: Tensor,
        layers: list[int],
        sample: Tensor,
        ends: TokenEnds,
    ) -> _Side:
        name = what.lower()
        with self.clock.phase(f"load {name}", 1) as report:
            model = LoadedModel(
                source, what, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
            )
            report(1)
        nats: list[Tensor] = []
        counted = None
        read: list[States] = []
        for state in ("alone",) if adapter is None else ("alone", "adapted"):
            if state == "adapted" and adapter is not None:
                model.attach(adapter)
            with self.clock.phase(f"{name} {state}", len(rows)) as report:
                read.append(model.states(rows, positions, tokens, layers=layers, sample=sample, report=report))
            if self.answers:
                with self.clock.phase(f"{name} {state}, labelled", len(self.answers)) as report:
                    found, counted = model.nats(self.answers, ends, self.max_tokens, report)
                    nats.append(found)
        if adapter is None:
            return _Side(read[0], None, {}, token_rows(model, tokens), nats, counted)
        return _Side(read[0], read[1], model.update_sizes(), None, nats, counted)


def _compared(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    text: str | os.PathLike[str] | None,
    examples: int,
    seed: int,
    clock: PhaseClock,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> Compared | None:
    """What a plan of the two models finds on the same text; None where no plan of them can be built."""
    options = Options(
        calibration=text,
        examples=examples,
        layers="cka",
        similarity="cka",
        heads="hungarian",
        transfer="embedding",
        method=AUTO,
        roles=ROLES,
        device=device,
        dtype=dtype,
        seed=seed,
        ridge=0.0,
        memory=None,
        mapped=True,
        trust_remote_code=trust_remote_code,
    )
    try:
        return compare_bases(old, new, options, clock)
    except LoraSuiteError:
        return None
    finally:
        release_memory()


def verify(
    old: str | os.PathLike[str],
    old_adapter: str | os.PathLike[str] | None,
    new: str | os.PathLike[str],
    new_adapter: str | os.PathLike[str] | None,
    *,
    text: str | os.PathLike[str] | None = None,
    labelled: str | os.PathLike[str] | None = None,
    examples: int = 64,
    max_tokens: int = 256,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    bootstrap: int = 1000,
    trust_remote_code: bool = False,
    report: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compares what two adapters do to their models, or, without adapters, how well the two models fit each other.

    The models are loaded one after the other, each through transformers and its adapter through PEFT. Kept of each are
    its last hidden states at the aligned positions, (positions, d), and the residual stream at a sample of them.

    Args:
        old, new: model folders or hub ids. old_adapter, new_adapter: PEFT folders, made by any tool; None for both
            gives the form before a migration.
        text: unlabelled .jsonl (field `text`) or .txt; None takes the general text shipped with the package. An
            adapter's effect shows best on text of its domain.
        labelled: .jsonl with fields `text`, or `prompt` and `completion`; adds bits per byte.
        examples: of either file, a seeded sample where there are more. max_tokens: of each, for each model.
        dtype: of weights and products; auto is float32. Log-probabilities are float32 always.
        bootstrap: resamples of the texts for the intervals.
        report: HTML file to write (`report_file.write_report`); an earlier report there is replaced.

    Raises:
        LoraSuiteError: for input that cannot be used, or where the two models share no tokens or positions.
    """
    start = time.perf_counter()
    given = {"OLD": old, "OLD_ADAPTER": old_adapter, "NEW": new, "NEW_ADAPTER": new_adapter}
    check_report(report, inputs=given | {"--text": text, "--labelled": labelled})
    if (old_adapter is None) != (new_adapter is None):
        raise LoraSuiteError("verify takes both adapters, or none for a pair of base models; one was given")
    if max_tokens < 2 or bootstrap < 1:
        raise LoraSuiteError(f"max_tokens is {max_tokens} and must be at least 2, bootstrap {bootstrap} at least 1")
    adapted = old_adapter is not None
    run_device, run_dtype = pick_device(device), pick_dtype(dtype)
    texts = load_examples(text, examples, seed)
    answers = [] if labelled is None else load_labelled(labelled, examples, seed)
    clock = PhaseClock(progress, run_device)
    with clock.phase("align", len(texts)) as step:
        sizes_o, sizes_n = (
            read_sizes(source, what, trust_remote_code=trust_remote_code)
            for source, what in ((old, "OLD"), (new, "NEW"))
        )
        alignment = Alignment(
            load_tokenizer(old, "OLD", trust_remote_code=trust_remote_code),
            load_tokenizer(new, "NEW", trust_remote_code=trust_remote_code),
        )
        aligned = alignment.align_all(texts, max_tokens)
        step(len(texts))
    shared = alignment.ordinary
    inside = (shared.old < sizes_o.V) & (shared.new < sizes_n.V)
    positions = sum(len(a.ends) for a in aligned)
    if len(aligned) < MIN_EXAMPLES or positions < 8 * MIN_EXAMPLES or int(inside.sum()) < 2:
        raise LoraSuiteError(
            f"{old} and {new} share {int(inside.sum())} tokens, and end tokens at the same byte at {positions} places "
            f"of {len(aligned)} texts; too few to compare anything"
        )
    of_text = torch.cat([torch.full((len(a.ends),), n) for n, a in enumerate(aligned)])
    compared = (
        None if adapted else _compared(old, new, text, examples, seed, clock, run_device, run_dtype, trust_remote_code)
    )
    pairs = mapped_pairs(compared.mapping) if compared else depth_pairs(sizes_o.L, sizes_n.L)
    layers_o = list(range(sizes_o.L)) if adapted else [i for i, _ in pairs]
    layers_n = list(range(sizes_n.L)) if adapted else [j for _, j in pairs]
    stored = max(len(layers_o) * sizes_o.d, len(layers_n) * sizes_n.d)
    sampled = min(positions, _STORED // stored, _SAMPLED if adapted else positions)
    sample = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))[:sampled].sort().values
    reading = _Reading(answers, max_tokens, clock, run_device, run_dtype, trust_remote_code)
    o = reading.side(
        old,
        old_adapter,
        "OLD",
        [a.ids_o for a in aligned],
        [a.positions_o for a in aligned],
        shared.old[inside],
        layers_o,
        sample,
        alignment.old,
    )
    release_memory()
    n = reading.side(
        new,
        new_adapter,
        "NEW",
        [a.ids_n for a in aligned],
        [a.positions_n for a in aligned],
        shared.new[inside],
        layers_n,
        sample,
        alignment.new,
    )
    effect, layers, fit = None, [], None
    with (
        clock.phase("compare", (2 if adapted else 1) * positions) as step,
        in_range(f"{old} or {new}, or their adapters"),
    ):
        if o.after is not None and n.after is not None:
            sums = effect_sums(
                (o.before, o.after), (n.before, n.after), of_text, device=run_device, seed=seed, report=step
            )
            effect = _effect(sums, resamples(len(aligned), bootstrap, seed))
            layers = _layer_effects(o, n)
            kind, sentence = verdict(effect)
        else:
            assert o.rows is not None
            assert n.rows is not None
            fit = base_fit(
                (o.before, n.before),
                (o.rows, n.rows),
                pairs,
                of_text,
                of_text[sample],
                device=run_device,
                seed=seed,
                report=step,
            )
            if compared is not None:
                fit = replace(
                    fit,
                    embedding_r2=compared.carried.r2,
                    embedding_r2_back=compared.carried.r2_back,
                    layer_map=compared.mapping,
                    layer_r2=compared.layer_r2,
                )
            kind, sentence = prediction(fit)
    result = Verification(
        os.fspath(old),
        None if old_adapter is None else os.fspath(old_adapter),
        os.fspath(new),
        None if new_adapter is None else os.fspath(new_adapter),
        kind,
        sentence,
        effect,
        layers,
        fit,
        _bits(o, n, resamples(len(answers), bootstrap, seed)) if answers else None,
        {
            "texts": len(aligned),
            "texts_without_positions": len(texts) - len(aligned),
            "positions": positions,
            "sampled_positions": sampled,
            "tokens_old": sum(len(a.ids_o) for a in aligned),
            "tokens_new": sum(len(a.ids_n) for a in aligned),
            "shared_tokens": int(inside.sum()),
            "layers_old": sizes_o.L,
            "layers_new": sizes_n.L,
        },
        {
            "text": "shipped" if text is None else os.fspath(text),
            "labelled": None if labelled is None else os.fspath(labelled),
            "examples": examples,
            "max_tokens": max_tokens,
            "seed": seed,
            "bootstrap": bootstrap,
            "device": run_device.type,
            "dtype": str(run_dtype).removeprefix("torch."),
        },
        clock.phases,
        time.perf_counter() - start,
        {"old": _fingerprint(old, "old"), "new": _fingerprint(new, "new")},
        None if fit is None else _relatives(old, new, fit),
    )
    write_report(result, report)
    return result


def _relatives(old: str | os.PathLike[str], new: str | os.PathLike[str], fit: BaseFit) -> dict[str, Any] | None:
    """Which kind of relatives two models are, from their weights and how well their embeddings fit."""
    try:
        models = Checkpoint(old, "old"), Checkpoint(new, "new")
    except LoraSuiteError:
        return None
    same = same_tensors(*models) and same_weights(*models)
    found = kinship(
        weight_distance(*models) if comparable(*models) else None,
        (fit.embedding_r2, fit.embedding_r2_back),
        same_depth=models[0].shape.L == models[1].shape.L,
        same=same,
    )
    return found.as_dict() | {"sentence": found.sentence}


def _fingerprint(source: str | os.PathLike[str], role: str) -> str | None:
    try:
        return Checkpoint(source, role).fingerprint()
    except LoraSuiteError:
        return None


def load_labelled(source: str | os.PathLike[str], count: int, seed: int) -> list[tuple[str, str]]:
    """At most `count` (prompt, completion) pairs of a .jsonl file, a seeded sample in the order of the file.

    Each line has `prompt` and `completion`, or `text`, which is all completion.

    Raises:
        LoraSuiteError: an unreadable file, a line without these fields, or no line with a completion.
    """
    path = Path(source)
    if path.suffix != ".jsonl":
        raise LoraSuiteError(f"{path}: labelled text must be a .jsonl file (`text`, or `prompt` and `completion`)")
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise LoraSuiteError(f"{path}: line {number} is not JSON ({error})") from None
        fields = value if isinstance(value, dict) else {}
        prompt = "" if "text" in fields else fields.get("prompt")
        completion = fields.get("text", fields.get("completion"))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise LoraSuiteError(f"{path}: line {number} has neither `text` nor `prompt` and `completion` as strings")
        if completion:
            found.append((whole_characters(prompt), whole_characters(completion)))
    if not found:
        raise LoraSuiteError(f"{path}: holds no text")
    if len(found) > count:
        found = [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), count))]
    return found


def _interval(value: Tensor, draws: Tensor) -> Interval:
    """A statistic and the 2.5th and 97.5th percentile of those of its resamples where it is defined."""
    if not torch.isfinite(value):
        return Interval(None, None, None)
    draws = draws[torch.isfinite(draws)]
    if not len(draws):
        return Interval(float(value), None, None)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Interval(float(value), low, high)


def _effect(sums: EffectSums, draws: Tensor) -> Effect:
    columns = (sums.gram, sums.plain, sums.scalars)
    whole = statistics(*(c.sum(0) for c in columns))
    resampled = statistics(*(torch.tensordot(draws, c, dims=1) for c in columns))
    figure = {name: _interval(value, resampled[name]) for name, value in whole.items()}

    def likeness(name: str) -> Likeness:
        return Likeness(*(figure[f"{name}_{what}"] for what in ("cosine", "share", "kl_share", "gain_share", "top1")))

    return Effect(
        old_kl=figure["old_kl"],
        new_kl=figure["new_kl"],
        old_rms=figure["old_rms"],
        new_rms=figure["new_rms"],
        size_ratio=figure["size_ratio"],
        best_gain=figure["best_gain"],
        carried=likeness("carried"),
        shuffled=likeness("shuffled"),
        flipped=likeness("flipped"),
        constant=likeness("constant"),
        tempered_cosine=figure["tempered_cosine"],
        tempered_share=figure["tempered_share"],
        content_cosine=figure["content_cosine"],
        content={name: figure[f"content_{short}_gain"] for name, short in _FIGURES.items()},
        top1_changed=figure["top1_changed"],
        top1_alone=figure["top1_alone"],
        unweighted={
            "cosine": figure["plain_carried_cosine"],
            "explained_share": figure["plain_carried_share"],
            "content_cosine": figure["plain_content_cosine"],
            "size_ratio": figure["plain_size_ratio"],
        },
    )


def verdict(effect: Effect) -> tuple[str, str]:
    """The kind of an outcome and the sentence that says it; the thresholds are this module's constants."""
    share, cosine, content = effect.carried.explained_share, effect.carried.cosine, effect.content_cosine
    if (effect.old_kl.value or 0) < NEGLIGIBLE_KL:
        return "nothing to carry", "The old adapter does not change the old model on this text: nothing to carry."
    if (effect.new_kl.value or 0) < NEGLIGIBLE_KL or cosine.value is None or share.value is None:
        return "nothing carried", "Nothing was carried: the new adapter does not change the new model on this text."
    constant = effect.constant.explained_share.value or 0.0
    size = f"{effect.size_ratio.value:.2g} times the size of the old one"
    scaled = max(cosine.value, 0.0) ** 2
    advice = f"scaled by {effect.best_gain.value:.2g} it would do {scaled:.0%} of it"
    if cosine.value <= REVERSED_COSINE and (cosine.high or 0) < 0:
        return "reversed", (
            f"Reversed: the new adapter pushes against the old one's effect (cosine {cosine.value:.2f})."
        )
    if share.value >= CARRIED_SHARE:
        return "carried", f"Carried: the new adapter does {share.value:.0%} of what the old one did."
    if content.value is None or content.low is None or content.low <= 0 or content.value < PARTLY_COSINE:
        if constant >= CONSTANT_SHARE:
            return "constant shift only", (
                f"Only a constant shift was carried: it explains {constant:.0%} of the old change; what "
                "depends on the text was not."
            )
        return "nothing carried", (
            f"Nothing was carried: the new adapter's change, {size}, has little or nothing to do with it "
            f"(content cosine {content.value or 0:.2f})"
            + ("; it takes the model further from it than no adapter." if share.value < -WORSE_SHARE else ".")
        )
    if content.value >= CARRIED_COSINE and scaled >= SCALED_SHARE:
        return "carried at another size", (
            f"Carried at another size: the right change (cosine {cosine.value:.2f}), {size}; {advice}."
        )
    if share.value <= 0:
        return "partly carried", (
            f"Partly carried: what depends on the text is alike (content cosine {content.value:.2f}), but the change "
            f"as a whole (cosine {cosine.value:.2f}, {size}) is no closer to the old one than no adapter"
            + (f"; {advice}" if scaled >= PARTLY_COSINE**2 else "")
            + f". If it was trained on labels since, look at the gain share ({effect.carried.gain_share.value:.2f})."
        )
    return "partly carried", (
        f"Partly carried: the new adapter does {share.value:.0%} of what the old one did (cosine {cosine.value:.2f})."
    )


def _layer_effects(o: _Side, n: _Side) -> list[LayerEffect]:
    """The layer table: every new layer with the old one it is mapped to by the CKA of their changes."""
    assert o.after is not None
    assert n.after is not None
    deltas = [side.after.layers - side.before.layers for side in (o, n) if side.after is not None]
    sizes = [_relative(delta, side.before.layers) for delta, side in zip(deltas, (o, n), strict=True)]
    stream = StreamingCKA(len(deltas[0]), len(deltas[1]))
    stream.update(*deltas)
    cka = stream.compute()
    partners = map_layers(cka)
    table = []
    for j in range(len(deltas[1])):
        i = partners.get(j)
        table.append(
            LayerEffect(
                j,
                i,
                n.updates.get(j),
                None if i is None else o.updates.get(i),
                sizes[1][j],
                None if i is None else sizes[0][i],
                None if i is None or not sizes[0][i] or not sizes[1][j] else float(cka[i, j]),
            )
        )
    return table


def _relative(delta: Tensor, stream: Tensor) -> list[float]:
    spread = (stream - stream.mean(1, keepdim=True)).flatten(1).norm(dim=1)
    ratio = delta.flatten(1).norm(dim=1) / spread
    return [float(value) for value in ratio]


def _bits(o: _Side, n: _Side, draws: Tensor) -> BitsPerByte:
    """Bits per byte of all examples together, and intervals over the examples."""
    every = torch.ones(1, draws.shape[1], dtype=draws.dtype)
    figures: list[tuple[Tensor, Tensor] | None] = []
    for side in (o, n):
        assert side.counted is not None
        for k in range(2):
            if k == len(side.nats):
                figures.append(None)
                continue
            value, resampled = (
                (weights @ side.nats[k]) / (weights @ side.counted) / math.log(2) for weights in (every, draws)
            )
            figures.append((value[0], resampled))
    base_o, adapted_o, base_n, adapted_n = figures
    assert base_o is not None
    assert base_n is not None
    if adapted_o is None or adapted_n is None:
        return BitsPerByte(_interval(*base_o), None, _interval(*base_n), None, None, None, None, draws.shape[1])
    gain_o = base_o[0] - adapted_o[0], base_o[1] - adapted_o[1]
    gain_n = base_n[0] - adapted_n[0], base_n[1] - adapted_n[1]
    ratio = (gain_n[0] / gain_o[0], gain_n[1] / gain_o[1]) if gain_o[0] > 0 else None
    return BitsPerByte(
        _interval(*base_o),
        _interval(*adapted_o),
        _interval(*base_n),
        _interval(*adapted_n),
        _interval(*gain_o),
        _interval(*gain_n),
        None if ratio is None else _interval(*ratio),
        draws.shape[1],
    )
