"""Bad input: one line that names the file or tensor and what to do, exit code 2, no traceback, OUT untouched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flat_options import given
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorasuite_fast import LoraSuiteError, PlanConfig, TransferPlan, migrate
from lorasuite_fast.cli.app import app

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pristine")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "adapter", targets=["q_proj", "o_proj"], rank=2, alpha=4, seed=0)
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "case")
    return tmp_path / "case"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard(folder: Path, names: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> None:
    """Splits model.safetensors in two with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / Path(file).name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


Q0 = "model.layers.0.self_attn.q_proj.weight"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def truncate_shard(root: Path) -> None:
    shard(root / "new")
    truncate(root / "new/b.safetensors")


def drop_shard(root: Path) -> None:
    shard(root / "new")
    (root / "new/b.safetensors").unlink()


def shard_outside(root: Path) -> None:
    shard(root / "old")
    index = root / "old/model.safetensors.index.json"
    index.write_text(index.read_text().replace("b.safetensors", "../new/model.safetensors"))


def pickle_only(root: Path) -> None:
    (root / "old/model.safetensors").unlink()
    (root / "old/pytorch_model.bin").write_bytes(b"\x80\x04.")


def no_tokenizer(root: Path) -> None:
    for path in (root / "new").glob("tokenizer*"):
        path.unlink()


def share_too_little(root: Path) -> None:
    """Leaves the new vocabulary fewer shared tokens than the old width of 32."""

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][20:] = 0

    edit_tensors(root / "new/model.safetensors", zero)


def span_too_little(root: Path) -> None:
    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][:, 10:] = 0

    edit_tensors(root / "old/model.safetensors", flatten)
    edit_json(root / "adapter/adapter_config.json", base_model_name_or_path=str(root / "old"))


def adapter_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    return lambda root: edit_tensors(root / "adapter/adapter_model.safetensors", change)


