"""The parts the projections are made of, each against its definition in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from lorasuite_fast.adapters.factors import Factors, update_norm
from lorasuite_fast.models.families import Shape
from lorasuite_fast.transfer.embeddings import pinv_times
from lorasuite_fast.transfer.projection import (
    LeastSquares,
    Pair,
    PlannedLayer,
    _fitted_scale,
    _neuron_fit,
    _with_constant,
    carry_heads,
    carry_writes,
    inverse,
)
from lorasuite_fast.transfer.similarity import _whitened, whiten

OLD = Shape(V=50, d=7, h=3, H=2, G=2, f=5, L=1)
NEW = Shape(V=60, d=9, h=4, H=3, G=3, f=6, L=1)
F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def planned(tensors: dict[str, Tensor], *, rms_ratio: float = 1.0, **matrices: Tensor) -> PlannedLayer:
    def no_checkpoints() -> Any:
        raise AssertionError("needs no model")

    W_h, S = matrices.get("W_h", normal(1, OLD.d, NEW.d)), matrices.get("S", normal(2, NEW.d, OLD.d))
    return PlannedLayer(0, 0, tensors, W_h, S, rms_ratio, 1.0, OLD, NEW, no_checkpoints)


def heads(role: str) -> dict[str, Tensor]:
    """Every new head with a partner and a block of its own."""
    return {"heads.match": torch.tensor([1, 0, 1]), f"{role}.blocks": normal(3, NEW.H, OLD.h, NEW.h)}


def test_inverse_of_a_zero_gain_is_zero() -> None:
    assert inverse(torch.tensor([2.0, 0.0, -4.0])).tolist() == [0.5, 0.0, -0.25]


def test_a_new_channel_without_gain_is_written_nothing() -> None:
    gain = torch.tensor([1.0, 0.0, 2.0], dtype=F64)
    carried = carry_writes(normal(0, 2, 4), normal(1, 2, 3), None, gain)
    assert not carried[1].any()
    assert carried[0].all()


def test_writes_behind_norms_are_equal_once_both_norms_have_passed() -> None:
    """diag(g_n) carried = W_h^T diag(g_o) W."""
    weight, W_h, before, after = normal(0, 4, 3), normal(1, 4, 6), normal(2, 4), normal(3, 6)
    carried = carry_writes(weight, W_h, before, after)
    torch.testing.assert_close(torch.diag(after) @ carried, W_h.T @ torch.diag(before) @ weight)


@pytest.mark.parametrize("role", ["q", "up"])
def test_an_update_reads_the_same_in_a_layer_norm_whose_stream_has_a_mean(role: str) -> None:
    """Neither the stream nor S keeps the mean: A then reads what LayerNorm makes of x_n S, shift included."""
    a, S = normal(0, 2, OLD.d), normal(2, NEW.d, OLD.d) + 0.7
    gains, shifts = (normal(4, OLD.d), normal(5, NEW.d)), (normal(6, OLD.d), normal(7, NEW.d))
    states = normal(8, 6, NEW.d) * 3 + 5
    tensors = heads(role) if role == "q" else {"neurons.match": torch.tensor([0, 1, 2, 3, 4, -1])}
    tensors |= {"neurons.scales": normal(9, 2, NEW.f)} if role == "up" else {}
    tensors |= {f"{role}.gain_old": gains[0], f"{role}.gain_new": gains[1]}
    tensors |= {f"{role}.shift_old": shifts[0], f"{role}.shift_new": shifts[1]}
    b = normal(10, OLD.H * OLD.h if role == "q" else OLD.f, 2)
    for x_n in states:
        x_o = (x_n - x_n.mean()) @ S
        ratio = float(x_n.std(correction=0) / x_o.std(correction=0))
        found = LeastSquares().project(planned(tensors, rms_ratio=ratio, S=S), role, Factors(b, a))
        read_o = a @ layer_norm(x_o, (OLD.d,), gains[0], shifts[0], 0)
        read_n = found.a @ layer_norm(x_n, (NEW.d,), gains[1], shifts[1], 0)
        torch.testing.assert_close(read_n, read_o)


def test_an_update_reads_the_same_behind_an_rms_norm() -> None:
    a, S = normal(0, 2, OLD.d), normal(2, NEW.d, OLD.d) + 0.7
    gain_o, gain_n = normal(4, OLD.d), normal(5, NEW.d)
    tensors = heads("q") | {"q.gain_old": gain_o, "q.gain_new": gain_n}
    x_n = normal(8, NEW.d) + 5
    x_o = x_n @ S
    ratio = float(x_n.square().mean().sqrt() / x_o.square().mean().sqrt())
    found = LeastSquares().project(planned(tensors, rms_ratio=ratio, S=S), "q", Factors(normal(9, 6, 2), a))
    read_o, read_n = (x * gain / x.square().mean().sqrt() for x, gain in ((x_o, gain_o), (x_n, gain_n)))
    torch.testing.assert_close(found.a @ read_n, a @ read_o)


def test_an_output_projection_is_scaled_as_stored_and_written_through_both_norms() -> None:
    b, a = normal(0, OLD.d, 2), normal(1, 2, OLD.H * OLD.h)
    after_o, after_n = normal(2, OLD.d), normal(3, NEW.d)
    tensors = heads("o") | {"o.after_old": after_o, "o.after_new": after_n, "o.scale": torch.tensor([3.0])}
    layer = planned(tensors)
    found = LeastSquares().project(layer, "o", Factors(b, a))
    wanted = layer.W_h.T @ (after_o[:, None] * b) / after_n[:, None] * 3
    torch.testing.assert_close(found.b, wanted)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("role", ["gate", "up", "down"])
def test_a_neurons_factor_is_that_of_its_partner_times_its_roles_scale(role: str, gated: bool) -> None:
    if role == "gate" and not gated:
        return
    match, scales = torch.tensor([4, -1, 0, 2, 1, -1]), normal(5, 3 if gated else 2, NEW.f)
    row = scales[(("gate", "up", "down") if gated else ("up", "down")).index(role)]
    gains = {f"{role}.gain_old": torch.ones(OLD.d, dtype=F64), f"{role}.gain_new": torch.ones(NEW.d, dtype=F64)}
    layer = planned({"neurons.match": match, "neurons.scales": scales} | (gains if role != "down" else {}))
    b, a = normal(6, *((OLD.f, 2) if role != "down" else (OLD.d, 2))), normal(7, 2, OLD.d if role != "down" else OLD.f)
    found = LeastSquares().project(layer, role, Factors(b, a))
    carried, source = (found.a.T, a.T) if role == "down" else (found.b, b)
    for j, i in enumerate(match.tolist()):
        wanted = torch.zeros(2, dtype=F64) if i < 0 else row[j] * source[i]
        torch.testing.assert_close(carried[j], wanted)


@pytest.mark.parametrize("mean_of_matched", [True, False])
def test_a_groups_mean_counts_its_matched_heads_or_all_of_them(mean_of_matched: bool) -> None:
    old, new = Shape(V=9, d=4, h=2, H=4, G=2, f=4, L=1), Shape(V=9, d=4, h=3, H=6, G=2, f=4, L=1)
    match, blocks, x = torch.tensor([0, 3, -1, 2, -1, -1]), normal(0, 6, 2, 3), normal(1, 4, 5)
    found = carry_heads({"heads.match": match, "k.blocks": blocks}, "k", x, old, new, mean_of_matched=mean_of_matched)
    for group in range(2):
        parts = [blocks[n].T @ x[2 * (match[n] // 2) :][:2] for n in range(3 * group, 3 * group + 3) if match[n] >= 0]
        wanted = sum(parts) / (len(parts) if mean_of_matched else 3)
        torch.testing.assert_close(found[3 * group : 3 * group + 3], wanted)


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_whitened_rows_are_the_transposed_pseudo_inverse_of_every_head(condition: float) -> None:
    spectrum = torch.tensor([1.0, condition**-0.5, 1 / condition], dtype=F64)
    blocks = [
        torch.linalg.qr(normal(n, 3, 3)).Q @ torch.diag(spectrum) @ torch.linalg.qr(normal(n + 5, 8, 3)).Q.T
        for n in range(2)
    ]
    wanted = torch.cat([torch.linalg.pinv(block).T for block in blocks])
    torch.testing.assert_close(whiten(torch.cat(blocks), 2), wanted, rtol=1e-6, atol=1e-6 * condition)


@pytest.mark.parametrize("condition", [1.0, 1e3, 5e4])
def test_whitening_by_cholesky_agrees_with_the_pseudo_inverse(condition: float) -> None:
    """What a GPU takes in the place of eigenvectors, wherever no direction is to be left out."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(3, 6, 20, generator=generator).double()
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    rows = left * torch.logspace(0, -math.log10(condition), 6).double() @ right
    found = _whitened(rows @ rows.mT, rows)
    assert found is not None
    wanted = torch.linalg.pinv(rows).mT
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * condition)


