"""The table of families says what transformers' own models do: which norm a projection reads, which rows are whose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted_families import config_of, random_model
from torch import Tensor

from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.models.families import Shape, shape_of
from lorasuite_fast.models.family_table import FAMILIES, family_of

from planted import tiny_model

SIZES: dict[str, Any] = {"d": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "f": 48, "vocab": 64}


def make(name: str) -> Any:
    if name in ("llama", "mistral", "qwen2", "qwen3"):
        return tiny_model(name, 0, vocab=64)
    alone = {"kv_heads": 4}
    special = {"bloom": {"f": 128, "kv_heads": 4}, "gpt_neox": {"kv_heads": 4, "parallel": False}}
    special |= dict.fromkeys(("gpt2", "gptj", "opt"), alone) | {"mpt": {"f": 128, "kv_heads": 4}}
    return random_model(config_of(name, **(SIZES | special.get(name, {}))), 0)


def calls(model: Any, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What each module read and gave."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda _, inputs, output: seen.update({name: (inputs[0], output)})

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(torch.tensor([[5, 9, 30, 7]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def normed(x: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    centred = x if shift is None else x - x.mean(-1, keepdim=True)
    scaled = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * gain
    return scaled if shift is None else scaled + shift


@pytest.mark.parametrize("name", FAMILIES)
def test_projections_read_and_write_through_the_norms_the_table_names(name: str) -> None:
    model, family = make(name), FAMILIES[name]
    layer = family.layer(1)
    seen = calls(model, [f"{layer}.{part}" for part in {*family.modules(), *family.norms()}])
    for projection in family.projections.values():
        read, written = seen[f"{layer}.{projection.module}"]
        if projection.norm is not None:
            torch.testing.assert_close(read, seen[f"{layer}.{projection.norm}"][1])
        if projection.after is not None:
            torch.testing.assert_close(seen[f"{layer}.{projection.after}"][0], written)
    for norm in family.norms():
        module = model.get_submodule(f"{layer}.{norm}")
        x, y = seen[f"{layer}.{norm}"]
        parts = dict(module.named_parameters())
        assert set(parts) == set(family.stored_norm)
        gain = parts.get("weight", torch.ones(32)) + (family.gain_offset if parts else 0)
        shift = parts.get("bias", torch.zeros(32)) if family.layer_norm else None
        eps = getattr(model.config, family.epsilon, 1e-5)
        torch.testing.assert_close(y, normed(x, gain, shift, eps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stream_begins_as_the_table_says(name: str) -> None:
    model, family = make(name), FAMILIES[name]
    seen: list[Tensor] = []
    first = model.get_submodule(family.layer(0))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.tensor([[5, 9, 30]]), use_cache=False)
    rows = model.get_submodule(f"{family.prefix}{family.embedding}").weight[[5, 9, 30]]
    if family.embedding_norm:
        norm = model.get_submodule(f"{family.prefix}{family.embedding_norm}")
        rows = normed(rows, norm.weight, norm.bias, getattr(model.config, family.epsilon))
    factor = 32**0.5 if family.scaled_embedding else model.config.embedding_multiplier if family.multipliers else 1
    for table in family.outside:
        # OPT's first two positions are never used.
        first_used = 2 if name == "opt" else 0
        rows = rows + model.get_parameter(f"{family.prefix}{table}")[first_used : first_used + 3]
    torch.testing.assert_close(seen[0][0], rows * factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_and_biases_are_those_of_transformers_modules(name: str) -> None:
    model, family = make(name), FAMILIES[name]
    shape = shape_of(model.config.to_dict(), family, name)
    config = model.config.to_dict()
    for projection in family.projections.values():
        module = model.get_submodule(f"{family.layer(0)}.{projection.module}")
        stored = module.weight.T if family.transposed else module.weight
        assert tuple(stored.shape) == family.module_shape(projection.module, shape)
        bias = projection.bias
        wanted = config.get(bias, projection.bias_default) if isinstance(bias, str) else bias
        assert (module.bias is not None) == wanted
    # What an expert computes, and what chooses it, is left to transformers.
    names = (n for n, _ in model.named_modules() if not any(f".{part}" in n for part in family.experts))
    assert family.gated == any("gate" in n for n in names)


def test_rows_of_a_fused_weight_are_the_roles_transformers_splits_it_into() -> None:
    """GPT-NeoX and Bloom: head by head its q, k and v. Phi-3: all of q, all of k, all of v; gate, then up."""
    for name in ("gpt_neox", "bloom"):
        family, shape = FAMILIES[name], Shape(V=9, d=6, h=2, H=3, G=3, f=4, L=1)
        whole = torch.arange(18).view(3, 3, 2)
        for n, role in enumerate("qkv"):
            rows = family.rows(role, shape)
            assert rows is not None
            assert rows.tolist() == whole[:, n].flatten().tolist()
    family, shape = FAMILIES["phi3"], Shape(V=9, d=6, h=2, H=3, G=1, f=4, L=1)
    starts = {"q": (0, 6), "k": (6, 8), "v": (8, 10), "gate": (0, 4), "up": (4, 8)}
    for role, (start, stop) in starts.items():
        rows = family.rows(role, shape)
        assert rows is not None
        assert rows.tolist() == list(range(start, stop))
    assert family.rows("o", shape) is None
    assert family.module_shape("self_attn.qkv_proj", shape) == (10, 6)


def config(**changed: Any) -> dict[str, Any]:
    given = {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 6,
    }
    return {name: value for name, value in (given | changed).items() if value is not None}


def test_absent_sizes_have_transformers_defaults() -> None:
    assert shape_of(config(), FAMILIES["llama"], "x") == Shape(V=9, d=8, h=2, H=4, G=4, f=6, L=2)
    assert shape_of(config(num_key_value_heads=2, head_dim=5), FAMILIES["llama"], "x").attention == "GQA 4:2"
    assert shape_of(config(num_key_value_heads=1), FAMILIES["llama"], "x").attention == "MQA"
    assert shape_of(config(), FAMILIES["gemma"], "x").h == 256
    assert shape_of(config(num_key_value_heads=2), FAMILIES["gpt_neox"], "x").G == 4
    bloom = {"vocab_size": 9, "n_embed": 8, "n_layer": 3, "n_head": 2, "intermediate_size": 7}
    assert shape_of(bloom, FAMILIES["bloom"], "x") == Shape(V=9, d=8, h=4, H=2, G=2, f=32, L=3)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4"])
def test_a_size_that_is_no_positive_integer_is_refused(value: Any) -> None:
    with pytest.raises(LoraSuiteError, match="needs a positive integer num_hidden_layers"):
        shape_of(config(num_hidden_layers=value), FAMILIES["llama"], "x")


def test_what_is_not_understood_is_refused() -> None:
    with pytest.raises(LoraSuiteError, match="4 attention heads cannot share 3"):
        shape_of(config(num_key_value_heads=3), FAMILIES["llama"], "x")
    with pytest.raises(LoraSuiteError, match="sets apply_residual_connection_post_layernorm to True"):
        shape_of(config(apply_residual_connection_post_layernorm=True), FAMILIES["bloom"], "x")
    with pytest.raises(LoraSuiteError, match="'mamba' is not supported; known families: arcee, bloom, cohere"):
        family_of({"model_type": "mamba"}, "x")
