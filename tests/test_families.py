"""Every family computes what it should: planted upgrades arrive whole, unlike layers are told apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planted_families import NAMES, TARGETS, config_of, plant_family, random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasuite_fast import ApplyConfig, LoraSuiteError, PlanConfig, migrate
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.adapters.factors import Factors
from lorasuite_fast.distillation.settings import Settings
from lorasuite_fast.distillation.streams import Side, updated
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.hidden_states import LayerStream, padded
from lorasuite_fast.models.vocabulary import shared_tokens
from lorasuite_fast.transfer.projection import _with_constant

import dense_oracle as oracle
import planted
from planted import Planted, random_adapter, save_folder, tiny_tokenizer


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    family: str
    old: dict[str, Any] = field(default_factory=dict)
    new: dict[str, Any] = field(default_factory=dict)
    vocab: int = 420


OLD = {"d": 32, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 8, "f": 48}
NEW = {"d_new": 48, "layers_new": 5, "heads_new": 6, "f_new": 80}
CASES = {
    "GPT-NeoX": Case("gpt_neox"),
    "GPT-NeoX, a larger stream": Case("gpt_neox", new={"stretch": 1.7}),
    "GPT-NeoX, attention and MLP in turn": Case("gpt_neox", {"parallel": False}),
    "Bloom with larger heads": Case(
        "bloom", {"f": 128}, {"heads_new": 4, "head_dim_new": 12, "f_new": 192, "head_map": [0, 1, 2, 3]}
    ),
    "Bloom, tied, more heads of larger size": Case(
        "bloom",
        {"f": 128, "tied": True},
        {"d_new": 96, "heads_new": 8, "head_dim_new": 12, "f_new": 384, "head_map": [1, 3, 5, 7], "stretch": 0.6},
    ),
    "Phi": Case("phi"),
    "Phi, grouped heads": Case("phi", {"kv_heads": 2}),
    "Phi-3, grouped heads": Case("phi3", {"kv_heads": 2}, {"stretch": 2.5}),
    "Gemma": Case("gemma", {"kv_heads": 1, "tied": True}),
    "Gemma 2": Case("gemma2", {"kv_heads": 2, "tied": True}, {"stretch": 1.4}),
    "Gemma 3": Case("gemma3_text", {"kv_heads": 2, "head_dim": 16}),
}


@dataclass
class Upgrade:
    root: Path
    model: Any
    planted: Planted
    case: Case


def make(case: Case, root: Path, seed: int) -> Upgrade:
    model = random_model(config_of(case.family, vocab=case.vocab, **(OLD | case.old)), seed)
    tokenizer = tiny_tokenizer(case.vocab, "bytelevel", seed)
    upgraded = plant_family(model, tokenizer, seed=seed, **(NEW | case.new))
    save_folder(model, tokenizer, root / "old")
    upgraded.save(root / "new")
    return Upgrade(root, model, upgraded, case)


def change(model: Any, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """Change of the logits under a PEFT adapter, all of it in float32."""
    before = planted.logits(model, ids)
    loaded = AutoModelForCausalLM.from_pretrained(adapter.parent / ("old" if adapter.name == "adapter" else "new"))
    return planted.logits(PeftModel.from_pretrained(loaded.eval(), adapter).eval(), ids) - before


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def test_a_planted_upgrade_computes_the_old_function(name: str, tmp_path: Path) -> None:
    upgrade = make(CASES[name], tmp_path, 0)
    ids_o, ids_n = upgrade.planted.random_ids(2, 24, 0)
    old = planted.logits(upgrade.model, ids_o)[..., upgrade.planted.shared_old]
    new = planted.logits(upgrade.planted.model, ids_n)[..., upgrade.planted.shared_new]
    assert old.std() > 0.3
    torch.testing.assert_close(new, old, rtol=0, atol=2e-4 * float(old.abs().max()))


@pytest.mark.parametrize("mlp", [False, True], ids=("attention", "all"))
@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def test_an_adapter_arrives_whole(name: str, mlp: bool, tmp_path: Path) -> None:
    upgrade = make(CASES[name], tmp_path, 1)
    attention, further = TARGETS[upgrade.case.family]
    targets = [*attention, *(further if mlp else [])]
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=targets, rank=4, alpha=8, seed=1)
    result = migrate(
        tmp_path / "old", tmp_path / "new", tmp_path / "adapter", tmp_path / "out", plan=PlanConfig(examples=48)
    )
    assert result.plan.options["method"] == "lstsq"
    assert result.plan.layers == {j: i for i, j in enumerate(upgrade.planted.layer_map)}
    ids_o, ids_n = upgrade.planted.random_ids(4, 24, 0)
    old = change(upgrade.model, tmp_path / "adapter", ids_o)[..., upgrade.planted.shared_old].flatten()
    new = change(upgrade.planted.model, tmp_path / "out", ids_n)[..., upgrade.planted.shared_new].flatten()
    assert float(torch.nn.functional.cosine_similarity(old, new, dim=0)) >= 0.9999
    assert float(new.norm() / old.norm()) == pytest.approx(1, abs=1e-3)
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {t.shape[0] for key, t in stored.items() if "lora_A" in key} == {4}


def two_models(root: Path, old: Any, new: Any) -> None:
    """Two unrelated models that share a tokenizer's tokens."""
    for name, config, seed in (("old", old, 1), ("new", new, 2)):
        model = random_model(config, seed) if not isinstance(config, str) else planted.tiny_model(config, seed)
        save_folder(model, tiny_tokenizer(320), root / name)


