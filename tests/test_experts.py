"""Mixtures of experts: adapters of the attention alone, experts neither read nor compared, forward passes whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planted_experts import Planter
from planted_families import MIXTURES, config_of, plant_family, random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasuite_fast import LoraSuiteError, PlanConfig, TransferPlan, migrate
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.hidden_states import LayerStream, padded

import dense_oracle as oracle
import planted
from planted import random_adapter, save_folder, tiny_tokenizer

OLD: dict[str, Any] = {"d": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "f": 48}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "glm4_moe": {"first_k_dense_replace": 1},
    "llama4_text": {"moe_layers": [1, 2]},
}
"""Config keys that make some layers dense, where a family knows such."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_planted_mixture_gets_the_effect_of_its_attention_adapter(family: str, tmp_path: Path) -> None:
    """The new model computes the old one's function, and PEFT's change of it under the migrated adapter is the old."""
    model = random_model(config_of(family, vocab=420, **OLD), 1)
    upgraded = plant_family(
        model, tiny_tokenizer(420, "bytelevel", 1), seed=1, d_new=48, layers_new=4, heads_new=6, kv_heads_new=3,
        f_new=80, planter_class=Planter,
    )  # fmt: skip
    save_folder(model, tiny_tokenizer(420, "bytelevel", 1), tmp_path / "old")
    upgraded.save(tmp_path / "new")
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=ATTENTION, rank=4, alpha=8, seed=1)
    folders = [tmp_path / name for name in ("old", "new", "adapter", "out")]
    result = migrate(*folders, plan=PlanConfig(examples=24, method="auto" if family == "qwen2_moe" else "lstsq"))
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


@pytest.mark.parametrize("family", MIXTURES)
def test_hidden_states_of_a_mixture_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Layers with experts and layers without, made of the file's tensors."""
    config = config_of(family, vocab=320, **OLD)
    config = type(config).from_dict(config.to_dict() | DENSE.get(family, {}))
    model = random_model(config, 1)
    for module in model.modules():
        if (bias := getattr(module, "e_score_correction_bias", None)) is not None:
            bias.copy_(torch.rand(len(bias)))
    save_folder(model, tiny_tokenizer(320), tmp_path / "old")
    rows = torch.arange(3, 27).view(2, 12).tolist()
    checkpoint = Checkpoint(tmp_path / "old")
    stream = LayerStream(checkpoint, *padded(checkpoint, rows), device=torch.device("cpu"), dtype=torch.float32)
    for layer in stream:
        list(layer.run(stream.hidden))
    wanted: list[torch.Tensor] = []
    kept = model.model.layers[-1].register_forward_hook(
        lambda module, given, out: wanted.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        model(torch.tensor(rows))
    kept.remove()
    assert wanted[0].std() > 0.1
    torch.testing.assert_close(stream.hidden[0], wanted[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_published_projection_of_a_mixture_is_that_of_the_dense_oracle(family: str, tmp_path: Path) -> None:
    model = random_model(config_of(family, vocab=320, **OLD | {"layers": 2}), 1)
    save_folder(model, tiny_tokenizer(320), tmp_path / "old")
    new = planted.tiny_model("llama", 2, d=40, layers=2, heads=4, kv_heads=2, head_dim=6, intermediate=56)
    save_folder(new, tiny_tokenizer(320), tmp_path / "new")
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=ATTENTION, rank=3, alpha=6, seed=3)
    plan = TransferPlan.build(
        tmp_path / "old", tmp_path / "new", config=PlanConfig(method="paper", examples=8, layers="first")
    )
    plan.apply(tmp_path / "adapter", tmp_path / "out")
    tables = [m.get_input_embeddings().weight.detach().double() for m in (model, new)]
    W_h = oracle.transfer_matrix(tables[0], tables[1])
    states = [{name: tensor.double() for name, tensor in m.state_dict().items()} for m in (model, new)]
    weights = [
        oracle.Attention(*(state[f"model.layers.1.self_attn.{r}_proj.weight"] for r in "qkvo"), heads=4, kv_heads=2)
        for state in states
    ]
    given, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    name = "base_model.model.model.layers.1.self_attn.{}_proj.lora_{}.weight"
    updates = {r: oracle.Lora(*(given[name.format(r, x)].double() for x in "BA"), 2.0) for r in "qkvo"}
    match = dict(enumerate(plan.tensors["layers.1.heads.match"].tolist()))
    for role, expected in oracle.project_attention(*weights, W_h, match, updates).items():
        b, a = (found[name.format(role, x)].double() for x in "BA")
        assert float((6 / 3 * b @ a - expected.delta).norm() / expected.delta.norm()) < 1e-3, role


def test_experts_are_not_needed_to_plan(tmp_path: Path) -> None:
    """Files whose experts are of a dtype that nothing here reads give the plan's tensors that whole files give."""
    model = random_model(config_of("mixtral", vocab=320, **OLD), 1)
    for name in ("old", "new"):
        save_folder(model, tiny_tokenizer(320), tmp_path / name)
    file = tmp_path / "new/model.safetensors"
    held = load_file(file)
    experts = [name for name in held if ".experts." in name]
    save_file({n: t.to(torch.uint8) if n in experts else t for n, t in held.items()}, file, metadata={"format": "pt"})
    assert experts
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=ATTENTION, rank=2, alpha=4, seed=3)
    migrate(*(tmp_path / name for name in ("old", "new", "adapter", "out")), plan=PlanConfig(method="copy"))
    given, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    assert set(given) == set(found)


def test_an_adapter_on_experts_is_refused_by_name(tmp_path: Path) -> None:
    model = random_model(config_of("qwen2_moe", vocab=320, **OLD), 1)
    save_folder(model, tiny_tokenizer(320), tmp_path / "old")
    targets = ["q_proj", "shared_expert.up_proj"]
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=targets, rank=2, alpha=4, seed=3)
    checkpoint = Checkpoint(tmp_path / "old")
    with pytest.raises(LoraSuiteError, match=r"shared_expert\.up_proj belongs to the experts of a qwen2_moe model"):
        read_adapter(tmp_path / "adapter", checkpoint.family, checkpoint.shape, "old")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    config = config_of("glm4_moe", vocab=320, **OLD)
    save_folder(random_model(config, 1), tiny_tokenizer(320), tmp_path / "old")
    file = tmp_path / "old/model.safetensors"
    held = load_file(file)
    save_file(held | {"model.layers.3.enorm.weight": torch.ones(32)}, file, metadata={"format": "pt"})
    assert Checkpoint(tmp_path / "old").shape.L == 3
    stated = tmp_path / "old/config.json"
    text = stated.read_text()
    assert '"num_nextn_predict_layers": 1' in text
    stated.write_text(text.replace('"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 0'))
    with pytest.raises(LoraSuiteError, match="not part of a glm4_moe model"):
        Checkpoint(tmp_path / "old")


