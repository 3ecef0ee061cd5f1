"""What is loaded of a model folder: the bare model, of the weights that plans and fingerprints read."""

from __future__ import annotations

import ast
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorasuite_fast
from lorasuite_fast import LoraSuiteError
from lorasuite_fast.adapters.aligned_states import LoadedModel, load_tokenizer, read_sizes
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.hidden_states import LayerStream, padded

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_folder(tiny_model("llama", 1, layers=2), tiny_tokenizer(320, seed=1), tmp_path / "model")
    return tmp_path / "model"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def loaded(folder: Path) -> LoadedModel:
    return LoadedModel(folder, "OLD", device=CPU, dtype=torch.float32)


@torch.inference_mode()
def test_an_adapter_in_the_model_folder_is_no_part_of_the_model(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(IDS).logits
    random_adapter(model, tmp_path / "adapter", targets=["q_proj", "o_proj"], rank=2, alpha=64, seed=0)
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, model / file.name)
    changed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(IDS).logits
    assert not torch.allclose(changed, expected, atol=1e-3), "transformers no longer loads the adapter by itself"
    with caplog.at_level(logging.WARNING, "lorasuite_fast"):
        assert torch.equal(loaded(model).model(IDS).logits, expected)
        loaded(model)
    told = [record.getMessage() for record in caplog.records if record.name == "lorasuite_fast"]
    assert told == [f"{model}: holds an adapter as well (adapter_config.json); the model is read without it"]


def test_an_adapter_config_that_names_another_base_is_not_followed(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}')
    loaded(model)


def test_a_config_that_names_other_weights_is_refused_wherever_it_is_read(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({n: t * 2 for n, t in tensors.items()}, model / "other.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(model)
    edit_json(model / "config.json", transformers_weights="other.safetensors")
    rows = padded(checkpoint, [[1, 2]])
    for read in (
        lambda: Checkpoint(model),
        lambda: loaded(model),
        lambda: read_sizes(model, "OLD"),
        lambda: LayerStream(checkpoint, *rows, device=CPU, dtype=torch.float32),
    ):
        with pytest.raises(LoraSuiteError, match=r"transformers_weights is 'other\.safetensors'.*model\.safetensors"):
            read()


def test_a_config_that_names_the_weights_read_here_is_accepted(model: Path) -> None:
    edit_json(model / "config.json", transformers_weights="model.safetensors")
    Checkpoint(model)
    loaded(model)


def test_a_tokenizer_or_model_that_needs_code_names_the_option(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.X", None]}, tokenizer_class="X")
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    with pytest.raises(LoraSuiteError, match="`trust_remote_code=True`"):
        load_tokenizer(model, "OLD")
    edit_json(model / "config.json", auto_map={"AutoConfig": "c.X"}, model_type="unheard_of")
    with pytest.raises(LoraSuiteError, match="`trust_remote_code=True`"):
        read_sizes(model, "OLD")


def test_only_one_module_loads_through_transformers() -> None:
    """Of the classes of transformers; PEFT's stand where an adapter is put on."""
    callers = set()
    for file in Path(lorasuite_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
                owner = ast.unparse(node.value)
                if owner.startswith("Auto"):
                    callers.add(file.name)
    assert callers == {"pretrained.py"}