def dense(folder: Path, module: str) -> torch.Tensor:
    """The dense update of one module of a saved adapter, (out, in) float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    b, a = (tensors[f"base_model.model.{module}.lora_{which}.weight"].double() for which in "BA")
    settings = json.loads((folder / "adapter_config.json").read_text())
    alpha = next((v for k, v in settings["alpha_pattern"].items() if module.endswith(k)), settings["lora_alpha"])
    return alpha / len(a) * b @ a


PHI3 = config_of("phi3", d=32, layers=2, heads=4, kv_heads=2, head_dim=8, f=48, vocab=320)
NEOX = config_of("gpt_neox", d=32, layers=2, heads=4, kv_heads=4, head_dim=8, f=48, vocab=320)


@pytest.mark.parametrize("method", ["paper", "lstsq"])
def test_three_updates_become_one_fused_update_of_three_times_the_rank(method: str, tmp_path: Path) -> None:
    """Llama to Phi-3 equals Llama to a Llama with Phi-3's weights, q, k and v one below the other."""
    two_models(tmp_path, "llama", PHI3)
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    split = planted.tiny_model("llama", 2)
    state = fused.state_dict()
    for i in range(2):
        for name, sizes, parts in (
            ("self_attn.qkv_proj", [32, 16, 16], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            ("mlp.gate_up_proj", [48, 48], ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            whole = state.pop(f"model.layers.{i}.{name}.weight")
            state |= {f"model.layers.{i}.{p}.weight": w for p, w in zip(parts, whole.split(sizes), strict=True)}
    split.load_state_dict(state)
    save_folder(split, tiny_tokenizer(320), tmp_path / "split")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    random_adapter(
        tmp_path / "old", tmp_path / "adapter", targets=targets, rank=3, alpha=6, seed=3,
        alpha_pattern={"k_proj": 9}, rank_pattern={"v_proj": 2},
    )  # fmt: skip
    for name in ("new", "split"):
        migrate(
            tmp_path / "old",
            tmp_path / name,
            tmp_path / "adapter",
            tmp_path / f"to-{name}",
            plan=PlanConfig(method=method, examples=8, layers="first"),
        )
    for i in range(2):
        found = dense(tmp_path / "to-new", f"model.layers.{i}.self_attn.qkv_proj")
        wanted = [dense(tmp_path / "to-split", f"model.layers.{i}.self_attn.{r}_proj") for r in "qkv"]
        torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-5 * float(found.abs().max()))
    stored = load_file(tmp_path / "to-new/adapter_model.safetensors")
    ranks = {key.split(".")[-3]: t.shape[0] for key, t in stored.items() if "lora_A" in key}
    assert ranks == {"qkv_proj": 8, "o_proj": 3, "gate_up_proj": 6, "down_proj": 3}
    loaded = PeftModel.from_pretrained(fused, tmp_path / "to-new")
    ids = torch.tensor([[5, 9, 30, 7]])
    before = loaded(ids).logits
    assert torch.allclose(loaded.merge_and_unload()(ids).logits, before, atol=1e-4)


def test_a_fused_update_is_taken_apart_for_a_model_without(tmp_path: Path) -> None:
    two_models(tmp_path, NEOX, "llama")
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=["query_key_value"], rank=3, alpha=6, seed=3)
    migrate(
        tmp_path / "old",
        tmp_path / "new",
        tmp_path / "adapter",
        tmp_path / "out",
        plan=PlanConfig(method="paper", examples=8),
    )
    old = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in load_file(tmp_path / "out/adapter_model.safetensors")} == {
        "q_proj", "k_proj", "v_proj",
    }  # fmt: skip
    # Of Eq. (3), A_n = A_o W_h: the row space of every part is that of the one A they shared.
    model = [load_file(tmp_path / n / "model.safetensors") for n in ("old", "new")]
    tables = model[0]["gpt_neox.embed_in.weight"].double(), model[1]["model.embed_tokens.weight"].double()
    W_h = torch.linalg.pinv(tables[0]) @ tables[1]
    carried = old["base_model.model.gpt_neox.layers.0.attention.query_key_value.lora_A.weight"].double() @ W_h
    basis = torch.linalg.qr(carried.T).Q
    for role in "qkv":
        update = dense(tmp_path / "out", f"model.layers.0.self_attn.{role}_proj")
        assert update.norm() > 0
        torch.testing.assert_close(update @ basis @ basis.T, update, rtol=1e-4, atol=1e-4 * float(update.abs().max()))


