"""The fast forms agree with the published algorithm, dense and in float64, on random models of every shape class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasuite_fast import PlanConfig, TransferPlan
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.vocabulary import shared_tokens
from lorasuite_fast.transfer.mapping import map_layers

import dense_oracle as oracle
from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
MODULES = {r: f"self_attn.{r}_proj" for r in ATTENTION} | {r: f"mlp.{r}_proj" for r in MLP}


@dataclass(frozen=True)
class Side:
    d: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    intermediate: int = 48
    family: str = "llama"


# What changes, and the two sides.
CLASSES = {
    "wider deeper more heads GQA to MHA": (Side(), Side(d=48, layers=4, heads=6, kv_heads=6, intermediate=64)),
    "narrower shallower fewer heads MHA to GQA": (
        Side(d=48, layers=4, heads=6, kv_heads=6, intermediate=64),
        Side(d=32, layers=2, heads=4, kv_heads=2),
    ),
    "MHA to GQA with unequal head counts": (Side(heads=4, kv_heads=4), Side(d=48, heads=8, kv_heads=2, head_dim=6)),
    "GQA to GQA with unequal groups": (Side(heads=6, kv_heads=2, d=48), Side(heads=8, kv_heads=4, layers=3)),
    "MQA to GQA and a larger head": (Side(kv_heads=1), Side(kv_heads=2, head_dim=16)),
    "GQA to MQA and a smaller head": (Side(head_dim=16), Side(kv_heads=1, head_dim=4, family="mistral")),
    "biases on the old side": (Side(family="qwen2"), Side(d=40, layers=3)),
    "head norms on the new side": (Side(), Side(d=40, layers=3, family="qwen3")),
}


def model_folder(side: Side, folder: Path, seed: int) -> Path:
    model = tiny_model(
        side.family,
        seed,
        d=side.d,
        layers=side.layers,
        heads=side.heads,
        kv_heads=side.kv_heads,
        head_dim=side.head_dim,
        intermediate=side.intermediate,
    )
    return save_folder(model, tiny_tokenizer(320, "bytelevel", seed), folder)


def double(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def attention(weights: dict[str, torch.Tensor], layer: int, side: Side) -> oracle.Attention:
    parts = (weights[f"model.layers.{layer}.self_attn.{role}_proj.weight"] for role in ATTENTION)
    return oracle.Attention(*parts, heads=side.heads, kv_heads=side.kv_heads)


def mlp(weights: dict[str, torch.Tensor], layer: int) -> oracle.Mlp:
    return oracle.Mlp(*(weights[f"model.layers.{layer}.mlp.{role}_proj.weight"] for role in MLP))


def lora(adapter: dict[str, torch.Tensor], layer: int, role: str, s: float) -> oracle.Lora:
    key = f"base_model.model.model.layers.{layer}.{MODULES[role]}"
    return oracle.Lora(adapter[f"{key}.lora_B.weight"].double(), adapter[f"{key}.lora_A.weight"].double(), s)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


@pytest.fixture(scope="module", params=CLASSES, ids=lambda name: name.replace(" ", "-"))
def migrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One pair of unrelated random models, an adapter on all seven projections, carried by Eq. (3)."""
    torch.set_num_threads(1)
    side_o, side_n = CLASSES[request.param]
    root = tmp_path_factory.mktemp("pair")
    old, new = model_folder(side_o, root / "old", 1), model_folder(side_n, root / "new", 2)
    targets = [module.rpartition(".")[2] for module in MODULES.values()]
    random_adapter(old, root / "adapter", targets=targets, rank=3, alpha=6, seed=3)
    plan = TransferPlan.build(old, new, config=PlanConfig(method="paper", examples=16))
    plan.apply(root / "adapter", root / "out")
    tokens = shared_tokens(Checkpoint(old).tokenizer(), Checkpoint(new).tokenizer())
    w_o, w_n = double(old), double(new)
    embed = "model.embed_tokens.weight"
    return {
        "sides": (side_o, side_n),
        "plan": plan,
        "weights": (w_o, w_n),
        "W_h": oracle.transfer_matrix(w_o[embed][tokens.old], w_n[embed][tokens.new]),
        "adapter": load_file(root / "adapter/adapter_model.safetensors"),
        "out": load_file(root / "out/adapter_model.safetensors"),
    }


