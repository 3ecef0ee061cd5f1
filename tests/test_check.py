"""Adapters that load and do nothing are told from those that work, for PEFT and for three servers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from planted_families import config_of, random_model
from safetensors.torch import load_file, save_file
from test_wrappers import wrapped
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

import lorasuite_fast
from lorasuite_fast import AdapterCheck, LoraSuiteError, check
from lorasuite_fast.cli.app import app

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODULES = 2 * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tiny_model("llama", 0), tiny_tokenizer(), tmp_path_factory.mktemp("check") / "model")


@pytest.fixture(scope="module")
def made(model: Path) -> Path:
    targets = ["q_proj", "o_proj", "up_proj"]
    return random_adapter(model, model.parent / "made", targets=targets, rank=4, alpha=8, seed=1)


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def rename(adapter: Path, new_name: Callable[[str], str]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, adapter / WEIGHTS)


def edit(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | changes))


def active(result: AdapterCheck) -> dict[str, int]:
    return {reader.name: reader.active for reader in result.readers}


def changes_logits(model: Path, adapter: Path) -> bool:
    """The obvious way: both models run."""
    ids = torch.arange(5, 15)[None]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, adapter)(ids).logits
    return not torch.equal(before, after)


def test_a_sound_adapter_is_active_everywhere(model: Path, adapter: Path) -> None:
    result = check(model, adapter)
    assert active(result) == dict.fromkeys(("PEFT", "vLLM", "llama.cpp", "SGLang"), MODULES)
    assert result.fine
    assert result.unread == 0
    assert result.modules == MODULES
    assert all(reader.lost == 0 and reader.refused is None for reader in result.readers)
    assert repr(result).count("\n") == 0
    assert json.dumps(result.as_dict())
    assert changes_logits(model, adapter)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.model.", "base_model.model.model.language_model."),
        ("base_model.model.model.", "model."),
        ("base_model.model.model.", "base_model.model."),
    ],
    ids=["a-wrapper's-prefix", "no-prefix", "the-bare-model's"],
)
def test_keys_with_another_prefix_are_a_no_op_and_told(old: str, new: str, model: Path, adapter: Path) -> None:
    rename(adapter, lambda name: name.replace(old, new))
    assert not changes_logits(model, adapter)
    result = check(model, adapter)
    peft = result.readers[0]
    assert (peft.active, peft.lost, peft.refused) == (0, 4 * MODULES // 2, None)
    assert set(peft.lost_keys) == set(load_file(adapter / WEIGHTS))
    assert not result.fine


def test_a_part_of_the_keys_with_another_prefix_is_told(model: Path, adapter: Path) -> None:
    wrong = "base_model.model.model.language_model.layers.1"
    rename(adapter, lambda name: name.replace("base_model.model.model.layers.1", wrong))
    result = check(model, adapter)
    assert result.readers[0].active == MODULES // 2 == active(result)["vLLM"]
    assert result.readers[0].lost == MODULES
    assert not result.fine
    assert "names 3 modules without tensors" in result.readers[0].notes[0]


def test_targets_that_match_nothing_are_told(model: Path, adapter: Path) -> None:
    edit(adapter, target_modules=["query_key_value"])
    result = check(model, adapter)
    assert result.readers[0].active == 0
    assert not result.fine
    assert "query_key_value" in str(result.readers[0].refused)


def test_targets_that_leave_tensors_out_are_told(model: Path, adapter: Path) -> None:
    edit(adapter, target_modules=["q_proj"])
    result = check(model, adapter)
    assert result.readers[0].active == 2
    assert not result.fine
    assert all("q_proj" not in key for key in result.readers[0].lost_keys)


def test_an_adapter_of_another_width_is_refused_by_peft(model: Path, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file(tensors | {name: torch.zeros(4, 64)}, adapter / WEIGHTS)
    refused = check(model, adapter).readers[0].refused
    assert refused is not None
    assert "size mismatch" in refused
    assert "q_proj" in refused


@pytest.mark.parametrize(
    ("prefix", "active_in_peft"), [("model.language_model.", 2), ("language_model.model.", 2), ("model.", 0)]
)
def test_a_multimodal_class_reads_its_own_prefixes(prefix: str, active_in_peft: int, tmp_path: Path) -> None:
    """The second is that of older releases, which PEFT maps for this class."""
    model = save_folder(wrapped("llava", tiny_model("llama", 0)), None, tmp_path / "model")
    base = AutoModelForImageTextToText.from_pretrained(model)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=r".*language_model.*q_proj")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    rename(tmp_path / "adapter", lambda name: name.replace("model.language_model.", prefix))
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    save_file({name: torch.ones_like(tensor) for name, tensor in tensors.items()}, tmp_path / "adapter" / WEIGHTS)
    result = check(model, tmp_path / "adapter")
    assert result.readers[0].active == active_in_peft
    assert result.fine == bool(active_in_peft)
    assert any("multimodal" in note for note in result.readers[1].notes) == (prefix != "model.language_model.")
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), tmp_path / "adapter")
    factors = [tensor for name, tensor in loaded.named_parameters() if "lora_B" in name]
    assert sum(bool(tensor.any()) for tensor in factors) == active_in_peft


@pytest.mark.parametrize(("family", "active_in_peft", "lost"), [("olmoe", 6, 0), ("gpt_oss", 2, 48)])
def test_experts_one_by_one_are_active_only_where_peft_joins_them(
    family: str, active_in_peft: int, lost: int, tmp_path: Path
) -> None:
    """A file with a LoRA on every expert, for classes that have all experts in one tensor."""
    sizes: dict[str, Any] = {"d": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "f": 48, "vocab": 320}
    model = save_folder(random_model(config_of(family, **sizes), 0), tiny_tokenizer(), tmp_path / "model")
    adapter = random_adapter(model, tmp_path / "adapter", targets=["q_proj"], rank=2, alpha=4, seed=1)
    tensors = load_file(adapter / WEIGHTS)
    shapes = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    for layer, expert, (name, (out, into)) in product(range(2), range(4), shapes.items()):
        module = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
        tensors |= {f"{module}.lora_A.weight": torch.ones(2, into), f"{module}.lora_B.weight": torch.ones(out, 2)}
    save_file(tensors, adapter / WEIGHTS)
    edit(adapter, target_modules=["q_proj", *shapes])
    result = check(model, adapter)
    assert (result.readers[0].active, result.readers[0].lost, result.fine) == (active_in_peft, lost, not lost)
    assert [(reader.active, reader.lost) for reader in result.readers[1:]] == [(2, 0)] * 3
    assert all("experts" in reader.notes[-1] for reader in result.readers[1:])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    factors = [tensor for name, tensor in loaded.named_parameters() if "lora_B" in name]
    assert sum(bool(tensor.any()) for tensor in factors) == active_in_peft


@pytest.mark.parametrize(
    ("changes", "refusing", "ignoring"),
    [
        ({"use_rslora": True}, set(), {"llama.cpp", "SGLang"}),
        ({"alpha_pattern": {"q_proj": 32}}, {"SGLang"}, {"vLLM", "llama.cpp"}),
        ({"bias": "all"}, {"vLLM"}, set()),
        ({"target_modules": r".*\.(q_proj|o_proj|up_proj)"}, {"SGLang"}, set()),
    ],
    ids=["rslora", "alpha-pattern", "bias", "pattern"],
)
def test_settings_servers_refuse_or_ignore_are_named(
    changes: dict[str, Any], refusing: set[str], ignoring: set[str], model: Path, adapter: Path
) -> None:
    edit(adapter, **changes)
    servers = check(model, adapter).readers[1:]
    assert {reader.name for reader in servers if reader.refused} == refusing
    assert {reader.name for reader in servers if reader.notes} == ignoring


def test_dora_is_whole_in_peft_and_refused_by_the_servers(model: Path, tmp_path: Path) -> None:
    adapter = random_adapter(model, tmp_path / "dora", targets=["q_proj"], rank=32, alpha=8, seed=1, use_dora=True)
    result = check(model, adapter)
    assert result.fine
    assert result.readers[0].active == 2
    assert result.unread == 0
    assert all(reader.refused and reader.active == 0 for reader in result.readers[1:])
    assert "--max-lora-rank 32" in result.readers[1].notes[0]


@pytest.mark.parametrize(
    "changes",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}, {"lora_bias": True}],
    ids=["modules", "tokens", "lora-bias"],
)
def test_tensors_beside_the_factors_are_whole_in_peft_alone(
    changes: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"], **changes)
    get_peft_model(base, config).save_pretrained(tmp_path)
    peft, vllm, llama_cpp, sglang = check(model, tmp_path).readers
    assert (peft.active, peft.lost, peft.refused) == (2, 0, None)
    assert vllm.refused
    assert llama_cpp.refused
    assert (sglang.active, sglang.lost) == (2, 0)
    assert "not known here" in sglang.notes[0]


def test_the_command_ends_with_1_where_a_key_is_lost(model: Path, adapter: Path) -> None:
    runner = CliRunner(env={"COLUMNS": "120"})
    sound = runner.invoke(app, ["check", str(model), str(adapter)])
    assert sound.exit_code == 0
    assert "PEFT reads every tensor" in sound.stdout
    rename(adapter, lambda name: name.replace("base_model.model.", ""))
    lost = runner.invoke(app, ["check", str(model), str(adapter)])
    assert lost.exit_code == 1
    assert "PEFT does not read model.layers.0" in lost.stdout
    told = json.loads(runner.invoke(app, ["check", str(model), str(adapter), "--json"]).stdout)
    assert told["fine"] is False
    assert told["readers"][0]["active"] == 0


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"peft_type": "IA3"}, "only LORA and ADALORA"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"target_modules": "(a+)+$"}, "very long to match"),
        ({"task_type": "SEQ_CLS"}, "only CAUSAL_LM"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
    ids=["kind", "import", "slow", "task", "replication"],
)
def test_what_cannot_be_checked_is_refused(changes: dict[str, Any], part: str, model: Path, adapter: Path) -> None:
    edit(adapter, **changes)
    with pytest.raises(LoraSuiteError, match=part):
        check(model, adapter)


def test_every_written_adapter_passes(model: Path, adapter: Path, tmp_path: Path) -> None:
    lorasuite_fast.migrate(model, model, adapter, tmp_path / "out", refine=False)
    assert check(model, tmp_path / "out").fine
