"""Which layer, head and neuron continues which: ties, orders and what stays alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.transfer.mapping import map_layers, match_heads, match_neurons


@pytest.mark.parametrize(("lead", "layer"), [(5e-5, 0), (5e-4, 1)])
def test_a_lead_within_rounding_goes_to_the_earlier_layer_and_a_larger_one_wins(lead: float, layer: int) -> None:
    """CKA differs by some 1e-5 from one machine to another; the mapping must not."""
    assert map_layers(torch.tensor([[0.5, 0.5 + lead, 0.1]])) == {layer: 0}
    assert map_layers(torch.tensor([[0.5], [0.5 + lead], [0.1]])) == {0: layer}


def test_layers_keep_their_order_although_a_crossing_pair_is_more_similar() -> None:
    cka = torch.tensor([[0.1, 0.2, 0.9], [0.9, 0.3, 0.4]])
    best = max(itertools.combinations(range(3), 2), key=lambda columns: cka[0, columns[0]] + cka[1, columns[1]])
    assert map_layers(cka) == {column: row for row, column in enumerate(best)}
    assert map_layers(cka.T) == dict(enumerate(best))


def test_heads_are_matched_for_the_greatest_sum() -> None:
    similarity = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    best = max(itertools.permutations(range(4), 3), key=lambda old: sum(similarity[i, j] for j, i in enumerate(old)))
    assert match_heads(similarity).tolist() == list(best)


def test_new_heads_beyond_the_old_ones_stay_alone() -> None:
    similarity = torch.tensor([[0.1, 0.9, 0.2]])
    assert match_heads(similarity).tolist() == [-1, 0, -1]
    assert match_heads(similarity, "identity").tolist() == [0, -1, -1]
    assert match_heads(similarity.T, "identity").tolist() == [0]


def test_an_unknown_mapping_is_named() -> None:
    with pytest.raises(LoraSuiteError, match="layer mapping 'best' is not one of"):
        map_layers(torch.zeros(2, 2), "best")
    with pytest.raises(LoraSuiteError, match="head mapping 'best' is not one of"):
        match_heads(torch.zeros(2, 2), "best")


def plain(*rows: list[float]) -> tuple[None, Tensor, Tensor]:
    """Ungated neurons that differ in their up vectors alone."""
    up = torch.tensor(rows)
    return None, up, torch.zeros_like(up)


def test_a_neuron_whose_best_partner_is_taken_gets_its_next_best() -> None:
    """Both old neurons are most similar to new neuron 0, the second one nearly as much to new neuron 1."""
    old = plain([1.0, 0.0], [0.8, 0.6])
    new = plain([1.0, 0.1], [0.3, 1.0])
    assert match_neurons(old, new).tolist() == [0, 1]
    assert match_neurons(new, old).tolist() == [0, 1]


def test_a_neuron_similar_to_none_stays_alone_on_either_side() -> None:
    few, many = plain([1.0, 0.0], [0.0, 1.0]), plain([0.0, 1.0], [-1.0, 0.0], [0.0, -1.0])
    assert match_neurons(few, many).tolist() == [1, -1, -1]
    assert match_neurons(many, few).tolist() == [-1, 0]


def test_two_fair_pairs_are_preferred_to_one_good_one_beside_a_neuron_alone() -> None:
    """0.6 + 0.6 is more than 1.0 + 0: a poor partner is worth its cosine."""
    old, new = plain([1.0, 0.0], [0.8, 0.6]), plain([0.8, 0.6], [0.0, -1.0], [-0.6, 0.8])
    cosines = old[1] @ new[1].T
    best = max(
        itertools.permutations([*range(3), None, None], 2),
        key=lambda picked: sum(max(0.0, float(cosines[i, j])) for i, j in enumerate(picked) if j is not None),
    )
    found = match_neurons(old, new).tolist()
    total = sum(float(cosines[i, j]) for j, i in enumerate(found) if i >= 0)
    assert total == pytest.approx(sum(float(cosines[i, j]) for i, j in enumerate(best) if j is not None))
    weak = plain([0.1, 0.995])
    assert match_neurons(plain([1.0, 0.0]), weak).tolist() == [0]
