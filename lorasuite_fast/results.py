"""What a migration did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .io.notebook import Rendered
from .io.phases import Phase
from .transfer.projection import LayerResult

if TYPE_CHECKING:
    from .distillation.choice import Choice
    from .distillation.settings import Distilled
    from .training.finetuning import Finetuning
    from .training.refinement import Refinement
    from .transfer.plan import Plan


@dataclass(frozen=True)
class Migration(Rendered):
    """The outcome of `migrate` or `TransferPlan.apply`; the adapter itself is in the folder `out`.

    `distilled` is there where the adapter was distilled, `refined` where it was then refined, `finetuned` where it was
    then trained on labelled data; `warning` says if held-out text, or that training, speaks against the result.
    """

    plan: Plan
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
