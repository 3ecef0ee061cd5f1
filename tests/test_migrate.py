"""End to end on planted upgrades: the adapter arrives whole, and PEFT takes it without a surprise."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasuite_fast import PlanConfig, Runtime, TransferPlan, migrate

from planted import Planted, effect, plant, random_adapter, save_folder, tiny_model, tiny_tokenizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    family: str = "llama"
    tied: bool = False
    kind: str = "bytelevel"
    kv_heads: int = 2
    flip: bool = False
    layers_new: int = 5
    d_new: int = 48
    targets: list[str] = field(default_factory=lambda: ALL)


CASES = {
    "llama GQA": Case(),
    "llama GQA attention only": Case(targets=ATTENTION, tied=True),
    "llama MHA sentencepiece": Case(kind="sentencepiece", kv_heads=4),
    "llama MQA flipped neurons": Case(kv_heads=1, flip=True),
    "mistral": Case("mistral", flip=True),
    "qwen2 biases tied": Case("qwen2", tied=True),
    "qwen3 head norms": Case("qwen3", d_new=60),
    "same depth": Case(layers_new=3),
}


@dataclass
class Upgrade:
    root: Path
    model: Any
    planted: Planted

    def folder(self, name: str) -> Path:
        return self.root / name


def make_upgrade(case: Case, root: Path, seed: int) -> Upgrade:
    model = tiny_model(case.family, seed, d=32, layers=3, kv_heads=case.kv_heads, vocab=420, tied=case.tied)
    tokenizer = tiny_tokenizer(420, case.kind, seed)
    planted = plant(
        model,
        tokenizer,
        d_new=case.d_new,
        layers_new=case.layers_new,
        heads_new=6,
        intermediate_new=80,
        added_tokens=30,
        seed=seed,
        flip_neurons=case.flip,
    )
    save_folder(model, tokenizer, root / "old")
    planted.save(root / "new")
    random_adapter(root / "old", root / "adapter", targets=case.targets, rank=4, alpha=8, seed=seed)
    return Upgrade(root, model, planted)


def compare_effect(upgrade: Upgrade, adapter: Path, out: Path) -> tuple[float, float]:
    """Cosine and size ratio of the change of the shared tokens' logits, new against old."""
    ids_o, ids_n = upgrade.planted.random_ids(4, 24, 0)
    old = effect(upgrade.model, adapter, ids_o)[..., upgrade.planted.shared_old].flatten()
    new = effect(upgrade.planted.model, out, ids_n)[..., upgrade.planted.shared_new].flatten()
    return float(torch.nn.functional.cosine_similarity(old, new, dim=0)), float(new.norm() / old.norm())


