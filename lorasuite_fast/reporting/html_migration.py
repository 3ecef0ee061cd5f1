"""What a report says of a plan and of a migration."""

from __future__ import annotations

import math

from ..evaluation.measures import Interval
from ..io.hub_ids import shown
from ..results import Migration
from ..transfer.build_options import EXACT_R2
from ..transfer.kinship import plan_kinship
from ..transfer.plan import Plan
from .escaping import html_text as escape
from .html_parts import (
    Part,
    facts_table,
    figure_of,
    folded_table,
    interval,
    listed,
    number_text,
    options_part,
    table_of,
    verdict_box,
)
from .html_results import finetuning_part, phases_part, refinement_part
from .inspection import inspect_plan
from .spectra import Spectra, migration_spectra
from .svg import Series, bar_chart, chart_key, heatmap, line_chart, strips

_ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def _models(plan: Plan) -> str:
    rows = []
    for name, value in (
        ("model", lambda m: shown(m.name)),
        ("fingerprint", lambda m: m.fingerprint),
        ("family", lambda m: m.family),
        ("layers", lambda m: m.shape.L),
        ("width", lambda m: f"{m.shape.d:,}"),
        ("MLP width", lambda m: f"{m.shape.f:,}"),
        ("heads", lambda m: f"{m.shape.H} of {m.shape.h}, {m.shape.attention}"),
        ("vocabulary", lambda m: f"{m.shape.V:,}"),
    ):
        rows.append((name, value(plan.old), value(plan.new)))
    return table_of(("", "old", "new"), rows, "The two models")


def plan_summary(plan: Plan) -> Part:
    facts = plan.facts
    rows = {
        "method": f"{plan.method}, {facts.get('method_reason', 'asked for')}",
        "shared tokens": f"{facts['shared_tokens']:,}",
        "same vocabulary": "yes" if facts["same_vocabulary"] else "no",
        "layers with a partner": f"{len(plan.layers)} of {plan.new.shape.L}",
        "relatives": plan_kinship(facts) or "–",
    }
    return Part("Summary", _expectation(plan) + facts_table(rows) + _models(plan))


def _expectation(plan: Plan) -> str:
    """What the fit of the transfer matrices lets one expect of an adapter."""
    fits = plan.linear_fits
    if plan.options["method"] == "copy" and plan.exact:
        return verdict_box("The new model's weights are the old one's: the adapter is what it was.", "good")
    if plan.exact:
        return verdict_box("A linear map carries one model onto the other: an adapter should arrive whole.", "good")
    if fits and min(fits) < EXACT_R2 and plan.options["method"] != "copy":
        return verdict_box(
            f"No linear map carries one model onto the other (R² below {EXACT_R2}): measure what an adapter still does "
            "before you rely on it (lorasuite-fast verify).",
            "part",
        )
    return verdict_box("Measure what an adapter still does before you rely on it (lorasuite-fast verify).", "part")


def plan_parts(plan: Plan) -> list[Part]:
    measure = str(plan.options.get("similarity", "cka"))
    measure = "CKA" if measure == "cka" else measure
    cka = plan.tensors["cka"].tolist()
    caption = (
        f"{measure} of the hidden states over the calibration text. The line joins the chosen pairs; a new layer "
        "without one has no partner."
    )
    table = folded_table(
        ["old \\ new", *map(str, range(plan.new.shape.L))],
        ([i, *(f"{value:.3f}" for value in row)] for i, row in enumerate(cka)),
        f"{measure} of old layers (rows) with new layers (columns)",
    )
    parts = [Part("Layers", figure_of(heatmap(cka, plan.layers, measure), caption, table))]
    parts.append(_heads(plan))
    parts.append(_residual(plan))
    return parts


