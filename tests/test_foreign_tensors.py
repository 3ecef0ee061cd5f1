"""Checkpoints that hold more than the model, or name it otherwise, as trainers and servers leave them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasuite_fast import LoraSuiteError
from lorasuite_fast.adapters.aligned_states import LoadedModel
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.hidden_states import LayerStream, padded

from planted import save_folder, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
ROWS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_folder(tiny_model("llama", 1, layers=2), tiny_tokenizer(320, seed=1), tmp_path / "model")
    return tmp_path / "model"


def shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    places = {name: f"{n % 2}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@torch.inference_mode()
def agrees(folder: Path, logits: torch.Tensor) -> None:
    """Both ways of reading give the model that is meant."""
    loaded = LoadedModel(folder, "OLD", device=CPU, dtype=torch.float32)
    assert torch.equal(loaded.model(torch.tensor([ROWS[0]])).logits, logits)
    checkpoint = Checkpoint(folder)
    stream = LayerStream(checkpoint, *padded(checkpoint, ROWS), device=CPU, dtype=torch.float32)
    states = loaded.backbone(torch.tensor([ROWS[0]]), output_hidden_states=True).hidden_states
    outputs = [output[0, :4].clone() for layer in stream for output in layer.run(stream.hidden)]
    assert torch.allclose(outputs[0], states[1][0], atol=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_wrappers_prefix_is_left_off_and_said_once(
    prefix: str, sharded: bool, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Checkpoint(model).fingerprint()
    logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([ROWS[0]])).logits.detach()
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    if sharded:
        shard(model, tensors)
    with caplog.at_level(logging.WARNING, "lorasuite_fast"):
        assert Checkpoint(model).fingerprint() == plain
        agrees(model, logits)
    told = [record.getMessage() for record in caplog.records if record.name == "lorasuite_fast"]
    assert len(told) == 1
    assert prefix in told[0]


EXTRA = {
    "v_head.summary.weight": (1, 32),
    "score.weight": (2, 32),
    "mtp.layers.0.mlp.up_proj.weight": (4, 32),
    "model.mtp.fc.weight": (4, 32),
    "model.layers.0.self_attn.k_scale": (1,),
    "model.layers.1.self_attn.kv_scale": (1,),
    "model.layers.1.self_attn.v_proj.output_scale": (1,),
}


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_not_the_language_models_is_left_out_and_said_once(
    sharded: bool, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Checkpoint(model).fingerprint()
    logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([ROWS[0]])).logits.detach()
    tensors = load_file(model / "model.safetensors") | {name: torch.ones(shape) for name, shape in EXTRA.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    if sharded:
        shard(model, tensors)
    with caplog.at_level(logging.WARNING, "lorasuite_fast"):
        assert Checkpoint(model).fingerprint() == plain
        agrees(model, logits)
    told = [record.getMessage() for record in caplog.records if record.name == "lorasuite_fast"]
    assert len(told) == 1
    assert f"{len(EXTRA)} tensors" in told[0]


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight_scale", "model.layers.7.mlp.up_proj.weight", "mtp", "a.score.weight"]
)
def test_other_tensors_are_refused_as_before(name: str, model: Path) -> None:
    tensors = load_file(model / "model.safetensors") | {name: torch.ones(1)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoraSuiteError, match="is not part of a llama model"):
        Checkpoint(model)


def test_a_prefix_of_some_names_is_no_wrappers(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["_orig_mod.model.norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoraSuiteError, match=r"tensor model\.norm\.weight is missing"):
        Checkpoint(model)


@pytest.mark.parametrize(
    ("stated", "stored", "named"),
    [
        ({"quant_method": "gptq", "bits": 3}, "qweight", "GPTQ, 3 bit"),
        ({"quant_method": "awq", "bits": 4}, "qweight", "AWQ, 4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "weight", "bitsandbytes, 4 bit"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "float8", "FP8"),
        ({"quant_method": "compressed-tensors"}, "weight_packed", "compressed-tensors"),
    ],
)
def test_a_quantised_checkpoint_is_refused_by_its_kind(
    stated: dict[str, object], stored: str, named: str, model: Path
) -> None:
    """Whether its tensors have other names, another shape or another dtype."""
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        if stored == "float8":
            tensors[name] = weight.to(torch.float8_e4m3fn)
        else:
            tensors[f"{name.removesuffix('weight')}{stored}"] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    with pytest.raises(LoraSuiteError, match=rf"its weights are quantised \({named}\).*pass the 16-bit model"):
        Checkpoint(model)
