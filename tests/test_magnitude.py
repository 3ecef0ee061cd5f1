"""DoRA's magnitudes: norms without the sum, factors, and what the new outputs get of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorasuite_fast.adapters.adapter import Update
from lorasuite_fast.adapters.factors import Factors
from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.models.families import Shape
from lorasuite_fast.transfer.magnitude import carry_factors, factors_of, row_norms
from lorasuite_fast.transfer.projection import PlannedLayer

OLD = Shape(V=50, d=4, h=3, H=4, G=2, f=5, L=1)
NEW = Shape(V=60, d=6, h=2, H=4, G=2, f=6, L=1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(tensors: dict[str, Tensor], W_h: Tensor | None = None) -> PlannedLayer:
    def no_checkpoints() -> Any:
        raise AssertionError("needs no model")

    W_h = normal(9, OLD.d, NEW.d) if W_h is None else W_h
    return PlannedLayer(0, 0, tensors, W_h, W_h.T, 1.0, 1.0, OLD, NEW, no_checkpoints)


def test_row_norms_are_those_of_the_sum_that_is_never_formed() -> None:
    weight, b, a = normal(0, 5, 7), normal(1, 5, 2), normal(2, 2, 7)
    wanted = (weight + 3 * b @ a).norm(dim=1)
    torch.testing.assert_close(row_norms(weight, Update(Factors(b, a), 6.0, False)), wanted)


def test_a_row_the_update_takes_away_has_norm_zero_and_factor_one() -> None:
    a = normal(0, 1, 4)
    weight, b = torch.cat([a, a]), torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    update = Update(Factors(b, a), 1.0, False, torch.tensor([5.0, 6.0]))
    assert float(row_norms(weight, update)[0]) == pytest.approx(0, abs=1e-7)
    factors = factors_of(torch.zeros(2, 4), Update(Factors(0 * b, a), 1.0, False, torch.tensor([5.0, 6.0])))
    assert factors.tolist() == [1, 1]
    torch.testing.assert_close(factors_of(weight, update)[1], 6 / (2 * a.norm()))


@pytest.mark.parametrize("role", ["o", "down"])
def test_outputs_on_the_stream_get_the_mean_weighted_by_the_squared_map(role: str) -> None:
    W_h, old = normal(0, OLD.d, NEW.d), normal(1, OLD.d).abs()
    W_h[:, 3] = 0
    found = carry_factors(layer({}, W_h), role, old)
    for j in range(NEW.d):
        weights = [float(W_h[i, j]) ** 2 for i in range(OLD.d)]
        total = sum(weights)
        wanted = sum(w * float(f) for w, f in zip(weights, old, strict=True)) / total if total else 1.0
        assert float(found[j]) == pytest.approx(wanted)


@pytest.mark.parametrize("role", ["gate", "up"])
def test_neurons_get_their_partners_factor_and_one_without(role: str) -> None:
    old = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    match = torch.tensor([4, -1, 0, 2, 1, -1])
    assert carry_factors(layer({"neurons.match": match}), role, old).tolist() == [6, 1, 2, 4, 3, 1]


def test_heads_get_the_mean_weighted_by_their_blocks_squares() -> None:
    match, old = torch.tensor([3, -1, 0, 1]), normal(1, OLD.H * OLD.h).abs()
    blocks = normal(2, NEW.H, OLD.h, NEW.h)
    found = carry_factors(layer({"heads.match": match, "q.blocks": blocks}), "q", old).view(NEW.H, NEW.h)
    for b, a in enumerate(match.tolist()):
        weights = blocks[b].square()
        wanted = torch.ones(NEW.h).double()
        if a >= 0:
            wanted = (weights * old[OLD.h * a : OLD.h * a + OLD.h, None]).sum(0) / weights.sum(0)
        torch.testing.assert_close(found[b], wanted)


def test_eq_3_names_what_it_cannot_carry() -> None:
    with pytest.raises(LoraSuiteError, match="magnitudes of up cannot be carried"):
        carry_factors(layer({}), "up", torch.ones(OLD.f))
