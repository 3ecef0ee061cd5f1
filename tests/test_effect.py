"""Every figure of the comparison of two changes, recounted position by position with plain vectors in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorasuite_fast.adapters.aligned_states import Head, States
from lorasuite_fast.evaluation.effect import (
    EffectSums,
    _beyond,
    chunk_size,
    effect_sums,
    position_chunks,
    resamples,
    statistics,
)

TOKENS = 7


def states(log_probs: Tensor) -> States:
    return States(log_probs.float(), torch.empty(0), Head(torch.eye(TOKENS), None))


def changes(positions: int, size: float = 0.7) -> list[Tensor]:
    """Log-probabilities of the old model without and with its adapter, then of the new one; as float32 holds them."""
    rng = torch.Generator().manual_seed(positions)
    base = torch.randn(2, positions, TOKENS, generator=rng)
    shifts = size * torch.randn(2, positions, TOKENS, generator=rng) + size * torch.randn(TOKENS, generator=rng)
    rows = [base[0], base[0] + shifts[0], base[1], base[1] + 0.5 * shifts[0] + 0.8 * shifts[1]]
    return [row.log_softmax(-1).double() for row in rows]


def sums_of(rows: list[Tensor], text: list[int]) -> EffectSums:
    o_0, o_1, n_0, n_1 = (states(row) for row in rows)
    return effect_sums((o_0, o_1), (n_0, n_1), torch.tensor(text), device=torch.device("cpu"), seed=0)


def figures(rows: list[Tensor], text: list[int] | None = None) -> dict[str, float]:
    sums = sums_of(rows, text or [0] * len(rows[0]))
    found = statistics(*(column.sum(0) for column in (sums.gram, sums.plain, sums.scalars)))
    return {name: float(value) for name, value in found.items()}


def stacked(rows: list[Tensor], vectors: Tensor, weighted: bool = True) -> Tensor:
    """All positions' vectors as one: centred by the weights and multiplied by their roots."""
    weights = sum(row.exp() for row in rows) / 4 if weighted else torch.full_like(rows[0], 1 / TOKENS)
    return torch.cat([w.sqrt() * (v - (w * v).sum()) for w, v in zip(weights, vectors, strict=True)])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def rest(change: Tensor, base: Tensor) -> Tensor:
    return change - base * (change @ base) / (base @ base)


