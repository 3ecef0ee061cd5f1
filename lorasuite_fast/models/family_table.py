"""The families that are known: one row each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ..errors import LoraSuiteError
from .families import Family, Projection
from .layouts import (
    MIXTURES,
    _behind,
    _without,
    fused_projections,
    glm4_projections,
    llama_projections,
    parallel,
    phi3_projections,
    sandwiched,
)


def _of(
    attention: str,
    attention_norm: str,
    mlp: tuple[str, str],
    mlp_norm: str,
    bias: tuple[str | bool, str | bool],
    **more: Any,
) -> dict[str, Projection]:
    """An MLP without a gate, and an attention of which the last part of each path is given.

    Args:
        attention: paths of q, k, v and o, separated by spaces. mlp: of up and down. bias: of the attention, the MLP.
    """
    q, k, v, o = attention.split()
    return {
        "q": Projection(q, attention_norm, bias=bias[0], **more),
        "k": Projection(k, attention_norm, bias=bias[0], **more),
        "v": Projection(v, attention_norm, bias=bias[0], **more),
        "o": Projection(o, bias=bias[0], **more),
        "up": Projection(mlp[0], mlp_norm, bias=bias[1], **more),
        "down": Projection(mlp[1], bias=bias[1], **more),
    }


_GPT2: dict[str, Any] = {
    "prefix": "transformer.",
    "embedding": "wte",
    "layers": "h",
    "final_norm": "ln_f",
    "tied": True,
    "layer_norm": True,
    "epsilon": "layer_norm_epsilon",
    "mlp_ratio": 4,
    "ignored": (".attn.bias", ".attn.masked_bias"),
    "config_names": {
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "hidden_size": ("n_embd",),
        "intermediate_size": ("n_inner",),
    },
}


_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


_GEMMA: dict[str, Any] = {"gain_offset": 1.0, "scaled_embedding": True, "head_dim": 256, "tied": True}


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", llama_projections("attention_bias", "attention_bias", "mlp_bias")),
        Family("mistral", llama_projections(False, False, False)),
        Family("qwen2", llama_projections(True, False, False)),
        Family("qwen3", llama_projections("attention_bias", "attention_bias", False), extra=_HEAD_NORMS),
        Family("phi3", phi3_projections(), fused="stacked"),
        Family("gemma", llama_projections("attention_bias", "attention_bias", False), **_GEMMA),
        Family("gemma2", sandwiched(llama_projections("attention_bias", "attention_bias", False)), **_GEMMA),
        Family(
            "gemma3_text",
            sandwiched(llama_projections("attention_bias", "attention_bias", False)),
            extra=_HEAD_NORMS,
            **_GEMMA,
        ),
        Family(
            "gpt_neox",
            fused_projections("attention", "attention_bias"),
            prefix="gpt_neox.",
            embedding="embed_in",
            final_norm="final_layer_norm",
            head=("lm_head", "embed_out"),
            fused="blocks",
            layer_norm=True,
            epsilon="layer_norm_eps",
        ),
        Family(
            "bloom",
            fused_projections("self_attention", True),
            prefix="transformer.",
            embedding="word_embeddings",
            layers="h",
            final_norm="ln_f",
            tied=True,
            fused="blocks",
            layer_norm=True,
            epsilon="layer_norm_epsilon",
            embedding_norm="word_embeddings_layernorm",
            mlp_ratio=4,
            config_names={
                "num_hidden_layers": ("n_layer",),
                "num_attention_heads": ("n_head",),
                "hidden_size": ("n_embed",),
            },
            refused={"apply_residual_connection_post_layernorm": False},
        ),
        Family(
            "phi",
            {
                "q": Projection("self_attn.q_proj", "input_layernorm", bias=True),
                "k": Projection("self_attn.k_proj", "input_layernorm", bias=True),
                "v": Projection("self_attn.v_proj", "input_layernorm", bias=True),
                "o": Projection("self_attn.dense", bias=True),
                "up": Projection("mlp.fc1", "input_layernorm", bias=True),
                "down": Projection("mlp.fc2", bias=True),
            },
            final_norm="final_layernorm",
            layer_norm=True,
            epsilon="layer_norm_eps",
            optional=tuple(f"self_attn.{x}_layernorm.{y}" for x in "qk" for y in ("weight", "bias")),
        ),
        Family("smollm3", llama_projections("attention_bias", "attention_bias", "mlp_bias"), tied=True),
        Family(
            "olmo2",
            _behind(llama_projections("attention_bias", "attention_bias", False)),
            epsilon_default=1e-5,
            extra=_HEAD_NORMS,
        ),
        Family(
            "olmo3",
            _behind(llama_projections("attention_bias", "attention_bias", False)),
            epsilon_default=1e-5,
            extra=_HEAD_NORMS,
        ),
        Family("granite", llama_projections("attention_bias", "attention_bias", "mlp_bias"), multipliers=True),
        Family("ministral", llama_projections(False, False, False)),
        Family("ministral3", llama_projections(False, False, False), epsilon_default=1e-5, head_dim=128),
        Family(
            "seed_oss",
            {
                role: replace(p, bias_default=role in ("q", "k", "v"))
                for role, p in llama_projections("attention_bias", "attention_out_bias", "mlp_bias").items()
            },
            head_dim=128,
        ),
        Family(
            "ernie4_5",
            llama_projections("use_bias", "use_bias", "use_bias"),
            tied=True,
            epsilon_default=1e-5,
            head_dim=128,
        ),
        Family("helium", llama_projections("attention_bias", False, "mlp_bias"), epsilon_default=1e-8, head_dim=128),
        Family(
            "hunyuan_v1_dense",
            llama_projections("attention_bias", "attention_bias", False),
            epsilon_default=1e-5,
            extra=("self_attn.query_layernorm.weight", "self_attn.key_layernorm.weight"),
        ),
        Family("exaone4", _behind(llama_projections(False, False, False)), epsilon_default=1e-5, extra=_HEAD_NORMS),
        Family(
            "stablelm",
            llama_projections("use_qkv_bias", False, False),
            layer_norm=True,
            epsilon="layer_norm_eps",
            refused={"use_parallel_residual": False, "qk_layernorm": False},
        ),
        Family(
            "starcoder2",
            _of(
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
                "input_layernorm",
                ("mlp.c_fc", "mlp.c_proj"),
                "post_attention_layernorm",
                ("use_bias", "use_bias"),
                bias_default=True,
            ),
            tied=True,
            layer_norm=True,
            epsilon="norm_epsilon",
        ),
        Family(
            "arcee",
            _without(llama_projections("attention_bias", "attention_bias", "mlp_bias"), "gate"),
            epsilon_default=1e-5,
        ),
        Family(
            "nemotron",
            _without(llama_projections("attention_bias", "attention_bias", "mlp_bias"), "gate"),
            layer_norm=True,
            gain_offset=1.0,
            epsilon="norm_eps",
        ),
        Family(
            "cohere",
            parallel(llama_projections("attention_bias", "attention_bias", False)),
            tied=True,
            layer_norm=True,
            norm_parts=("weight",),
            epsilon="layer_norm_eps",
            logit_scale=0.0625,
            optional=_HEAD_NORMS,
        ),
        Family(
            "cohere2",
            parallel(llama_projections("attention_bias", "attention_bias", False)),
            tied=True,
            layer_norm=True,
            norm_parts=("weight",),
            epsilon="layer_norm_eps",
            logit_scale=0.0625,
        ),
        Family(
            "glm",
            {role: replace(p, after=None) for role, p in glm4_projections().items()},
            fused="stacked",
            epsilon_default=1.5625e-07,
            head_dim=128,
        ),
        Family("glm4", glm4_projections(), fused="stacked", epsilon_default=1.5625e-07, head_dim=128),
        Family(
            "gpt2",
            _of(
                "attn.c_attn attn.c_attn attn.c_attn attn.c_proj",
                "ln_1",
                ("mlp.c_fc", "mlp.c_proj"),
                "ln_2",
                (True, True),
            ),
            fused="stacked",
            transposed=True,
            outside=("wpe.weight",),
            refused={"add_cross_attention": False},
            **_GPT2,
        ),
        Family(
            "gpt_bigcode",
            _of(
                "attn.c_attn attn.c_attn attn.c_attn attn.c_proj",
                "ln_1",
                ("mlp.c_fc", "mlp.c_proj"),
                "ln_2",
                (True, True),
            ),
            fused="stacked",
            kv_heads=1,
            outside=("wpe.weight",),
            refused={"add_cross_attention": False, "multi_query": True},
            **_GPT2,
        ),
        Family(
            "opt",
            _of(
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj",
                "self_attn_layer_norm",
                ("fc1", "fc2"),
                "final_layer_norm",
                ("enable_bias", "enable_bias"),
                bias_default=True,
            ),
            embedding="decoder.embed_tokens",
            layers="decoder.layers",
            final_norm="decoder.final_layer_norm",
            tied=True,
            layer_norm=True,
            epsilon="layer_norm_eps",
            outside=("decoder.embed_positions.weight",),
            config_names={"intermediate_size": ("ffn_dim",)},
            refused={"do_layer_norm_before": True, "layer_norm_elementwise_affine": True},
        ),
        Family(
            "falcon",
            _of(
                "self_attention.query_key_value self_attention.query_key_value self_attention.query_key_value "
                "self_attention.dense",
                "input_layernorm",
                ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
                "input_layernorm",
                ("bias", "bias"),
            ),
            prefix="transformer.",
            embedding="word_embeddings",
            layers="h",
            final_norm="ln_f",
            tied=True,
            fused="stacked",
            layer_norm=True,
            epsilon="layer_norm_epsilon",
            kv_heads=1,
            mlp_ratio=4,
            config_names={"intermediate_size": ("ffn_hidden_size",)},
            refused={"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
        ),
        Family(
            "gptj",
            _of(
                "attn.q_proj attn.k_proj attn.v_proj attn.out_proj",
                "ln_1",
                ("mlp.fc_in", "mlp.fc_out"),
                "ln_1",
                (False, True),
            ),
            **_GPT2 | {"tied": False},
        ),
        Family(
            "mpt",
            _of(
                "attn.Wqkv attn.Wqkv attn.Wqkv attn.out_proj",
                "norm_1",
                ("ffn.up_proj", "ffn.down_proj"),
                "norm_2",
                (False, False),
            ),
            prefix="transformer.",
            embedding="wte",
            layers="blocks",
            final_norm="norm_f",
            tied=True,
            fused="stacked",
            layer_norm=True,
            norm_parts=("weight",),
            epsilon="layer_norm_epsilon",
            mlp_ratio=4,
            config_names={
                "num_hidden_layers": ("n_layers",),
                "num_attention_heads": ("n_heads",),
                "hidden_size": ("d_model",),
            },
            refused={"expansion_ratio": 4},
        ),
        Family(
            "olmo",
            llama_projections("attention_bias", "attention_bias", False),
            layer_norm=True,
            norm_parts=(),
            epsilon="layer_norm_eps",
        ),
        *MIXTURES,
    )
}


@dataclass(frozen=True)
class Wrapper:
    """A multimodal class that holds a text model.

    Attributes:
        text: module path of the text model. tied: whether the head is tied, where config.json does not say.
        text_type: the text's model type, where config.json does not say; its sizes are then those of the whole.
    """

    text: str = "model.language_model"
    tied: bool = False
    text_type: str | None = None


WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(tied=True, text_type="gemma3_text"),
    "mistral3": Wrapper(tied=True, text_type="mistral"),
    "qwen2_vl": Wrapper(text_type="qwen2_vl_text"),
    "qwen2_5_vl": Wrapper(text_type="qwen2_5_vl_text"),
    "qwen3_vl": Wrapper(text_type="qwen3_vl_text"),
    "llava": Wrapper(text_type="llama"),
    "llava_next": Wrapper(text_type="llama"),
    "paligemma": Wrapper(tied=True, text_type="gemma"),
    "smolvlm": Wrapper("model.text_model", text_type="llama"),
    "idefics3": Wrapper("model.text_model", text_type="llama"),
    "internvl": Wrapper(tied=True, text_type="qwen2"),
}


TEXT_LAYOUTS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text models inside wrappers that have the layout of another family."""