def test_transfer_matrix_is_the_pseudo_inverse_solution(migrated: dict[str, Any]) -> None:
    assert relative(migrated["plan"].tensors["W_h"].double(), migrated["W_h"]) < 1e-6


def test_head_similarities_and_matches_agree(migrated: dict[str, Any]) -> None:
    plan, (side_o, side_n), (w_o, w_n) = migrated["plan"], migrated["sides"], migrated["weights"]
    for j, i in plan.layers.items():
        expected = oracle.head_similarity(attention(w_o, i, side_o), attention(w_n, j, side_n), migrated["W_h"])
        found = plan.tensors[f"layers.{j}.heads.similarity"].double()
        assert relative(found, expected) < 1e-5
        pairs = oracle.head_mapping(expected)
        assert plan.tensors[f"layers.{j}.heads.match"].tolist() == [
            -1 if pairs.get(b) is None else pairs[b] for b in range(side_n.heads)
        ]


def test_attention_updates_agree(migrated: dict[str, Any]) -> None:
    plan, (side_o, side_n), (w_o, w_n) = migrated["plan"], migrated["sides"], migrated["weights"]
    for j, i in plan.layers.items():
        a_o, a_n = attention(w_o, i, side_o), attention(w_n, j, side_n)
        pairs = oracle.head_mapping(oracle.head_similarity(a_o, a_n, migrated["W_h"]))
        adapter = {role: lora(migrated["adapter"], i, role, 2.0) for role in ATTENTION}
        expected = oracle.project_attention(a_o, a_n, migrated["W_h"], pairs, adapter)
        for role in ATTENTION:
            found = lora(migrated["out"], j, role, 2.0)
            assert relative(found.delta, expected[role].delta) < 1e-5
            # The factors are those of the singular value decomposition, up to signs.
            gram = found.B.T @ found.B
            assert relative(gram, torch.diag(gram.diagonal())) < 1e-4
            assert relative(gram, found.A @ found.A.T) < 1e-4
            assert relative(found.B.abs(), expected[role].B.abs()) < 1e-3


def test_mlp_updates_agree(migrated: dict[str, Any]) -> None:
    plan, (w_o, w_n) = migrated["plan"], migrated["weights"]
    for j, i in plan.layers.items():
        adapter = {role: lora(migrated["adapter"], i, role, 2.0) for role in MLP}
        expected = oracle.project_mlp(mlp(w_o, i), mlp(w_n, j), migrated["W_h"], adapter)
        for role in MLP:
            assert relative(lora(migrated["out"], j, role, 2.0).delta, expected[role].delta) < 1e-5


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("L_o", "L_n"), [(3, 3), (2, 5), (5, 2), (4, 7), (6, 4), (1, 4)])
def test_layer_mapping_is_the_best_of_all_increasing_maps(L_o: int, L_n: int, seed: int) -> None:
    cka = torch.rand(L_o, L_n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = oracle.layer_mapping(cka)
    found = {i: j for j, i in map_layers(cka).items()}
    assert len(found) == min(L_o, L_n)

    def total(pairs: dict[int, int]) -> float:
        return float(sum(cka[i, j] for i, j in pairs.items()))

    assert total(found) >= total(best) - 1e-4 * min(L_o, L_n)
    if total(found) > total(best) - 1e-12:
        assert found == best


@pytest.mark.parametrize("how", ["first", "medium", "last"])
@pytest.mark.parametrize(("L_o", "L_n"), [(3, 3), (2, 7), (7, 2)])
def test_fixed_layer_mappings_keep_one_offset(how: str, L_o: int, L_n: int) -> None:
    found = map_layers(torch.zeros(L_o, L_n), how)
    offset = {"first": 0, "medium": abs(L_o - L_n) // 2, "last": abs(L_o - L_n)}[how]
    assert found == {(i + offset if L_o <= L_n else i): (i if L_o <= L_n else i + offset) for i in range(min(L_o, L_n))}


def test_cka_ties_go_to_the_earliest_layer() -> None:
    cka = torch.tensor([[1.0, 1.00005, 0.2, 0.1], [0.1, 0.999, 1.0, 1.00002]])
    assert map_layers(cka) == {0: 0, 2: 1}
