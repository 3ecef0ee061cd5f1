"""Facts that the dense oracle itself must satisfy before anything is compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from dense_oracle import (
    Attention,
    Lora,
    Mlp,
    cka_minibatch,
    cka_minibatch_exact,
    gram,
    gram_exact,
    head_mapping,
    head_similarity,
    hsic1,
    hsic1_u_statistic,
    interaction,
    layer_mapping,
    project_attention,
    project_mlp,
    transfer_matrix,
)
from planted import plant, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small lose more to waiting for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def integers(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=rng).double()


def random_attention(rng: torch.Generator, d: int, heads: int, kv_heads: int, h: int) -> Attention:
    q, k, v = (normal(rng, count * h, d) for count in (heads, kv_heads, kv_heads))
    return Attention(q, k, v, normal(rng, d, heads * h), heads, kv_heads)


def random_lora(rng: torch.Generator, weight: Tensor, rank: int = 3, s: float = 2.0) -> Lora:
    return Lora(normal(rng, weight.shape[0], rank), normal(rng, rank, weight.shape[1]), s)


def attention_of(layer: nn.Module, heads: int, kv_heads: int) -> Attention:
    projections = (getattr(layer.self_attn, f"{name}_proj").weight.detach() for name in "qkvo")
    return Attention(*projections, heads, kv_heads)


def test_transfer_matrix_recovers_an_exact_map(rng: torch.Generator) -> None:
    e_o, W_h = normal(rng, 40, 8), normal(rng, 8, 12)
    torch.testing.assert_close(transfer_matrix(e_o, e_o @ W_h), W_h)
    torch.testing.assert_close(transfer_matrix(e_o @ W_h, e_o), torch.linalg.pinv(W_h))


@pytest.mark.parametrize("m", [4, 5, 7])
def test_hsic_sums_equal_the_u_statistic_exactly(rng: torch.Generator, m: int) -> None:
    K, L = gram_exact(integers(rng, m, 3)), gram_exact(integers(rng, m, 5))
    assert isinstance(hsic1(K, L), Fraction)
    assert hsic1(K, L) == hsic1_u_statistic(K, L)


@pytest.mark.parametrize("m", [4, 6, 9])
def test_hsic_in_float64_equals_rational_arithmetic(rng: torch.Generator, m: int) -> None:
    x, y = integers(rng, m, 3), integers(rng, m, 5)
    assert hsic1(gram(x), gram(y)) == pytest.approx(float(hsic1(gram_exact(x), gram_exact(y))), rel=1e-11)


def test_hsic_does_not_change_under_a_shift(rng: torch.Generator) -> None:
    x, y = integers(rng, 6, 3), integers(rng, 6, 5)
    K, L = gram_exact(x), gram_exact(y)
    assert hsic1(gram_exact(x + torch.tensor([1000, -7, 3])), L) == hsic1(K, L)
    assert hsic1(gram(x + 2.0**20), gram(y)) == pytest.approx(float(hsic1(K, L)), rel=1e-11)


def test_exact_gram_refuses_fractional_values() -> None:
    with pytest.raises(ValueError, match="integer"):
        gram_exact(torch.tensor([[0.5]]))


def test_cka_equals_rational_arithmetic_and_is_one_on_itself(rng: torch.Generator) -> None:
    old = [[integers(rng, 5, 4) for _ in range(2)] for _ in range(3)]
    new = [[integers(rng, 5, 6) for _ in range(3)] for _ in range(3)]
    torch.testing.assert_close(cka_minibatch(old, new), cka_minibatch_exact(old, new), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(cka_minibatch(old, old).diagonal(), torch.ones(2, dtype=torch.float64))


def test_layer_mapping_is_the_best_increasing_map() -> None:
    cka = torch.tensor([[0.9, 0.8, 0.1, 0.1], [0.9, 0.9, 0.2, 0.3]])
    assert layer_mapping(cka) == {0: 0, 1: 1}
    cka = torch.tensor([[0.1, 0.2, 0.9, 0.0], [0.9, 0.9, 0.9, 0.1]])
    assert layer_mapping(cka) == {0: 1, 1: 2}


def test_layer_mapping_leaves_layers_of_a_deeper_old_model_unused() -> None:
    cka = torch.tensor([[0.1, 0.0], [0.9, 0.1], [0.0, 0.8]])
    assert layer_mapping(cka) == {1: 0, 2: 1}


def test_layer_mapping_of_equal_depths_is_the_identity(rng: torch.Generator) -> None:
    assert layer_mapping(normal(rng, 4, 4)) == {0: 0, 1: 1, 2: 2, 3: 3}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_layer_is_most_similar_to_itself(rng: torch.Generator, kv_heads: int) -> None:
    layer = random_attention(rng, 12, 4, kv_heads, 3)
    similarity = head_similarity(layer, layer, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(similarity.diagonal(), torch.ones(4, dtype=torch.float64))
    assert head_mapping(similarity) == {b: b for b in range(4)}


def test_heads_without_a_partner_map_to_none() -> None:
    similarity = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.8, 0.0]])
    assert head_mapping(similarity) == {0: 1, 1: 0, 2: None}
    assert head_mapping(similarity.T) == {0: 1, 1: 0}


def test_grouped_query_heads_share_their_kv_block(rng: torch.Generator) -> None:
    layer = random_attention(rng, 6, 4, 2, 3)
    w_qk, w_vo = interaction(layer, 3)
    torch.testing.assert_close(w_qk, layer.q[9:12].T @ layer.k[3:6])
    torch.testing.assert_close(w_vo, layer.v[3:6].T @ layer.o[:, 9:12].T)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_projection_onto_the_same_layer_multiplies_by_the_head_gram(rng: torch.Generator, orthonormal: bool) -> None:
    d, heads, h = 12, 4, 3
    layer = random_attention(rng, d, heads, heads, h)
    if orthonormal:
        layer = Attention(*(torch.linalg.qr(w).Q for w in (layer.q, layer.k, layer.v, layer.o)), heads, heads)
    adapter = {module: random_lora(rng, getattr(layer, module)) for module in "qkvo"}
    identity = torch.eye(d, dtype=torch.float64)
    projected = project_attention(layer, layer, identity, {b: b for b in range(heads)}, adapter)
    for module, lora in adapter.items():
        for b in range(heads):
            block = slice(b * h, (b + 1) * h)
            if module == "o":
                expected = lora.delta[:, block] @ layer.o[:, block].T @ layer.o[:, block]
                found, unchanged = projected[module].delta[:, block], lora.delta[:, block]
            else:
                weight = layer.rows(module, b)
                expected = weight @ weight.T @ lora.delta[block]
                found, unchanged = projected[module].delta[block], lora.delta[block]
            torch.testing.assert_close(found, expected)
            assert torch.allclose(found, unchanged) == orthonormal


def test_truncation_loses_nothing_of_a_projected_update(rng: torch.Generator) -> None:
    old, new = random_attention(rng, 12, 4, 2, 3), random_attention(rng, 16, 6, 3, 4)
    adapter = {module: random_lora(rng, getattr(old, module), rank=2, s=0.5) for module in "qkvo"}
    mapping = {0: 2, 1: 0, 2: None, 3: 3, 4: None, 5: 1}
    for module, projected in project_attention(old, new, normal(rng, 12, 16), mapping, adapter).items():
        assert projected.delta.shape == getattr(new, module).shape
        torch.testing.assert_close(0.5 * projected.B @ projected.A, projected.delta)
        torch.testing.assert_close(projected.B.T @ projected.B, projected.A @ projected.A.T)


def test_unmatched_heads_are_zero_and_halve_their_groups_average(rng: torch.Generator) -> None:
    old, new = random_attention(rng, 8, 2, 2, 4), random_attention(rng, 8, 4, 2, 4)
    W_h = normal(rng, 8, 8)
    adapter = {module: random_lora(rng, getattr(old, module)) for module in "qko"}
    projected = project_attention(old, new, W_h, {0: 0, 1: None, 2: 0, 3: 1}, adapter)
    assert not projected["q"].delta[4:8].any()
    assert not projected["o"].delta[:, 4:8].any()
    C = old.k[:4] @ W_h @ new.k[:4].T
    torch.testing.assert_close(projected["k"].delta[:4], C.T @ adapter["k"].delta[:4] @ W_h / 2)


def test_old_kv_head_follows_the_old_models_group(rng: torch.Generator) -> None:
    old, new = random_attention(rng, 8, 4, 2, 4), random_attention(rng, 8, 2, 2, 4)
    W_h = normal(rng, 8, 8)
    lora = random_lora(rng, old.v)
    delta = project_attention(old, new, W_h, {0: 3, 1: 0}, {"v": lora})["v"].delta
    C = old.v[4:] @ W_h @ new.v[:4].T
    torch.testing.assert_close(delta[:4], C.T @ lora.delta[4:] @ W_h)


def test_mlp_projection_onto_the_same_layer_is_the_identity_up_to_its_range(rng: torch.Generator) -> None:
    identity = torch.eye(10, dtype=torch.float64)
    for inner, exact in ((6, True), (14, False)):
        layer = Mlp(normal(rng, inner, 10), normal(rng, inner, 10), normal(rng, 10, inner))
        adapter = {module: random_lora(rng, getattr(layer, module)) for module in ("gate", "up", "down")}
        projected = project_mlp(layer, layer, identity, adapter)
        for module, lora in adapter.items():
            assert torch.allclose(projected[module].delta, lora.delta) == exact
        in_range = Lora(layer.up @ normal(rng, 10, 3), normal(rng, 3, 10), 2.0)
        torch.testing.assert_close(project_mlp(layer, layer, identity, {"up": in_range})["up"].delta, in_range.delta)


def test_mlp_projection_has_the_new_layers_shapes(rng: torch.Generator) -> None:
    old = Mlp(normal(rng, 14, 10), normal(rng, 14, 10), normal(rng, 10, 14))
    new = Mlp(normal(rng, 20, 12), normal(rng, 20, 12), normal(rng, 12, 20))
    adapter = {module: random_lora(rng, getattr(old, module)) for module in ("gate", "up", "down")}
    for module, projected in project_mlp(old, new, normal(rng, 10, 12), adapter).items():
        assert projected.delta.shape == getattr(new, module).shape
        torch.testing.assert_close(2.0 * projected.B @ projected.A, projected.delta)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_planted_upgrade_gives_up_its_transfer_matrix_and_heads(family: str) -> None:
    model = tiny_model(family, 0, tied=True).double()
    upgraded = plant(
        model,
        tiny_tokenizer(320),
        d_new=48,
        layers_new=3,
        heads_new=6,
        intermediate_new=64,
        added_tokens=5,
        seed=0,
    )
    e_o = model.get_input_embeddings().weight.detach()[upgraded.shared_old]
    e_n = upgraded.model.get_input_embeddings().weight.detach()[upgraded.shared_new]
    W_h = transfer_matrix(e_o, e_n)
    torch.testing.assert_close(W_h, upgraded.Q, rtol=0, atol=1e-10)
    for i, j in enumerate(upgraded.layer_map):
        old = attention_of(model.model.layers[i], 4, 2)
        new = attention_of(upgraded.model.model.layers[j], 6, 6)
        found = head_mapping(head_similarity(old, new, W_h))
        assert [b for a in range(4) for b in found if found[b] == a] == upgraded.head_map[i]