@pytest.mark.parametrize("weighted", [True, False])
def test_cosines_shares_and_sizes_are_those_of_the_stacked_vectors(weighted: bool) -> None:
    rows = changes(9)
    d_o, d_n = rows[1] - rows[0], rows[3] - rows[2]
    o, n = (stacked(rows, d, weighted) for d in (d_o, d_n))
    mean_o, mean_n = (stacked(rows, d.mean(0).expand_as(d), weighted) for d in (d_o, d_n))
    base_o, base_n = (stacked(rows, row, weighted) for row in (rows[0], rows[2]))
    found, prefix = figures(rows), "" if weighted else "plain_"
    wanted = {
        "old_rms": float(o.norm()) / 3,
        "new_rms": float(n.norm()) / 3,
        "size_ratio": float(n.norm() / o.norm()),
        "best_gain": float(torch.linalg.lstsq(n[:, None], o[:, None]).solution),
        "carried_cosine": cosine(o, n),
        "flipped_cosine": -cosine(o, n),
        "constant_cosine": cosine(o, mean_n),
        "carried_share": 1 - float((o - n).square().sum() / o.square().sum()),
        "flipped_share": 1 - float((o + n).square().sum() / o.square().sum()),
        "constant_share": 1 - float((o - mean_n).square().sum() / o.square().sum()),
        "tempered_cosine": abs(cosine(o, base_n)),
        "tempered_share": 1 - float(rest(o, base_n).square().sum() / o.square().sum()),
        "content_cosine": cosine(rest(o - mean_o, base_o), rest(n - mean_n, base_n)),
    }
    for name, value in wanted.items():
        assert found[f"{prefix}{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for figure in ("cosine", "share"):
        controls = [found[f"{prefix}{name}_{figure}"] for name in ("shuffled", "constant", "tempered")]
        beyond = found[f"{prefix}carried_{figure}"] - max(0.0, *controls)
        assert found[f"{prefix}content_{figure}_gain"] == pytest.approx(beyond)


def divergence(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


def test_divergences_gains_and_best_tokens_are_those_of_the_distributions() -> None:
    rows = changes(11)
    o_0, o_1, n_0, n_1 = rows
    d_o, d_n = o_1 - o_0, n_1 - n_0
    target, moved = (n_0 + d_o).log_softmax(-1), o_1.exp() - o_0.exp()
    changed = o_1.argmax(-1) != o_0.argmax(-1)
    assert 0 < int(changed.sum()) < len(changed)
    found, count = figures(rows), int(changed.sum())
    alone = divergence(target, n_0)
    assert found["old_kl"] == pytest.approx(divergence(o_1, o_0) / 11, rel=1e-5)
    assert found["new_kl"] == pytest.approx(divergence(n_1, n_0) / 11, rel=1e-5)
    assert found["top1_changed"] == pytest.approx(count / 11)
    assert found["top1_alone"] == pytest.approx(int((changed & (n_0.argmax(-1) == o_1.argmax(-1))).sum()) / count)
    for name, change in (("carried", d_n), ("flipped", -d_n), ("constant", d_n.mean(0))):
        reached = (n_0 + change).log_softmax(-1)
        share, gain = 1 - divergence(target, reached) / alone, float((moved * change).sum() / (moved * d_o).sum())
        hits = int((changed & (reached.argmax(-1) == o_1.argmax(-1))).sum())
        assert found[f"{name}_kl_share"] == pytest.approx(share, rel=1e-4)
        assert found[f"{name}_gain_share"] == pytest.approx(gain, rel=1e-4)
        imitated = (divergence(o_1, n_0) - divergence(o_1, reached)) / divergence(o_1, o_0)
        assert found[f"{name}_imitated_share"] == pytest.approx(imitated, rel=1e-4)
        assert found[f"{name}_top1"] == pytest.approx(hits / count)
    for figure in ("kl_share", "imitated_share"):
        controls = [found[f"{name}_{figure}"] for name in ("shuffled", "constant")]
        assert found[f"content_{figure}_gain"] == pytest.approx(found[f"carried_{figure}"] - max(0.0, *controls))


def test_an_adapter_that_does_in_one_model_what_it_does_in_the_other_imitates_all_of_it() -> None:
    rows = changes(5)
    assert figures([rows[0], rows[1], rows[0], rows[1]])["carried_imitated_share"] == pytest.approx(1, rel=1e-5)
    assert figures([rows[0], rows[1], rows[2], rows[2]])["carried_imitated_share"] == pytest.approx(0, abs=1e-6)


def test_the_shuffled_change_is_that_of_another_position() -> None:
    rows = changes(2)
    d_o, d_n = rows[1] - rows[0], rows[3] - rows[2]
    wanted = cosine(stacked(rows, d_o), stacked(rows, d_n.flip(0)))
    assert figures(rows)["shuffled_cosine"] == pytest.approx(wanted, rel=1e-4)


def test_sums_are_kept_by_text() -> None:
    rows, text = changes(6), [0, 1, 1, 0, 1, 0]
    sums = sums_of(rows, text)
    assert sums.scalars[:, 0].tolist() == [3, 3]
    whole = stacked(rows, rows[1] - rows[0]).view(6, TOKENS)
    for n in (0, 1):
        own = whole[torch.tensor(text) == n]
        assert float(sums.gram[n, 0, 0]) == pytest.approx(float(own.square().sum()), rel=1e-4)


@pytest.mark.parametrize("positions", [3, 400])
def test_a_divergence_below_what_float32_holds_has_no_shares_however_many_positions(positions: int) -> None:
    rows = changes(positions, size=1e-4)
    target = (rows[2] + rows[1] - rows[0]).log_softmax(-1)
    assert divergence(target, rows[2]) / positions < 5e-8
    found = figures(rows)
    assert math.isnan(found["carried_kl_share"])
    assert math.isnan(found["carried_gain_share"])
    assert math.isnan(found["carried_imitated_share"])
    assert found["old_kl"] == pytest.approx(0, abs=5e-8)
    assert math.isfinite(figures(changes(positions, size=1e-2))["carried_kl_share"])


@pytest.mark.parametrize(("positions", "size"), [(2, 1), (3, 1), (5, 2), (64, 10), (7, 100)])
def test_chunks_hold_every_position_once_and_never_one_alone(positions: int, size: int) -> None:
    chunks = position_chunks(positions, size, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(chunks).tolist()) == list(range(positions))
    assert all(2 <= len(chunk) <= max(3, size) for chunk in chunks)


def test_a_chunk_is_as_large_as_the_budget_and_never_too_small_or_large() -> None:
    assert chunk_size(1000, 100_000) == 100
    assert chunk_size(100_000, 100_000) == 32
    assert chunk_size(2, 10**9) == 512


def test_every_resample_draws_as_many_texts_with_repeats() -> None:
    drawn = resamples(12, 300, 0)
    assert drawn.shape == (300, 12)
    assert (drawn.sum(1) == 12).all()
    assert drawn.mean(0).min() > 0.8
    assert drawn.max() > 1
    assert not torch.equal(drawn, resamples(12, 300, 1))


@pytest.mark.parametrize(
    ("controls", "beyond"),
    [((-0.2, -0.1, -0.3), 0.5), ((0.1, 0.2, 0.4), 0.1), ((0.4, 0.1, 0.2), 0.1), ((math.nan, -1.0, -1.0), 0.5)],
)
def test_a_headline_counts_beyond_the_best_control_and_beyond_doing_nothing(
    controls: tuple[float, ...], beyond: float
) -> None:
    names = ("shuffled_x", "constant_x", "tempered_x")
    found = {name: torch.tensor(value) for name, value in zip(names, controls, strict=True)}
    assert float(_beyond(found | {"carried_x": torch.tensor(0.5)}, "%s_x")) == pytest.approx(beyond)
