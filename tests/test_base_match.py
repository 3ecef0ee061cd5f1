"""The base an adapter names: what is opened for it, what counts as the same model, and what is said."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hostile import opening_only

from lorasuite_fast import LoraSuiteError, PlanConfig, migrate
from lorasuite_fast.adapters.adapter import Adapter, read_adapter
from lorasuite_fast.adapters.base_match import check_base, same_weights
from lorasuite_fast.models.checkpoint import Checkpoint

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, seed in (("old", 1), ("new", 2)):
        save_folder(tiny_model("llama", seed, layers=2), tiny_tokenizer(320, seed=seed), tmp_path / name)
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=["q_proj"], rank=2, alpha=4, seed=0)
    return tmp_path


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    with caplog.at_level(logging.WARNING, "lorasuite_fast"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "lorasuite_fast"]


def named(root: Path, base: str) -> Adapter:
    file = root / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    old = Checkpoint(root / "old")
    return read_adapter(root / "adapter", old.family, old.shape, "OLD")


def checked(root: Path, base: str, **options: Any) -> None:
    old = Checkpoint(root / "old")
    check_base(named(root, base), old.fingerprint(), old.name, **options)


def cached(root: Path, source: Path, monkeypatch: pytest.MonkeyPatch, *, only: str | None = None) -> str:
    """A copy of a model, or one of its files, in a hub cache, under an id of its own."""
    snapshot = root / "hub/models--owner--some-base/snapshots/0123"
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        if only in (None, file.name):
            shutil.copy(file, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(root / "hub"))
    return "owner/some-base"


def test_a_folder_the_user_did_not_name_is_not_opened(root: Path, told: Any) -> None:
    shutil.copytree(root / "new", root / "private")
    adapter, old = named(root, str(root / "private")), Checkpoint(root / "old")
    fingerprint = old.fingerprint()
    with opening_only(root / "old", root / "adapter"):
        check_base(adapter, fingerprint, old.name, passed=(root / "new",))
    assert told() == [
        f"{root / 'adapter'}: was trained on {root / 'private'}, given {old.name}; the two could not be compared"
    ]


def test_a_base_that_is_another_model_the_user_named_is_refused(root: Path) -> None:
    with pytest.raises(LoraSuiteError, match="build a plan for that base"):
        checked(root, str(root / "new"), passed=(root / "new",))
    with pytest.raises(LoraSuiteError, match="build a plan for that base"):
        migrate(root / "old", root / "new", root / "adapter", root / "out", plan=PlanConfig(examples=8))


def test_the_old_model_by_another_path_is_the_old_model(root: Path, told: Any) -> None:
    (root / "link").symlink_to(root / "old")
    checked(root, str(root / "link"))
    assert told() == []


@pytest.mark.parametrize("other", ["old", "new"])
def test_a_base_in_the_cache_is_compared(other: str, root: Path, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = cached(root, root / other, monkeypatch)
    if other == "new":
        with pytest.raises(LoraSuiteError, match=r"owner/some-base \(fingerprint"):
            checked(root, base)
    else:
        checked(root, base)
        assert told() == []


def test_of_a_base_of_which_only_the_config_is_cached_one_line_is_said(
    root: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = cached(root, root / "new", monkeypatch, only="config.json")
    checked(root, base)
    assert [text.partition(": ")[2].partition(",")[0] for text in told()] == ["was trained on owner/some-base"]


def test_a_quantised_base_in_the_cache_is_no_refusal_of_the_model_given(
    root: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "old", root / "quantised")
    tensors = load_file(root / "quantised/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    save_file(tensors, root / "quantised/model.safetensors", metadata={"format": "pt"})
    base = cached(root, root / "quantised", monkeypatch)
    checked(root, base)
    assert len(told()) == 1


@pytest.mark.parametrize(
    ("base", "name", "silent"),
    [
        ("lorasuite-fast/demo-old", "/x/lorasuite_fast/demo/old", True),
        ("meta-llama/Llama-3.2-1B", "/models/Llama-3.2-1B", True),
        ("meta-llama/Llama-3.2-1B", "/home/me/.cache/models--other--llama-3.2-1b/snapshots/0123", True),
        ("/their/disk/Llama-3.2-1B/", "/models/Llama-3.2-1B", True),
        ("unsloth/Llama-3.2-1B-bnb-4bit", "/models/Llama-3.2-1B", False),
        ("meta-llama/Llama-3.2-1B-Instruct", "/models/Llama-3.2-1B", False),
        ("owner/other", "/models/Llama-3.2-1B", False),
    ],
)
def test_a_name_that_is_not_at_hand_is_told_unless_it_is_the_old_models(
    base: str, name: str, silent: bool, root: Path, told: Any
) -> None:
    check_base(named(root, base), "0" * 32, name)
    assert len(told()) == (0 if silent else 1)
    if not silent:
        assert base in told()[0]
        assert name in told()[0]


def copy_of(root: Path, kind: str) -> Path:
    copy = root / "copy"
    shutil.copytree(root / "old", copy)
    tensors = load_file(copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    if kind == "older keys":
        config = config | {"rope_scaling": None, "an_older_key": 1}
        config.pop("rope_parameters", None)
    elif kind == "a value changed":
        tensors["model.norm.weight"] += 1e-3
    elif kind == "trained on":
        generator = torch.Generator().manual_seed(0)
        for tensor in tensors.values():
            tensor += 1e-3 * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)
    if kind in ("bfloat16", "float16", "trained on"):
        dtype = torch.float16 if kind == "float16" else torch.bfloat16
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        config["dtype"] = str(dtype).removeprefix("torch.")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("kind", "same"),
    [
        ("older keys", True),
        ("bfloat16", True),
        ("float16", True),
        ("a value changed", False),
        ("trained on", False),
    ],
)
def test_weights_tell_whether_a_base_is_the_old_model(
    kind: str, same: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_of(root, kind)
    assert Checkpoint(copy).fingerprint() != Checkpoint(root / "old").fingerprint()
    assert same_weights(Checkpoint(copy), Checkpoint(root / "old")) == same
    base = cached(root, copy, monkeypatch)
    if same:
        checked(root, base)
    else:
        with pytest.raises(LoraSuiteError, match="build a plan for that base"):
            checked(root, base)


def test_a_model_of_another_shape_is_another_model(root: Path) -> None:
    save_folder(tiny_model("llama", 1, layers=3), tiny_tokenizer(320, seed=1), root / "deeper")
    assert not same_weights(Checkpoint(root / "deeper"), Checkpoint(root / "old"))
