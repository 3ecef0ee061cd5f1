"""What a PEFT folder holds is read exactly, refused where it does not fit, and written so that PEFT reads it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch
from safetensors.torch import load

from lorasuite_fast.adapters.adapter import Adapter, Update, _check_values, adapter_files, by_module, read_adapter
from lorasuite_fast.adapters.base_match import check_base
from lorasuite_fast.adapters.factors import Factors
from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.families import Shape
from lorasuite_fast.models.family_table import FAMILIES

SHAPE = Shape(**hostile.MODEL)


def read(folder: Path) -> Adapter:
    return read_adapter(folder, FAMILIES["llama"], SHAPE, "old")


def of_rank(folder: Path, rank: int) -> Path:
    hostile.write_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps(hostile.adapter_config() | {"r": rank}))
    (folder / "adapter_model.safetensors").write_bytes(hostile.pack(hostile.adapter_tensors(rank)))
    return folder


def test_a_rank_of_four_times_the_longer_side_is_read_and_one_more_is_not(tmp_path: Path) -> None:
    most = 4 * max(SHAPE.expected("q"))
    assert read(of_rank(tmp_path / "most", most)).updates[0, "q"].rank == most
    with pytest.raises(LoraSuiteError, match=f"rank {most + 1}, far more than its weight"):
        read(of_rank(tmp_path / "more", most + 1))


Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def written(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    hostile.write_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps(hostile.adapter_config() | config))
    if tensors is not None:
        (folder / "adapter_model.safetensors").write_bytes(hostile.pack(tensors))
    return folder


def factors(layer: int, b: tuple[int, ...], a: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {Q.format(layer, "A"): np.ones(a), Q.format(layer, "B"): np.ones(b)}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 4 / 2),
        ({"use_rslora": True}, 4 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 3}}, 3 / 2),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 5}}, 5 / 2),
        ({"alpha_pattern": {"proj": 9}}, 4 / 2),
        ({"r": 8, "rank_pattern": {"self_attn.q_proj": 2}}, 4 / 2),
        ({"r": 8, "rank_pattern": {".*q_proj": 2}, "alpha_pattern": {"k_proj": 1}}, 4 / 2),
    ],
)
def test_the_scale_is_alpha_over_the_rank_by_the_pattern_that_names_the_module(
    config: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    assert read(written(tmp_path / "a", config)).updates[0, "q"].scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"r": 3}, None, "has rank 2, adapter_config.json gives it 3"),
        ({}, factors(2, (8, 2), (2, 8)), "is beyond the 2 layers"),
        ({}, factors(0, (8, 3), (2, 8)), "the weight of old is"),
        ({}, factors(0, (7, 2), (2, 8)), "the weight of old is"),
        ({}, factors(0, (8, 2), (2, 9)), "the weight of old is"),
        ({}, factors(0, (8, 0), (0, 8)), "has rank 0; there is nothing to migrate"),
        ({}, {Q.format(0, "A"): np.ones((2, 8)), Q.format(0, "B"): np.full((8, 2), np.nan)}, "NaN or infinity"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    config: dict[str, Any], tensors: dict[str, np.ndarray] | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(LoraSuiteError, match=said):
        read(written(tmp_path / "a", config, tensors))


def test_whole_numbers_are_no_factors(tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="not a floating dtype"):
        _check_values("q_proj", {"A": torch.ones(2, 2, dtype=torch.int64)}, "LORA", tmp_path)


def test_patterns_that_could_take_for_ever_are_refused(tmp_path: Path) -> None:
    slow = {"rank_pattern": {"a*a*a*a*b": 2}}
    with pytest.raises(LoraSuiteError, match="may take very long to match"):
        read(written(tmp_path / "a", slow))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def files(updates: dict[tuple[int, str], Update], layers: int = 2, **config: Any) -> tuple[dict[str, Any], Any]:
    """The configuration and tensors written for updates by (layer, module)."""
    source = Adapter("x", hostile.adapter_config() | config, {})
    found = adapter_files(updates, source, "llama", Shape(V=99, d=8, h=4, H=2, G=2, f=8, L=layers), "new")
    return json.loads(found["adapter_config.json"]), load(found["adapter_model.safetensors"])


def plain(rank: int, alpha: float = 4.0) -> Update:
    return Update(Factors(normal(0, 8, rank), normal(1, rank, 8)), alpha, False)


MODULE = "self_attn.q_proj"


def test_ranks_and_alphas_that_differ_are_written_as_patterns() -> None:
    config, tensors = files({(0, MODULE): plain(2), (1, MODULE): plain(3, 6.0)})
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {f"model.layers.1.{MODULE}": 3}
    assert config["alpha_pattern"] == {f"model.layers.1.{MODULE}": 6.0}
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == "new"
    assert tensors[f"base_model.model.model.layers.1.{MODULE}.lora_A.weight"].shape == (3, 8)


def test_targets_are_named_short_where_all_cover_the_same_layers() -> None:
    every, _ = files({(i, MODULE): plain(2) for i in range(2)})
    assert (every["target_modules"], every["layers_to_transform"], every["layers_pattern"]) == (["q_proj"], None, None)
    some, _ = files({(1, MODULE): plain(2)})
    assert (some["target_modules"], some["layers_to_transform"], some["layers_pattern"]) == (["q_proj"], [1], "layers")
    mixed, _ = files({(0, MODULE): plain(2), (1, MODULE): plain(2), (1, "mlp.up_proj"): plain(2)})
    assert mixed["layers_to_transform"] is None
    assert mixed["target_modules"] == [
        f"model.layers.0.{MODULE}",
        "model.layers.1.mlp.up_proj",
        f"model.layers.1.{MODULE}",
    ]


def test_a_zero_update_keeps_the_factor_training_could_start_from() -> None:
    update = Update(Factors(torch.zeros(8, 2), normal(0, 2, 8)), 4.0, False)
    found = by_module({(0, "q"): update}, FAMILIES["llama"], SHAPE, torch.float32)[0, MODULE]
    assert torch.equal(found.factors.a, update.factors.a)


@pytest.mark.parametrize("rslora", [False, True])
def test_parts_of_a_fused_weight_become_one_update_of_the_same_effect(rslora: bool) -> None:
    """Phi-3: q and k of different scales read through A of their own, v through that of q."""
    family, shape = FAMILIES["phi3"], Shape(V=9, d=8, h=2, H=4, G=4, f=6, L=1)
    a = [normal(n, 3, 8) for n in (0, 1)]
    parts = {
        "q": Update(Factors(normal(2, 8, 3), a[0]), 6.0, rslora),
        "k": Update(Factors(normal(3, 8, 3), a[1]), 9.0, rslora),
        "v": Update(Factors(normal(4, 8, 3), a[0].clone()), 6.0, rslora),
    }
    merged = by_module({(0, role): update for role, update in parts.items()}, family, shape, torch.float32)
    (found,) = merged.values()
    assert found.rank == 6
    wanted = torch.cat([update.scale * update.factors.b @ update.factors.a for update in parts.values()])
    torch.testing.assert_close(found.scale * found.factors.b @ found.factors.a, wanted, rtol=1e-4, atol=1e-5)


def test_a_fused_updates_rows_are_taken_with_their_magnitudes(tmp_path: Path) -> None:
    family, shape = FAMILIES["phi3"], Shape(V=9, d=8, h=2, H=4, G=2, f=6, L=1)
    name = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_{}"
    draw = np.random.default_rng(0)
    tensors = {
        name.format("A.weight"): draw.normal(size=(2, 8)),
        name.format("B.weight"): draw.normal(size=(16, 2)),
        name.format("magnitude_vector"): np.arange(16.0),
    }
    folder = written(tmp_path / "a", {"use_dora": True, "target_modules": ["qkv_proj"]}, tensors)
    found = read_adapter(folder, family, shape, "old").updates
    for role, (start, stop) in {"q": (0, 8), "k": (8, 12), "v": (12, 16)}.items():
        magnitude = found[0, role].magnitude
        assert magnitude is not None
        assert magnitude.tolist() == list(range(start, stop))
        wanted = torch.from_numpy(tensors[name.format("B.weight")][start:stop])
        torch.testing.assert_close(found[0, role].factors.b.double(), wanted)


def test_an_adapter_of_another_model_at_hand_is_refused(tmp_path: Path) -> None:
    base = hostile.write_model(tmp_path / "base")
    fingerprint = Checkpoint(base, "base").fingerprint()
    adapter = read(written(tmp_path / "a", {"base_model_name_or_path": str(base)}))
    check_base(adapter, fingerprint, "old")
    check_base(adapter, "another", str(base))
    with pytest.raises(LoraSuiteError, match="while the plan's old model is old"):
        check_base(adapter, "another", "old", passed=(base,))


@pytest.mark.parametrize(("alpha", "scale"), [(6, 6 / 3.00001), (0, 2 / 3.00001)])
def test_adalora_is_the_lora_of_its_first_rank_and_singular_values(alpha: float, scale: float, tmp_path: Path) -> None:
    """PEFT adds 1e-5 to the rank, and takes the rank in the place of an alpha of 0."""
    config = {"peft_type": "ADALORA", "init_r": 3, "target_r": 2, "lora_alpha": alpha}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}"
    draw = np.random.default_rng(0)
    tensors = {name.format("A"): draw.normal(size=(2, 8)), name.format("B"): draw.normal(size=(8, 2))}
    tensors[name.format("E")] = np.array([[3.0], [0.5]])
    adapter = read(written(tmp_path / "a", config, tensors))
    found = adapter.updates[0, "q"]
    assert found.scale == pytest.approx(scale, rel=1e-7)
    b, a = (torch.from_numpy(tensors[name.format(which)]).float() for which in "BA")
    torch.testing.assert_close(found.factors.b, b * torch.tensor([3.0, 0.5]))
    torch.testing.assert_close(found.factors.a, a)
    assert adapter.config["peft_type"] == "LORA"
    assert "target_r" not in adapter.config