def _heads(plan: Plan) -> Part:
    rows: list[tuple[int, list[float | None], list[int]]] = []
    for j in sorted(plan.layers):
        if f"layers.{j}.heads.match" not in plan.tensors:
            continue
        match = plan.tensors[f"layers.{j}.heads.match"].tolist()
        similarity = plan.tensors[f"layers.{j}.heads.similarity"]
        rows.append((j, [float(similarity[a, b]) if a >= 0 else None for b, a in enumerate(match)], match))
    if not rows:
        text = "This method does not match heads." if plan.options["method"] in ("copy", "distill") else ""
        return Part("Heads", f"<p>{text}</p>" if text else "")
    table = folded_table(
        ("layer", "new head", "old head", "cosine"),
        (
            (j, b, a if a >= 0 else "–", number_text(c))
            for j, cs, m in rows
            for b, (c, a) in enumerate(zip(cs, m, strict=True))
        ),
        "Matched heads",
    )
    caption = (
        "Each square is a new head, its strength the cosine with the old head it continues, whose number it has where "
        "there is room; another colour is a cosine below 0. Near 0 nothing was found to match."
    )
    return Part("Heads", figure_of(strips(rows), caption, table))


def _residual(plan: Plan) -> Part:
    facts = plan.facts
    rows = [
        (name, r2, "–" if r2 is None else f"{1 - r2:.4f}")
        for name, r2 in (("old to new, W_h", facts["r2"]), ("new to old, S", facts["r2_back"]))
    ]
    layers = _layer_residual(plan)
    if all(r2 is None for _, r2, _ in rows):
        words = "<p>The transfer matrix was given, not fitted: there is no residual on tokens.</p>"
        return Part("Transfer matrix", words + layers)
    shares = [(name, None if r2 is None else 1 - r2, text) for name, r2, text in rows]
    svg = bar_chart(shares, "Residual of the transfer matrices on held-out shared tokens, 1 − R²", 1.0, 1 - EXACT_R2)
    caption = (
        f"1 − R² on every 20th shared token, fitted on the others: 0 is a perfect linear map, 1 no map at all. Up to "
        f"{1 - EXACT_R2:.3f} (the line) counts as exact."
    )
    table = folded_table(
        ("", "R²", "1 − R²"), [(n, number_text(r2, 5), t) for n, r2, t in rows], "Fit on held-out tokens"
    )
    return Part("Transfer matrix", figure_of(svg, caption, table) + layers)


def _layer_residual(plan: Plan) -> str:
    """1 - R² of W_h on what the mapped layers give, where the plan holds it."""
    found = sorted((int(j), r2) for j, r2 in plan.facts.get("layer_r2", {}).items())
    if not found:
        return ""
    bars = [(f"layer {j}", 1 - r2, f"{1 - r2:.4f}") for j, r2 in found]
    caption = "1 − R² of W_h on the pooled states behind each new layer and its partner; more than 1 is drawn as 1."
    return figure_of(bar_chart(bars, caption, 1.0, 1 - EXACT_R2), caption)


def migration_parts(result: Migration) -> list[Part]:
    plan = result.plan
    rows: dict[str, object] = {
        "adapter": shown(result.adapter),
        "written": shown(result.out),
        "method": f"{plan.method}, {plan.facts.get('method_reason', 'asked for')}",
        "relatives": plan_kinship(plan.facts) or "–",
        "seconds": number_text(result.seconds, 1),
        "new layers without a partner": listed(j for j in range(plan.new.shape.L) if j not in plan.layers),
        "old layers left out": listed(result.unused_old_layers),
    }
    if (choice := result.choice) is not None:
        rows["candidates, agreement on held-out text that depends on the text"] = choice.table
        rows["candidates not judged"] = "; ".join(f"{name}: {why}" for name, why in choice.left_out.items()) or "none"
    if (distilled := result.distilled) is not None:
        share, content = distilled.agreement["kl_share"], distilled.agreement["content_kl_share"]
        rows |= {
            "agreement on held-out text": interval(Interval(*share)),
            "of which depends on the text": interval(Interval(*content)),
            "gain": f"{distilled.gain:g}",
            "R² of the output map": number_text(distilled.output_r2),
            "text": shown(distilled.text),
            "aligned positions": f"{distilled.positions:,} in {distilled.texts:,} texts",
        }
    verdict = ""
    if result.warning:
        verdict = verdict_box(result.warning, "bad")
    elif distilled is None and choice is not None:
        share = choice.agreement[choice.chosen]["kl_share"]
        verdict = verdict_box(f"On held-out text {share[0]:.0%} of the effect arrived.", "part")
    elif distilled is not None:
        verdict = verdict_box(
            f"On held-out text {distilled.agreement['kl_share'][0]:.0%} of the effect arrived.", "part"
        )
    elif result.finetuned is None and result.refined is None:
        verdict = _expectation(plan)
    parts = [Part("Summary", verdict + facts_table(rows) + _models(plan)), *plan_parts(plan)]
    parts += [_fidelity(result), _spectra(result)]
    if result.refined is not None:
        parts.append(refinement_part(result.refined))
    if result.finetuned is not None:
        parts.append(finetuning_part(result.finetuned))
    return [*parts, phases_part(result.phases, result.seconds), options_part(plan.options)]


