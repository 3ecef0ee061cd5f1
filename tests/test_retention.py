"""What a model is asked to retain: its own predictions without the adapter and without dropout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lorasuite_fast import FinetuneConfig, RefineConfig
from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.text.samples import Sample
from lorasuite_fast.training.retention import kept_batch, kept_samples, summed_shift

from planted import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    """With an adapter that changes it, and much dropout in both."""
    torch.manual_seed(0)
    base = tiny_model("llama", 0)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    return get_peft_model(base, config)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, the second one padded at its front by two tokens."""
    ids = torch.tensor([[3, 7, 9, 11, 40], [0, 0, 5, 8, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    counted = torch.tensor([[False, True, False, True, True], [False, False, False, True, True]])
    return ids, mask, counted


def recount(model: Any, ids: Tensor, mask: Tensor, counted: Tensor) -> float:
    """KL(bare ‖ adapted) of every counted token's prediction, row by row without padding."""
    total = 0.0
    model.eval()
    for row, present, wanted in zip(ids, mask.bool(), counted, strict=True):
        with torch.no_grad():
            adapted = model(input_ids=row[present][None]).logits[0].double().log_softmax(-1)
            with model.disable_adapter():
                bare = model(input_ids=row[present][None]).logits[0].double().log_softmax(-1)
        for t, counts in enumerate(wanted[present].tolist()):
            if counts:
                total += float((bare[t - 1].exp() * (bare[t - 1] - adapted[t - 1])).sum())
    return total


def test_the_shift_is_the_summed_divergence_from_the_bare_model(model: Any) -> None:
    wanted = recount(model, *rows())
    assert wanted > 1e-3
    model.eval()
    assert float(summed_shift(model, *rows())) == pytest.approx(wanted, rel=1e-4)


def test_the_bare_prediction_is_one_without_dropout_and_the_mode_stays(model: Any) -> None:
    model.train()
    bare: list[Tensor] = []
    handle = model.register_forward_hook(lambda *call: bare.append(call[2].logits.detach()))
    for training in (True, False):
        model.train(training)
        summed_shift(model, *rows())
        assert model.training is training
    handle.remove()
    assert len(bare) == 4
    assert torch.equal(bare[0], bare[2])


def test_half_precision_predictions_are_compared_in_float32(model: Any) -> None:
    model.eval()
    half = model.to(torch.bfloat16)
    try:
        assert summed_shift(half, *rows()).dtype == torch.float32
    finally:
        model.float()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_keeps_nothing_or_everything_is_refused(weight: float) -> None:
    for config in (RefineConfig, FinetuneConfig):
        config(retain_weight=1e-3)
        with pytest.raises(LoraSuiteError, match=r"must be (above 0|finite)"):
            config(retain_weight=weight)


def test_the_default_weight_is_the_measured_one() -> None:
    """bench/reports/quality.md was measured with it."""
    assert RefineConfig().retain_weight == FinetuneConfig().retain_weight == 0.3


def test_shipped_text_is_kept_whole_up_to_the_cut_off_and_none_is_none() -> None:
    tokenizer = tiny_tokenizer()
    found = kept_samples("shipped", tokenizer, 16, 0).samples
    assert len(found) > 50
    assert max(len(sample.ids) for sample in found) <= 17
    assert kept_samples(None, tokenizer, 16, 0).samples == []


def test_a_batch_of_it_stands_under_names_of_its_own() -> None:
    found = kept_batch([Sample([5, 6], [False, True])])
    assert set(found) == {"kept_input_ids", "kept_attention_mask", "kept_labels"}
    assert found["kept_labels"].tolist() == [[-100, 6]]
