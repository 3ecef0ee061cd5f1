"""How well two base models fit each other, and what that lets one expect of a migration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.aligned_states import LoadedModel, Report, States
from ..models.vocabulary import trained_rows
from ..transfer.embeddings import normal_equations, solve_normal
from .effect import chunk_size, position_chunks

EXACT_R2 = 0.999
"""From here on, on held-out tokens, one table of vectors counts as a linear image of another."""
EXACT_KL = 0.01
"""Nats. The two models' predictions may differ by this much for a migration to count as exact, not merely close."""
DISTILLABLE_TOP1 = 0.1
"""Least lead of the top-1 agreement over that of shuffled positions at which a distillation can carry something."""
_TOKENS = 2**14
_HELD_OUT = 20
_PAIRS = 8
_RIDGES = (1e-6, 1e-4, 1e-2)


@dataclass(frozen=True)
class LayerFit:
    """R², on held-out texts, of a linear map from a new layer's hidden states to those of the old layer beside it.

    Rows are divided by their root mean square, as the next norm does. `positions` is how many the map was fitted on,
    `new_width` what it maps from. With fewer positions than a few widths R² comes out too low, which is why the
    prediction does not rest on it. None where fewer than 2 positions were held out.
    """

    old_layer: int
    new_layer: int
    r2: float | None
    positions: int
    new_width: int


@dataclass(frozen=True)
class BaseFit:
    """Two base models compared.

    Attributes:
        embedding_r2: held-out R² of the linear map between the shared tokens' embeddings, old to new; embedding_r2_back
            new to old. unembedding_r2, unembedding_r2_back: of the head's rows, final norm gain folded in and centred.
            None where fewer than 2 shared tokens were held out.
        top1_agreement: share of aligned positions where both models have the same best shared token.
        top1_shuffled: the same with the new model's positions permuted.
        kl: mean KL(old ‖ new) over the shared tokens, in nats. kl_shuffled: with the new model's positions permuted.
        layers: some of the pairs of `layer_map`, or of equal relative depth where it is None.
        layer_map: new layer -> old layer as a plan of the two models maps them. layer_r2: of the plan's transfer matrix
            on the states of each new layer and its partner. None where no plan of the two can be built.
    """

    embedding_r2: float | None
    embedding_r2_back: float | None
    unembedding_r2: float | None
    unembedding_r2_back: float | None
    top1_agreement: float
    top1_shuffled: float
    kl: float
    kl_shuffled: float
    layers: list[LayerFit]
    layer_map: dict[int, int] | None = None
    layer_r2: dict[int, float] | None = None


@dataclass(frozen=True)
class TokenRows:
    """A model's rows for a sample of the shared tokens, (t, d) float32, the final norm's gain in the head's."""

    embedding: Tensor
    unembedding: Tensor


