"""What a command prints of a result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from ..reporting.escaping import printable, terminal

if TYPE_CHECKING:
    from ..distillation.choice import Choice
    from ..distillation.settings import Distilled
    from ..io.phases import Phase
    from ..results import Migration
    from ..training.finetuning import Finetuning
    from ..transfer.plan import Plan
    from .doctor import Diagnosis


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def phase_table(phases: list[Phase]) -> Table:
    """Times, and memory in MiB: what was predicted for the device stands beside what was measured there."""
    on_gpu = any(phase.peak_device_memory is not None for phase in phases)
    table = Table(title="Phases (memory in MiB, peaks)", title_justify="left")
    table.add_column("phase")
    for name in ("seconds", "anonymous", "resident", *(["on the GPU"] if on_gpu else []), "predicted"):
        table.add_column(name, justify="right")
    for phase in phases:
        sizes = [phase.peak_memory, phase.peak_resident, *([phase.peak_device_memory] if on_gpu else [])]
        table.add_row(phase.name, f"{phase.seconds:.2f}", *map(_mib, [*sizes, phase.predicted]))
    return table


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def measure_name(plan: Plan) -> str:
    """Heading of the layers' similarity; plans of older releases name no measure."""
    measure = plan.options.get("similarity", "cka")
    return "CKA" if measure == "cka" else terminal(measure)


def print_transfer(console: Console, plan: Plan, *, measured: bool = False) -> None:
    from ..transfer.kinship import plan_kinship

    facts, old, new = plan.facts, plan.old.shape, plan.new.shape
    line = (
        f"old: {old.L} layers, d {old.d}, {old.attention}   new: {new.L} layers, d {new.d}, {new.attention}   "
        f"method: {plan.method}, {facts.get('method_reason', 'asked for')}"
    )
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
    relatives = plan_kinship(facts)
    if relatives is not None:
        console.print(printable(relatives), highlight=False, markup=False, soft_wrap=True)
    if plan.options["transfer"] == "identity":
        vocabulary = "the same vocabulary" if facts["same_vocabulary"] else "[yellow]different vocabularies[/yellow]"
        console.print(f"transfer matrix: the identity, as asked for; the two models have {vocabulary}")
        return
    from ..transfer.build_options import EXACT_R2

    r2, back = facts["r2"], facts["r2_back"]
    console.print(
        f"transfer matrix: {facts['shared_tokens']:,} shared tokens"
        + (f" ({facts['untrained_tokens']:,} untrained ones left out)" if facts["untrained_tokens"] else "")
        + f", R² on held-out tokens {percent(r2)} old to new, {percent(back)} new to old",
        highlight=False,
    )
    if r2 is not None and min(r2, back) < EXACT_R2 and plan.options["method"] in ("lstsq", "paper") and not measured:
        console.print(
            "[yellow]No linear map carries one embedding onto the other (R² below 0.999): between such models the\n"
            "projection alone usually changes little or nothing for the better. Measure before you rely on it.[/yellow]"
        )


def _print_layers(console: Console, result: Migration) -> None:
    plan, distilled = result.plan, result.distilled is not None
    figures = ("explained",) if distilled else ("head cosine", "neuron cosine")
    table = Table(title="Layers", title_justify="left")
    for name in ("new", "old", measure_name(plan), *figures, "relative size of the update"):
        table.add_column(name, justify="left" if name.startswith("relative") else "right")
    results = {layer.new_layer: layer for layer in result.layers}
    for j in range(plan.new.shape.L):
        layer, old = results.get(j), plan.layers.get(j)
        similarity = None if old is None else float(plan.tensors["cka"][old, j])
        if layer is None:
            none = "not fitted, no update" if distilled else "no partner, no update"
            row, update = [""] * len(figures), f"[dim]{none}[/dim]"
        else:
            shares = (layer.explained,) if distilled else (layer.head_similarity, layer.neuron_similarity)
            row = [percent(share) for share in shares]
            update = "  ".join(f"{role}\u00a0{size:.3f}" for role, size in layer.update.items()) or "–"
        table.add_row(str(j), "–" if old is None else str(old), percent(similarity), *row, update)
    console.print(table)