def test_gated_and_ungated_neurons_are_not_matched(tmp_path: Path) -> None:
    two_models(tmp_path, NEOX, "llama")
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=["dense_h_to_4h"], rank=2, alpha=2, seed=3)
    folders = [tmp_path / name for name in ("old", "new", "adapter", "out")]
    with pytest.raises(LoraSuiteError, match="gated in llama and not in gpt_neox"):
        migrate(*folders, plan=PlanConfig(method="lstsq", examples=8))
    assert not folders[-1].exists()


def test_a_gate_has_no_place_in_a_model_without_one(tmp_path: Path) -> None:
    two_models(tmp_path, "llama", NEOX)
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=["gate_proj"], rank=2, alpha=2, seed=3)
    folders = [tmp_path / name for name in ("old", "new", "adapter", "out")]
    with pytest.raises(LoraSuiteError, match="gpt_neox layer has no gate"):
        migrate(*folders, plan=PlanConfig(method="paper", examples=8))


def test_a_constant_that_lora_cannot_express_is_left_out_and_the_rest_is_exact() -> None:
    """A shift orthogonal to 1 / g: the centred part stays what it was, and nothing blows up."""
    torch.manual_seed(0)
    a, gain = torch.randn(3, 16, dtype=torch.float64), 0.5 + torch.rand(16, dtype=torch.float64)
    shift = torch.randn(16, dtype=torch.float64)
    shift -= (shift / gain).mean() * gain
    assert torch.equal(_with_constant(a, torch.ones(3, dtype=torch.float64), shift, 1 / gain), a)
    shift += 0.3
    moved = _with_constant(a, torch.ones(3, dtype=torch.float64), shift, 1 / gain)
    torch.testing.assert_close(moved @ shift, torch.ones(3, dtype=torch.float64))
    z = torch.randn(5, 16, dtype=torch.float64)
    z -= z.mean(1, keepdim=True)
    torch.testing.assert_close((gain * z) @ moved.T, (gain * z) @ a.T)


