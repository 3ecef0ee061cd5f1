"""Which of several candidates is written: the one that agrees best with the old adapter on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

Figures = dict[str, tuple[float, float, float]]
"""`Distilled.agreement`: each figure with its 95 % interval."""

FIGURE = "content_imitated_share"
"""What candidates are ranked by: what depends on the text in the share of the old adapter's gain in log-likelihood, on
what the adapted old model predicts. Unlike the divergence from the new model changed as the old one was, it forgives a
change of the right direction that is too large, and so does the adapter's own domain."""
DIRECTION = "content_cosine"
"""What must be above 0 for the rank to count: a change without direction flattens the new model's predictions, which
brings two models that have nothing in common nearer to each other."""
WHOLE = "kl_share"
"""What decides where no candidate's content counts."""
TIE = 0.005
"""Candidates whose figures differ by less are equally good."""
ORDER = ("copy", "lstsq", "paper", "distill")
"""The simplest first."""
REST = " + rest"
"""Ends the name of a candidate with what it leaves undone fitted on top of it."""
MARGIN = 0.03
"""By which such a candidate has to be better than the best of the others."""


@dataclass(frozen=True)
class Choice:
    """The candidates of one adapter and what they were judged by.

    Attributes:
        agreement: candidate -> its figures on held-out text. left_out: candidate -> why it could not be judged.
        chosen: the one that was written.
    """

    agreement: dict[str, Figures]
    left_out: dict[str, str]
    chosen: str

    @property
    def table(self) -> str:
        """The candidates' figures in one line."""
        figures = " · ".join(f"{name} {figures[FIGURE][0]:.2f}" for name, figures in self.agreement.items())
        return f"{figures} → {self.chosen}"

    @property
    def warning(self) -> str | None:
        """A sentence for the user where the chosen candidate cannot be trusted."""
        figures = self.agreement[self.chosen]
        if not (figures[WHOLE][1] > 0 or counts(figures)):
            return (
                "on held-out text the migrated adapter agrees with the old one no better than no adapter at all; do "
                "not use it without measuring"
            )
        if not counts(figures):
            return (
                "on held-out text the migrated adapter only shifts the new model's predictions by a constant; what the "
                "old adapter does depending on the text was not carried"
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for results and reports."""
        return asdict(self) | {"table": self.table}


def counts(figures: Figures) -> bool:
    """Whether what an adapter does depending on the text is carried, beyond chance."""
    return figures[FIGURE][1] > 0 and figures[DIRECTION][1] > 0


def choose(agreement: Mapping[str, Figures], left_out: Mapping[str, str]) -> Choice:
    """The best candidate of those whose content counts; of candidates that tie, the simplest.

    Where no candidate's content counts, the best agreement above 0 decides; where none is, it is distill, which scales
    its update to nothing rather than do harm. A candidate with a rest is chosen where it is better than all others by a
    margin.
    """
    judged = {name: agreement[name] for name in ORDER if name in agreement}
    chosen = best(judged) or _best(judged, WHOLE, lambda figures: figures[WHOLE][1] > 0) or "distill"
    most = max((figures[FIGURE][0] for figures in judged.values() if counts(figures)), default=0.0)
    for name in agreement.keys() - judged.keys():
        judged[name] = agreement[name]
        if name.endswith(REST) and counts(agreement[name]) and agreement[name][FIGURE][0] >= most + MARGIN:
            chosen = name
    return Choice(judged, dict(left_out), chosen)


def best(judged: Mapping[str, Figures]) -> str | None:
    """The candidate that carries most of what depends on the text; None where none carries any."""
    return _best({name: judged[name] for name in ORDER if name in judged}, FIGURE, counts)


def _best(judged: Mapping[str, Figures], figure: str, valid: Callable[[Figures], bool]) -> str | None:
    values = {name: figures[figure][0] for name, figures in judged.items() if valid(figures)}
    most = max(values.values(), default=0.0)
    return next((name for name, value in values.items() if value >= most - TIE), None)
