"""What a migrated adapter still does, told from unlabelled text, and what to expect before a migration."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasuite_kernels import StreamingCKA

from ..adapters.aligned_states import LoadedModel, States
from ..errors import LoraSuiteError
from ..io.notebook import Rendered
from ..io.phases import Phase, PhaseClock, release_memory
from ..models.checkpoint import Checkpoint
from ..models.families import ROLES
from ..models.token_ends import TokenEnds
from ..transfer.build_options import AUTO, Options
from ..transfer.compare import Compared, compare_bases
from ..transfer.kinship import comparable, kinship, weight_distance
from ..transfer.mapping import map_layers
from .base_fit import BaseFit, TokenRows, token_rows
from .effect import NEGLIGIBLE_KL, EffectSums, statistics
from .identical import same_tensors, same_weights
from .measures import BitsPerByte, Effect, Interval, LayerEffect, Likeness

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
SAMPLED = 512
"""Positions at which the residual stream is compared layer by layer after a migration."""
STORED = 2**28
"""Elements of residual stream kept of one model."""


@dataclass(frozen=True)
class Verification(Rendered):
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
class ReadSide:
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
class Reading:
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
    ) -> ReadSide:
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
            return ReadSide(read[0], None, {}, token_rows(model, tokens), nats, counted)
        return ReadSide(read[0], read[1], model.update_sizes(), None, nats, counted)


def compared_bases(
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


def relatives_of(old: str | os.PathLike[str], new: str | os.PathLike[str], fit: BaseFit) -> dict[str, Any] | None:
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


def fingerprint(source: str | os.PathLike[str], role: str) -> str | None:
    try:
        return Checkpoint(source, role).fingerprint()
    except LoraSuiteError:
        return None


def _interval(value: Tensor, draws: Tensor) -> Interval:
    """A statistic and the 2.5th and 97.5th percentile of those of its resamples where it is defined."""
    if not torch.isfinite(value):
        return Interval(None, None, None)
    draws = draws[torch.isfinite(draws)]
    if not len(draws):
        return Interval(float(value), None, None)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Interval(float(value), low, high)


def effect_of(sums: EffectSums, draws: Tensor) -> Effect:
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


def layer_effects(o: ReadSide, n: ReadSide) -> list[LayerEffect]:
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


def bits_per_byte(o: ReadSide, n: ReadSide, draws: Tensor) -> BitsPerByte:
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