def token_rows(model: LoadedModel, tokens: Tensor) -> TokenRows:
    """Rows of at most 16,384 of the tokens, spread over all of them."""
    chosen = tokens[:: -(-len(tokens) // _TOKENS)].to(model.device)
    table, gain = model.unembedding
    embedding = model.model.get_input_embeddings().weight.detach()[chosen]
    return TokenRows(embedding.float().cpu(), table[chosen].float().cpu() * gain)


def depth_pairs(L_o: int, L_n: int) -> list[tuple[int, int]]:
    """At most 8 pairs (old layer, new layer) of equal relative depth, evenly spaced, the last pair last."""
    count = min(L_o, L_n, _PAIRS)
    depths = [k / (count - 1) for k in range(count)] if count > 1 else [1.0]
    return [(round(x * (L_o - 1)), round(x * (L_n - 1))) for x in depths]


def layers_compared(fit: BaseFit) -> str:
    """Which layers' states stand beside each other."""
    return "layers of equal relative depth" if fit.layer_map is None else "layers as a plan maps them"


def mapped_pairs(mapping: dict[int, int]) -> list[tuple[int, int]]:
    """At most 8 pairs (old layer, new layer) of a plan's map, evenly spaced, the last pair last."""
    pairs = [(i, j) for j, i in sorted(mapping.items())]
    count = min(len(pairs), _PAIRS)
    return [pairs[round(k * (len(pairs) - 1) / (count - 1))] for k in range(count)] if count > 1 else pairs[-1:]


def base_fit(
    states: tuple[States, States],
    rows: tuple[TokenRows, TokenRows],
    pairs: list[tuple[int, int]],
    text: Tensor,
    text_of_sample: Tensor,
    *,
    device: torch.device,
    seed: int,
    report: Report | None = None,
) -> BaseFit:
    """Measures one pair of base models.

    Args:
        states: of old and new, their layers those of `pairs`. rows: of old and new, token for token.
        text: (positions,) int64, the text of each position; text_of_sample: of each sampled one.
    """
    old, new = rows
    keep = trained_rows(old.embedding, torch.arange(len(old.embedding)))
    keep &= trained_rows(new.embedding, torch.arange(len(new.embedding)))
    e_o, e_n = old.embedding[keep], new.embedding[keep]
    u_o, u_n = (table - table.mean(0) for table in (old.unembedding[keep], new.unembedding[keep]))
    return BaseFit(
        _table_r2(e_o, e_n),
        _table_r2(e_n, e_o),
        _table_r2(u_o, u_n),
        _table_r2(u_n, u_o),
        *_agreement(states, text, device, seed, report),
        [
            _layer_fit(x_n, x_o, pair, text_of_sample)
            for x_o, x_n, pair in zip(states[0].layers, states[1].layers, pairs, strict=True)
        ],
    )


def _r2(y: Tensor, found: Tensor) -> float | None:
    """None where y, of which there may be one row or none, does not vary."""
    y = y.double()
    spread = float((y - y.mean(0)).square().sum())
    return 1 - float((y - found).square().sum()) / spread if spread > 0 else None


def _table_r2(x: Tensor, y: Tensor) -> float | None:
    """R² on every 20th row of the linear map x -> y fitted on the others."""
    held = torch.zeros(len(x), dtype=torch.bool)
    held[_HELD_OUT - 1 :: _HELD_OUT] = True
    train = (~held).nonzero()[:, 0]
    # Fewer rows than twice the width do not determine the map.
    ridge = 1e-3 if len(train) < 2 * x.shape[1] else 0.0
    sums = normal_equations(x, y, train, train, both=False)
    return _r2(y[held], x[held].double() @ solve_normal(sums.oo, sums.on, ridge)[0])


def _normed(x: Tensor) -> Tensor:
    """Rows of root mean square 1; rows of zeros stay."""
    size = x.square().mean(1, keepdim=True).sqrt()
    return torch.where(size > 0, x / size, 0)


def _layer_fit(x: Tensor, y: Tensor, pair: tuple[int, int], text: Tensor) -> LayerFit:
    """Fits on five eighths of the texts; an eighth chooses the ridge, and a quarter is the test."""
    x, y = (_normed(side.double()) for side in (x, y))
    test = text % 4 == 3
    choose = text % 8 == 0
    train = ~test & ~choose
    centre_x, centre_y = x[train].mean(0), y[train].mean(0)
    x, y = x - centre_x, y - centre_y
    gram, cross = x[train].T @ x[train], x[train].T @ y[train]
    maps = [solve_normal(gram, cross, ridge)[0] for ridge in _RIDGES]
    best = min(maps, key=lambda w: float((y[choose] - x[choose] @ w).square().sum()))
    return LayerFit(*pair, _r2(y[test], x[test] @ best), int(train.sum()), x.shape[1])


def _agreement(
    states: tuple[States, States], text: Tensor, device: torch.device, seed: int, report: Report | None
) -> tuple[float, float, float, float]:
    sums = torch.zeros(4, dtype=torch.float64)
    done = 0
    for at in position_chunks(len(text), chunk_size(states[0].head.size), torch.Generator().manual_seed(seed)):
        o, n = (side.head.log_probs(side.last[at].to(device)) for side in states)
        best = o.argmax(-1)
        for k, other in enumerate((n, n.roll(1, 0))):
            sums[k] += (other.argmax(-1) == best).sum().cpu()
            sums[2 + k] += (o.exp() * (o - other)).sum().double().cpu()
        done += len(at)
        if report:
            report(done)
    same, shuffled, kl, kl_shuffled = (sums / len(text)).tolist()
    return same, shuffled, kl, kl_shuffled


def prediction(fit: BaseFit) -> tuple[str, str]:
    """Whether a migration will carry: exact, close, distillation or nothing, and the sentence that says it.

    A rule of thumb; the thresholds are this module's constants.
    """
    found = fit.embedding_r2, fit.embedding_r2_back, fit.unembedding_r2, fit.unembedding_r2_back
    measured = [r2 for r2 in found if r2 is not None]
    tables = min(measured) if len(measured) == len(found) else -math.inf
    if tables >= EXACT_R2 and fit.kl <= EXACT_KL:
        return "exact", (
            f"A weights-only migration will carry the adapter whole: a linear map fits the models (R² {tables:.4f})."
        )
    if tables >= EXACT_R2:
        return "close", (
            "A weights-only migration should carry much of the effect: the tables of the two models are linear images "
            f"of each other, but their predictions differ (KL {fit.kl:.2f} nats). Verify it afterwards."
        )
    if math.isfinite(tables):
        reason = f"no linear map fits the two models (R² {tables:.2f}, exact from {EXACT_R2})"
    else:
        reason = "the two models share too few tokens to tell whether a linear map fits them"
    if fit.top1_agreement - fit.top1_shuffled >= DISTILLABLE_TOP1:
        return "distillation", (
            f"A weights-only migration will carry little or nothing, {reason}; a distillation on text can carry a part "
            f"(same next token at {fit.top1_agreement:.0%} of the positions, {fit.top1_shuffled:.0%} by chance)."
        )
    return "nothing", (
        f"Neither is likely to carry anything: {reason}, and at {fit.top1_agreement:.0%} of the positions the models "
        f"agree on the next token, at {fit.top1_shuffled:.0%} by chance."
    )
