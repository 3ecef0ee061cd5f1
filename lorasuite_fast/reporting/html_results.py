"""What a report says of a verification and of a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..evaluation.base_fit import layers_compared
from ..evaluation.verification import Verification
from ..io.hub_ids import shown
from ..io.phases import Phase
from ..training.finetuning import Finetuning
from ..training.refinement import Refinement
from .escaping import html_text as escape
from .html_parts import Part, facts_table, figure_of, folded_table, interval, mib, number_text, table_of, verdict_box
from .svg import Series, bar_chart, chart_key, interval_chart, line_chart

if TYPE_CHECKING:
    from ..evaluation.base_fit import BaseFit
    from ..evaluation.measures import Effect


def phases_part(phases: Sequence[Phase], seconds: float | None = None) -> Part:
    if not phases:
        return Part("Time and memory", "")
    longest = max(phase.seconds for phase in phases)
    bars = [(phase.name, phase.seconds, f"{phase.seconds:.2f} s") for phase in phases]
    on_gpu = any(phase.peak_device_memory is not None for phase in phases)
    columns = ("phase", "s", "anon.", "resident", *(["GPU"] if on_gpu else []), "expected")
    rows = []
    for phase in phases:
        sizes = [phase.peak_memory, phase.peak_resident, *([phase.peak_device_memory] if on_gpu else [])]
        rows.append((phase.name, f"{phase.seconds:.2f}", *map(mib, [*sizes, phase.predicted])))
    total = f"{seconds if seconds is not None else sum(phase.seconds for phase in phases):.1f} s in all. "
    caption = f"{total}Peak memory in MiB: what the process allocated itself, its resident set, and what was expected"
    svg = figure_of(bar_chart(bars, "Seconds of each phase", longest), "Seconds of each phase.")
    return Part("Time and memory", svg + f'<div class="fit">{table_of(columns, rows, caption)}</div>')


_KINDS = {
    "carried": "good",
    "exact": "good",
    "constant shift only": "bad",
    "nothing carried": "bad",
    "nothing": "bad",
    "reversed": "bad",
}


_CONTROLS = {"carried": "new adapter", "shuffled": "shuffled", "flipped": "sign flipped", "constant": "constant shift"}


def fingerprints(result: Verification | Refinement | Finetuning) -> Part:
    """By which a reader can tell whether a model at hand is the one of the report."""
    rows = {f"{role} model" if role != "model" else role: found or "–" for role, found in result.fingerprints.items()}
    return Part("Fingerprints", facts_table(rows) if rows else "")


def verification_parts(result: Verification) -> list[Part]:
    facts = result.facts
    rows = {
        "old": shown(result.old) + (f" with {shown(result.old_adapter)}" if result.old_adapter else ""),
        "new": shown(result.new) + (f" with {shown(result.new_adapter)}" if result.new_adapter else ""),
        "text": shown(str(result.options["text"])),
        "aligned positions": f"{facts['positions']:,} in {facts['texts']} texts",
        "shared tokens": f"{facts['shared_tokens']:,}",
    }
    parts = [Part("Verdict", verdict_box(result.verdict, _KINDS.get(result.kind, "part")) + facts_table(rows))]
    if result.effect is not None:
        parts.append(_effect(result.effect))
        parts.append(_changes(result))
    if result.fit is not None:
        parts.append(_fit(result.fit))
    if result.relatives is not None:
        parts.append(relatives_part(result.relatives))
    if (bits := result.bits_per_byte) is not None:
        table = table_of(
            ("", "alone", "adapted", "gain"),
            [
                ("old", *(interval(f) for f in (bits.old, bits.old_adapted, bits.old_gain))),
                ("new", *(interval(f) for f in (bits.new, bits.new_adapted, bits.new_gain))),
            ],
            f"Bits per byte of {bits.examples} labelled examples, with 95 % intervals",
        )
        share = f"<p>Share of the old gain reached: {interval(bits.gain_share, 2)}</p>" if bits.gain_share else ""
        parts.append(Part("Labelled text", f'<div class="fit">{table}</div>{share}'))
    return parts


def _effect(effect: Effect) -> Part:
    figures = []
    for name, label, tempered in (
        ("cosine", "Cosine with the old change", effect.tempered_cosine),
        ("explained_share", "Explained share of the old change", effect.tempered_share),
        ("kl_share", "KL share", None),
        ("gain_share", "Gain share", None),
    ):
        rows = [(words, getattr(getattr(effect, row), name)) for row, words in _CONTROLS.items()]
        if tempered is not None:
            rows.append(("temperature", tempered))
        if name in effect.content:
            rows.append(("content alone", effect.content[name]))
        svg = interval_chart(rows, f"{label} of the new adapter and of its controls")
        figures.append(
            f"<figure>{svg}<figcaption>{escape(label)}, with 95 % intervals over texts</figcaption></figure>"
        )
    rows_ = [
        (
            words,
            *(
                interval(getattr(getattr(effect, row), name), 2)
                for name in ("cosine", "explained_share", "kl_share", "gain_share")
            ),
        )
        for row, words in _CONTROLS.items()
    ]
    sizes = facts_table(
        {
            "KL with and without the adapter, old": f"{interval(effect.old_kl)} nats",
            "the same, new": f"{interval(effect.new_kl)} nats",
            "size of the new change over the old": interval(effect.size_ratio, 2),
            "best size": interval(effect.best_gain, 2),
            "cosine without constant shift and temperature": interval(effect.content_cosine),
        }
    )
    table = folded_table(
        ("", "cosine", "explained", "KL share", "gain share"), rows_, "Likeness to the old change, and that of controls"
    )
    return Part("Effect", f'<div class="panels">{"".join(figures)}</div>{table}{sizes}')


def _changes(result: Verification) -> Part:
    bars = [(f"layer {x.new_layer}", x.cka, number_text(x.cka)) for x in result.layers]
    if not bars:
        return Part("Fidelity by layer", "")
    caption = "CKA of the change of the residual stream behind each new layer with that of the old layer most like it."
    rows = [
        (
            layer.new_layer,
            "–" if layer.old_layer is None else layer.old_layer,
            *map(number_text, (layer.new_update, layer.old_update, layer.new_change, layer.old_change, layer.cka)),
        )
        for layer in result.layers
    ]
    columns = ("new", "old", "update, new", "old", "change, new", "old", "CKA")
    table = table_of(columns, rows, "Updates over the weights' norm; changes over the stream's")
    return Part(
        "Fidelity by layer", figure_of(bar_chart(bars, caption, 1.0), caption) + f'<div class="fit">{table}</div>'
    )


def _fit(fit: BaseFit) -> Part:
    tables = [
        ("embeddings", number_text(fit.embedding_r2, 4), number_text(fit.embedding_r2_back, 4)),
        ("unembeddings", number_text(fit.unembedding_r2, 4), number_text(fit.unembedding_r2_back, 4)),
    ]
    words = [
        ("same best token", number_text(fit.top1_agreement), number_text(fit.top1_shuffled)),
        ("KL, nats", number_text(fit.kl), number_text(fit.kl_shuffled)),
    ]
    bars = [(f"new {x.new_layer}, old {x.old_layer}", x.r2, number_text(x.r2)) for x in fit.layers]
    caption = f"Held-out R² of linear maps from new to old hidden states, {layers_compared(fit)}."
    return Part(
        "Fit of the models",
        table_of(("held-out R²", "old to new", "new to old"), tables, "Linear maps between the shared tokens' rows")
        + table_of(("", "as they are", "shuffled"), words, "Next token at the aligned positions")
        + figure_of(bar_chart(bars, caption, 1.0), caption),
    )


def refinement_part(result: Refinement) -> Part:
    evaluations = result.evaluations
    agreement = [Series("agreement", [(float(e.step), e.agreement) for e in evaluations])]
    svg = line_chart(
        agreement,
        "Agreement with the old adapter on held-out text over steps",
        "step",
        "agreement",
        mark=result.chosen_step,
    )
    losses = [
        Series("KL", [(float(e.step), e.kl) for e in evaluations if e.kl is not None]),
        Series("next token", [(float(e.step), e.next_token) for e in evaluations if e.next_token is not None], "b"),
    ]
    lost = line_chart(losses, "Mean losses between evaluations", "step", "nats")
    kind = "bad" if result.agreement <= 0 else "part" if result.kept_start else "good"
    facts = {
        "text": shown(result.text),
        "held-out texts": result.held_out_texts,
        "steps": f"{result.steps} of {result.budget}, stopped by {result.stopped}",
        "tokens trained on": f"{result.trained_tokens:,}",
        "trainable parameters": f"{result.trainable_parameters:,}",
        "shared tokens kept of a target": f"{result.teacher.k:,} of {result.teacher.shared:,}",
    }
    table = folded_table(
        ("step", "agreement", "KL", "next token", "retained text"),
        ((e.step, *map(number_text, (e.agreement, e.kl, e.next_token, e.retained_kl))) for e in evaluations),
        "Evaluations on held-out text",
    )
    first = figure_of(svg, "Agreement on held-out text: 1 is the target itself, 0 the bare new model.", table)
    second = f"<figure>{lost}{chart_key(('KL', 'a'), ('next token', 'b'))}</figure>" if lost else ""
    body = verdict_box(result.summary, kind) + facts_table(facts) + f'<div class="panels">{first}{second}</div>'
    return Part("Refinement", body)


def finetuning_part(result: Finetuning) -> Part:
    losses = Series("training", [(float(n), loss) for n, loss in enumerate(result.losses, 1)])
    held_out = Series("validation", [(float(e.step), e.loss) for e in result.evaluations], "b")
    mark = result.chosen_step if result.evaluations else -1
    svg = line_chart([losses, held_out], "Loss over steps", "step", "nats a token", mark=mark)
    facts = {
        "started from": "a new adapter" if result.adapter is None else shown(result.adapter),
        "samples": f"{result.samples:,}, and {result.validation_samples:,} for validation",
        "cut off": f"{result.truncated:,}",
        "left out": f"{result.left_out:,}",
        "tokens trained on": f"{result.trained_tokens:,}",
        "trainable parameters": f"{result.trainable_parameters:,}",
    }
    if result.retained_kl is not None:
        facts["distance from the bare model on the text to retain"] = (
            f"{number_text(result.start_retained_kl)} nats before, {number_text(result.retained_kl)} in the last third"
        )
    key = chart_key(("training", "a"), *([("validation", "b")] if result.evaluations else []))
    table = folded_table(
        ("step", "loss"),
        [(n, number_text(loss, 4)) for n, loss in enumerate(result.losses, 1)],
        "Training loss by step",
    )
    kind = "bad" if result.diverged else "part" if result.kept_start else "good"
    picture = f"<figure>{svg}{key}<figcaption>Loss of each step before its update.</figcaption>{table}</figure>"
    return Part("Fine-tuning", verdict_box(result.summary, kind) + facts_table(facts) + (picture if svg else ""))


def relatives_part(relatives: dict[str, Any]) -> Part:
    rows = [(kind, f"{distance:.2%}") for kind, distance in relatives.get("distances", {}).items()]
    table = table_of(("module", "distance"), rows, "Distance of the weights from the old ones, relative to their size")
    return Part("Relatives", f"<p>{escape(relatives['sentence'])}</p>" + (table if rows else ""))
