"""A verification as tables on a terminal, at most 100 columns wide."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ..evaluation.base_fit import BaseFit, layers_compared
from ..evaluation.measures import BitsPerByte, Effect, Interval, LayerEffect
from ..evaluation.verification import Verification
from .escaping import terminal

_COLOURS = {
    "carried": "green",
    "exact": "green",
    "carried at another size": "yellow",
    "partly carried": "yellow",
    "close": "yellow",
    "distillation": "yellow",
    "constant shift only": "red",
    "nothing carried": "red",
    "nothing": "red",
    "reversed": "red",
}
_ENOUGH = 3
"""Positions per dimension from which on a linear map between hidden states is determined well enough to judge."""
_ROWS = {
    "carried": "new adapter",
    "shuffled": "positions shuffled",
    "flipped": "sign flipped",
    "constant": "constant shift",
}


def print_verification(console: Console, result: Verification) -> None:
    """Prints what was compared, the tables and, last, the verdict."""
    facts = result.facts
    console.print(
        f"{facts['positions']:,} aligned positions in {facts['texts']} texts ({terminal(result.options['text'])}), "
        f"{facts['shared_tokens']:,} shared tokens",
        highlight=False,
        soft_wrap=True,
    )
    if result.effect is not None:
        _print_effect(console, result.effect)
        _print_layers(console, result.layers)
    if result.fit is not None:
        _print_fit(console, result.fit)
    if result.relatives is not None:
        _print_relatives(console, result.relatives)
    if result.bits_per_byte is not None:
        _print_bits(console, result.bits_per_byte)
    if result.options["text"] == "shipped" and result.effect is not None:
        console.print(
            "[dim]General text was read; the effect shows best on text of the adapter's domain (--text).[/dim]"
        )
    colour = _COLOURS.get(result.kind, "default")
    console.print(f"[bold {colour}]{terminal(result.verdict)}[/bold {colour}]", highlight=False)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(figure: Interval | None, digits: int = 3) -> str:
    if figure is None or figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.{digits}f}"
    return f"{figure.value:.{digits}f} [dim]{figure.low:.{digits}f}…{figure.high:.{digits}f}[/dim]"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _print_effect(console: Console, effect: Effect) -> None:
    table = _table("Size of the change (95 % intervals over texts)", "", "old", "new")
    table.add_row("KL(with adapter ‖ without), nats", _interval(effect.old_kl), _interval(effect.new_kl))
    table.add_row("RMS change of a log-probability", _interval(effect.old_rms), _interval(effect.new_rms))
    console.print(table)
    table = _table(
        "Likeness to the old change, and that of controls",
        "",
        "cosine",
        "explained share",
        "KL share",
        "top-1",
    )
    for name, label in _ROWS.items():
        row = getattr(effect, name)
        table.add_row(
            label,
            _interval(row.cosine, 2),
            _interval(row.explained_share, 2),
            _interval(row.kl_share, 2),
            _number(row.top1.value, 2),
        )
    table.add_row(
        "temperature alone", _interval(effect.tempered_cosine, 2), _interval(effect.tempered_share, 2), "", ""
    )
    table.add_row("no adapter", "", "0.00", "0.00", _number(effect.top1_alone.value, 2))
    table.add_section()
    content = effect.content
    table.add_row(
        "content-dependent",
        *(_interval(content[name], 2) for name in ("cosine", "explained_share", "kl_share")),
        "",
    )
    console.print(table)
    changed, best = effect.top1_changed.value, effect.best_gain.value
    console.print(
        f"cosine without constant shift and temperature: {_interval(effect.content_cosine)}; new change "
        f"{_number(effect.size_ratio.value, 2)} times the old, closest at {_number(best, 2)} times its size\n"
        f"top-1: of the {_number(changed, 2)} of positions where the old adapter changed the best token, the share "
        "with that token\n"
        f"gain share: {_interval(effect.carried.gain_share, 2)} (constant shift alone "
        f"{_number(effect.constant.gain_share.value, 2)}): how far what the old adapter made likelier became "
        "likelier here",
        highlight=False,
    )


def _print_layers(console: Console, layers: list[LayerEffect]) -> None:
    table = Table(title="Layers (relative to the weights; to the residual stream behind the layer)")
    table.title_justify = "left"
    names = ("new", "old", "new update", "old update", "new change", "old change", "CKA of the changes")
    for name in names:
        table.add_column(name, justify="right")
    for layer in layers:
        table.add_row(
            str(layer.new_layer),
            "–" if layer.old_layer is None else str(layer.old_layer),
            _number(layer.new_update),
            _number(layer.old_update),
            _number(layer.new_change),
            _number(layer.old_change),
            _number(layer.cka),
        )
    console.print(table)


def _print_fit(console: Console, fit: BaseFit) -> None:
    table = _table("Linear maps between the shared tokens' rows", "held-out R²", "old to new", "new to old")
    table.add_row("embeddings", _number(fit.embedding_r2, 4), _number(fit.embedding_r2_back, 4))
    table.add_row("unembeddings", _number(fit.unembedding_r2, 4), _number(fit.unembedding_r2_back, 4))
    console.print(table)
    table = _table("Next token at the aligned positions", "", "as they are", "positions shuffled")
    table.add_row("same best token", _number(fit.top1_agreement), _number(fit.top1_shuffled))
    table.add_row("KL(old ‖ new), nats", _number(fit.kl), _number(fit.kl_shuffled))
    console.print(table)
    table = _table(f"Hidden states, {layers_compared(fit)}", "new layer", "old layer", "held-out R², new to old")
    for layer in fit.layers:
        table.add_row(str(layer.new_layer), str(layer.old_layer), _number(layer.r2))
    console.print(table)
    if any(layer.positions < _ENOUGH * layer.new_width for layer in fit.layers):
        first = fit.layers[0]
        console.print(
            f"[dim]fitted on {first.positions:,} positions for {first.new_width:,} dimensions, too few: R² comes out "
            "low; give more text[/dim]",
            highlight=False,
        )


def _print_relatives(console: Console, relatives: dict[str, Any]) -> None:
    distances = relatives.get("distances", {})
    if distances:
        table = _table("Weights: distance from the old ones, relative to their size", "module", "distance")
        for kind, distance in distances.items():
            table.add_row(kind, f"{distance:.2%}")
        console.print(table)
    console.print(f"relatives: {relatives['sentence']}", highlight=False, markup=False, soft_wrap=True)


def _print_bits(console: Console, bits: BitsPerByte) -> None:
    table = _table(f"Bits per byte of {bits.examples} labelled examples", "", "alone", "with adapter", "gain")
    table.add_row("old", _interval(bits.old), _interval(bits.old_adapted), _interval(bits.old_gain))
    table.add_row("new", _interval(bits.new), _interval(bits.new_adapted), _interval(bits.new_gain))
    console.print(table)
    if bits.gain_share is not None:
        console.print(f"share of the old gain reached: {_interval(bits.gain_share, 2)}", highlight=False)
