"""Neurons are matched one to one, by cosine, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorasuite_fast.transfer.mapping import match_neurons
from lorasuite_kernels import neuron_candidates

Neurons = tuple[Tensor | None, Tensor, Tensor]


def neurons(count: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(count, d, generator=generator) for _ in range(3))
    return gate, up, down


def cosines(rows: Neurons, columns: Neurons) -> Tensor:
    """Every pair, in float64, from the concatenated vectors with either sign of up and down."""
    best = None
    for sign in (1, -1):
        a = torch.cat([w.double() * s for w, s in zip(rows, (1, sign, sign), strict=True) if w is not None], 1)
        b = torch.cat([w.double() for w in columns if w is not None], 1)
        value = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
        best = value if best is None or rows[0] is None else torch.maximum(best, value)
        if rows[0] is None:
            return best
    assert best is not None
    return best


@pytest.mark.parametrize("gated", [True, False])
def test_candidates_are_the_largest_cosines(gated: bool) -> None:
    rows: Neurons = neurons(57, 5, 0)
    columns: Neurons = neurons(83, 5, 1)
    if not gated:
        rows, columns = (None, *rows[1:]), (None, *columns[1:])
    found = neuron_candidates(*rows, *columns, k=4)
    expected = cosines(rows, columns).topk(4, dim=1)
    assert torch.allclose(found.similarity.double(), expected.values, atol=1e-6)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize(("f_o", "f_n"), [(40, 70), (70, 40), (50, 50)])
def test_a_permutation_with_noise_is_recovered(f_o: int, f_n: int) -> None:
    small, large = min(f_o, f_n), max(f_o, f_n)
    few = neurons(small, 12, 2)
    place = torch.randperm(large, generator=torch.Generator().manual_seed(3))[:small]
    many = tuple(torch.zeros(large, 12) for _ in range(3))
    for target, source in zip(many, few, strict=True):
        target[place] = source + 0.05 * torch.randn(small, 12, generator=torch.Generator().manual_seed(4))
    many[1][place[0]] *= -1
    many[2][place[0]] *= -1
    old, new = (few, many) if f_o <= f_n else (many, few)
    match = match_neurons(old, new)  # type: ignore[arg-type]
    if f_o <= f_n:
        assert torch.equal(match[place], torch.arange(small))
        assert int((match >= 0).sum()) == small
    else:
        assert torch.equal(match, place)


def test_no_old_neuron_is_used_twice() -> None:
    old, new = neurons(30, 4, 5), neurons(30, 4, 6)
    # Several new neurons resemble one old neuron best.
    for target, source in zip(new, old, strict=True):
        target[:10] = source[0]
    match = match_neurons(old, new)
    used = match[match >= 0]
    assert len(used.unique()) == len(used)


def test_dead_neurons_stay_alone() -> None:
    old, new = neurons(6, 4, 7), tuple(torch.zeros(6, 4) for _ in range(3))
    assert match_neurons(old, new).tolist() == [-1] * 6  # type: ignore[arg-type]
