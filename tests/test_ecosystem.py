"""A migrated adapter in other people's tools: PEFT, transformers and TRL themselves, llama.cpp's and vLLM's naming.

llama.cpp and vLLM do not run here. What they do with names and configurations is restated from their sources
(convert_lora_to_gguf.py; vllm/lora/utils.py and peft_helper.py), and llama.cpp's own table of tensor names is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from planted_families import TARGETS, config_of, random_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lorasuite_fast import PlanConfig, migrate

from planted import logits, random_adapter, save_folder, tiny_model, tiny_tokenizer

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "phi": gguf.MODEL_ARCH.PHI2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
    "bloom": gguf.MODEL_ARCH.BLOOM,
}
USUAL = TARGETS["gemma2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two adapters carried to one model, and a prompt."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ecosystem")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 2)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    targets = [*USUAL[0], *USUAL[1]]
    for n in (1, 2):
        random_adapter(root / "old", root / f"adapter{n}", targets=targets, rank=4, alpha=8, seed=n, size=0.5)
        migrate(
            root / "old",
            root / "new",
            root / f"adapter{n}",
            root / f"out{n}",
            plan=PlanConfig(method="lstsq", examples=8),
        )
    return SimpleNamespace(root=root, ids=torch.arange(12)[None] + 5)


def base(made: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(made.root / "new", dtype=torch.float32).eval()


def by_hand(made: Any, **weights: float) -> Tensor:
    """Logits of the new model with the files' products added to its weights, each adapter times its weight."""
    return logits(merged_by_hand(made, **weights), made.ids)


def merged_by_hand(made: Any, **weights: float) -> PreTrainedModel:
    model = base(made)
    for name, weight in weights.items():
        config = json.loads((made.root / name / "adapter_config.json").read_text())
        tensors = load_file(made.root / name / "adapter_model.safetensors")
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b, a = tensors[key.replace("lora_A", "lora_B")], tensors[key]
            model.get_submodule(module).weight.data += weight * config["lora_alpha"] / config["r"] * b @ a
    return model


def test_the_adapters_change_the_model(made: Any) -> None:
    plain = logits(base(made), made.ids)
    for name in ("out1", "out2"):
        assert (by_hand(made, **{name: 1.0}) - plain).abs().max() > 1e-3


def test_peft_loads_it(made: Any) -> None:
    model = PeftModel.from_pretrained(base(made), made.root / "out1").eval()
    torch.testing.assert_close(logits(model, made.ids), by_hand(made, out1=1.0), rtol=1e-4, atol=1e-5)


def test_peft_merges_it(made: Any) -> None:
    model = PeftModel.from_pretrained(base(made), made.root / "out1").merge_and_unload()
    torch.testing.assert_close(logits(model, made.ids), by_hand(made, out1=1.0), rtol=1e-4, atol=1e-5)


