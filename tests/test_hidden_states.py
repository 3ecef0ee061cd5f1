"""The layer-by-layer forward pass gives the hidden states transformers gives with the whole model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasuite_fast.checkpoint import Checkpoint
from lorasuite_fast.hidden_states import pooled_hidden_states

from planted import save_folder, tiny_model, tiny_tokenizer

TEXTS = ["one short line", "a line that is quite a bit longer than the first one, to be cut", "x", "1 + 1 = 2 " * 9]


def token_rows(folder: Path) -> list[list[int]]:
    tokenizer = Checkpoint(folder).tokenizer()
    return [tokenizer(text)["input_ids"][:40] for text in TEXTS]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_pooled_hidden_states_equal_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    layers = 3
    folder = save_folder(tiny_model(family, 0, layers=layers), tiny_tokenizer(320), tmp_path / "model")
    rows = token_rows(folder)
    found = pooled_hidden_states(
        Checkpoint(folder), rows, device=torch.device("cpu"), dtype=torch.float32, micro_batch=3
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, inputs, output: outputs.append(output if isinstance(output, torch.Tensor) else output[0])
        )
    for example, row in enumerate(rows):
        # One example at a time, so that no padding is involved at all.
        outputs.clear()
        with torch.inference_mode():
            states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        for layer in range(layers):
            expected = outputs[layer][0].mean(0)
            assert torch.allclose(found[layer, example], expected, atol=1e-5)
            if layer < layers - 1:
                assert torch.equal(states[layer + 1], outputs[layer])


def test_every_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder(tiny_model("llama", 0, layers=3), tiny_tokenizer(320), tmp_path / "model")
    read: list[str] = []
    original = Checkpoint.read

    def counted(self: Checkpoint, name: str, *arguments: object) -> torch.Tensor:
        read.append(name)
        return original(self, name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read", counted)
    checkpoint = Checkpoint(folder)
    pooled_hidden_states(checkpoint, token_rows(folder), device=torch.device("cpu"), dtype=torch.float32)
    assert len(read) == len(set(read))
    assert set(read) == {name for name in checkpoint.tensors.entries if name.startswith("model.layers.")}