def test_experts_in_mxfp4_are_unpacked_for_a_forward_pass(tmp_path: Path) -> None:
    """Against the values of the format's table, 32 of 4 bits (the lower half of a byte first) times 2^(scale - 127)."""
    model = random_model(config_of("gpt_oss", vocab=320, **OLD | {"f": 64}), 1)
    save_folder(model, tiny_tokenizer(320), tmp_path / "old")
    file = tmp_path / "old/model.safetensors"
    held, rng = load_file(file), torch.Generator().manual_seed(0)
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor(half + [-v for v in half], dtype=torch.float64)
    wanted, packed = dict(held), {}
    for name in [n for n in held if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = held[name].shape
        blocks = torch.randint(256, (experts, out, into // 32, 16), generator=rng, dtype=torch.uint8)
        scales = torch.randint(122, 125, (experts, out, into // 32), generator=rng, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1).flatten(-2)
        numbers = numbers * 2.0 ** (scales.double() - 127)[..., None]
        wanted[name] = numbers.flatten(-2).transpose(1, 2).float().contiguous()
        del held[name]
    assert len(packed) == 12
    save_file(held | packed, file, metadata={"format": "pt"})
    model.load_state_dict(wanted)
    rows = torch.arange(3, 27).view(2, 12).tolist()
    checkpoint = Checkpoint(tmp_path / "old")
    stream = LayerStream(checkpoint, *padded(checkpoint, rows), device=torch.device("cpu"), dtype=torch.float32)
    for layer in stream:
        list(layer.run(stream.hidden))
    with torch.no_grad():
        states = model.model.norm(stream.hidden[0])
        found = model.lm_head(states)
    torch.testing.assert_close(found, planted.logits(model, torch.tensor(rows)), rtol=0, atol=1e-4)