def test_peft_adds_two_of_them_with_weights(made: Any) -> None:
    model = PeftModel.from_pretrained(base(made), made.root / "out1", adapter_name="one")
    model.load_adapter(made.root / "out2", adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(logits(model.eval(), made.ids), by_hand(made, out1=0.7, out2=0.3), rtol=1e-4, atol=1e-5)


def test_peft_swaps_one_for_the_other_in_place(made: Any) -> None:
    model = PeftModel.from_pretrained(base(made), made.root / "out1").eval()
    hotswap_adapter(model, str(made.root / "out2"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model, made.ids), by_hand(made, out2=1.0), rtol=1e-4, atol=1e-5)


def test_transformers_loads_it_into_a_plain_model(made: Any) -> None:
    model = base(made)
    model.load_adapter(str(made.root / "out1"))
    torch.testing.assert_close(logits(model, made.ids), by_hand(made, out1=1.0), rtol=1e-4, atol=1e-5)
    model.disable_adapters()
    torch.testing.assert_close(logits(model, made.ids), logits(base(made), made.ids))


def test_trl_starts_from_it_and_trains_nothing_else(made: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    rows = (torch.arange(4 * 16).reshape(4, 16) * 7 % 300 + 5).tolist()
    model = PeftModel.from_pretrained(base(made), made.root / "out1", is_trainable=True)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "sft"), learning_rate=1e-2, max_steps=3, per_device_train_batch_size=4,
        gradient_accumulation_steps=1, logging_steps=1, lr_scheduler_type="constant", bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(made.root / "new")
    data = Dataset.from_list([{"input_ids": row} for row in rows])
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    ids = torch.tensor(rows)
    predicted = logits(merged_by_hand(made, out1=1.0), ids)[:, :-1]
    expected = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), ids[:, 1:].flatten())
    assert losses[0] == pytest.approx(float(expected), abs=1e-3)
    assert losses[-1] < losses[0]
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)

    trainer.save_model(str(tmp_path / "tuned"))
    again = PeftModel.from_pretrained(base(made), tmp_path / "tuned").eval()
    torch.testing.assert_close(logits(again, made.ids), logits(model.eval(), made.ids), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def carried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An adapter of every projection, carried within a family."""
    family, root = request.param, tmp_path_factory.mktemp(request.param)
    targets = [*TARGETS.get(family, USUAL)[0], *TARGETS.get(family, USUAL)[1]]
    sizes = {"d": 32, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 8, "f": 128, "vocab": 320}
    for name, seed in (("old", 1), ("new", 2)):
        model = random_model(config_of(family, **sizes), seed) if family in TARGETS else tiny_model(family, seed)
        save_folder(model, tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "adapter", targets=targets, rank=2, alpha=4, seed=0)
    migrate(root / "old", root / "new", root / "adapter", root / "out", plan=PlanConfig(method="lstsq", examples=8))
    return SimpleNamespace(
        family=family,
        tensors=load_file(root / "out/adapter_model.safetensors"),
        config=json.loads((root / "out/adapter_config.json").read_text()),
        model=AutoModelForCausalLM.from_pretrained(root / "new"),
    )


def llama_cpp(carried: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """What its conversion makes of the file: GGUF tensor name -> (A, B)."""
    table = gguf.get_tensor_name_map(ARCHITECTURES[carried.family], 2)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in carried.tensors.items():
        module = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        assert module, key
        name = table.get_name(f"{module[1]}.weight", try_suffixes=(".weight",))
        assert name is not None, key
        halves.setdefault(name, {})[module[2]] = tensor
    return {name: (found["A"], found["B"]) for name, found in halves.items()}


def test_llama_cpp_knows_every_tensor_and_finds_both_factors(carried: Any) -> None:
    assert llama_cpp(carried)


def test_llama_cpp_and_vllm_scale_it_as_peft_does(carried: Any) -> None:
    """Both divide the one lora_alpha by a rank (the module's, the configuration's) and know no alpha patterns."""
    config = carried.config
    assert config["use_rslora"] is False
    for key in ("rank_pattern", "alpha_pattern"):
        assert config[key] == {}
    assert {a.shape[0] for a, _ in llama_cpp(carried).values()} == {config["r"]}


def vllm_module(key: str) -> str | None:
    """The module a key belongs to, None for a key vLLM refuses."""
    parts = key.split(".")
    plain = parts[:2] == ["base_model", "model"] and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
    return ".".join(parts[2:-2]) if plain else None


def test_vllm_finds_a_module_of_the_model_for_every_key(carried: Any) -> None:
    modules = dict(carried.model.named_modules())
    for key, tensor in carried.tensors.items():
        module = vllm_module(key)
        assert module in modules, key
        out, into = modules[module].weight.shape
        assert tensor.shape == ((carried.config["r"], into) if "lora_A" in key else (out, carried.config["r"]))


def test_vllm_accepts_the_configuration(carried: Any) -> None:
    config = carried.config
    refused: dict[str, Callable[[Any], bool]] = {
        "modules_to_save": bool,
        "use_dora": bool,
        "bias": lambda bias: bias != "none",
    }
    assert isinstance(config["r"], int)
    assert isinstance(config["lora_alpha"], int)
    assert isinstance(config["target_modules"], list)
    assert not [name for name, wrong in refused.items() if wrong(config.get(name))]


def test_the_folder_holds_what_the_hub_and_the_tools_look_for(made: Any) -> None:
    assert sorted(path.name for path in Path(made.root / "out1").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorasuite.json",
    ]