def known_family(name: str) -> Family | None:
    """The row of a family by its name: a model type, or that of a wrapper and that of its text, with / between."""
    wrapper, _, text = name.rpartition("/")
    if not wrapper:
        return FAMILIES.get(text)
    layout = TEXT_LAYOUTS.get(text, text)
    return _wrapped(layout, wrapper, text) if layout in FAMILIES and wrapper in WRAPPERS else None


def family_named(name: str) -> Family:
    """`known_family`, of a name that is known. Raises KeyError."""
    family = known_family(name)
    if family is None:
        raise KeyError(name)
    return family


@cache
def _wrapped(layout: str, wrapper: str, text: str) -> Family:
    heads = ("lm_head", "language_model.lm_head")
    prefix = f"{WRAPPERS[wrapper].text}."
    return replace(FAMILIES[layout], model_type=f"{wrapper}/{text}", wrapper=wrapper, prefix=prefix, head=heads)


def family_of(config: dict[str, Any], where: str) -> Family:
    """The row for a config's `model_type`. Raises LoraSuiteError naming the family and the known ones."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise LoraSuiteError(f"{where}: config.json has no model_type; it is not a Hugging Face model folder")
    if model_type in WRAPPERS:
        inner = config.get("text_config")
        text = (inner if isinstance(inner, dict) else {}).get("model_type") or WRAPPERS[model_type].text_type
        found = known_family(f"{model_type}/{text}")
        if found is None:
            raise LoraSuiteError(
                f"{where}: the text model inside this {model_type}, {text!r}, is not supported; known families: "
                f"{', '.join(sorted(FAMILIES))}"
            )
        return found
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise LoraSuiteError(f"{where}: model family {model_type!r} is not supported; known families: {known}")
    return FAMILIES[model_type]
