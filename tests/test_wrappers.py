"""Multimodal classes: the text model inside is found, its adapters carried, and the rest left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planted_families import NAMES, TARGETS, config_of, plant_family, random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorasuite_fast import LoraSuiteError, PlanConfig, VerifyConfig, migrate, verify
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.family_table import WRAPPERS

import planted
from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

OLD: dict[str, Any] = {"d": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "f": 48}
NEW: dict[str, Any] = {"d_new": 48, "layers_new": 3, "heads_new": 6, "kv_heads_new": 3, "f_new": 80}
LLAMA = (["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"])
TEXTS = {
    "gemma3": "gemma3_text",
    "mistral3": "ministral3",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "llava": "llama",
    "llava_next": "mistral",
    "paligemma": "gemma",
    "smolvlm": "llama",
    "idefics3": "llama",
    "internvl": "qwen2",
}
"""What stands in each wrapper here."""
_TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
          "image_size": 28, "patch_size": 14}  # fmt: skip
_QWEN_TOWER = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 14, "intermediate_size": 16,
               "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0],
               "num_position_embeddings": 16}  # fmt: skip
_TOWERS = {
    "gemma3": _TOWER | {"model_type": "siglip_vision_model"},
    "mistral3": _TOWER | {"model_type": "pixtral"},
    "llava": _TOWER | {"model_type": "clip_vision_model"},
    "llava_next": _TOWER | {"model_type": "clip_vision_model"},
    "paligemma": _TOWER | {"model_type": "siglip_vision_model", "projection_dim": 16},
    "smolvlm": _TOWER | {"model_type": "smolvlm_vision"},
    "idefics3": _TOWER | {"model_type": "idefics3_vision"},
    "internvl": _TOWER | {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def wrapped(wrapper: str, text: Any) -> Any:
    """The wrapper around a text model: its tower is random and has as many layers, its text the given weights."""
    inner = text.config.to_dict()
    tower = _TOWERS.get(wrapper)
    if wrapper.startswith("qwen"):
        width = text.config.hidden_size
        size = {"hidden_size": width} if wrapper == "qwen2_vl" else {"hidden_size": 16, "out_hidden_size": width}
        tower = _QWEN_TOWER | size
        inner = {k: v for k, v in inner.items() if k not in ("model_type", "layer_types")} | {"rope_parameters": _MROPE}
    further = {"scale_factor": 1} if wrapper in ("smolvlm", "idefics3") else {}
    config = CONFIG_MAPPING[wrapper](text_config=inner, vision_config=tower, tie_word_embeddings=False, **further)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    model.get_submodule(WRAPPERS[wrapper].text).load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return model


def upgrade(wrapper: str, root: Path) -> Any:
    """Folders old and new of a wrapper, text (the old one's text model alone) and an adapter of it."""
    family = TEXTS[wrapper]
    tokenizer = tiny_tokenizer(420, "bytelevel", 1)
    if family in NAMES:
        text = random_model(config_of(family, vocab=420, **OLD), 1)
        made = plant_family(text, tokenizer, seed=1, **NEW)
    else:
        text = tiny_model(family, 1, vocab=420)
        sizes = {k: v for k, v in NEW.items() if k != "f_new"} | {"intermediate_new": 80}
        made = planted.plant(text, tokenizer, added_tokens=20, seed=1, **sizes)
    save_folder(text, tokenizer, root / "text")
    save_folder(wrapped(wrapper, text), tokenizer, root / "old")
    save_folder(wrapped(wrapper, made.model), made.tokenizer, root / "new")
    targets = [module for part in TARGETS.get(family, LLAMA) for module in part]
    random_adapter(root / "text", root / "adapter", targets=targets, rank=4, alpha=8, seed=1)
    # Trained on the text's class, whose folder is another than the wrapper's.
    path = root / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    return made


def change(folder: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    before = planted.logits(model, ids)
    return planted.logits(PeftModel.from_pretrained(model, adapter).eval(), ids) - before


def test_every_wrapper_of_the_table_is_tried() -> None:
    assert set(TEXTS) == set(WRAPPERS)


@pytest.mark.parametrize("wrapper", TEXTS)
def test_a_wrapped_upgrade_gets_the_effect_under_the_keys_of_its_class(wrapper: str, tmp_path: Path) -> None:
    made = upgrade(wrapper, tmp_path)
    folders = [tmp_path / name for name in ("old", "new", "adapter", "out")]
    result = migrate(*folders, plan=PlanConfig(examples=24))
    assert result.plan.options["method"] == "lstsq"
    assert result.plan.layers == {j: i for i, j in enumerate(made.layer_map)}
    ids_o, ids_n = made.random_ids(3, 24, 0)
    worn = renamed(tmp_path / "adapter", tmp_path / "worn", f"{WRAPPERS[wrapper].text}.")
    old = change(tmp_path / "old", worn, ids_o)[..., made.shared_old]
    new = change(tmp_path / "new", tmp_path / "out", ids_n)[..., made.shared_new]
    assert old.std() > 0.01
    assert float(torch.nn.functional.cosine_similarity(old.flatten(), new.flatten(), dim=0)) >= 0.9999
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(name.startswith(f"base_model.model.{WRAPPERS[wrapper].text}.layers.") for name in written)
    assert "model = AutoModelForImageTextToText.from_pretrained(" in (tmp_path / "out/README.md").read_text()


def renamed(adapter: Path, out: Path, prefix: str) -> Path:
    """An adapter whose modules begin with another prefix, as another class of transformers has them."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    out.mkdir()
    moved = {name.replace("base_model.model.model.", f"base_model.model.{prefix}"): t for name, t in tensors.items()}
    save_file(moved, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return out


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gemma3")
    upgrade("gemma3", root)
    return root


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.text_model.", "model."])
@pytest.mark.parametrize("model", ["text", "old"])
def test_adapters_are_read_under_every_classes_prefix(prefix: str, model: str, gemma: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(gemma / model)
    wanted = read_adapter(gemma / "adapter", checkpoint.family, checkpoint.shape, "old").updates
    found = read_adapter(renamed(gemma / "adapter", tmp_path / "a", prefix), checkpoint.family, checkpoint.shape, "old")
    assert found.updates.keys() == wanted.keys()
    assert all(torch.equal(u.factors.b, wanted[key].factors.b) for key, u in found.updates.items())


def test_one_module_under_two_prefixes_is_refused(gemma: Path, tmp_path: Path) -> None:
    folder = renamed(gemma / "adapter", tmp_path / "a", "language_model.model.")
    both = load_file(folder / "adapter_model.safetensors") | load_file(gemma / "adapter/adapter_model.safetensors")
    save_file(both, folder / "adapter_model.safetensors")
    checkpoint = Checkpoint(gemma / "old")
    with pytest.raises(LoraSuiteError, match="are one module under two names"):
        read_adapter(folder, checkpoint.family, checkpoint.shape, "old")


def test_an_adapter_of_the_vision_tower_is_refused_by_name(gemma: Path, tmp_path: Path) -> None:
    folder = renamed(gemma / "adapter", tmp_path / "a", "vision_tower.encoder.")
    checkpoint = Checkpoint(gemma / "old")
    with pytest.raises(
        LoraSuiteError, match=r"vision_tower.encoder.layers.0.* is not one a gemma3/gemma3_text adapter"
    ):
        read_adapter(folder, checkpoint.family, checkpoint.shape, "old")


def test_sizes_a_wrapper_leaves_out_are_those_of_the_texts_class(gemma: Path, tmp_path: Path) -> None:
    """As in Gemma 3's own files, whose text_config names neither the heads nor the vocabulary where they are usual."""
    settings = json.loads((gemma / "old/config.json").read_text())
    whole = Checkpoint(gemma / "old")
    for key in ("num_attention_heads", "num_key_value_heads"):
        del settings["text_config"][key]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((gemma / "old" / name).read_bytes())
    assert whole.shape.H == 4
    # Gemma 3's own default is 8 heads, which these weights do not have.
    with pytest.raises(LoraSuiteError, match=r"self_attn.q_proj.weight is \[32, 32\], config.json makes it \[64, 32\]"):
        Checkpoint(folder)


def test_keys_at_the_top_of_an_older_config_are_the_texts(tmp_path: Path) -> None:
    """Qwen2-VL's own files have no text_config."""
    text = tiny_model("qwen2", 1, vocab=420)
    save_folder(wrapped("qwen2_vl", text), tiny_tokenizer(420), tmp_path / "old")
    path = tmp_path / "old/config.json"
    settings = json.loads(path.read_text())
    inner = settings.pop("text_config")
    path.write_text(json.dumps({k: v for k, v in inner.items() if k != "model_type"} | settings))
    found = Checkpoint(tmp_path / "old")
    assert (found.shape.L, found.shape.H, found.shape.G, found.family.model_type) == (2, 4, 2, "qwen2_vl/qwen2_vl_text")


def test_an_unknown_text_inside_a_wrapper_is_named(gemma: Path, tmp_path: Path) -> None:
    settings = json.loads((gemma / "old/config.json").read_text())
    settings["text_config"]["model_type"] = "mamba"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(LoraSuiteError, match="the text model inside this gemma3, 'mamba', is not supported"):
        Checkpoint(tmp_path)


def test_a_wrapper_is_verified_and_its_text_alone_carries_to_it(gemma: Path, tmp_path: Path) -> None:
    """From the text's class to the wrapper: one family, so that the adapter may be copied; both are read whole."""
    migrate(gemma / "text", gemma / "old", gemma / "adapter", tmp_path / "out", plan=PlanConfig(method="copy"))
    copied = load_file(tmp_path / "out/adapter_model.safetensors")
    source = load_file(gemma / "adapter/adapter_model.safetensors")
    inside = "base_model.model.model."
    moved = {name.replace(inside, f"{inside}language_model."): t for name, t in source.items()}
    assert copied.keys() == moved.keys()
    assert all(torch.equal(copied[name], t) for name, t in moved.items())
    found = verify(
        gemma / "text",
        gemma / "adapter",
        gemma / "old",
        tmp_path / "out",
        config=VerifyConfig(examples=8, max_tokens=32),
    )
    assert found.effect.carried.cosine.value > 0.9999
