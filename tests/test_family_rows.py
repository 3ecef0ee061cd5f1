"""Every row of the table of families beyond the first ones: planted upgrades, and the dense oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planted_families import NAMES, OLDER, TARGETS, config_of, plant_family, random_model
from transformers import AutoModelForCausalLM

from lorasuite_fast import migrate
from lorasuite_fast.families import FAMILIES

import planted
from planted import random_adapter, save_folder, tiny_tokenizer

ROWS = [family for family in NAMES if family not in OLDER]
OLD: dict[str, Any] = {"d": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "f": 48}
NEW: dict[str, Any] = {"d_new": 48, "layers_new": 4, "heads_new": 6, "kv_heads_new": 3, "f_new": 80}
ALONE: dict[str, Any] = {"kv_heads": 4}
KEEPS_EPSILON = (48 / 32) ** 0.5
"""The stretch at which an epsilon that no config can change is the right one in both models."""


@dataclass(frozen=True)
class Sizes:
    old: dict[str, Any] = field(default_factory=dict)
    new: dict[str, Any] = field(default_factory=dict)


SIZES = {
    "gpt2": Sizes(ALONE, {"kv_heads_new": 6}),
    "gptj": Sizes(ALONE, {"kv_heads_new": 6}),
    "opt": Sizes(ALONE, {"kv_heads_new": 6, "stretch": KEEPS_EPSILON}),
    "olmo": Sizes({}, {"stretch": KEEPS_EPSILON}),
    "gpt_bigcode": Sizes({"kv_heads": 1}, {"kv_heads_new": 1}),
    "falcon": Sizes({"kv_heads": 1}, {"kv_heads_new": 1}),
    # Its positions are slopes that depend on a head's place.
    "mpt": Sizes(
        ALONE | {"f": 128},
        {"heads_new": 4, "kv_heads_new": 4, "head_dim_new": 12, "f_new": 192, "head_map": [0, 1, 2, 3]},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_family_of_the_table_is_planted_somewhere() -> None:
    assert set(FAMILIES) == {*NAMES, "llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.parametrize("family", ROWS)
def test_a_planted_upgrade_gets_the_effect_of_its_adapter(family: str, tmp_path: Path) -> None:
    """The new model computes the old one's function, and PEFT's change of it under the migrated adapter is the old."""
    sizes = SIZES.get(family, Sizes())
    model = random_model(config_of(family, vocab=420, **(OLD | sizes.old)), 1)
    upgraded = plant_family(model, tiny_tokenizer(420, "bytelevel", 1), seed=1, **(NEW | sizes.new))
    save_folder(model, tiny_tokenizer(420, "bytelevel", 1), tmp_path / "old")
    upgraded.save(tmp_path / "new")
    targets = [module for part in TARGETS[family] for module in part]
    random_adapter(tmp_path / "old", tmp_path / "adapter", targets=targets, rank=4, alpha=8, seed=1)
    folders = [tmp_path / name for name in ("old", "new", "adapter", "out")]
    result = migrate(*folders, examples=24)
    assert result.plan.options["method"] == "lstsq"
    assert result.plan.layers == {j: i for i, j in enumerate(upgraded.layer_map)}
    changes, logits = [], []
    sides = zip(
        folders[:2], folders[2:], upgraded.random_ids(3, 24, 0), (upgraded.shared_old, upgraded.shared_new), strict=True
    )
    for folder, adapter, ids, shared in sides:
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        before = planted.logits(loaded, ids)
        after = planted.logits(PeftModel.from_pretrained(loaded, adapter).eval(), ids)
        logits.append(before[..., shared])
        changes.append((after - before)[..., shared].flatten())
    assert logits[0].std() > 0.1
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=3e-4 * float(logits[0].abs().max()))
    assert float(torch.nn.functional.cosine_similarity(*changes, dim=0)) >= 0.9999
    assert float(changes[1].norm() / changes[0].norm()) == pytest.approx(1, abs=1e-3)
