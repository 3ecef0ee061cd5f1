"""The head that transformers would use is the one that is read and compared."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from lorasuite_fast import LoraSuiteError, PlanConfig, TransferPlan
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.family_table import FAMILIES
from lorasuite_fast.models.unembedding import unembedding

from planted import plant, save_folder, tiny_model, tiny_tokenizer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def put(folder: Path, head: torch.Tensor | None, *, tied: bool) -> None:
    """Stores a head beside the embedding, or takes it out."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(HEAD, None)
    save_file(tensors | ({} if head is None else {HEAD: head}), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_folder(tiny_model("llama", 1, layers=2), tiny_tokenizer(320, seed=1), tmp_path / "model")
    return tmp_path / "model"


def embedding(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[EMBEDDING]


def used_by_transformers(folder: Path) -> torch.Tensor:
    weight: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight
    return weight.detach()


@pytest.mark.parametrize("kind", ["another", "the same", "the same in bfloat16", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_one_transformers_uses(
    kind: str, tied: bool, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = embedding(model).bfloat16().float()
    put_embedding = load_file(model / "model.safetensors") | {EMBEDDING: table}
    save_file(put_embedding, model / "model.safetensors", metadata={"format": "pt"})
    heads = {
        "another": table.flip(0).contiguous(),
        "the same": table.clone(),
        "the same in bfloat16": table.bfloat16(),
        "none": None,
    }
    put(model, heads[kind], tied=tied)
    if kind == "none" and not tied:
        with pytest.raises(LoraSuiteError, match=r"lm_head\.weight is missing.*random"):
            Checkpoint(model)
        return
    with caplog.at_level(logging.WARNING, "lorasuite_fast"):
        assert torch.equal(unembedding(Checkpoint(model)).float(), used_by_transformers(model).float())
        unembedding(Checkpoint(model))
    told = [record.getMessage() for record in caplog.records if record.name == "lorasuite_fast"]
    assert len(told) == (kind == "another" and tied)
    assert all("ties the head to the embedding" in text and HEAD in text for text in told)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_does_not_say_is_read_as_transformers_reads_it(family: str) -> None:
    assert FAMILIES[family].tied == bool(CONFIG_MAPPING[family]().tie_word_embeddings)


@pytest.fixture(scope="module")
def planted_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("planted")
    save_folder(tiny_model("llama", 1, layers=2), tiny_tokenizer(320, seed=1), root / "old")
    planted = plant(
        AutoModelForCausalLM.from_pretrained(root / "old"),
        AutoTokenizer.from_pretrained(root / "old"),
        d_new=48,
        layers_new=3,
        heads_new=6,
        intermediate_new=96,
        added_tokens=10,
        seed=3,
    )
    save_folder(planted.model, planted.tokenizer, root / "new")
    return root


def test_a_plan_is_exact_only_where_the_heads_agree(planted_pair: Path) -> None:
    old, new = planted_pair / "old", planted_pair / "new"
    plan = TransferPlan.build(old, new, config=PlanConfig(examples=8))
    assert plan.exact
    assert plan.facts["head_r2"] == pytest.approx(1, abs=1e-6)
    stored = used_by_transformers(new)
    put(new, stored[torch.randperm(len(stored), generator=torch.Generator().manual_seed(0))], tied=True)
    plan = TransferPlan.build(old, new, config=PlanConfig(examples=8))
    assert plan.options["method"] == "distill"
    assert "heads" in plan.facts["method_reason"]
    plan = TransferPlan.build(old, new, config=PlanConfig(examples=8, method="lstsq"))
    assert plan.facts["head_r2"] < 0.5
    assert not plan.exact
