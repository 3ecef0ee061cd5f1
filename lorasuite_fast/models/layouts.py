"""Layouts of a layer's projections that families share."""

from __future__ import annotations

from dataclasses import replace

from .families import ATTENTION, Family, Projection

READING = ("q", "k", "v", "gate", "up")
"""Roles that read the residual stream; o and down write to it."""


def llama_projections(qkv_bias: str | bool, o_bias: str | bool, mlp_bias: str | bool) -> dict[str, Projection]:
    attention, mlp = "input_layernorm", "post_attention_layernorm"
    return {
        "q": Projection("self_attn.q_proj", attention, bias=qkv_bias),
        "k": Projection("self_attn.k_proj", attention, bias=qkv_bias),
        "v": Projection("self_attn.v_proj", attention, bias=qkv_bias),
        "o": Projection("self_attn.o_proj", bias=o_bias),
        "gate": Projection("mlp.gate_proj", mlp, bias=mlp_bias),
        "up": Projection("mlp.up_proj", mlp, bias=mlp_bias),
        "down": Projection("mlp.down_proj", bias=mlp_bias),
    }


def sandwiched(projections: dict[str, Projection]) -> dict[str, Projection]:
    """Gemma 2 and 3: a norm in front of and behind both the attention and the MLP."""
    mlp, after_attention, after_mlp = (
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    )
    return projections | {
        "o": replace(projections["o"], after=after_attention),
        "gate": replace(projections["gate"], norm=mlp),
        "up": replace(projections["up"], norm=mlp),
        "down": replace(projections["down"], after=after_mlp),
    }


def phi3_projections() -> dict[str, Projection]:
    unfused = llama_projections(False, False, False)
    modules = dict.fromkeys("qkv", "self_attn.qkv_proj") | dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")
    return {role: replace(p, module=modules.get(role, p.module)) for role, p in unfused.items()}


def fused_projections(attention: str, bias: str | bool) -> dict[str, Projection]:
    """GPT-NeoX and Bloom."""
    fused = Projection(f"{attention}.query_key_value", "input_layernorm", bias=bias, bias_default=True)
    return {
        "q": fused,
        "k": fused,
        "v": fused,
        "o": Projection(f"{attention}.dense", bias=bias, bias_default=True),
        "up": Projection("mlp.dense_h_to_4h", "post_attention_layernorm", bias=True),
        "down": Projection("mlp.dense_4h_to_h", bias=True),
    }


def _behind(projections: dict[str, Projection]) -> dict[str, Projection]:
    """OLMo 2 and 3, EXAONE 4: the stream is read as it is; norms are behind the attention and the MLP alone."""
    behind = {"o": "post_attention_layernorm", "down": "post_feedforward_layernorm"}
    return {role: replace(p, norm=None, after=behind.get(role)) for role, p in projections.items()}


def parallel(projections: dict[str, Projection]) -> dict[str, Projection]:
    """Cohere: one norm, which attention and MLP both read."""
    return {role: replace(p, norm=p.norm and "input_layernorm") for role, p in projections.items()}


def _fused_gate(projections: dict[str, Projection]) -> dict[str, Projection]:
    """GLM: gate and up in one module."""
    fused = dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")
    return {role: replace(p, module=fused.get(role, p.module)) for role, p in projections.items()}


def _without(projections: dict[str, Projection], *roles: str) -> dict[str, Projection]:
    return {role: p for role, p in projections.items() if role not in roles}


def glm4_projections() -> dict[str, Projection]:
    behind = {"o": "post_self_attn_layernorm", "down": "post_mlp_layernorm"}
    plain = _fused_gate(llama_projections("attention_bias", False, False))
    return {role: replace(p, after=behind.get(role), bias_default=role in ("q", "k", "v")) for role, p in plain.items()}


_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_MLP_NORM = "post_attention_layernorm.weight"


def _attention(qkv_bias: str | bool, o_bias: str | bool, *, bias_default: bool = False) -> dict[str, Projection]:
    found = llama_projections(qkv_bias, o_bias, False)
    return {role: replace(found[role], bias_default=bias_default) for role in ATTENTION}


MIXTURES = (
    Family(
        "mixtral",
        _attention(False, False),
        epsilon_default=1e-5,
        extra=(_MLP_NORM,),
        experts=("block_sparse_moe", "mlp"),
    ),
    Family("qwen2_moe", _attention("qkv_bias", False, bias_default=True), extra=(_MLP_NORM,), experts=("mlp",)),
    Family(
        "qwen3_moe", _attention("attention_bias", "attention_bias"), extra=(*_HEAD_NORMS, _MLP_NORM), experts=("mlp",)
    ),
    Family(
        "olmoe",
        _attention("attention_bias", "attention_bias"),
        epsilon_default=1e-5,
        extra=(*_HEAD_NORMS, _MLP_NORM),
        experts=("mlp",),
        refused={"clip_qkv": None},
    ),
    Family(
        "gpt_oss",
        _attention("attention_bias", "attention_bias", bias_default=True),
        epsilon_default=1e-5,
        head_dim=64,
        extra=("self_attn.sinks", _MLP_NORM),
        experts=("mlp",),
    ),
    Family(
        "glm4_moe",
        _attention("attention_bias", False),
        epsilon_default=1e-5,
        extra=(_MLP_NORM,),
        optional=_HEAD_NORMS,
        experts=("mlp",),
    ),
    Family(
        "llama4_text",
        _attention("attention_bias", "attention_bias"),
        epsilon_default=1e-5,
        head_dim=128,
        extra=(_MLP_NORM,),
        experts=("feed_forward",),
    ),
)
"""Mixtures of experts. Only the attention has projections: experts and routers are neither read nor compared."""
