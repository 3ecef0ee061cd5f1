"""What a migration did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .phases import Phase

if TYPE_CHECKING:
    from .choice import Choice
    from .distillation import Distilled
    from .finetuning import Finetuning
    from .plan import TransferPlan
    from .refinement import Refinement


@dataclass(frozen=True)
class LayerResult:
    """One new layer that has a partner, or that distillation has fitted; the partner is None where it has none.

    Attributes:
        cka: of the partner's hidden states with this layer's, or whatever measure the plan's option `similarity` names.
        head_similarity, neuron_similarity: mean cosine over the matched heads and neurons, None where the adapter does
            not touch them.
        explained: share of distillation's target reached behind this layer on held-out text, None with other methods.
        update: role -> Frobenius norm of s·B A over that of the new weight.
    """

    new_layer: int
    old_layer: int | None
    cka: float | None
    head_similarity: float | None
    neuron_similarity: float | None
    update: dict[str, float]
    explained: float | None = None


@dataclass(frozen=True)
class Migration:
    """The outcome of `migrate` or `TransferPlan.apply`; the adapter itself is in the folder `out`.

    `distilled` is there where the adapter was distilled, `refined` where it was then refined, `finetuned` where it was
    then trained on labelled data; `warning` says if held-out text, or that training, speaks against the result.
    """

    plan: TransferPlan
    adapter: str
    out: str
    layers: list[LayerResult]
    phases: list[Phase]
    unused_old_layers: list[int]
    seconds: float | None = None
    distilled: Distilled | None = None
    refined: Refinement | None = None
    finetuned: Finetuning | None = None
    choice: Choice | None = None
    """How `auto` chose among the candidates, where it measured them."""

    @property
    def warning(self) -> str | None:
        """A sentence for the user where held-out text shows that the result cannot be trusted; None elsewhere."""
        if self.finetuned is not None:
            return self.finetuned.summary.rstrip(".") if self.finetuned.kept_start else None
        if self.refined is not None:
            return None if self.refined.agreement > 0 else self.refined.summary.rstrip(".")
        if self.distilled is not None:
            return self.distilled.warning
        return None if self.choice is None else self.choice.warning

    def with_seconds(self, seconds: float) -> Migration:
        return replace(self, seconds=seconds)

    def _repr_html_(self) -> str:
        from .html_report import fragment

        return fragment(self)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, what `--json` prints."""
        plan = self.plan.summary()
        return {
            "adapter": self.adapter,
            "out": self.out,
            "old": plan["old"],
            "new": plan["new"],
            "options": plan["options"],
            "facts": plan["facts"],
            "layers": [asdict(layer) for layer in self.layers],
            "unpartnered_new_layers": [j for j in range(self.plan.new.shape.L) if j not in self.plan.layers],
            "unused_old_layers": self.unused_old_layers,
            "phases": [phase.as_dict() for phase in self.phases],
            "seconds": self.seconds,
            "choice": None if self.choice is None else self.choice.as_dict(),
            "distillation": None if self.distilled is None else self.distilled.as_dict(),
            "refinement": None if self.refined is None else self.refined.as_dict(),
            "finetuning": None if self.finetuned is None else self.finetuned.as_dict(),
            "warning": self.warning,
        }