@pytest.mark.parametrize("family", NAMES)
def test_a_streamed_pass_with_an_update_equals_peft(family: str, tmp_path: Path) -> None:
    f = 128 if family in ("bloom", "mpt") else 48
    config = config_of(family, d=32, layers=3, heads=4, kv_heads=4, head_dim=8, f=f, vocab=320)
    save_folder(random_model(config, 0), tiny_tokenizer(320), tmp_path / "old")
    attention, mlp = TARGETS[family]
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=[*attention, *mlp], rank=2, alpha=6, seed=0)
    checkpoint = Checkpoint(tmp_path / "old")
    source = read_adapter(tmp_path / "adapter", checkpoint.family, checkpoint.shape, "old")
    rows = torch.arange(3, 27).view(2, 12).tolist()
    stream = LayerStream(checkpoint, *padded(checkpoint, rows), device=torch.device("cpu"), dtype=torch.float32)
    for layer in stream:
        factors = {
            role: Factors(u.factors.b * u.scale, u.factors.a)
            for (i, role), u in source.updates.items()
            if i == layer.index
        }
        with updated(layer.module, checkpoint, factors):
            list(layer.run(stream.hidden))
    side = Side(checkpoint, rows, [torch.arange(12)] * 2, Settings(), torch.device("cpu"))
    head = side.head(torch.arange(320))
    found = head.log_probs(side.last(side.take(0, stream.hidden[0])))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "old").eval()
    base = planted.logits(model, torch.tensor(rows)).flatten(0, 1).log_softmax(-1)
    wanted = planted.logits(PeftModel.from_pretrained(model, tmp_path / "adapter").eval(), torch.tensor(rows))
    wanted = wanted.flatten(0, 1).log_softmax(-1)
    assert (wanted - base).abs().max() > 0.05
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["GPT-NeoX", "Bloom with larger heads", "Phi-3, grouped heads", "Gemma 2", "Gemma 3"])
def test_distillation_carries_a_planted_last_layer(name: str, tmp_path: Path) -> None:
    """Fitted where the adapter acts, on text both models read alike, most of the effect arrives."""
    upgrade = make(CASES[name], tmp_path, 2)
    attention = TARGETS[upgrade.case.family][0]
    random_adapter(
        tmp_path / "old", tmp_path / "adapter", targets=attention[-1:], rank=2, alpha=2, seed=1, layers=[2], size=0.5
    )
    j = upgrade.planted.layer_map[2]
    layers = upgrade.planted.model.config.num_hidden_layers - j
    result = migrate(
        tmp_path / "old",
        tmp_path / "new",
        tmp_path / "adapter",
        tmp_path / "out",
        plan=PlanConfig(method="distill", examples=8),
        apply=ApplyConfig(distill=Settings(layers=layers, max_tokens=48)),
    )
    assert result.distilled.agreement["kl_share"][1] > 0.5
    # Of GPT-NeoX's random biases most is a constant shift already.
    assert result.distilled.agreement["content_kl_share"][1] > 0.02


def test_the_published_projection_takes_the_embeddings_as_they_are_stored(tmp_path: Path) -> None:
    """Gemma multiplies its embeddings by sqrt(d) on their way; an update holds W_h twice."""
    gemma = config_of("gemma3_text", d=48, layers=2, heads=4, kv_heads=2, head_dim=12, f=64, vocab=320)
    two_models(tmp_path, "llama", gemma)
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=["q_proj", "o_proj"], rank=3, alpha=3, seed=3)
    folders = [tmp_path / name for name in ("old", "new", "adapter", "out")]
    result = migrate(*folders, plan=PlanConfig(method="paper", examples=8, layers="first"))
    old, new = ({k: t.double() for k, t in load_file(f / "model.safetensors").items()} for f in folders[:2])
    tokens = shared_tokens(Checkpoint(folders[0]).tokenizer(), Checkpoint(folders[1]).tokenizer())
    table = "model.embed_tokens.weight"
    W_h = oracle.transfer_matrix(old[table][tokens.old], new[table][tokens.new])
    torch.testing.assert_close(result.plan.tensors["W_h"].double(), W_h * 48**0.5, rtol=1e-4, atol=1e-5)
    match = result.plan.tensors["layers.0.heads.match"].tolist()
    layer = "model.layers.0.self_attn."
    delta = {role: dense(folders[2], f"{layer}{role}_proj") for role in "qo"}
    q_o, q_n, o_o, o_n = (w[f"{layer}{role}_proj.weight"] for role in "qo" for w in (old, new))
    wanted_q, wanted_o = torch.zeros_like(q_n), torch.zeros_like(o_n)
    for b, a in enumerate(match):
        rows_o, rows_n = slice(8 * a, 8 * a + 8), slice(12 * b, 12 * b + 12)
        C = q_o[rows_o] @ W_h @ q_n[rows_n].T
        wanted_q[rows_n] = C.T @ delta["q"][rows_o] @ W_h
        wanted_o[:, rows_n] = W_h.T @ delta["o"][:, rows_o] @ (o_o[:, rows_o].T @ W_h @ o_n[:, rows_n])
    for role, wanted in (("q", wanted_q), ("o", wanted_o)):
        found = dense(folders[3], f"{layer}{role}_proj")
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4
