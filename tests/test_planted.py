"""The planted upgrades are what they claim: another model and tokenizer, the same function."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import planted
from planted import Planted, plant, tiny_model, tiny_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION = {"mha": 4, "gqa": 2, "mqa": 1}
TEXT = "The old héron waits near the river, and a new one comes."


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small lose more to waiting for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def upgrade(model: PreTrainedModel, seed: int, kind: str = "bytelevel", **changes: object) -> Planted:
    shape = {"d_new": 48, "layers_new": 4, "heads_new": 6, "intermediate_new": 64, "added_tokens": 20}
    vocab = model.config.vocab_size
    return plant(model, tiny_tokenizer(vocab, kind, seed), seed=seed, **(shape | changes))


def shared_logits(model: PreTrainedModel, upgraded: Planted, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of both models over the shared tokens, (2, 24, shared) each."""
    ids_o, ids_n = upgraded.random_ids(2, 24, seed)
    old = planted.logits(model, ids_o)[..., upgraded.shared_old]
    new = planted.logits(upgraded.model, ids_n)[..., upgraded.shared_new]
    return old, new


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, False], ids=("tied", "untied"))
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_planted_logits_equal_old_logits_in_float32(family: str, attention: str, tied: bool, seed: int) -> None:
    model = tiny_model(family, seed, kv_heads=ATTENTION[attention], tied=tied)
    old, new = shared_logits(model, upgrade(model, seed, flip_neurons=seed == 1), seed)
    torch.testing.assert_close(new, old, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_planted_logits_equal_old_logits_in_float64(family: str, attention: str) -> None:
    model = planted.in_float64(tiny_model(family, 3, kv_heads=ATTENTION[attention], tied=True, eps=1e-2))
    upgraded = upgrade(tiny_model(family, 3, kv_heads=ATTENTION[attention], tied=True, eps=1e-2).double(), 3)
    ids_o, ids_n = upgraded.random_ids(2, 24, 3)
    old = planted.logits(model, ids_o)[..., upgraded.shared_old]
    new = planted.logits(planted.in_float64(upgraded.model), ids_n)[..., upgraded.shared_new]
    assert old.std() > 0.3
    torch.testing.assert_close(new, old, rtol=0, atol=1e-9)


def test_every_aspect_of_an_upgrade_changes() -> None:
    model = tiny_model("qwen2", 0, tied=True)
    old, new = model.config, upgrade(model, 0).model.config
    assert new.vocab_size != old.vocab_size
    assert (new.hidden_size, new.intermediate_size, new.num_hidden_layers) == (48, 64, 4)
    assert (new.num_attention_heads, new.num_key_value_heads) == (6, 6)
    assert (old.num_attention_heads, old.num_key_value_heads) == (4, 2)
    assert old.tie_word_embeddings
    assert not new.tie_word_embeddings


def test_grouped_attention_can_be_kept() -> None:
    model = tiny_model("llama", 0, kv_heads=2)
    upgraded = upgrade(model, 0, heads_new=8, kv_heads_new=4)
    old, new = shared_logits(model, upgraded, 0)
    assert upgraded.model.config.num_key_value_heads == 4
    torch.testing.assert_close(new, old, rtol=0, atol=1e-4)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        upgrade(tiny_model("llama", 0, kv_heads=4), 0, heads_new=6, kv_heads_new=2)


def test_attention_and_mlp_biases_of_llama_follow() -> None:
    config = tiny_model("llama", 0).config
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    old, new = shared_logits(model, upgrade(model, 0), 0)
    torch.testing.assert_close(new, old, rtol=0, atol=1e-4 * float(old.abs().max()))


def test_sliding_windows_stay_on_their_layers() -> None:
    config = tiny_model("qwen2", 0, layers=3).config.to_dict()
    config |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None}
    model = AutoModelForCausalLM.from_config(planted.FAMILIES["qwen2"](**config))
    model.load_state_dict(tiny_model("qwen2", 0, layers=3).state_dict())
    old, new = shared_logits(model.eval(), upgrade(model, 0, layers_new=5, identity_at=(0, 3)), 0)
    assert "sliding_attention" in model.config.layer_types
    torch.testing.assert_close(new, old, rtol=0, atol=1e-4)