def _print_distilled(console: Console, distilled: Distilled) -> None:
    share, content = distilled.agreement["kl_share"], distilled.agreement["content_kl_share"]
    console.print(
        f"distilled on {distilled.positions:,} aligned positions of {distilled.texts:,} texts, gain {distilled.gain}\n"
        f"agreement with the old adapter on held-out text (1: the same change, 0: none): {share[0]:.3f} "
        f"[{share[1]:.3f}, {share[2]:.3f}], of which {content[0]:.3f} [{content[1]:.3f}, {content[2]:.3f}] depends on "
        "the text",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _print_choice(console: Console, choice: Choice) -> None:
    console.print(
        f"candidates, by what depends on the text in their agreement on held-out text: {choice.table}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for name, reason in choice.left_out.items():
        console.print(f"{name} was not judged: {reason}", highlight=False, markup=False, soft_wrap=True)


def print_finetuned(console: Console, tuned: Finetuning) -> None:
    lost = [
        f"{count:,} of its samples {what}"
        for count, what in (
            (tuned.truncated, f"were cut off at {tuned.options['max_tokens']} tokens"),
            (tuned.left_out, "were left out, nothing to learn being left of them there"),
        )
        if count
    ]
    if lost:
        console.print(f"[yellow]data: {'; '.join(lost)}[/yellow]", soft_wrap=True, highlight=False)
    style = "yellow" if tuned.kept_start else None
    console.print(printable(tuned.summary), style=style, highlight=False, markup=False, soft_wrap=True)


def print_written(console: Console, report_file: str | os.PathLike[str] | None, out: str | Path | None = None) -> None:
    for what, path in (("written", out), ("report", report_file)):
        if path is not None:
            console.print(f"{what}: {printable(path)}", highlight=False, markup=False, soft_wrap=True)


def print_result(result: Migration, as_json: bool, report_file: str | os.PathLike[str] | None = None) -> None:
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
    console = Console()
    print_transfer(console, result.plan, measured=result.choice is not None)
    _print_layers(console, result)
    console.print(phase_table(result.phases))
    if result.choice is not None:
        _print_choice(console, result.choice)
    if result.distilled is not None:
        _print_distilled(console, result.distilled)
    if result.refined is not None:
        console.print(printable(result.refined.summary), highlight=False, markup=False, soft_wrap=True)
    if result.finetuned is not None:
        print_finetuned(console, result.finetuned)
    elif result.warning:
        console.print(f"[yellow]WARNING: {terminal(result.warning)}.[/yellow]", soft_wrap=True)
    if result.unused_old_layers:
        console.print(f"old layers without a partner, left out: {', '.join(map(str, result.unused_old_layers))}")
    print_written(console, report_file, result.out)


def print_outcomes(outcomes: dict[str, dict[str, str]], as_json: bool) -> None:
    """What became of each of many adapters; exit code 2 if any failed."""
    failed = [name for name, outcome in outcomes.items() if "error" in outcome]
    if as_json:
        typer.echo(json.dumps({"adapters": outcomes, "failed": len(failed)}))
    else:
        for name, outcome in sorted(outcomes.items()):
            typer.echo(printable(f"{name}: {outcome['out']}" if "out" in outcome else f"{name}: FAILED"))
        typer.echo(f"carried: {len(outcomes) - len(failed)} of {len(outcomes)}")
        for name in failed:
            typer.echo(printable(f"error: {name}: {outcomes[name]['error']}"), err=True)
    if failed:
        raise typer.Exit(2)


_WAYS = {"triton": "compiled Triton kernel", "interpreter": "Triton's interpreter", "torch": "PyTorch twin"}


def print_diagnosis(console: Console, found: Diagnosis) -> None:
    def gib(size: int | None) -> str:
        return "unknown" if size is None else f"{size / 2**30:,.1f} GiB"

    def line(text: str, style: str | None = None) -> None:
        console.print(printable(text), style=style, highlight=False, markup=False, soft_wrap=True)

    line("  ".join(f"{name} {version}" for name, version in found.versions.items()))
    table = Table(title="Packages", title_justify="left")
    for name in ("package", "installed", "needed", ""):
        table.add_column(name)
    for package in found.packages:
        state = "" if package.fine else "[red]missing[/red]" if package.required else "[yellow]optional[/yellow]"
        least = f">= {package.least}" if package.least else ""
        table.add_row(package.name, package.found or "–", least, state)
    console.print(table)
    table = Table(title="Devices", title_justify="left")
    for name in ("device", "", "memory", "free", "kernels"):
        table.add_column(name)
    for device in found.devices:
        ways = sorted({_WAYS[kernel.runs] for kernel in found.kernels if kernel.device == device.name})
        table.add_row(device.name, device.description, gib(device.memory), gib(device.free), ", ".join(ways))
    console.print(table)
    for reason in dict.fromkeys(f"{k.device}: {k.reason}" for k in found.kernels if k.reason):
        line(reason, "dim")
    line("free disk: " + ", ".join(f"{place} {gib(free)}" for place, free in found.disk.items()))
    hub = found.hub
    state = f"{hub['models']} models" if hub["exists"] else "not there yet"
    line(f"hub cache: {hub['cache']} ({state}), {'offline' if hub['offline'] else 'downloads allowed'}")
    for problem in found.problems:
        line(f"PROBLEM: {problem}", "red")
    for sentence in found.advice:
        line(f"note: {sentence}", "yellow")
    line("problems found" if found.problems else "everything needed is here", "red" if found.problems else "green")