def model_tensors(side: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    return lambda root: edit_tensors(root / side / "model.safetensors", change)


def adapter_config(**changes: object) -> Callable[[Path], None]:
    return lambda root: edit_json(root / "adapter/adapter_config.json", **changes)


def put(name: str, index: int, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[index] = value

    return change


def rank_zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LORA.format("A")] = tensors[LORA.format("A")][:0]
    tensors[LORA.format("B")] = tensors[LORA.format("B")][:, :0].contiguous()


def unknown_target(tensors: dict[str, torch.Tensor]) -> None:
    for which in "AB":
        tensors[LORA.format(which).replace("q_proj", "qkv_proj")] = tensors.pop(LORA.format(which))


# name -> (what is done to the inputs, what the message must hold)
CASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing tensor": (model_tensors("old", lambda t: t.pop(Q0)), [Q0, "missing", "2 layers"]),
    "extra tensor": (
        model_tensors("new", lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)})),
        ["model.layers.9.mlp.up_proj.weight", "not part of", "config.json"],
    ),
    "wrong shape": (
        model_tensors("old", lambda t: t.update({Q0: torch.zeros(8, 32)})),
        [Q0, "[8, 32]", "[32, 32]"],
    ),
    "integer weights": (
        model_tensors("old", lambda t: t.update({Q0: torch.zeros(32, 32, dtype=torch.int8)})),
        [Q0, "I8", "quantised"],
    ),
    "truncated file": (
        lambda root: truncate(root / "old/model.safetensors"),
        ["old/model.safetensors", "truncated or damaged"],
    ),
    "truncated shard": (truncate_shard, ["new/b.safetensors", "truncated or damaged"]),
    "missing shard": (drop_shard, ["b.safetensors", "missing from"]),
    "shard outside the folder": (shard_outside, ["../new/model.safetensors", "outside the model folder"]),
    "NaN in a weight": (model_tensors("new", put("model.layers.1.self_attn.k_proj.weight", 7, float("nan"))), ["NaN"]),
    "inf in the embedding": (
        model_tensors("old", put("model.embed_tokens.weight", 99, float("inf"))),
        ["model.embed_tokens.weight", "NaN or infinity"],
    ),
    "pickle-only checkpoint": (pickle_only, ["pytorch_model.bin", "never opened", "save_pretrained"]),
    "no weights": (lambda root: (root / "old/model.safetensors").unlink(), ["neither model.safetensors nor"]),
    "no config": (lambda root: (root / "new/config.json").unlink(), ["new/config.json", "no such file"]),
    "damaged config": (lambda root: (root / "new/config.json").write_text("{"), ["new/config.json", "JSON"]),
    "unknown family": (
        lambda root: edit_json(root / "new/config.json", model_type="mamba"),
        ["'mamba'", "phi, phi3, qwen2, qwen2_moe, qwen3"],
    ),
    "config with a text for a number": (
        lambda root: edit_json(root / "new/config.json", hidden_size="big"),
        ["hidden_size", "'big'"],
    ),
    "no tokenizer": (no_tokenizer, ["new", "no tokenizer"]),
    "vocabularies that share too little": (share_too_little, ["share 20 trained tokens", "old width 32", "--ridge"]),
    "embeddings that span too little": (span_too_little, ["span 10 of 32", "--ridge"]),
    "adapter is no folder": (lambda root: shutil.rmtree(root / "adapter"), ["ADAPTER", "no such folder"]),
    "adapter without weights": (
        lambda root: (root / "adapter/adapter_model.safetensors").unlink(),
        ["adapter_model.safetensors is missing"],
    ),
    "pickled adapter": (
        lambda root: (root / "adapter/adapter_model.safetensors").rename(root / "adapter/adapter_model.bin"),
        ["adapter_model.bin is never opened", "safe_serialization=True"],
    ),
    "truncated adapter": (
        lambda root: truncate(root / "adapter/adapter_model.safetensors"),
        ["adapter_model.safetensors", "truncated or damaged"],
    ),
    "adapter of another width": (
        adapter_tensors(lambda t: t.update({LORA.format("A"): torch.zeros(2, 48)})),
        ["q_proj", "lora_A [2, 48]", "[32, 32]", "base OLD"],
    ),
    "adapter of a deeper model": (
        adapter_tensors(
            lambda t: t.update({k.replace("layers.0.", "layers.5."): v.clone() for k, v in list(t.items())})
        ),
        ["layers.5", "beyond the 2 layers"],
    ),
    "rank 0": (adapter_tensors(rank_zero), ["q_proj", "rank 0"]),
    "rank 0 in the config": (adapter_config(r=0), ["rank r is 0"]),
    "rank unlike the config": (adapter_config(r=3), ["has rank 2", "gives it 3"]),
    "unknown target": (adapter_tensors(unknown_target), ["qkv_proj", "self_attn.q_proj"]),
    "half a pair": (adapter_tensors(lambda t: t.pop(LORA.format("B"))), ["q_proj.lora_B.weight is missing"]),
    "NaN in the adapter": (
        adapter_tensors(put(LORA.format("B"), 3, float("nan"))),
        ["q_proj.lora_B.weight", "NaN"],
    ),
    "a DoRA adapter without magnitudes": (adapter_config(use_dora=True), ["lora_magnitude_vector is missing"]),
    "saved modules": (adapter_config(modules_to_save=["lm_head"]), ["modules_to_save"]),
    "trained biases": (adapter_config(bias="all"), ["biases", "'all'"]),
    "PiSSA initialisation": (adapter_config(init_lora_weights="pissa"), ["pissa", "base weights"]),
    "a rank pattern that is no regex": (adapter_config(rank_pattern={"q_proj(": 4}), ["'q_proj('", "no regex"]),
    "a rank pattern that is no object": (adapter_config(rank_pattern=["q_proj"]), ["rank_pattern", "object"]),
    "another kind of adapter": (adapter_config(peft_type="IA3"), ["'IA3'", "only LORA"]),
    "alpha that is no number": (adapter_config(lora_alpha="8"), ["lora_alpha", "'8'"]),
    "adapter of another base": (
        lambda root: edit_json(root / "adapter/adapter_config.json", base_model_name_or_path=str(root / "new")),
        ["trained on", "fingerprint", "build a plan for that base"],
    ),
}


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_bad_input_ends_in_one_line_and_exit_code_2(name: str, root: Path) -> None:
    spoil, parts = CASES[name]
    spoil(root)
    arguments = ["migrate", *(str(root / x) for x in ("old", "new", "adapter", "out")), "--examples", "8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert sorted(path.name for path in root.iterdir() if path.name != "adapter") == ["new", "old"]


def run(root: Path, out: str = "out", **options: object) -> object:
    return migrate(root / "old", root / "new", root / "adapter", root / out, **given(migrate, examples=8, **options))  # type: ignore[arg-type]


def test_the_untouched_input_migrates(root: Path) -> None:
    run(root)
    assert {path.name for path in root.iterdir()} == {"old", "new", "adapter", "out"}


def test_an_existing_out_is_refused_and_left_as_it_is(root: Path) -> None:
    (root / "out").mkdir()
    (root / "out/mine.txt").write_text("keep")
    with pytest.raises(LoraSuiteError, match=r"exists already.*`overwrite=True`"):
        run(root)
    assert (root / "out/mine.txt").read_text() == "keep"


def test_overwrite_replaces_out_only_when_the_new_one_is_complete(root: Path) -> None:
    run(root)
    before = (root / "out/adapter_model.safetensors").read_bytes()
    truncate(root / "new/model.safetensors")
    with pytest.raises(LoraSuiteError, match="truncated"):
        run(root, overwrite=True)
    assert (root / "out/adapter_model.safetensors").read_bytes() == before
    shutil.copy(root / "old/model.safetensors", root / "new/model.safetensors")
    shutil.copy(root / "old/config.json", root / "new/config.json")
    run(root, overwrite=True)
    assert (root / "out/adapter_model.safetensors").read_bytes() != before
    assert {path.name for path in root.iterdir()} == {"old", "new", "adapter", "out"}


def test_a_ridge_accepts_vocabularies_that_share_too_little(root: Path) -> None:
    share_too_little(root)
    run(root, ridge=1e-3)
    written = load_file(root / "out/adapter_model.safetensors")
    assert written
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in written.values())


