"""How alike two changes of next-token distributions are, position by position, and how alike by chance.

At every aligned position, over the tokens both vocabularies share, `d_o` (s,) is the change of the old model's
log-probabilities under its adapter and `d_n` that of the new one's. Log-probabilities are defined up to a constant a
position, and most of the s tokens are improbable everywhere, where a change means nothing. So vectors are compared in
the Fisher metric of the softmax: `<a, b> = Σ_t w_t (a_t - ā)(b_t - b̄)`, ā = Σ_t w_t a_t, with probabilities as weights
w; half of `<d, d>` is the divergence the change causes, to second order. w is the mean of four distributions: old and
new model, each without and with its adapter, so that a token counts if any of them finds it probable, and neither
what an adapter pushes away nor what it brings in is overlooked. Inner products are summed over positions before any
ratio is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..adapters.aligned_states import Report, States

ELEMENTS = 2**23
"""Log-probabilities of one kind that are there at a time."""
FEWEST = 32
"""Positions that read the head together at least; for fewer its rows would be fetched too often."""
NEGLIGIBLE_KL = 1e-7
"""Nats a position. A change of less counts as none: float32 log-probabilities do not hold more."""
COPIES = 36
"""How many kinds, their basis and what is made of it among them."""
_BASIS = ("old", "new", "shuffled", "old_mean", "new_mean", "old_base", "new_base")
_K = len(_BASIS)
CANDIDATES = ("carried", "shuffled", "flipped", "constant")
"""What is compared with the old change: the new change; that of another position; its negative; its mean."""
_SCALARS = (
    "positions",
    "kl_old",
    "kl_new",
    "target_alone",
    "gain_old",
    *(f"target_{name}" for name in CANDIDATES),
    *(f"gain_{name}" for name in CANDIDATES),
    *(f"imitated_{name}" for name in CANDIDATES),
    "changed",
    "hit_alone",
    *(f"hit_{name}" for name in CANDIDATES),
)


@dataclass(frozen=True)
class EffectSums:
    """Sums over the positions of each text, float64.

    Attributes:
        gram: (texts, 7, 7), inner products of _BASIS in the Fisher metric: both changes, the new change of another
            position, both changes' means, both models' log-probabilities without adapter. plain: with equal weights.
        scalars: (texts, len(_SCALARS)).
    """

    gram: Tensor
    plain: Tensor
    scalars: Tensor


def chunk_size(tokens: int, elements: int = ELEMENTS) -> int:
    """Positions compared at a time, whose log-probabilities are `elements` at most, if that is `FEWEST` of them."""
    return max(FEWEST, min(512, elements // max(1, tokens)))


def position_chunks(positions: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """All positions in random order, in chunks of at least two, about `size` each."""
    order = torch.randperm(positions, generator=generator)
    return list(order.tensor_split(max(1, min(positions // 2, -(-positions // size)))))


def _changes(states: tuple[States, States], at: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, s) each: log-probabilities without the adapter and with it."""
    before, after = (side.head.log_probs(side.last[at].to(device)) for side in states)
    return before, after


def effect_sums(
    old: tuple[States, States],
    new: tuple[States, States],
    text: Tensor,
    *,
    device: torch.device,
    seed: int,
    elements: int = ELEMENTS,
    report: Report | None = None,
) -> EffectSums:
    """Compares the two changes at every position.

    Positions are visited in random order. "shuffled" compares the old change of a position with the new change of
    another one of its chunk, which is a random one of all positions.

    Args:
        old, new: states without and with the adapter, of the same positions.
        text: (positions,) int64, which text each belongs to, counted from 0.
        elements: log-probabilities that are there at a time, a few of each kind.
        report: called with the number of positions done, in each of two passes: the means, then the rest.
    """
    tokens = old[0].head.size
    chunks = position_chunks(len(text), chunk_size(tokens, elements), torch.Generator().manual_seed(seed))
    means = torch.zeros(2, tokens, dtype=torch.float64, device=device)
    done = 0
    for at in chunks:
        for k, side in enumerate((old, new)):
            before, after = _changes(side, at, device)
            means[k] += (after - before).double().sum(0)
        done += len(at)
        if report:
            report(done)
    mean_o, mean_n = (means / len(text)).float()
    count = int(text.max()) + 1
    sums = EffectSums(
        torch.zeros(count, _K, _K, dtype=torch.float64),
        torch.zeros(count, _K, _K, dtype=torch.float64),
        torch.zeros(count, len(_SCALARS), dtype=torch.float64),
    )
    for at in chunks:
        _add(sums, text[at], _changes(old, at, device), _changes(new, at, device), (mean_o, mean_n))
        done += len(at)
        if report:
            report(done)
    return sums


