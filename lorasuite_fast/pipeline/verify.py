"""Verification: what arrived of an adapter, or how two models fit each other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.aligned_states import load_tokenizer, read_sizes
from ..config import Runtime, VerifyConfig, pick_device, pick_dtype
from ..config.flat import takes_flat_keywords
from ..errors import LoraSuiteError
from ..evaluation.base_fit import BaseFit, base_fit, depth_pairs, mapped_pairs, prediction
from ..evaluation.effect import effect_sums, resamples
from ..evaluation.labelled import load_labelled
from ..evaluation.measures import Effect, LayerEffect
from ..evaluation.verification import (
    SAMPLED,
    STORED,
    Reading,
    ReadSide,
    Verification,
    bits_per_byte,
    compared_bases,
    effect_of,
    fingerprint,
    layer_effects,
    relatives_of,
    verdict,
)
from ..io.number_range import in_range
from ..io.phases import PhaseClock, release_memory
from ..io.report_path import check_report
from ..reporting.html_report import write_report
from ..text.alignment import AlignedText, Alignment
from ..text.calibration import MIN_EXAMPLES, load_examples
from ..transfer.compare import Compared


@takes_flat_keywords(config=VerifyConfig, runtime=Runtime)
def verify(
    old: str | os.PathLike[str],
    old_adapter: str | os.PathLike[str] | None,
    new: str | os.PathLike[str],
    new_adapter: str | os.PathLike[str] | None,
    *,
    config: VerifyConfig | None = None,
    runtime: Runtime | None = None,
) -> Verification:
    """Compares what two adapters do to their models, or, without adapters, how well the two models fit each other.

    The models are loaded one after the other, each through transformers and its adapter through PEFT. Kept of each are
    its last hidden states at the aligned positions, (positions, d), and the residual stream at a sample of them.

    Args:
        old: Model folder or hub id.
        old_adapter: PEFT folder, made by any tool; None for both adapters gives the form before a migration.
        new: Model folder or hub id.
        new_adapter: PEFT folder, made by any tool.
        config: What is read.
        runtime: Device, dtype, report and progress. Log-probabilities are float32 always.

    Returns:
        The comparison and its verdict.

    Raises:
        LoraSuiteError: for input that cannot be used, or where the two models share no tokens or positions.
    """
    config, runtime = config or VerifyConfig(), runtime or Runtime()
    start = time.perf_counter()
    given = {"OLD": old, "OLD_ADAPTER": old_adapter, "NEW": new, "NEW_ADAPTER": new_adapter}
    check_report(runtime.report, inputs=given | {"`text`": config.text, "`labelled`": config.labelled})
    found = _stamps(given)
    if (old_adapter is None) != (new_adapter is None):
        raise LoraSuiteError("verify takes both adapters, or none for a pair of base models; one was given")
    device, dtype = pick_device(runtime.device), pick_dtype(runtime.dtype)
    texts = load_examples(config.text, config.examples, config.seed)
    answers = [] if config.labelled is None else load_labelled(config.labelled, config.examples, config.seed)
    clock = PhaseClock(runtime.progress, device)
    common = _align(old, new, texts, config, runtime, clock)
    compared = None
    if old_adapter is None:
        compared = compared_bases(
            old, new, config.text, config.examples, config.seed, clock, device, dtype, runtime.trust_remote_code
        )
    reading = Reading(answers, config.max_tokens, clock, device, dtype, runtime.trust_remote_code)
    places = _places(common, compared, config.seed, adapted=old_adapter is not None)
    o, n = _read_sides(reading, given, common, places)
    with (
        clock.phase("compare", (1 if old_adapter is None else 2) * common.positions) as step,
        in_range(f"{old} or {new}, or their adapters"),
    ):
        outcome = _compare(o, n, common, places, compared, config, device, step)
    result = Verification(
        os.fspath(old),
        None if old_adapter is None else os.fspath(old_adapter),
        os.fspath(new),
        None if new_adapter is None else os.fspath(new_adapter),
        outcome.kind,
        outcome.sentence,
        outcome.effect,
        outcome.layers,
        outcome.fit,
        bits_per_byte(o, n, resamples(len(answers), config.bootstrap, config.seed)) if answers else None,
        _facts(common, places, len(texts)),
        _options(config, device, dtype),
        clock.phases,
        time.perf_counter() - start,
        {"old": fingerprint(old, "old"), "new": fingerprint(new, "new")},
        None if outcome.fit is None else relatives_of(old, new, outcome.fit),
    )
    _check_unchanged(given, found)
    write_report(result, runtime.report)
    return result


@dataclass(frozen=True)
class _Common:
    """What both models can be compared on.

    Attributes:
        tokens_o, tokens_n: (s,) int64, ids of the shared tokens that have a row in both models.
        depths: Layers of the old and of the new model. widths: Of their residual streams.
    """

    alignment: Alignment
    aligned: list[AlignedText]
    tokens_o: Tensor
    tokens_n: Tensor
    depths: tuple[int, int]
    widths: tuple[int, int]

    @property
    def positions(self) -> int:
        return sum(len(a.ends) for a in self.aligned)

    @property
    def of_text(self) -> Tensor:
        """(positions,) int64, which text each position belongs to."""
        return torch.cat([torch.full((len(a.ends),), n) for n, a in enumerate(self.aligned)])


@dataclass(frozen=True)
class _Places:
    """Where the residual streams are read.

    Attributes:
        pairs: Old and new layers that are compared. layers_o, layers_n: Those that are kept.
        sample: (sampled,) int64, ascending, which of the positions.
    """

    pairs: list[tuple[int, int]]
    layers_o: list[int]
    layers_n: list[int]
    sample: Tensor


@dataclass(frozen=True)
class _Outcome:
    kind: str
    sentence: str
    effect: Effect | None
    layers: list[LayerEffect]
    fit: BaseFit | None


def _align(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    texts: list[str],
    config: VerifyConfig,
    runtime: Runtime,
    clock: PhaseClock,
) -> _Common:
    """Aligns the texts; raises LoraSuiteError where the models share too little."""
    with clock.phase("align", len(texts)) as step:
        sizes_o, sizes_n = (
            read_sizes(source, what, trust_remote_code=runtime.trust_remote_code)
            for source, what in ((old, "OLD"), (new, "NEW"))
        )
        alignment = Alignment(
            load_tokenizer(old, "OLD", trust_remote_code=runtime.trust_remote_code),
            load_tokenizer(new, "NEW", trust_remote_code=runtime.trust_remote_code),
        )
        aligned = alignment.align_all(texts, config.max_tokens)
        step(len(texts))
    shared = alignment.ordinary
    inside = (shared.old < sizes_o.V) & (shared.new < sizes_n.V)
    positions = sum(len(a.ends) for a in aligned)
    if len(aligned) < MIN_EXAMPLES or positions < 8 * MIN_EXAMPLES or int(inside.sum()) < 2:
        raise LoraSuiteError(
            f"{old} and {new} share {int(inside.sum())} tokens, and end tokens at the same byte at {positions} places "
            f"of {len(aligned)} texts; too few to compare anything"
        )
    tokens = shared.old[inside], shared.new[inside]
    return _Common(alignment, aligned, *tokens, (sizes_o.L, sizes_n.L), (sizes_o.d, sizes_n.d))


def _places(common: _Common, compared: Compared | None, seed: int, *, adapted: bool) -> _Places:
    """All layers at a few positions after a migration, the paired ones at as many as fit before it."""
    pairs = mapped_pairs(compared.mapping) if compared else depth_pairs(*common.depths)
    layers_o = list(range(common.depths[0])) if adapted else [i for i, _ in pairs]
    layers_n = list(range(common.depths[1])) if adapted else [j for _, j in pairs]
    stored = max(len(layers_o) * common.widths[0], len(layers_n) * common.widths[1])
    positions = common.positions
    sampled = min(positions, STORED // stored, SAMPLED if adapted else positions)
    sample = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))[:sampled].sort().values
    return _Places(pairs, layers_o, layers_n, sample)


def _read_sides(
    reading: Reading, given: Mapping[str, Any], common: _Common, places: _Places
) -> tuple[ReadSide, ReadSide]:
    """Reads one model after the other."""
    o = reading.side(
        given["OLD"],
        given["OLD_ADAPTER"],
        "OLD",
        [a.ids_o for a in common.aligned],
        [a.positions_o for a in common.aligned],
        common.tokens_o,
        places.layers_o,
        places.sample,
        common.alignment.old,
    )
    release_memory()
    n = reading.side(
        given["NEW"],
        given["NEW_ADAPTER"],
        "NEW",
        [a.ids_n for a in common.aligned],
        [a.positions_n for a in common.aligned],
        common.tokens_n,
        places.layers_n,
        places.sample,
        common.alignment.new,
    )
    return o, n


def _compare(
    o: ReadSide,
    n: ReadSide,
    common: _Common,
    places: _Places,
    compared: Compared | None,
    config: VerifyConfig,
    device: torch.device,
    step: Callable[[int], None],
) -> _Outcome:
    """The effects of the two adapters, or without them how well the models fit each other."""
    of_text = common.of_text
    if o.after is not None and n.after is not None:
        sides = (o.before, o.after), (n.before, n.after)
        sums = effect_sums(*sides, of_text, device=device, seed=config.seed, report=step)
        effect = effect_of(sums, resamples(len(common.aligned), config.bootstrap, config.seed))
        layers = layer_effects(o, n)
        return _Outcome(*verdict(effect), effect, layers, None)
    assert o.rows is not None
    assert n.rows is not None
    fit = base_fit(
        (o.before, n.before),
        (o.rows, n.rows),
        places.pairs,
        of_text,
        of_text[places.sample],
        device=device,
        seed=config.seed,
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
    return _Outcome(*prediction(fit), None, [], fit)


def _facts(common: _Common, places: _Places, texts: int) -> dict[str, Any]:
    return {
        "texts": len(common.aligned),
        "texts_without_positions": texts - len(common.aligned),
        "positions": common.positions,
        "sampled_positions": len(places.sample),
        "tokens_old": sum(len(a.ids_o) for a in common.aligned),
        "tokens_new": sum(len(a.ids_n) for a in common.aligned),
        "shared_tokens": len(common.tokens_o),
        "layers_old": common.depths[0],
        "layers_new": common.depths[1],
    }


def _options(config: VerifyConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "text": "shipped" if config.text is None else os.fspath(config.text),
        "labelled": None if config.labelled is None else os.fspath(config.labelled),
        "examples": config.examples,
        "max_tokens": config.max_tokens,
        "seed": config.seed,
        "bootstrap": config.bootstrap,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _stamps(given: Mapping[str, object]) -> dict[str, tuple[str, Path, object]]:
    """By path, what the files of the local models and adapters look like: whose they are, and inode, size and time."""
    stamps: dict[str, tuple[str, Path, object]] = {}
    for what, source in given.items():
        folder = Path(os.fspath(source)).expanduser() if isinstance(source, str | os.PathLike) else None
        with suppress(OSError, ValueError):
            for file in [] if folder is None or not folder.is_dir() else sorted(folder.iterdir()):
                if file.suffix not in (".safetensors", ".json"):
                    continue
                seen = file.stat()
                stamps[os.fspath(file)] = what, file, (seen.st_ino, seen.st_size, seen.st_mtime_ns)
    return stamps


def _check_unchanged(given: Mapping[str, object], before: dict[str, tuple[str, Path, object]]) -> None:
    """Each model is read several times; figures of two different ones are figures of neither.

    Raises:
        LoraSuiteError: a file is another one now.
    """
    after = _stamps(given)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            what, file, _ = before.get(path) or after[path]
            raise LoraSuiteError(f"{what} {file.parent}: {file.name} changed while it was read; run verify again")
