"""What a distillation is asked for, and what it found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from ..adapters.factors import Factors
from ..config import DistillConfig
from ..config.choices import DistillControl
from ..evaluation.effect import NEGLIGIBLE_KL

GAINS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Factors on the fitted updates from which held-out positions choose."""


Settings = DistillConfig
"""As 0.1 called it."""
CONTROLS: tuple[str, ...] = get_args(DistillControl)


@dataclass(frozen=True)
class Rest:
    """What is fitted on top of a carried adapter.

    Attributes:
        on: name of the carried candidate. updates: (layer, role) -> factors (scale 1), the gain in B. gain: on the
            fitted updates, chosen by held-out texts. agreement: of both together; see `Distilled.agreement`.
    """

    on: str
    updates: dict[tuple[int, str], Factors]
    gain: float
    agreement: dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Distilled:
    """Updates (scale 1) by (new layer, role), and how well they do on texts held out from the fit.

    Attributes:
        updates: what is handed out: `fitted` with B times the gain. fitted: as the regressions gave them.
        gain: the factor on the fitted updates that held-out texts chose.
        explained: layer -> share of the target explained behind it on held-out positions, before the gain.
        agreement: kl_share (1 - KL(target ‖ new + adapter) / KL(target ‖ new), target: the new model changed as the old
            one was), content_kl_share (the same less the better of two controls: the changes shuffled over positions,
            and their mean), imitated_share (of the log-likelihood the old adapter adds to what the adapted old model
            predicts, the share the new one adds to the same), content_imitated_share, cosine, content_cosine (without
            mean and temperature); each (value, low, high) with a 95 % bootstrap interval over texts. Each text is
            judged with the gain that the other held-out texts choose. 0 where `old_kl` is nothing.
        old_kl: mean KL(with ‖ without) of the old adapter on held-out positions, in nats.
        output_r2: of U on held-out tokens.
        positions, held_positions, texts, tokens: of the text; tokens are those read by either model.
        settings: it was fitted with. text: its name: "shipped", "self", or a file; "" where `distill` was called
            itself.
    """

    fitted: dict[tuple[int, str], Factors]
    gain: float
    explained: dict[int, float]
    agreement: dict[str, tuple[float, float, float]]
    old_kl: float
    output_r2: float
    positions: int
    held_positions: int
    texts: int
    tokens: tuple[int, int]
    settings: Settings
    gains: dict[float, float] = field(default_factory=dict)
    """KL share on held-out texts by gain."""
    text: str = ""
    others: dict[str, dict[str, tuple[float, float, float]]] = field(default_factory=dict)
    """Agreement of other adapters on the same held-out texts, by name; without those that give NaN or infinity."""
    rest: Rest | None = None
    """What is fitted on top of the best of the others, where that is worth a try."""

    @property
    def updates(self) -> dict[tuple[int, str], Factors]:
        return {key: Factors(self.gain * f.b, f.a) for key, f in self.fitted.items()}

    @property
    def warning(self) -> str | None:
        """A sentence for the user where the result cannot be trusted, None elsewhere."""
        share, content = self.agreement["kl_share"], self.agreement["content_kl_share"]
        if self.old_kl < NEGLIGIBLE_KL:
            return (
                "the old adapter does not change the old model on this text, so there was nothing to carry, and the "
                "written adapter changes nothing"
            )
        if self.gain == 0:
            return (
                "no part of the adapter's effect could be carried: on held-out text every size of the fitted update "
                "makes the new model agree less with the adapted old one, so the written adapter changes nothing"
            )
        if not share[1] > 0:
            return (
                "on held-out text the migrated adapter agrees with the old one no better than no adapter at all; do "
                "not use it without measuring"
            )
        if not content[1] > 0:
            return (
                "on held-out text the migrated adapter only shifts the new model's predictions by a constant; what the "
                "old adapter does depending on the text was not carried"
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for results and reports."""
        return {
            "gain": self.gain,
            "explained": {str(j): share for j, share in self.explained.items()},
            "agreement": {name: list(figures) for name, figures in self.agreement.items()},
            "old_kl": self.old_kl,
            "output_r2": self.output_r2,
            "positions": self.positions,
            "held_positions": self.held_positions,
            "texts": self.texts,
            "tokens": list(self.tokens),
            "text": self.text,
            "settings": asdict(self.settings),
        }