def _add(
    sums: EffectSums,
    where: Tensor,
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    means: tuple[Tensor, Tensor],
) -> None:
    """Adds a chunk: log-probabilities (n, s) without the adapter and with it; the means of the changes are (s,)."""
    (o_0, o_1), (n_0, n_1), (mean_o, mean_n) = old, new, means
    d_o, d_n = o_1 - o_0, n_1 - n_0
    others = d_n.roll(1, 0)
    basis = torch.stack([d_o, d_n, others, mean_o.expand_as(d_o), mean_n.expand_as(d_o), o_0, n_0], dim=1)
    weights = (o_0.exp() + o_1.exp() + n_0.exp() + n_1.exp()) / 4
    sums.gram.index_add_(0, where, _gram(basis, weights).double().cpu())
    weights = torch.full_like(weights[:1], 1 / weights.shape[1])
    sums.plain.index_add_(0, where, _gram(basis, weights).double().cpu())
    # Seven of what one chunk takes: the largest part.
    del basis
    candidates = dict(zip(CANDIDATES, (d_n, others, -d_n, mean_n), strict=True))
    sums.scalars.index_add_(0, where, _scalars(o_0, o_1, n_0, d_o, candidates).double().cpu())


def _gram(basis: Tensor, weights: Tensor) -> Tensor:
    """(n, k, s) vectors and (n or 1, s) weights -> (n, k, k): their weighted inner products, centred by the weights."""
    centre = torch.einsum("ns,nks->nk", weights.expand(len(basis), -1), basis)
    scaled = basis - centre[:, :, None]
    scaled *= weights.sqrt()[:, None]
    return scaled @ scaled.transpose(1, 2)


def _scalars(o_0: Tensor, o_1: Tensor, n_0: Tensor, d_o: Tensor, candidates: dict[str, Tensor]) -> Tensor:
    """(n, len(_SCALARS)).

    `target_*` is the divergence KL(target ‖ new model changed by the candidate), with the target the new model changed
    as the old one was, softmax(n_0 + d_o); `gain_*` the log-likelihood the candidate adds to a next token drawn from
    the adapted old model, less what it adds to one drawn from the bare old model, Σ_t (p_o1 - p_o0)(t) d(t);
    `gain_old` the same of the old change, the sum of both divergences between p_o1 and p_o0; `imitated_*` the
    log-likelihood that the new model changed by the candidate adds to a next token drawn from the adapted old model,
    KL(p_o1 ‖ new) - KL(p_o1 ‖ new changed), of which the old change adds `kl_old`; `hit_*` whether the candidate's best
    token is the adapted old model's, where the adapter changed that.
    """
    moved_mass = o_1.exp() - o_0.exp()
    target = functional.log_softmax(n_0 + d_o, dim=-1)
    share = target.exp()
    best = o_1.argmax(-1)
    changed = best != o_0.argmax(-1)
    gap = (share * (target - n_0)).sum(-1)
    columns = {
        "positions": torch.ones_like(gap),
        "kl_old": (o_1.exp() * d_o).sum(-1),
        "gain_old": (moved_mass * d_o).sum(-1),
        "target_alone": gap,
        "changed": changed,
        "hit_alone": changed & (n_0.argmax(-1) == best),
    }
    for name, change in candidates.items():
        moved = n_0 + change
        log_sum = moved.logsumexp(-1)
        columns[f"target_{name}"] = gap + log_sum - (share * change).sum(-1)
        columns[f"gain_{name}"] = (moved_mass * change).sum(-1)
        columns[f"imitated_{name}"] = (o_1.exp() * change).sum(-1) - log_sum
        columns[f"hit_{name}"] = changed & (moved.argmax(-1) == best)
        if name == "carried":
            columns["kl_new"] = ((moved - log_sum[:, None]).exp() * change).sum(-1)
    return torch.stack([columns[name].to(gap) for name in _SCALARS], dim=1)


