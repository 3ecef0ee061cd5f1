"""The report's pictures as matplotlib figures, for notebooks and papers.

Each function returns a `matplotlib.figure.Figure` that belongs to no window; `figure.savefig(...)` writes it, and a
notebook shows it once `%matplotlib inline` is on. Needs matplotlib, which is the extra `plot`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LoraSuiteError
from .spectra import migration_spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..evaluation.verification import Verification
    from ..io.phases import Phase
    from ..results import Migration
    from ..training.finetuning import Finetuning
    from ..training.refinement import Refinement
    from ..transfer.plan import Plan


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of that many inches with a row of axes; the axes themselves where it is one."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LoraSuiteError("figures need matplotlib, which is not installed; pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, axes[0] if columns == 1 else axes


def cka(plan: Plan) -> Figure:
    """Similarity of every old layer (up) with every new one (right), and the chosen pairs joined by a line."""
    table = plan.tensors["cka"]
    figure, axes = _axes(1.5 + 0.25 * table.shape[1], 1.2 + 0.25 * table.shape[0])
    image = axes.imshow(table.numpy(), origin="lower", cmap="Blues", vmin=0, vmax=1, aspect="auto")
    new, old = zip(*sorted(plan.layers.items()), strict=True) if plan.layers else ((), ())
    axes.plot(new, old, color="tab:orange", marker="s", markerfacecolor="none")
    measure = plan.options.get("similarity", "cka")
    axes.set(xlabel="new layer", ylabel="old layer", title="CKA" if measure == "cka" else measure)
    figure.colorbar(image)
    return figure


def heads(plan: Plan) -> Figure:
    """Cosine of every new head with the old head it continues, a row for each new layer; blank without a partner.

    Raises:
        LoraSuiteError: the plan matches no heads (distill, or a plan for the MLP alone).
    """
    layers = [j for j in sorted(plan.layers) if f"layers.{j}.heads.match" in plan.tensors]
    if not layers:
        raise LoraSuiteError(f"a plan of method {plan.options['method']} and these roles matches no heads")
    rows: list[list[float]] = []
    for j in layers:
        match, similarity = (plan.tensors[f"layers.{j}.heads.{name}"] for name in ("match", "similarity"))
        rows.append([float(similarity[a, b]) if a >= 0 else float("nan") for b, a in enumerate(match.tolist())])
    figure, axes = _axes(1.5 + 0.3 * plan.new.shape.H, 1.2 + 0.3 * len(layers))
    image = axes.imshow(rows, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axes.set(xlabel="new head", ylabel="new layer", title="cosine with the old head it continues")
    axes.set_yticks(range(len(layers)), [str(j) for j in layers])
    figure.colorbar(image)
    return figure


def residual(plan: Plan) -> Figure:
    """1 - R² of the transfer matrices on held-out shared tokens. Raises LoraSuiteError where they were not fitted."""
    shares = {"old to new, W_h": plan.facts["r2"], "new to old, S": plan.facts["r2_back"]}
    known = {name: 1 - r2 for name, r2 in shares.items() if r2 is not None}
    if not known:
        raise LoraSuiteError("the plan's transfer matrix was given, not fitted: there is no residual")
    figure, axes = _axes(5, 1.6)
    axes.barh(list(known), list(known.values()))
    axes.set(xlabel="1 - R² on held-out tokens", xlim=(0, max(1.0, *known.values())))
    axes.invert_yaxis()
    return figure


def spectra(result: Migration) -> Figure:
    """Singular values of the old and the new updates, one picture for each role, one line for each layer.

    Raises:
        LoraSuiteError: neither adapter folder is there any more.
    """
    old, new = migration_spectra(result)
    roles = [role for role in ("q", "k", "v", "o", "gate", "up", "down") if any(r == role for _, r in [*old, *new])]
    if not roles:
        raise LoraSuiteError(f"neither {result.adapter} nor {result.out} can be read any more")
    figure, all_axes = _axes(3.2 * len(roles), 2.8, len(roles))
    for role, axes in zip(roles, [all_axes] if len(roles) == 1 else all_axes, strict=True):
        for found, style, name in ((old, "--", "old"), (new, "-", "new")):
            lines = [values for (_, r), values in found.items() if r == role]
            for n, values in enumerate(lines):
                shown = [(x, v) for x, v in enumerate(values, 1) if v > 1e-7 * max(values)]
                if shown:
                    colour = "tab:orange" if name == "old" else "tab:blue"
                    axes.semilogy(*zip(*shown, strict=True), style, color=colour, label=None if n else name)
        axes.set(title=role, xlabel="index")
        axes.legend()
    return figure


def fidelity(result: Migration | Verification) -> Figure:
    """By new layer: of a migration the similarity with its partner, matched heads' and neurons' cosine and the share of
    distillation's target reached; of a verification the CKA of the changes."""
    figure, axes = _axes(6, 3)
    series: dict[str, list[tuple[int, float | None]]]
    from ..results import Migration

    if isinstance(result, Migration):
        names = {"cka": "layers", "head_similarity": "heads", "neuron_similarity": "neurons", "explained": "explained"}
        series = {label: [(x.new_layer, getattr(x, name)) for x in result.layers] for name, label in names.items()}
    else:
        series = {"CKA of the changes": [(x.new_layer, x.cka) for x in result.layers]}
    for label, points in series.items():
        known = [(j, value) for j, value in points if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", label=label)
    axes.set(xlabel="new layer")
    if axes.lines:
        axes.legend()
    return figure


def phases(found: Sequence[Phase]) -> Figure:
    """Seconds of each phase, and the peak of the process's own memory in MiB."""
    figure, (time, memory) = _axes(8, 0.8 + 0.3 * len(found), 2)
    names = [f"{n}. {phase.name}" for n, phase in enumerate(found, 1)]
    time.barh(names, [phase.seconds for phase in found])
    memory.barh(names, [phase.peak_memory / 2**20 for phase in found])
    time.set(xlabel="seconds")
    memory.set(xlabel="MiB", yticklabels=[])
    for axes in (time, memory):
        axes.invert_yaxis()
    return figure


def training(result: Refinement | Finetuning) -> Figure:
    """Of a refinement the agreement on held-out text by step; of a fine-tuning the training and validation losses."""
    figure, axes = _axes(6, 3)
    from ..training.finetuning import Finetuning

    if isinstance(result, Finetuning):
        axes.plot(range(1, len(result.losses) + 1), result.losses, label="training")
        if result.evaluations:
            steps, losses = zip(*((e.step, e.loss) for e in result.evaluations), strict=True)
            axes.plot(steps, losses, "--", marker="o", label="validation")
        axes.set(ylabel="nats a token")
        axes.legend()
    else:
        axes.plot([e.step for e in result.evaluations], [e.agreement for e in result.evaluations], marker="o")
        axes.set(ylabel="agreement")
    axes.axvline(result.chosen_step, color="tab:orange", linestyle=":")
    axes.set(xlabel="step")
    return figure
