"""The quality report's machinery: starts, claims, the search, the order of stages."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def quality() -> Any:
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("quality", BENCH / "quality.py")
        assert spec
        assert spec.loader
        module = ModuleType("quality")
        sys.modules["quality"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("quality", None)


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
        )
    ).double()


def neox() -> Any:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3)
    ).double()


@pytest.mark.parametrize(
    ("make", "pair", "targets"),
    [
        (llama, "llama-deep", ["q_proj", "v_proj"]),
        (llama, "llama-deep", ["o_proj", "down_proj"]),
        (neox, "neox", ["query_key_value"]),
        (neox, "neox", ["attention.dense", "dense_4h_to_h"]),
    ],
)
def test_a_start_among_further_modules_computes_what_its_adapter_computes(
    quality: Any, tmp_path: Path, make: Any, pair: str, targets: list[str]
) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(make(), config).save_pretrained(tmp_path / "start")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(make(), tmp_path / "start").double()(input_ids=ids).logits
        model = quality.started(make(), quality.PAIRS[pair], "base", tmp_path / "start").double()
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-6, atol=1e-6)
        assert (wanted - make()(input_ids=ids).logits).abs().max() > 1e-2
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for target in (*quality.PAIRS[pair].targets, *targets):
        assert any(f".{target}.lora_B" in name for name in trained)


def test_a_stage_is_claimed_once_until_its_process_is_gone(quality: Any, tmp_path: Path) -> None:
    bench = quality.Bench(tmp_path)
    assert bench.claim("a/b")
    assert not bench.claim("a/b")
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    bench.path("a/b").with_suffix(".lock").write_text(str(child))
    assert bench.claim("a/b")


def test_stages_run_after_what_they_need_and_only_once(quality: Any, tmp_path: Path) -> None:
    bench, made = quality.Bench(tmp_path), []

    def stage(name: str, *needs: str) -> Any:
        return quality.Stage(name, needs, lambda: made.append(name) or {"name": name})

    everything = [stage("x/3", "x/2"), stage("x/1"), stage("x/2", "x/1"), stage("x/4")]
    wanted = quality.with_needs(everything, {"x/3"})
    bench.run(wanted)
    bench.run(wanted)
    assert made == ["x/1", "x/2", "x/3"]
    assert json.loads(bench.path("x/2").read_text())["name"] == "x/2"


def test_the_search_by_halving_finds_the_best_of_what_it_tried(quality: Any, tmp_path: Path) -> None:
    case = quality.Case(quality.Bench(tmp_path), quality.PAIRS["neox"], "bible", 0)
    tried = []

    def setting(start: str, rate: float, epochs: int) -> dict[str, Any]:
        tried.append((rate, epochs))
        # Best at 1e-2, the more epochs the better.
        return {"rate": rate, "epochs": epochs, "domain_valid": abs(rate - 1e-2) + 1 / epochs}

    case.setting = setting
    runs = case.search("nothing")
    assert min(runs, key=lambda run: run["domain_valid"]) == {"rate": 1e-2, "epochs": 15, "domain_valid": 1 / 15}
    assert len(tried) == len(runs) == len(quality.RATES) + 3


def test_what_a_stage_needs_is_a_stage_before_it(quality: Any, tmp_path: Path) -> None:
    before: set[str] = set()
    for stage in quality.stages(quality.Bench(tmp_path)):
        assert before.issuperset(stage.needs), stage.name
        before.add(stage.name)