def statistics(gram: Tensor, plain: Tensor, scalars: Tensor) -> dict[str, Tensor]:
    """Every figure from summed columns; all arguments (..., their own shape), results (...).

    0 / 0 gives NaN, and so do shares of a divergence that is none, but for rounding.
    """
    column: dict[str, Any] = {name: scalars[..., k] for k, name in enumerate(_SCALARS)}
    old_kl = column["kl_old"] / column["positions"]
    for name in ("target_alone", "gain_old", "kl_old"):
        column[name] = column[name].where(column[name] >= NEGLIGIBLE_KL * column["positions"], torch.nan)
    found: dict[str, Tensor] = {
        "old_kl": old_kl,
        "new_kl": column["kl_new"] / column["positions"],
        "top1_changed": column["changed"] / column["positions"],
        "top1_alone": column["hit_alone"] / column["changed"],
    }
    for prefix, g in (("", _products(gram)), ("plain_", _products(plain))):
        oo, nn, on = g["old", "old"], g["new", "new"], g["old", "new"]
        found[f"{prefix}old_rms"] = (oo / column["positions"]).sqrt()
        found[f"{prefix}new_rms"] = (nn / column["positions"]).sqrt()
        found[f"{prefix}size_ratio"] = (nn / oo).sqrt()
        found[f"{prefix}best_gain"] = on / nn
        for name, key in (("carried", "new"), ("shuffled", "shuffled"), ("flipped", "new"), ("constant", "new_mean")):
            sign = -1 if name == "flipped" else 1
            inner, square = sign * g["old", key], g[key, key]
            found[f"{prefix}{name}_cosine"] = inner / (oo * square).sqrt()
            found[f"{prefix}{name}_share"] = (2 * inner - square) / oo
        base = g["new_base", "new_base"]
        # The multiple of the new model's own log-probabilities that comes closest to the old change.
        found[f"{prefix}tempered_cosine"] = g["old", "new_base"].abs() / (oo * base).sqrt()
        found[f"{prefix}tempered_share"] = g["old", "new_base"].square() / (oo * base)
        found[f"{prefix}content_cosine"] = _content_cosine(gram if not prefix else plain)
        for figure in ("cosine", "share"):
            found[f"{prefix}content_{figure}_gain"] = _beyond(found, f"{prefix}%s_{figure}")
    for name in CANDIDATES:
        found[f"{name}_gain_share"] = column[f"gain_{name}"] / column["gain_old"]
        found[f"{name}_kl_share"] = 1 - column[f"target_{name}"] / column["target_alone"]
        found[f"{name}_imitated_share"] = column[f"imitated_{name}"] / column["kl_old"]
        found[f"{name}_top1"] = column[f"hit_{name}"] / column["changed"]
    for figure in ("kl_share", "imitated_share"):
        found[f"content_{figure}_gain"] = _beyond(found, f"%s_{figure}")
    return found


def _content_cosine(gram: Tensor) -> Tensor:
    """Cosine of what is left of both changes without their mean over the positions and without their temperature.

    Temperature is the multiple of the model's own log-probabilities in a change: any disturbance flattens a
    distribution, and two models that predict alike are then changed alike by adapters that have nothing in common.
    """
    rest = []
    for change, mean, base in (("old", "old_mean", "old_base"), ("new", "new_mean", "new_base")):
        i, j, k = (_BASIS.index(name) for name in (change, mean, base))
        vector = torch.zeros(*gram.shape[:-1], dtype=gram.dtype)
        vector[..., i], vector[..., j] = 1, -1
        vector[..., k] = -((gram[..., i, k] - gram[..., j, k]) / gram[..., k, k]).nan_to_num(0.0)
        rest.append(vector)
    (oo, on), (_, nn) = ([torch.einsum("...i,...ij,...j->...", a, gram, b) for b in rest] for a in rest)
    return on / (oo * nn).sqrt()


def _beyond(found: dict[str, Tensor], figure: str) -> Tensor:
    """The headline minus the best of the controls that know nothing of the content, or minus doing nothing."""
    names = [figure % name for name in ("shuffled", "constant", "tempered")]
    controls = torch.stack([found[name].nan_to_num(0.0) for name in names if name in found])
    return found[figure % "carried"] - controls.amax(0).clamp_min(0)


def _products(gram: Tensor) -> dict[tuple[str, str], Tensor]:
    return {(a, b): gram[..., i, j] for i, a in enumerate(_BASIS) for j, b in enumerate(_BASIS)}


def resamples(texts: int, count: int, seed: int) -> Tensor:
    """(count, texts) float64: how often each text is drawn in each bootstrap sample of as many texts."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(texts, (count, texts), generator=generator)
    return torch.zeros(count, texts, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(count, texts, dtype=torch.float64)
    )
