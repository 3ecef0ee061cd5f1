"""Which adapters are read: their settings, their targets, and that PEFT loads what is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hostile import MODEL, adapter_config, adapter_tensors, pack, write_adapter
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasuite_fast import LoraSuiteError, PlanConfig, migrate
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.adapters.adapter_config import _KNOWN, is_target
from lorasuite_fast.adapters.aligned_states import LoadedModel
from lorasuite_fast.adapters.peft_check import check_loads, empty_model, skeleton
from lorasuite_fast.models.families import Shape
from lorasuite_fast.models.family_table import FAMILIES

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

LLAMA, SHAPE = FAMILIES["llama"], Shape(**MODEL)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def edit(adapter: Path, **changes: object) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps(adapter_config() | changes))


def read(adapter: Path) -> Any:
    return read_adapter(adapter, LLAMA, SHAPE, "OLD")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("kasa_config", {"beta": 1e-4}, "KaSA"),
        ("monteclora_config", {"num_samples": 2}, "MonteCLoRA"),
        ("task_type", "SEQ_CLS", "'SEQ_CLS'"),
        ("task_type", "FEATURE_EXTRACTION", "CAUSAL_LM"),
        ("use_something_new", True, "use_something_new is 'True'"),
        ("scale_per_token", 0.5, "scale_per_token"),
        ("init_lora_weights", "pissa_niter_4", "pissa_niter_4"),
        ("init_lora_weights", "corda", "changes the base weights"),
        ("target_modules", 7, "target_modules must be"),
        ("target_modules", ["q_proj", 7], "target_modules must be"),
        ("layers_to_transform", ["0"], "layers_to_transform must be"),
    ],
)
def test_a_setting_that_changes_meaning_is_refused_by_name(key: str, value: object, part: str, adapter: Path) -> None:
    edit(adapter, **{key: value})
    with pytest.raises(LoraSuiteError, match=re.escape(part)):
        read(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_something_new": None, "another": False, "third": {}, "fourth": "none", "fifth": []},
        {"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "os"}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "EVA", "eva_config": {"rho": 2.0}},
        {"loftq_config": {"loftq_bits": 4}, "runtime_config": {"ephemeral_gpu_offload": False}},
        {"megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "0.30"},
    ],
    ids=["unknown-but-empty", "no-task", "orthogonal", "eva", "init-only", "defaults"],
)
def test_settings_that_change_nothing_are_accepted(changes: dict[str, Any], adapter: Path) -> None:
    edit(adapter, **changes)
    assert list(read(adapter).updates) == [(0, "q")]


def test_every_setting_of_the_installed_peft_is_known() -> None:
    for key in LoraConfig(task_type="CAUSAL_LM").to_dict():
        assert key in _KNOWN, key


NAMES = [
    *(f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1, 10) for x in "qkvo"),
    *(f"model.layers.{i}.mlp.{x}_proj" for i in (0, 1, 10) for x in ("gate", "up")),
    "lm_head",
]
TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "o_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj", "k_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["self_attn.q_proj"], "layers_to_transform": [1, 10]},
    {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h"]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": r".*layers\.(0|10)\..*\.(q|k)_proj"},
    {"target_modules": r"layers\.0\.self_attn\.q_proj"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["model.layers.1.mlp.up_proj", "0.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*\.10\..*"},
]


@pytest.mark.parametrize("config", TARGETS, ids=range(len(TARGETS)))
def test_a_module_is_a_target_exactly_where_peft_says_so(config: dict[str, Any]) -> None:
    as_peft = SimpleNamespace(**({"target_parameters": None} | config))
    for name in NAMES:
        excluded = type(found := check_target_module_exists(as_peft, name)).__name__ == "_ExcludedModule"
        assert is_target(config, name) == (bool(found) and not excluded), name


@pytest.mark.parametrize(
    ("targets", "extra", "share"),
    [
        (["k_proj"], False, "none of its tensors"),
        ([], False, "none of its tensors"),
        (r".*v_proj", False, "none of its tensors"),
        (["q_proj"], True, "not those of 1 of its modules"),
    ],
)
def test_tensors_that_peft_would_not_load_are_refused_naming_both(
    targets: object, extra: bool, share: str, adapter: Path
) -> None:
    tensors = adapter_tensors()
    if extra:
        tensors |= {name.replace("q_proj", "o_proj"): np.ones_like(value) for name, value in tensors.items()}
    (adapter / "adapter_model.safetensors").write_bytes(pack(tensors))
    edit(adapter, target_modules=targets)
    module = f"model.layers.0.self_attn.{'o' if extra else 'q'}_proj"
    with pytest.raises(LoraSuiteError, match=re.escape(module)) as error:
        read(adapter)
    assert share in str(error.value)
    assert (targets if isinstance(targets, str) else ", ".join(targets)) in str(error.value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.(" + "|".join(map(str, range(32))) + r")\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|up_proj)",
        r".*\.layers\.(0|1|2|3|4|5|6|7|8|9)\..*\.(q_proj|k_proj|v_proj|o_proj)",
        r"^(model\.)?layers\.(0|1|2)\.self_attn\.(q|k|v|o)_proj",
        r"(?:model\.layers\.(?:0|1)\.self_attn\.q_proj|model\.layers\.(?:2|3)\.mlp\.up_proj)",
    ],
)
def test_a_list_of_layers_written_as_one_pattern_is_accepted(pattern: str, adapter: Path) -> None:
    others = {pattern.replace("0", str(n)).replace("q_proj", f"x{n}"): n for n in range(2, 10)}
    edit(adapter, r=7, rank_pattern={pattern: 2} | others)
    assert read(adapter).updates[0, "q"].rank == 2


@pytest.mark.parametrize("pattern", [".*.*.*.*x", "a+b*c*d+x"])
def test_a_pattern_whose_repeats_multiply_is_refused(pattern: str, adapter: Path) -> None:
    edit(adapter, r=7, rank_pattern={pattern: 2})
    with pytest.raises(LoraSuiteError, match="very long to match"):
        read(adapter)


@pytest.mark.parametrize("which", ["A", "B"])
def test_a_tensor_saved_without_gathering_is_named(which: str, adapter: Path) -> None:
    tensors = adapter_tensors()
    tensors[next(name for name in tensors if f"lora_{which}" in name)] = np.zeros((0,))
    (adapter / "adapter_model.safetensors").write_bytes(pack(tensors))
    with pytest.raises(LoraSuiteError, match=rf"lora_{which} that is empty \[0\].*saved without gathering"):
        read(adapter)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pair")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "adapter", targets=["q_proj", "o_proj"], rank=2, alpha=4, seed=0)
    return root


def test_what_only_says_how_an_adapter_was_made_is_not_written(root: Path, tmp_path: Path) -> None:
    file = root / "adapter/adapter_config.json"
    before = file.read_text()
    changes = {
        "auto_mapping": {"base_model_class": "X", "parent_library": "nowhere.at_all", "unsloth_fixed": True},
        "task_type": None,
        "eva_config": {"rho": 2.0},
        "init_lora_weights": "EVA",
        "runtime_config": {"ephemeral_gpu_offload": True},
    }
    try:
        file.write_text(json.dumps(json.loads(before) | changes))
        migrate(
            root / "old",
            root / "new",
            root / "adapter",
            tmp_path / "out",
            plan=PlanConfig(examples=8, method="lstsq", ridge=0.1),
        )
    finally:
        file.write_text(before)
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["auto_mapping"] is None
    assert written["eva_config"] is None
    assert "runtime_config" not in written
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "new"), tmp_path / "out")


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dora", [False, True])
def test_the_check_takes_what_peft_takes(dora: bool, root: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "old")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1], use_dora=dora
    )
    peft = PeftModel(model, config)
    peft.save_pretrained(tmp_path / "saved")
    shape = read_shape(root / "old")
    for place in (skeleton(LLAMA, shape), empty_model(root / "old")):
        check_loads(files_of(tmp_path / "saved"), place, "old")
    assert len(get_peft_model_state_dict(peft)) == (6 if dora else 4)


def read_shape(folder: Path) -> Shape:
    from lorasuite_fast.models.checkpoint import Checkpoint

    return Checkpoint(folder).shape


def spoiled_config(**changes: object) -> Any:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    return spoil


def spoiled_tensors(change: Any) -> Any:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoil


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SPOILED: dict[str, tuple[Any, str]] = {
    "targets that are nowhere": (spoiled_config(target_modules=["wq"]), "not found"),
    "a target too many": (spoiled_config(target_modules=["q_proj", "o_proj", "k_proj"]), "no tensor for"),
    "a target too few": (spoiled_config(target_modules=["q_proj"]), "no place for"),
    "another rank": (spoiled_config(r=3), "place for it [3,"),
    "a layer beyond": (
        spoiled_tensors(lambda t: t.update({Q.replace("layers.0", "layers.9"): t[Q].clone()})),
        "no place for model.layers.9",
    ),
    "another width": (spoiled_tensors(lambda t: t.update({Q: torch.zeros(2, 5)})), "[2, 5]"),
    "a kind that is unknown": (spoiled_config(peft_type="NONE_SUCH"), "NONE_SUCH"),
}


@pytest.mark.parametrize("name", SPOILED, ids=lambda name: name.replace(" ", "-"))
def test_what_peft_would_not_load_whole_is_never_written(name: str, root: Path, tmp_path: Path) -> None:
    spoil, part = SPOILED[name]
    random_adapter(root / "old", tmp_path / "a", targets=["q_proj", "o_proj"], rank=2, alpha=4, seed=0)
    check_loads(files_of(tmp_path / "a"), skeleton(LLAMA, read_shape(root / "old")), "old")
    spoil(tmp_path / "a")
    for place in (skeleton(LLAMA, read_shape(root / "old")), empty_model(root / "old")):
        with pytest.raises(LoraSuiteError, match=re.escape(part)) as error:
            check_loads(files_of(tmp_path / "a"), place, "old")
        assert "nothing was written" in str(error.value)


def test_peft_imports_no_module_that_a_start_names(root: Path, tmp_path: Path) -> None:
    random_adapter(root / "old", tmp_path / "a", targets=["q_proj"], rank=2, alpha=4, seed=0)
    spoiled_config(megatron_config={"a": 1}, megatron_core="no_such_module")(tmp_path / "a")
    loaded = LoadedModel(root / "old", "OLD", device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(LoraSuiteError, match="megatron_config is set"):
        loaded.attach(tmp_path / "a")


def test_a_configuration_written_here_is_one_peft_reads_without_a_remark(
    root: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    migrate(
        root / "old",
        root / "new",
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(examples=8, method="lstsq", ridge=0.1),
    )
    recwarn.clear()
    PeftConfig.from_pretrained(tmp_path / "out")
    assert not [str(w.message) for w in recwarn]
