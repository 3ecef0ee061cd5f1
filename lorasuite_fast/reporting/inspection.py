"""What is in a transfer plan, told from the plan alone: neither model is opened."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..transfer.kinship import plan_kinship
from ..transfer.plan import Plan
from .escaping import printable, terminal

_KINDS = {
    "heads": "head matches and similarities",
    "neurons": "neuron matches and scales",
    "blocks": "projection blocks of matched heads",
}


def matched(similarity: Tensor, match: Tensor) -> Tensor:
    """Cosine of each matched head or neuron with its partner.

    Args:
        similarity: (old, new) or, of each with its partner, (new,). match: (new,), the old partner or -1.
    """
    if similarity.ndim == 2:
        similarity = similarity[match.clamp_min(0), torch.arange(len(match))]
    return similarity[match >= 0].float()


def inspect_plan(plan: Plan) -> dict[str, Any]:
    """`TransferPlan.summary` with each layer's matches (counts, mean and least cosine) and the bytes of every part."""
    summary = plan.summary()
    for layer in summary["layers"]:
        for name in ("heads", "neurons"):
            prefix = f"layers.{layer['new']}.{name}"
            if f"{prefix}.match" not in plan.tensors:
                continue
            match = plan.tensors[f"{prefix}.match"]
            cosines = matched(plan.tensors[f"{prefix}.similarity"], match)
            layer[name] = {
                "matched": len(cosines),
                "of": len(match),
                "mean_cosine": float(cosines.mean()) if len(cosines) else None,
                "least_cosine": float(cosines.min()) if len(cosines) else None,
            }
    summary["unpartnered_new_layers"] = [j for j in range(plan.new.shape.L) if j not in plan.layers]
    summary["bytes"] = _sizes(plan)
    return summary


def _sizes(plan: Plan) -> dict[str, int]:
    """Bytes of the plan's tensors by what they are; the largest first."""
    sizes: dict[str, int] = {}
    for name, size in plan.tensor_bytes().items():
        parts = name.split(".")
        kind = name if parts[0] != "layers" else _KINDS.get(parts[-1], _KINDS.get(parts[2], "norms and gains"))
        sizes[kind] = sizes.get(kind, 0) + size
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def print_plan(console: Console, plan: Plan, measure: str) -> None:
    """Prints a plan's models, options, layers and sizes."""
    facts = inspect_plan(plan)
    table = Table(title="Models", title_justify="left")
    for name in ("", "old", "new"):
        table.add_column(name, overflow="fold")
    old, new = plan.old, plan.new
    table.add_row("name", terminal(old.name), terminal(new.name))
    table.add_row("fingerprint", terminal(old.fingerprint), terminal(new.fingerprint))
    table.add_row("family", terminal(old.family), terminal(new.family))
    for label, shown in (
        ("vocabulary", [f"{s.V:,}" for s in (old.shape, new.shape)]),
        ("layers", [f"{s.L}" for s in (old.shape, new.shape)]),
        ("width", [f"{s.d:,}" for s in (old.shape, new.shape)]),
        ("MLP width", [f"{s.f:,}" for s in (old.shape, new.shape)]),
        ("heads", [f"{s.H} of {s.h}, {s.attention}" for s in (old.shape, new.shape)]),
    ):
        table.add_row(label, *shown)
    console.print(table)
    table = Table(title="Layers", title_justify="left")
    for name in ("new", "old", measure, "heads matched", "cosine, mean", "least", "neurons matched", "cosine, mean"):
        table.add_column(name, justify="right")
    layers = {layer["new"]: layer for layer in facts["layers"]}
    for j in range(new.shape.L):
        if j not in layers:
            table.add_row(str(j), "–", "", "[dim]no partner[/dim]")
            continue
        layer = layers[j]
        heads, neurons = layer.get("heads"), layer.get("neurons")
        table.add_row(
            str(j),
            str(layer["old"]),
            f"{layer['cka']:.3f}",
            *(_counts(heads), _cosine(heads, "mean_cosine"), _cosine(heads, "least_cosine")),
            *(_counts(neurons), _cosine(neurons, "mean_cosine")),
        )
    console.print(table)
    console.print(f"method: {plan.method}", highlight=False, markup=False, soft_wrap=True)
    relatives = plan_kinship(plan.facts)
    if relatives is not None:
        console.print(f"relatives: {relatives}", highlight=False, markup=False, soft_wrap=True)
    options = "  ".join(f"{name} {_plain(value)}" for name, value in plan.options.items())
    console.print(f"options: {printable(options)}", highlight=False, markup=False, soft_wrap=True)
    sizes = "  ".join(f"{kind} {size / 2**20:,.2f} MiB" for kind, size in facts["bytes"].items())
    console.print(f"size: {sizes}", highlight=False, markup=False, soft_wrap=True)


def _counts(found: dict[str, Any] | None) -> str:
    return "–" if found is None else f"{found['matched']} of {found['of']}"


def _cosine(found: dict[str, Any] | None, name: str) -> str:
    return "–" if found is None or found[name] is None else f"{found[name]:.3f}"


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