def _fidelity(result: Migration) -> Part:
    plan = result.plan
    matches = {layer["new"]: layer for layer in inspect_plan(plan)["layers"]}
    rows: list[tuple[object, ...]] = []
    for layer in result.layers:
        heads = layer.head_similarity
        if heads is None and "heads" in matches.get(layer.new_layer, {}):
            heads = matches[layer.new_layer]["heads"]["mean_cosine"]
        sizes = ", ".join(f"{role} {size:.3f}" for role, size in layer.update.items()) or "–"
        old = "–" if layer.old_layer is None else layer.old_layer
        figures = (layer.cka, heads, layer.neuron_similarity, layer.explained)
        rows.append((layer.new_layer, old, *map(number_text, figures), sizes))
    columns = ("new", "old", "sim.", "heads", "neurons", "expl.", "update")
    caption = (
        "sim.: similarity with the partner; heads, neurons: mean cosine of the matched; expl.: share of distillation's "
        "target reached behind the layer on held-out text; update: its norm over that of the weight"
    )
    svg = ""
    if any(layer.explained is not None for layer in result.layers):
        bars = [(f"layer {x.new_layer}", x.explained, number_text(x.explained)) for x in result.layers]
        words = "Share of the target reached behind each fitted layer, on held-out text, before the gain."
        svg = figure_of(bar_chart(bars, words, 1.0), words)
    return Part("Fidelity by layer", svg + f'<div class="fit">{table_of(columns, rows, caption)}</div>' if rows else "")


def _spectra(result: Migration) -> Part:
    old, new = migration_spectra(result)
    if not old and not new:
        return Part("Singular values", "<p>The adapters' folders are not there any more.</p>")
    figures = []
    for role in _ROLES:
        series = [
            *(Series(f"old layer {i}", list(enumerate(s, 1)), "b") for (i, r), s in old.items() if r == role),
            *(Series(f"new layer {j}", list(enumerate(s, 1)), "a") for (j, r), s in new.items() if r == role),
        ]
        svg = line_chart(
            [_drawn(s) for s in series], f"Singular values of the updates of {role}", "index", role, log=True
        )
        if svg:
            figures.append(f"<figure>{svg}</figure>")
    caption = "Singular values of the update s·BA of each module, a line for each layer; those of 0 are left out."
    table = folded_table(
        ("module", "rank", "largest", "norm"),
        [row for name, spectra in (("old", old), ("new", new)) for row in _spectrum_rows(name, spectra)],
        "Singular values by module",
    )
    key = chart_key(("old", "b"), ("new", "a"))
    return Part("Singular values", f'{key}<div class="panels">{"".join(figures)}</div><p>{escape(caption)}</p>{table}')


def _drawn(series: Series) -> Series:
    """Without what rounding left of singular values that are 0."""
    points = [(float(x), y) for x, y in series.points]
    largest = max((y for _, y in points), default=0.0)
    return Series(series.name, [(x, y) for x, y in points if y > 1e-7 * largest], series.kind)


def _spectrum_rows(side: str, spectra: Spectra) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for (layer, role), values in spectra.items():
        largest = max(values, default=0.0)
        rank = sum(value > 1e-7 * largest for value in values) if largest else 0
        norm = math.sqrt(sum(v * v for v in values))
        rows.append((f"{side} {layer} {role}", rank, f"{largest:.4g}", f"{norm:.4g}"))
    return rows
