"""Losses read from the last hidden states against those of the model's own logits."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional

from lorasuite_fast.training.predictions import predictions
from lorasuite_fast.training.teacher import Target, divergence

SIZES = {
    "vocab_size": 90,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}


def built(kind: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(1)
    name, lora = {"adapted head": ("Llama", ["q_proj", "lm_head"])}.get(kind, (kind, ["q_proj"]))
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.get_output_embeddings().weight.data.mul_(20)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=lora, init_lora_weights=False, lora_dropout=0.0))
    return peft.train()


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "Llama": ({}, True),
    "Gemma2": ({"final_logit_softcapping": 2.0}, True),
    "Cohere": ({"logit_scale": 0.25}, True),
    "Granite": ({"logits_scaling": 4.0}, True),
    "adapted head": ({}, False),
}
ids = torch.randint(1, 90, (3, 10), generator=torch.Generator().manual_seed(2))
mask = torch.ones_like(ids)
mask[2, 7:] = 0
tokens = torch.arange(3, 80)
row, position = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 8, 4, 6])
labels = ids.masked_fill(mask == 0, -100)[:, 1:]


def wanted(k: int | None) -> Target:
    log_probs = torch.log_softmax(torch.randn(4, len(tokens), generator=torch.Generator().manual_seed(5)), -1)
    if k is None:
        return Target(log_probs, None, torch.full((4,), -torch.inf))
    kept, index = log_probs.topk(k)
    return Target(kept, index, log_probs.scatter(1, index, -torch.inf).logsumexp(-1))


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("kind", list(CASES))
def test_losses_and_gradients_are_those_of_the_models_own_logits(kind: str) -> None:
    options, readable = CASES[kind]
    model = built(kind, **options)
    assert (predictions(model, ids, mask).head is not None) == readable
    for k in (5, None):
        logits = model(input_ids=ids, attention_mask=mask).logits
        plain = divergence(wanted(k), logits[row, position][:, tokens])
        found = predictions(model, ids, mask).target_kl(row, position, wanted(k), tokens)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
        for own, other in zip(gradients(model, found.sum()), gradients(model, plain.sum()), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-7)
    logits = model(input_ids=ids, attention_mask=mask).logits
    plain = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
    found = predictions(model, ids, mask).cross_entropy(labels)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    for own, other in zip(gradients(model, found), gradients(model, plain), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-7)
    counted = labels != -100
    dense = functional.log_softmax(logits[:, :-1][counted], -1)
    torch.testing.assert_close(predictions(model, ids, mask).log_probs(counted), dense, rtol=1e-4, atol=1e-5)


def test_the_models_own_head_sees_one_position() -> None:
    model = built("Llama")
    predictions(model, ids, mask)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))
    predictions(model, ids, mask)
    assert seen == [(3, 1, 90)]


def test_a_head_the_logits_disagree_with_is_left_to_the_model() -> None:
    model = built("Llama")
    model.get_output_embeddings().register_forward_hook(lambda m, i, o: o + torch.linspace(0, 9, 90))
    found = predictions(model, ids, mask)
    assert found.head is None
    torch.testing.assert_close(found.states, model(input_ids=ids, attention_mask=mask).logits)


def test_reading_the_head_leaves_mode_and_draws_as_they_were() -> None:
    model = built("Llama")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.no_grad():
        predictions(model, ids, mask)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