def load_strictly(base: Path, adapter: Path) -> PeftModel:
    """Loads as a user would, with every warning PEFT or transformers has about keys turned into an error."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
        loaded = PeftModel.from_pretrained(model, adapter)
    stored = set(load_file(adapter / "adapter_model.safetensors"))
    present = {n.replace(".default.", ".") for n, _ in loaded.named_parameters() if "lora_" in n}
    assert present == stored
    return loaded


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_least_squares_is_exact_on_a_planted_upgrade(name: str, seed: int, tmp_path: Path) -> None:
    upgrade = make_upgrade(CASES[name], tmp_path, seed)
    result = migrate(
        tmp_path / "old", tmp_path / "new", tmp_path / "adapter", tmp_path / "out", plan=PlanConfig(examples=48)
    )
    planted = upgrade.planted
    assert result.plan.layers == {j: i for i, j in enumerate(planted.layer_map)}
    assert (result.plan.tensors["W_h"] - planted.Q).abs().max() < 1e-5
    for i, j in enumerate(planted.layer_map):
        match = result.plan.tensors[f"layers.{j}.heads.match"].tolist()
        assert [match[b] for b in planted.head_map[i]] == list(range(len(planted.head_map[i])))
        assert sum(a >= 0 for a in match) == len(planted.head_map[i])
    cosine, ratio = compare_effect(upgrade, tmp_path / "adapter", tmp_path / "out")
    assert cosine >= 0.9999
    assert ratio == pytest.approx(1, abs=1e-3)


def test_the_published_projection_is_not_exact_there(tmp_path: Path) -> None:
    upgrade = make_upgrade(CASES["llama GQA"], tmp_path, 0)
    migrate(
        tmp_path / "old",
        tmp_path / "new",
        tmp_path / "adapter",
        tmp_path / "out",
        plan=PlanConfig(examples=48, method="paper"),
    )
    cosine, _ = compare_effect(upgrade, tmp_path / "adapter", tmp_path / "out")
    assert 0.3 < cosine < 0.95


@pytest.fixture(scope="module")
def upgrade(tmp_path_factory: pytest.TempPathFactory) -> Upgrade:
    torch.set_num_threads(1)
    return make_upgrade(Case("qwen2"), tmp_path_factory.mktemp("upgrade"), 0)


@pytest.fixture(scope="module")
def plan(upgrade: Upgrade) -> TransferPlan:
    return TransferPlan.build(upgrade.folder("old"), upgrade.folder("new"), config=PlanConfig(examples=48))


ADAPTERS: dict[str, dict[str, Any]] = {
    "every projection": {"targets": ALL, "rank": 4, "alpha": 8},
    "query and value": {"targets": ["q_proj", "v_proj"], "rank": 2, "alpha": 2},
    "rank above the width": {"targets": ["o_proj", "down_proj"], "rank": 70, "alpha": 16},
    "rank 1 rsLoRA": {"targets": ATTENTION, "rank": 1, "alpha": 4, "rslora": True},
    "some layers": {"targets": ATTENTION, "rank": 4, "alpha": 8, "layers": [0, 2]},
    "rank and alpha patterns": {
        "targets": ALL,
        "rank": 4,
        "alpha": 8,
        "rank_pattern": {"q_proj": 7, r"layers.1.self_attn.o_proj": 2},
        "alpha_pattern": {"v_proj": 3, "down_proj": 12},
    },
    "rank pattern with rsLoRA": {
        "targets": ["q_proj", "o_proj"],
        "rank": 4,
        "alpha": 8,
        "rslora": True,
        "rank_pattern": {"o_proj": 9},
    },
}


@pytest.mark.parametrize("name", ADAPTERS, ids=lambda name: name.replace(" ", "-"))
def test_peft_loads_and_merges_what_was_written(
    name: str, upgrade: Upgrade, plan: TransferPlan, tmp_path: Path
) -> None:
    adapter = random_adapter(upgrade.folder("old"), tmp_path / "adapter", seed=5, **ADAPTERS[name])
    plan.apply(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(upgrade.folder("new"))
    loaded = load_strictly(upgrade.folder("new"), tmp_path / "out")
    ids = torch.tensor([[5, 9, 30, 7]])
    before = loaded(ids).logits
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(ids).logits, before, atol=1e-4)
    cosine, ratio = compare_effect(upgrade, adapter, tmp_path / "out")
    assert cosine >= 0.9999
    assert ratio == pytest.approx(1, abs=1e-3)


def test_modules_that_cover_different_layers_are_named_in_full(
    upgrade: Upgrade, plan: TransferPlan, tmp_path: Path
) -> None:
    adapter = random_adapter(
        upgrade.folder("old"),
        tmp_path / "adapter",
        targets=["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"],
        rank=3,
        alpha=3,
        seed=1,
    )
    plan.apply(adapter, tmp_path / "out")
    load_strictly(upgrade.folder("new"), tmp_path / "out")
    cosine, ratio = compare_effect(upgrade, adapter, tmp_path / "out")
    assert cosine >= 0.9999
    assert ratio == pytest.approx(1, abs=1e-3)


def test_a_deeper_old_model_leaves_some_of_its_layers_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(320)
    for name, seed, layers in (("old", 1, 5), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tokenizer, tmp_path / name)
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=["q_proj"], rank=2, alpha=2, seed=0)
    folders = (tmp_path / name for name in ("old", "new", "adapter", "out"))
    result = migrate(*folders, plan=PlanConfig(examples=8, method="lstsq"))
    assert sorted(result.plan.layers) == [0, 1, 2]
    assert len(result.unused_old_layers) == 2
    load_strictly(tmp_path / "new", tmp_path / "out")


def test_migrate_is_build_and_apply_to_the_bit(upgrade: Upgrade, plan: TransferPlan, tmp_path: Path) -> None:
    adapter, old, new = (upgrade.folder(name) for name in ("adapter", "old", "new"))
    migrate(old, new, adapter, tmp_path / "direct", plan=PlanConfig(examples=48))
    plan.save(tmp_path / "plan.safetensors")
    loaded = TransferPlan.load(tmp_path / "plan.safetensors")
    loaded.apply(adapter, tmp_path / "planned", old=old, new=new)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "planned" / name).read_bytes()
    facts = json.loads(json.dumps(plan.summary()))
    # Times, memory, device and dtype are of one run, not of the plan.
    lasting = {name: value for name, value in facts["options"].items() if name not in ("device", "dtype")}
    assert loaded.summary() | {"phases": []} == facts | {"phases": [], "options": lasting}


def test_sharded_and_bfloat16_checkpoints_give_the_same_plan(upgrade: Upgrade, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(upgrade.folder("old"), dtype=torch.bfloat16)
    tokenizer = tiny_tokenizer(420)
    save_folder(model, tokenizer, tmp_path / "whole", dtype=torch.bfloat16)
    save_folder(model, tokenizer, tmp_path / "sharded", dtype=torch.bfloat16)
    (tmp_path / "sharded/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    plans = [
        TransferPlan.build(tmp_path / name, upgrade.folder("new"), config=PlanConfig(examples=8, roles=("q", "o")))
        for name in ("whole", "sharded")
    ]
    assert plans[0].old.fingerprint == plans[1].old.fingerprint
    for name, tensor in plans[0].tensors.items():
        assert torch.equal(tensor, plans[1].tensors[name])


def test_identity_transfer_and_identity_heads_return_the_adapter(upgrade: Upgrade, tmp_path: Path) -> None:
    old, adapter = upgrade.folder("old"), upgrade.folder("adapter")
    migrate(
        old,
        old,
        adapter,
        tmp_path / "out",
        plan=PlanConfig(examples=8, transfer="identity", heads="identity", layers="first"),
    )
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "out"))
    for name in before:
        if ".lora_B." in name:
            factor = name.replace("lora_B", "lora_A")
            assert torch.allclose(after[name] @ after[factor], before[name] @ before[factor], atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-5), ("bfloat16", 0.1)])
def test_the_compute_dtype_changes_only_the_rounding(
    dtype: str, tolerance: float, upgrade: Upgrade, plan: TransferPlan, tmp_path: Path
) -> None:
    other = TransferPlan.build(
        upgrade.folder("old"),
        upgrade.folder("new"),
        config=PlanConfig(examples=48, layers="cka"),
        runtime=Runtime(dtype=dtype),
    )
    assert other.options["dtype"] == dtype
    assert other.layers == plan.layers
    for j in plan.layers:
        name = f"layers.{j}.v.blocks"
        assert torch.linalg.vector_norm(
            other.tensors[name] - plan.tensors[name]
        ) < tolerance * torch.linalg.vector_norm(plan.tensors[name])
        assert other.tensors[name].dtype == torch.float32


def test_progress_names_every_phase_and_counts_up(upgrade: Upgrade, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    migrate(
        upgrade.folder("old"),
        upgrade.folder("new"),
        upgrade.folder("adapter"),
        tmp_path / "out",
        plan=PlanConfig(examples=8),
        runtime=Runtime(progress=lambda phase, done, total: seen.setdefault(phase, []).append((done, total))),
    )
    assert list(seen) == [
        "open",
        "transfer matrix",
        "old hidden states",
        "new hidden states",
        "similarity",
        "heads and projections",
        "apply",
    ]
    for steps in seen.values():
        assert steps[0][0] == 0
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]
    assert seen["old hidden states"][-1] == (3, 3)
    assert seen["new hidden states"][-1] == (5, 5)