@pytest.mark.parametrize("least", [0.0, 1e-6])
def test_whitening_by_cholesky_gives_way_where_one_head_lacks_a_direction(least: float) -> None:
    rows = torch.eye(4).double().repeat(3, 1, 1)
    rows[1, 2, 2] = least
    assert _whitened(rows @ rows.mT, rows) is None


def test_whitening_leaves_out_directions_that_rounding_alone_gives_a_size() -> None:
    left, right = torch.linalg.qr(normal(0, 3, 3)).Q, torch.linalg.qr(normal(1, 8, 3)).Q
    sizes = torch.tensor([1.0, 0.5, 1e-7], dtype=F64)
    wanted = left[:, :2] @ torch.diag(1 / sizes[:2]) @ right[:, :2].T
    torch.testing.assert_close(whiten(left @ torch.diag(sizes) @ right.T, 1), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
def test_pinv_times_is_the_pseudo_inverse_applied(shape: tuple[int, int]) -> None:
    w, x = normal(0, *shape), normal(1, shape[0], 3)
    torch.testing.assert_close(pinv_times(w, x), torch.linalg.pinv(w) @ x)


def test_the_scale_is_the_best_factor_and_of_nothing_one() -> None:
    carried, found = normal(0, 6, 3), normal(1, 6, 3)
    scale = float(_fitted_scale(carried, found))
    errors = [float((factor * carried - found).norm()) for factor in (scale - 1e-3, scale, scale + 1e-3)]
    assert errors[1] == min(errors)
    assert float(_fitted_scale(torch.zeros(6, 3), found)) == 1


@pytest.mark.parametrize("direction", [1, -1])
def test_a_constant_may_take_ten_times_the_row_and_no_more(direction: int) -> None:
    """1 / g is a unit vector, and a row of length 2 is orthogonal to the shift: the change's size is the constant."""
    reciprocal = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=F64)
    a = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=F64) * 2**0.5
    for constant, kept in ((19.9 * direction, True), (20.1 * direction, False)):
        found = _with_constant(a, torch.tensor([constant], dtype=F64), reciprocal, reciprocal)
        torch.testing.assert_close(found, a + constant * reciprocal if kept else a)


