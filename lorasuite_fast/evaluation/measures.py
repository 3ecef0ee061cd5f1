"""The figures of a verification."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap interval over texts; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Likeness:
    """How well a change of the new model's log-probabilities stands in for the old one's, in the metric of `effect`.

    Attributes:
        cosine: with the old change. explained_share: 1 - |d_o - d|² / |d_o|², 0 for no change at all, 1 for the same.
        kl_share: 1 - KL(target ‖ new with the change) / KL(target ‖ new), the target being the new model changed just
            as the old one was; the explained share without its second-order approximation.
        gain_share: the log-likelihood the change adds to what the adapted old model predicts, less what it adds to what
            the bare one predicts, over the same of the old change: Σ (p_o1 - p_o0) d / Σ (p_o1 - p_o0) d_o. 1 for the
            same change; twice the change has twice the share. Whatever else a change does, such as what a training on
            labels teaches besides, costs nothing here, and copying the old model as such earns nothing.
        top1: of the positions where the old adapter changed the old model's best token, the share where the new model
            with the change has that best token.
    """

    cosine: Interval
    explained_share: Interval
    kl_share: Interval
    gain_share: Interval
    top1: Interval


@dataclass(frozen=True)
class Effect:
    """The comparison of both adapters' effects, over byte-aligned positions and shared ordinary tokens.

    Attributes:
        old_kl, new_kl: mean KL(with ‖ without adapter) in nats. old_rms, new_rms: root mean square change of a
            log-probability, weighted by probability. size_ratio: new over old.
        best_gain: the factor on the new change that would bring it closest to the old.
        carried: the new adapter itself. shuffled: its changes permuted among the positions. flipped: with the opposite
            sign. constant: its mean over the positions at every one of them.
        tempered_cosine, tempered_share: of the best change of the new model's temperature, the fourth control: any
            disturbance flattens predictions, and does so alike in models that predict alike.
        content_cosine: cosine once both changes have lost their mean over the positions and their temperature.
        content: cosine, explained and KL share of the headline minus the best of shuffled, constant, tempered (not for
            the KL share) and no change.
        top1_changed: share of positions where the old adapter changed the old model's best token. top1_alone: of
            those, the share where the new model without an adapter has the adapted old model's best token.
        unweighted: cosine, explained share and content cosine with all tokens weighted alike.
    """

    old_kl: Interval
    new_kl: Interval
    old_rms: Interval
    new_rms: Interval
    size_ratio: Interval
    best_gain: Interval
    carried: Likeness
    shuffled: Likeness
    flipped: Likeness
    constant: Likeness
    tempered_cosine: Interval
    tempered_share: Interval
    content_cosine: Interval
    content: dict[str, Interval]
    top1_changed: Interval
    top1_alone: Interval
    unweighted: dict[str, Interval]


@dataclass(frozen=True)
class LayerEffect:
    """One new layer beside the old layer whose change it resembles most, layers taken in order.

    Attributes:
        new_update, old_update: norm of the adapter's updates in the layer over that of the weights; None without any.
        new_change, old_change: norm of the change of the residual stream behind the layer over that of the stream,
            its mean taken off, at sampled aligned positions.
        cka: linear CKA (unbiased HSIC) of the two changes; None where one of them is zero.
    """

    new_layer: int
    old_layer: int | None
    new_update: float | None
    old_update: float | None
    new_change: float
    old_change: float | None
    cka: float | None


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of the labelled text, without and with adapter, and what each adapter gains (positive is better).

    `gain_share` is the new side's gain over the old side's; None where the old adapter gains nothing.
    """

    old: Interval
    old_adapted: Interval | None
    new: Interval
    new_adapted: Interval | None
    old_gain: Interval | None
    new_gain: Interval | None
    gain_share: Interval | None
    examples: int
