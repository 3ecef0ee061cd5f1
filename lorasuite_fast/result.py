"""What a migration did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .phases import Phase

if TYPE_CHECKING:
    from .plan import TransferPlan


@dataclass(frozen=True)
class LayerResult:
    """One new layer that has a partner.

    Attributes:
        cka: of the partner's hidden states with this layer's. head_similarity, neuron_similarity: mean cosine over the
            matched heads and neurons, None where the adapter does not touch them.
        update: role -> Frobenius norm of s·B A over that of the new weight.
    """

    new_layer: int
    old_layer: int
    cka: float
    head_similarity: float | None
    neuron_similarity: float | None
    update: dict[str, float]


@dataclass(frozen=True)
class Migration:
    """The outcome of `migrate` or `TransferPlan.apply`; the adapter itself is in the folder `out`."""

    plan: TransferPlan
    adapter: str
    out: str
    layers: list[LayerResult]
    phases: list[Phase]
    unused_old_layers: list[int]
    seconds: float | None = None

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
        }