def test_unused_directions_of_the_new_width_stay_unused() -> None:
    model = tiny_model("llama", 0).double()
    upgraded = upgrade(model, 0)
    rows = upgraded.model.get_input_embeddings().weight
    torch.testing.assert_close(rows @ upgraded.Q.T @ upgraded.Q, rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(upgraded.Q @ upgraded.Q.T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-12)


def test_layer_map_carries_every_residual_state() -> None:
    model = tiny_model("mistral", 0)
    upgraded = upgrade(model, 0, identity_at=(1, 3))
    ids_o, ids_n = upgraded.random_ids(1, 12, 0)
    with torch.no_grad():
        old = model(ids_o, output_hidden_states=True).hidden_states
        new = upgraded.model(ids_n, output_hidden_states=True).hidden_states
    assert upgraded.layer_map == [0, 2]
    for i, j in enumerate(upgraded.layer_map):
        torch.testing.assert_close(new[j], old[i] @ upgraded.Q.float(), rtol=0, atol=1e-5)


def test_neuron_and_head_maps_point_at_the_carried_weights() -> None:
    model = tiny_model("llama", 0, gains=False).double()
    upgraded = upgrade(model, 0, flip_neurons=True)
    j, Q, h = upgraded.layer_map[1], upgraded.Q, 8
    old, new = model.model.layers[1], upgraded.model.model.layers[j]
    up = new.mlp.up_proj.weight[upgraded.neuron_map[1]] / upgraded.neuron_scale[1][:, None]
    torch.testing.assert_close(up @ Q.T, old.mlp.up_proj.weight * (32 / 48) ** 0.5)
    down = new.mlp.down_proj.weight[:, upgraded.neuron_map[1]] * upgraded.neuron_scale[1]
    torch.testing.assert_close(Q @ down, old.mlp.down_proj.weight)
    o = new.self_attn.o_proj.weight.unflatten(1, (-1, h))[:, upgraded.head_map[1]].flatten(1)
    torch.testing.assert_close(Q @ o, old.self_attn.o_proj.weight)


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
def test_tiny_tokenizers_have_the_asked_size_and_round_trip(kind: str, tmp_path: Path) -> None:
    tiny_tokenizer(400, kind, 0).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 400
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert len(ids) < len(TEXT.encode())


@pytest.mark.parametrize(
    ("kind", "family"),
    [("bytelevel", family) for family in FAMILIES] + [("sentencepiece", "llama"), ("sentencepiece", "mistral")],
)
def test_saved_upgrade_loads_with_the_same_logits_and_a_working_tokenizer(
    kind: str, family: str, tmp_path: Path
) -> None:
    model = tiny_model(family, 0, vocab=420)
    old_tokenizer = tiny_tokenizer(420, kind, 0)
    upgraded = upgrade(model, 0, kind)
    upgraded.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    _, ids_n = upgraded.random_ids(1, 8, 0)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(planted.logits(loaded, ids_n), planted.logits(upgraded.model, ids_n), rtol=0, atol=0)

    assert len(tokenizer) == loaded.config.vocab_size == 420 - (420 - len(upgraded.token_map)) + 20
    assert tokenizer.decode(tokenizer(TEXT).input_ids, skip_special_tokens=True) == TEXT
    assert tokenizer.bos_token_id == loaded.config.bos_token_id == upgraded.token_map[1]
    if kind == "sentencepiece":
        assert tokenizer(TEXT).input_ids[0] == tokenizer.bos_token_id
    old_names = old_tokenizer.convert_ids_to_tokens(upgraded.shared_old.tolist())
    assert tokenizer.convert_ids_to_tokens(upgraded.shared_new.tolist()) == old_names


def test_about_a_tenth_of_the_ordinary_tokens_is_dropped_and_none_of_the_base_alphabet() -> None:
    tokenizer = tiny_tokenizer(459, "bytelevel", 0)
    upgraded = plant(
        tiny_model("llama", 0, vocab=459), tokenizer,
        d_new=48, layers_new=3, heads_new=6, intermediate_new=64, added_tokens=7, seed=0,
    )  # fmt: skip
    gone = set(range(459)) - set(upgraded.token_map)
    assert len(gone) == 20
    assert all(len(token) > 1 for token in tokenizer.convert_ids_to_tokens(sorted(gone)))
    assert len(upgraded.tokenizer) == 459 - 20 + 7


def test_embedding_rows_without_a_token_are_kept() -> None:
    model = tiny_model("llama", 0, vocab=330)
    upgraded = plant(
        model, tiny_tokenizer(320, "bytelevel", 0),
        d_new=48, layers_new=3, heads_new=6, intermediate_new=64, added_tokens=4, seed=0,
    )  # fmt: skip
    old, new = shared_logits(model, upgraded, 0)
    assert upgraded.model.config.vocab_size == len(upgraded.tokenizer) + 10
    torch.testing.assert_close(new, old, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_random_adapter_changes_logits_and_honours_its_patterns(rslora: bool, tmp_path: Path) -> None:
    model = tiny_model("qwen2", 0)
    planted.save_folder(model, None, tmp_path / "model")
    adapter = planted.random_adapter(
        tmp_path / "model", tmp_path / "adapter", targets=("q_proj", "down_proj"), rank=4, alpha=8, seed=0,
        rslora=rslora, rank_pattern={"down_proj": 2}, layers=(1,),
    )  # fmt: skip
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {name.split("layers.")[1].split(".")[0] for name in tensors} == {"1"}
    factors = {name.rsplit("self_attn.", 1)[-1]: t for name, t in tensors.items() if "q_proj" in name}
    scale = 8 / (4**0.5 if rslora else 4)
    update = scale * factors["q_proj.lora_B.weight"] @ factors["q_proj.lora_A.weight"]
    ratio = update.norm() / model.model.layers[1].self_attn.q_proj.weight.norm()
    assert ratio.item() == pytest.approx(0.15, rel=1e-5)
    assert {t.shape[0] for name, t in tensors.items() if "down_proj.lora_A" in name} == {2}

    change = planted.effect(model, adapter, torch.arange(12).view(1, 12))
    assert change.dtype == torch.float64
    assert change.abs().max() > 1e-2
    assert model.dtype == torch.float32
