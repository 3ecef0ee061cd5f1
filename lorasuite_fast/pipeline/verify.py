"""Verification: what arrived of an adapter, or how two models fit each other."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters.aligned_states import load_tokenizer, read_sizes
from ..config import Runtime, VerifyConfig, pick_device, pick_dtype
from ..config.flat import takes_flat_keywords
from ..errors import LoraSuiteError
from ..evaluation.base_fit import base_fit, depth_pairs, mapped_pairs, prediction
from ..evaluation.effect import effect_sums, resamples
from ..evaluation.labelled import load_labelled
from ..evaluation.verification import (
    SAMPLED,
    STORED,
    Reading,
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
from ..text.alignment import Alignment
from ..text.calibration import MIN_EXAMPLES, load_examples


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
    adapted = old_adapter is not None
    run_device, run_dtype = pick_device(runtime.device), pick_dtype(runtime.dtype)
    texts = load_examples(config.text, config.examples, config.seed)
    answers = [] if config.labelled is None else load_labelled(config.labelled, config.examples, config.seed)
    clock = PhaseClock(runtime.progress, run_device)
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
    of_text = torch.cat([torch.full((len(a.ends),), n) for n, a in enumerate(aligned)])
    compared = (
        None
        if adapted
        else compared_bases(
            old, new, config.text, config.examples, config.seed, clock, run_device, run_dtype, runtime.trust_remote_code
        )
    )
    pairs = mapped_pairs(compared.mapping) if compared else depth_pairs(sizes_o.L, sizes_n.L)
    layers_o = list(range(sizes_o.L)) if adapted else [i for i, _ in pairs]
    layers_n = list(range(sizes_n.L)) if adapted else [j for _, j in pairs]
    stored = max(len(layers_o) * sizes_o.d, len(layers_n) * sizes_n.d)
    sampled = min(positions, STORED // stored, SAMPLED if adapted else positions)
    sample = torch.randperm(positions, generator=torch.Generator().manual_seed(config.seed))[:sampled].sort().values
    reading = Reading(answers, config.max_tokens, clock, run_device, run_dtype, runtime.trust_remote_code)
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
                (o.before, o.after), (n.before, n.after), of_text, device=run_device, seed=config.seed, report=step
            )
            effect = effect_of(sums, resamples(len(aligned), config.bootstrap, config.seed))
            layers = layer_effects(o, n)
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
        bits_per_byte(o, n, resamples(len(answers), config.bootstrap, config.seed)) if answers else None,
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
            "text": "shipped" if config.text is None else os.fspath(config.text),
            "labelled": None if config.labelled is None else os.fspath(config.labelled),
            "examples": config.examples,
            "max_tokens": config.max_tokens,
            "seed": config.seed,
            "bootstrap": config.bootstrap,
            "device": run_device.type,
            "dtype": str(run_dtype).removeprefix("torch."),
        },
        clock.phases,
        time.perf_counter() - start,
        {"old": fingerprint(old, "old"), "new": fingerprint(new, "new")},
        None if fit is None else relatives_of(old, new, fit),
    )
    _check_unchanged(given, found)
    write_report(result, runtime.report)
    return result


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