def test_a_missing_parent_of_out_is_named(root: Path) -> None:
    with pytest.raises(LoraSuiteError, match="nowhere does not exist"):
        run(root, out="nowhere/out")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("few.jsonl", '{"text": "a"}\n{"text": "b"}\n', "holds 2 examples"),
        ("field.jsonl", '{"content": "a"}\n', 'line 1 has no string field "text"'),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("text.csv", "a,b", "must be a .jsonl"),
    ],
)
def test_calibration_text_that_cannot_be_used_is_named(root: Path, name: str, text: str, message: str) -> None:
    (root / name).write_text(text)
    with pytest.raises(LoraSuiteError, match=message):
        run(root, calibration=root / name)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "best"},
        {"heads": "greedy"},
        {"method": "magic"},
        {"transfer": "random"},
        {"device": "tpu"},
        {"dtype": "float16"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_unknown_options_name_the_known_ones(root: Path, options: dict[str, str]) -> None:
    with pytest.raises(LoraSuiteError, match="is not one of"):
        run(root, **options)


def test_a_plan_refuses_changed_models_and_foreign_adapters(root: Path) -> None:
    plan = TransferPlan.build(root / "old", root / "new", config=PlanConfig(examples=8, roles=("q", "o")))
    plan.save(root / "plan")
    save_folder(tiny_model("llama", 7, layers=2), tiny_tokenizer(320, seed=1), root / "chat")
    loaded = TransferPlan.load(root / "plan")
    with pytest.raises(LoraSuiteError) as refused:
        loaded.apply(root / "adapter", root / "out", old=root / "chat")
    assert plan.old.fingerprint in str(refused.value)
    found = str(refused.value).split("has fingerprint ")[1][:32]
    assert found != plan.old.fingerprint
    edit_json(root / "adapter/adapter_config.json", base_model_name_or_path=str(root / "new"))
    with pytest.raises(LoraSuiteError) as refused:
        loaded.apply(root / "adapter", root / "out")
    assert plan.old.fingerprint in str(refused.value)
    assert plan.new.fingerprint in str(refused.value)
    assert not (root / "out").exists()


def test_a_plan_refuses_roles_it_does_not_cover(root: Path) -> None:
    plan = TransferPlan.build(root / "old", root / "new", config=PlanConfig(examples=8, roles=("v",), method="lstsq"))
    with pytest.raises(LoraSuiteError, match="targets q, o, the plan covers only v"):
        plan.apply(root / "adapter", root / "out")


def test_a_file_that_is_no_plan_is_refused(root: Path) -> None:
    with pytest.raises(LoraSuiteError, match="is not a plan file"):
        TransferPlan.load(root / "old/model.safetensors")
    with pytest.raises(LoraSuiteError, match="no such file"):
        TransferPlan.load(root / "absent")


def test_a_plan_of_another_version_is_refused(root: Path) -> None:
    plan = TransferPlan.build(root / "old", root / "new", config=PlanConfig(examples=8, roles=("v",)))
    plan.save(root / "plan")
    data = (root / "plan").read_bytes()
    key = b'\\"version\\": 2,'
    assert data.count(key) == 1
    (root / "plan").write_bytes(data.replace(key, b'\\"version\\": 9,'))
    with pytest.raises(LoraSuiteError, match="format version 9, this release reads 2"):
        TransferPlan.load(root / "plan")


def test_hub_ids_are_resolved_offline(root: Path) -> None:
    with pytest.raises(LoraSuiteError, match="not in the local hub cache"):
        migrate("someone/some-model", root / "new", root / "adapter", root / "out")
    with pytest.raises(LoraSuiteError, match="no such folder"):
        migrate("/nowhere/model", root / "new", root / "adapter", root / "out")
