"""The layer-by-layer forward pass gives the hidden states transformers gives with the whole model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.hidden_states import LayerStream, padded, pooled_layers

from planted import save_folder, tiny_model, tiny_tokenizer

TEXTS = ["one short line", "a line that is quite a bit longer than the first one, to be cut", "x", "1 + 1 = 2 " * 9]
CPU = torch.device("cpu")


def token_rows(folder: Path) -> list[list[int]]:
    tokenizer = Checkpoint(folder).tokenizer()
    return [tokenizer(text)["input_ids"][:40] for text in TEXTS]


def stream(folder: Path, ids: torch.Tensor, mask: torch.Tensor, **options: object) -> LayerStream:
    return LayerStream(Checkpoint(folder), ids, mask, device=CPU, dtype=torch.float32, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_equal_those_of_the_whole_model(family: str, side: str, tmp_path: Path) -> None:
    folder = save_folder(tiny_model(family, 0, layers=3), tiny_tokenizer(320), tmp_path / "model")
    ids, mask = padded(Checkpoint(folder), token_rows(folder), side)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    last: list[torch.Tensor] = []
    # transformers reports the last layer's output behind the final norm only.
    model.model.layers[-1].register_forward_hook(lambda _, __, output: last.append(output))
    with torch.no_grad():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = [*states[1:-1], last[0] if isinstance(last[0], torch.Tensor) else last[0][0]]
    run = stream(folder, ids, mask, micro_batch=3)
    for layer in run:
        found = torch.cat(list(layer.run(run.hidden)))
        difference = (found - expected[layer.index])[mask.bool()].abs().max()
        assert difference < 1e-5


def test_pooled_vectors_are_means_over_the_tokens_that_are_no_padding(tmp_path: Path) -> None:
    folder = save_folder(tiny_model("llama", 0, layers=2), tiny_tokenizer(320), tmp_path / "model")
    rows = token_rows(folder)
    found = [vectors for _, vectors in pooled_layers(stream(folder, *padded(Checkpoint(folder), rows)))]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for example, row in enumerate(rows):
        # One example at a time, so that no padding is involved at all.
        with torch.no_grad():
            states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        assert torch.allclose(found[0][example], states[1][0].mean(0), atol=1e-5)


def test_a_pass_goes_on_from_saved_hidden_states_to_the_bit(tmp_path: Path) -> None:
    folder = save_folder(tiny_model("qwen3", 0, layers=4), tiny_tokenizer(320), tmp_path / "model")
    batch = padded(Checkpoint(folder), token_rows(folder))
    whole = dict(pooled_layers(stream(folder, *batch)))
    first = stream(folder, *batch, last=2)
    for layer in first:
        list(layer.run(first.hidden))
    rest = stream(folder, *batch, first=2)
    rest.hidden = first.hidden
    for i, vectors in pooled_layers(rest):
        assert torch.equal(vectors, whole[i])


@pytest.mark.parametrize("mapped", [True, False])
def test_each_layer_is_read_once_and_the_head_never(tmp_path: Path, mapped: bool) -> None:
    folder = save_folder(tiny_model("llama", 0, layers=3, tied=False), tiny_tokenizer(320), tmp_path / "model")
    checkpoint = Checkpoint(folder, mapped=mapped)
    files = checkpoint.tensors
    run = LayerStream(
        checkpoint, *padded(checkpoint, token_rows(folder)), device=CPU, dtype=torch.float32, micro_batch=1
    )
    list(pooled_layers(run))
    layers = [name for name in files.entries if name.startswith("model.layers.")]
    assert "lm_head.weight" in files
    assert files.bytes_read == sum(files.entry(name).size for name in [*layers, checkpoint.embedding_name])