def flipped(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same function: up and down of a gated neuron, both negated."""
    return weights[0], -weights[1], -weights[2]


def test_flipped_neurons_are_as_similar_as_unflipped_ones() -> None:
    old = tuple(normal(n, 5, 4) for n in range(3))
    match = torch.arange(5)
    scales, similarity = _neuron_fit(old, flipped(old), match)
    torch.testing.assert_close(similarity, torch.ones(5, dtype=F64))
    torch.testing.assert_close(scales, torch.tensor([[1.0], [-1.0], [-1.0]], dtype=F64).expand(3, 5))


def test_a_neurons_scales_are_least_squares_and_its_similarity_the_cosine() -> None:
    old, new = (tuple(normal(10 * side + n, 5, 4) for n in range(2)) for side in (0, 1))
    match = torch.tensor([3, 1, -1, 0, 2])
    scales, similarity = _neuron_fit(old, new, match)
    for j, i in enumerate(match.tolist()):
        if i < 0:
            assert not scales[:, j].any()
            assert similarity[j] == 0
            continue
        for role in range(2):
            wanted = torch.linalg.lstsq(old[role][i][:, None], new[role][j][:, None]).solution[0, 0]
            torch.testing.assert_close(scales[role, j], wanted)
        vectors = [torch.cat([w[k] for w in side]) for side, k in ((old, i), (new, j))]
        torch.testing.assert_close(similarity[j], torch.nn.functional.cosine_similarity(*vectors, dim=0))


def test_a_dead_neuron_scales_nothing_and_is_similar_to_nothing() -> None:
    new = tuple(normal(n, 2, 4) for n in range(3))
    scales, similarity = _neuron_fit(tuple(torch.zeros_like(w) for w in new), new, torch.arange(2))
    assert not scales.any()
    assert not similarity.any()


def test_the_norm_of_an_update_is_that_of_its_product() -> None:
    b, a = normal(0, 6, 2), normal(1, 2, 5)
    assert update_norm(Factors(b, a)) == pytest.approx(float((b @ a).norm()))


def test_a_stream_read_as_it_is_has_a_gain_of_its_own_size_in_the_old_streams_units() -> None:
    family = SimpleNamespace(reads_through_norms=lambda role: False)
    old, new = (
        SimpleNamespace(checkpoint=SimpleNamespace(family=family, shape=SimpleNamespace(d=d)), device="cpu")
        for d in (2, 3)
    )
    pair: Any = Pair(old, new, torch.empty(2, 3), torch.empty(3, 2), rms_ratio=1.5, factor=1.0)  # type: ignore[arg-type]
    assert pair.gain(old, "q", torch.float64).tolist() == [1, 1]
    assert pair.gain(new, "q", torch.float64).tolist() == [1.5, 1.5, 1.5]
