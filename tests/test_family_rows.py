"""Every row of the table of families beyond the first ones: planted upgrades, and the dense oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planted_families import MIXTURES, NAMES, OLDER, TARGETS, config_of, dense_layer, plant_family, random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasuite_fast import LoraSuiteError, PlanConfig, TransferPlan, migrate
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.family_table import FAMILIES

import dense_oracle as oracle
import planted
from planted import random_adapter, save_folder, tiny_tokenizer

ROWS = [family for family in NAMES if family not in OLDER]
OLD: dict[str, Any] = {"d": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "f": 48}
NEW: dict[str, Any] = {"d_new": 48, "layers_new": 4, "heads_new": 6, "kv_heads_new": 3, "f_new": 80}
ALONE: dict[str, Any] = {"kv_heads": 4}
KEEPS_EPSILON = (48 / 32) ** 0.5
"""The stretch at which an epsilon that no config can change is the right one in both models."""


@dataclass(frozen=True)
class Sizes:
    old: dict[str, Any] = field(default_factory=dict)
    new: dict[str, Any] = field(default_factory=dict)


SIZES = {
    "gpt2": Sizes(ALONE, {"kv_heads_new": 6}),
    "gptj": Sizes(ALONE, {"kv_heads_new": 6}),
    "opt": Sizes(ALONE, {"kv_heads_new": 6, "stretch": KEEPS_EPSILON}),
    "olmo": Sizes({}, {"stretch": KEEPS_EPSILON}),
    "gpt_bigcode": Sizes({"kv_heads": 1}, {"kv_heads_new": 1}),
    "falcon": Sizes({"kv_heads": 1}, {"kv_heads_new": 1}),
    # Its positions are slopes that depend on a head's place.
    "mpt": Sizes(
        ALONE | {"f": 128},
        {"heads_new": 4, "kv_heads_new": 4, "head_dim_new": 12, "f_new": 192, "head_map": [0, 1, 2, 3]},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_family_of_the_table_is_planted_somewhere() -> None:
    assert set(FAMILIES) == {*NAMES, *MIXTURES, "llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.parametrize("family", ROWS)
def test_a_planted_upgrade_gets_the_effect_of_its_adapter(family: str, tmp_path: Path) -> None:
    """The new model computes the old one's function, and PEFT's change of it under the migrated adapter is the old."""
    sizes = SIZES.get(family, Sizes())
    model = random_model(config_of(family, vocab=420, **(OLD | sizes.old)), 1)
    upgraded = plant_family(model, tiny_tokenizer(420, "bytelevel", 1), seed=1, **(NEW | sizes.new))
    save_folder(model, tiny_tokenizer(420, "bytelevel", 1), tmp_path / "old")
    upgraded.save(tmp_path / "new")
    targets = [module for part in TARGETS[family] for module in part]
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=targets, rank=4, alpha=8, seed=1)
    folders = [tmp_path / name for name in ("old", "new", "adapter", "out")]
    result = migrate(*folders, plan=PlanConfig(examples=24))
    assert result.plan.options["method"] == "lstsq"
    assert result.plan.layers == {j: i for i, j in enumerate(upgraded.layer_map)}
    changes, logits = [], []
    sides = zip(
        folders[:2], folders[2:], upgraded.random_ids(3, 24, 0), (upgraded.shared_old, upgraded.shared_new), strict=True
    )
    for folder, adapter, ids, shared in sides:
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        before = planted.logits(loaded, ids)
        after = planted.logits(PeftModel.from_pretrained(loaded, adapter).eval(), ids)
        logits.append(before[..., shared])
        changes.append((after - before)[..., shared].flatten())
    assert logits[0].std() > 0.1
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=3e-4 * float(logits[0].abs().max()))
    assert float(torch.nn.functional.cosine_similarity(*changes, dim=0)) >= 0.9999
    assert float(changes[1].norm() / changes[0].norm()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("family", ROWS)
def test_the_published_projection_of_each_row_is_that_of_the_dense_oracle(family: str, tmp_path: Path) -> None:
    """Onto an unrelated Llama: what the row takes for q, k, v, o and the neurons is what transformers takes."""
    sizes = SIZES.get(family, Sizes()).old
    model = random_model(config_of(family, vocab=320, **(OLD | {"layers": 2} | sizes)), 1)
    save_folder(model, tiny_tokenizer(320), tmp_path / "old")
    new = planted.tiny_model("llama", 2, d=40, layers=2, heads=4, kv_heads=2, head_dim=6, intermediate=56)
    save_folder(new, tiny_tokenizer(320), tmp_path / "new")
    targets = [module for part in TARGETS[family] for module in part]
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=targets, rank=3, alpha=6, seed=3)
    plan = TransferPlan.build(
        tmp_path / "old",
        tmp_path / "new",
        config=PlanConfig(method="paper", examples=8, layers="first", roles=FAMILIES[family].roles),
    )
    plan.apply(tmp_path / "adapter", tmp_path / "out")
    tables = [m.get_input_embeddings().weight.detach().double() for m in (model, new)]
    W_h = oracle.transfer_matrix(tables[0], tables[1])
    torch.testing.assert_close(plan.tensors["W_h"].double() / plan.facts["embedding_factor"], W_h, rtol=1e-4, atol=1e-5)
    weights, updates = dense_layer(model, tmp_path / "adapter", 1)
    state = {name: tensor.double() for name, tensor in new.state_dict().items()}
    inside = [f"self_attn.{r}_proj" for r in "qkvo"] + [f"mlp.{r}_proj" for r in ("gate", "up", "down")]
    target = dict(zip(("q", "k", "v", "o", "gate", "up", "down"), inside, strict=True))
    new_weights = {role: state[f"model.layers.1.{path}.weight"] for role, path in target.items()}
    old_side = oracle.Attention(*(weights[r] for r in "qkvo"), heads=4, kv_heads=len(weights["k"]) // 8)
    new_side = oracle.Attention(*(new_weights[r] for r in "qkvo"), heads=4, kv_heads=2)
    match = dict(enumerate(plan.tensors["layers.1.heads.match"].tolist()))
    wanted = oracle.project_attention(old_side, new_side, W_h, match, {r: updates[r] for r in "qkvo"})
    gate = weights.get("gate", weights["up"])
    mlps = (
        oracle.Mlp(gate, weights["up"], weights["down"]),
        oracle.Mlp(*(new_weights[r] for r in ("gate", "up", "down"))),
    )
    wanted |= oracle.project_mlp(*mlps, W_h, {r: u for r, u in updates.items() if r not in "qkvo"})
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    for role, expected in wanted.items():
        name = f"base_model.model.model.layers.1.{target[role]}"
        b, a = (found[f"{name}.lora_{x}.weight"].double() for x in "BA")
        delta = 6 / 3 * b @ a
        assert float((delta - expected.delta).norm() / expected.delta.norm()) < 1e-3, role


def test_modules_whose_last_names_are_one_are_told_apart(tmp_path: Path) -> None:
    """GPT-2's attention and MLP both end in c_proj: an adapter of one of them does not become one of both."""
    model = random_model(config_of("gpt2", vocab=320, **(OLD | ALONE)), 1)
    save_folder(model, tiny_tokenizer(320), tmp_path / "old")
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=["attn.c_proj"], rank=3, alpha=6, seed=3)
    migrate(tmp_path / "old", tmp_path / "old", tmp_path / "adapter", tmp_path / "copy", plan=PlanConfig(method="copy"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "old"), tmp_path / "copy")
    named = {name for name, _ in loaded.named_modules() if name.endswith(".lora_A")}
    assert named == {f"base_model.model.transformer.h.{i}.attn.c_proj.lora_A" for i in range(3)}
    checkpoint = Checkpoint(tmp_path / "old")
    read = read_adapter(tmp_path / "copy", checkpoint.family, checkpoint.shape, "old")
    assert read.roles == ("o",)


def test_least_squares_are_not_tried_where_one_stream_is_normed_and_the_other_read_as_it_is(tmp_path: Path) -> None:
    for name, family, seed in (("old", "smollm3", 1), ("new", "olmo2", 2)):
        save_folder(random_model(config_of(family, vocab=320, **OLD), seed), tiny_tokenizer(320), tmp_path / name)
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=["q_proj"], rank=2, alpha=2, seed=3)
    folders = [tmp_path / name for name in ("old", "new", "adapter", "out")]
    with pytest.raises(LoraSuiteError, match="smollm3 and olmo2: one reads its residual stream through norms"):
        migrate(*folders, plan=PlanConfig(method="lstsq", examples=8))
    assert not folders[-1].exists()
    result = migrate(*folders, plan=PlanConfig(examples=8))
    assert "lstsq" not in result.plan.options.get("candidates", [])
