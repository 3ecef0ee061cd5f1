"""Model architectures as data: where a checkpoint keeps its embedding, layers, projections and norms.

Adding a family is adding a row. Names are checked against the checkpoint's own tensors and shapes before any use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .errors import LoraSuiteError

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
ROLES = ATTENTION + MLP
READING = ("q", "k", "v", "gate", "up")
"""Roles that read the residual stream; o and down write to it."""


@dataclass(frozen=True)
class Projection:
    """One linear map of a layer.

    Attributes:
        module: module path inside the layer; its weight is (out, in). Projections naming one module share a fused
            weight, of which each has some rows (`Family.rows`).
        norm: the norm whose output it reads; None where it reads heads (o), neurons (down), or the residual stream
            as it is. Two projections naming one norm are parallel.
        after: the norm its output passes before it joins the residual stream, if there is one.
        bias: the config key that says whether there is a bias, or True / False. bias_default: where the key is absent.
    """

    module: str
    norm: str | None = None
    after: str | None = None
    bias: str | bool = False
    bias_default: bool = False


@dataclass(frozen=True)
class Family:
    """Where everything is in one architecture.

    Attributes:
        wrapper: model type of the multimodal class that holds the text model, if one does.
        prefix: of the transformer's own modules in the causal language model.
        head: names the head goes by, if it is not tied to the embedding. tied: whether it is, where config.json does
            not say.
        fused: layout of the rows of a fused q, k, v weight: None, "blocks" (per head its q, k and v) or "stacked" (all
            of q, all of k, all of v; likewise gate and up).
        layer_norm: norms subtract the mean (LayerNorm), instead of RMSNorm.
        norm_parts: what the file stores of a norm; None for a weight, and a bias too where it is a LayerNorm.
        gain_offset: added to a norm's stored weight to get its gain (1 where the file stores gain - 1).
        epsilon: config key of the norms' epsilon. epsilon_default: where config.json does not say; None for 1e-5
            (LayerNorm) or 1e-6.
        embedding_norm: a norm between the embedding and the residual stream.
        scaled_embedding: embeddings are multiplied by sqrt(d) on their way into the residual stream.
        multipliers: config.json has factors on the embeddings and on what a layer adds to the stream (Granite).
        logit_scale: factor on the logits, where the config does not say.
        transposed: weights are stored (in, out), as in transformers' Conv1D.
        head_dim: config.json's default for head_dim; None for d / H.
        kv_heads: G, where the config does not say it in the usual way; None for its num_key_value_heads, or else H.
        mlp_ratio: f / d, where the config does not say f.
        outside: further tensors outside the layers, such as learned positions.
        extra: further tensors a layer holds, that no projection needs. optional: those it may hold.
        ignored: tensor name endings some files hold though they follow from the config.
        config_names: further names of config keys, by the usual one.
        refused: config keys, and the one value of each that is understood.
    """

    model_type: str
    projections: dict[str, Projection]
    wrapper: str | None = None
    prefix: str = "model."
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    head: tuple[str, ...] = ("lm_head",)
    tied: bool = False
    fused: str | None = None
    layer_norm: bool = False
    norm_parts: tuple[str, ...] | None = None
    gain_offset: float = 0.0
    epsilon: str = "rms_norm_eps"
    epsilon_default: float | None = None
    embedding_norm: str | None = None
    scaled_embedding: bool = False
    multipliers: bool = False
    logit_scale: float = 1.0
    transposed: bool = False
    head_dim: int | None = None
    kv_heads: int | None = None
    mlp_ratio: int | None = None
    outside: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "masked_bias", "attention.bias")
    config_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, Any] = field(default_factory=dict)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role in ROLES if role in self.projections)

    @property
    def gated(self) -> bool:
        """Whether the MLP's neurons are `act(gate·x) (up·x)`, instead of `act(up·x)`."""
        return "gate" in self.projections

    @property
    def text_type(self) -> str:
        """The model type of the text model, whatever holds it."""
        return self.model_type.rpartition("/")[2]

    @property
    def stored_prefixes(self) -> tuple[str, ...]:
        """What the names of the text model's tensors may begin with in a file, likeliest first."""
        return (self.prefix, *(_WRAPPED_PREFIXES if self.wrapper else ("",)))

    @property
    def adapter_prefixes(self) -> tuple[str, ...]:
        """What module names of an adapter may begin with: those of the text's class and of every wrapper's."""
        return (self.prefix, *_WRAPPED_PREFIXES)

    def targets(self, roles: Iterable[str]) -> list[str] | str:
        """PEFT's target_modules for some roles: ends of paths, or a pattern that spares a wrapper's other parts."""
        wanted = set(roles)
        modules = list(dict.fromkeys(self.projections[role].module for role in self.roles if role in wanted))
        if self.wrapper is None:
            return [self.suffix(module) for module in modules]
        return re.escape(f"{self.prefix}{self.layers}.") + r"\d+\.(" + "|".join(map(re.escape, modules)) + ")"

    @property
    def stored_norm(self) -> tuple[str, ...]:
        """What the file stores of a norm: none, one or both of "weight" and "bias"."""
        return ("weight", "bias")[: 1 + self.layer_norm] if self.norm_parts is None else self.norm_parts

    def reads_through_norms(self, role: str) -> bool:
        """Whether a projection reads a norm of the residual stream, instead of the stream itself, or no stream."""
        return self.projections[role].norm is not None

    def layer(self, i: int) -> str:
        return f"{self.prefix}{self.layers}.{i}"

    def norms(self) -> list[str]:
        named = ({p.norm, p.after} for p in self.projections.values())
        return sorted({norm for pair in named for norm in pair if norm})

    def sharing(self, module: str) -> tuple[str, ...]:
        """The roles whose weights one module holds, in the order of the table."""
        return tuple(role for role, p in self.projections.items() if p.module == module)

    def modules(self) -> list[str]:
        return list(dict.fromkeys(p.module for p in self.projections.values()))

    def rows(self, role: str, shape: Shape) -> Tensor | None:
        """Rows of the module's weight that belong to a role, (out,) int64; None where all of them do."""
        roles = self.sharing(self.projections[role].module)
        if len(roles) == 1:
            return None
        if self.fused == "blocks":
            return (
                torch.arange(shape.H * len(roles) * shape.h)
                .view(shape.H, len(roles), -1)[:, roles.index(role)]
                .flatten()
            )
        start = sum(shape.expected(r)[0] for r in roles[: roles.index(role)])
        return torch.arange(start, start + shape.expected(role)[0])

    def module_shape(self, module: str, shape: Shape) -> tuple[int, int]:
        """(out, in) of a module's weight, fused or not, however it is stored."""
        sizes = [shape.expected(role) for role in self.sharing(module)]
        return sum(out for out, _ in sizes), sizes[0][1]

    def suffix(self, module: str) -> str:
        """The shortest end of a module's path that no other module of a layer has."""
        parts = module.split(".")
        others = [other for other in self.modules() if other != module]
        ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
        return next((end for end in ends if not any(f".{o}".endswith(f".{end}") for o in others)), module)


def _llama_projections(qkv_bias: str | bool, o_bias: str | bool, mlp_bias: str | bool) -> dict[str, Projection]:
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


def _sandwiched(projections: dict[str, Projection]) -> dict[str, Projection]:
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


def _phi3_projections() -> dict[str, Projection]:
    unfused = _llama_projections(False, False, False)
    modules = dict.fromkeys("qkv", "self_attn.qkv_proj") | dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")
    return {role: replace(p, module=modules.get(role, p.module)) for role, p in unfused.items()}


def _fused_projections(attention: str, bias: str | bool) -> dict[str, Projection]:
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


def _parallel(projections: dict[str, Projection]) -> dict[str, Projection]:
    """Cohere: one norm, which attention and MLP both read."""
    return {role: replace(p, norm=p.norm and "input_layernorm") for role, p in projections.items()}


def _fused_gate(projections: dict[str, Projection]) -> dict[str, Projection]:
    """GLM: gate and up in one module."""
    fused = dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")
    return {role: replace(p, module=fused.get(role, p.module)) for role, p in projections.items()}


def _without(projections: dict[str, Projection], *roles: str) -> dict[str, Projection]:
    return {role: p for role, p in projections.items() if role not in roles}


def _glm4_projections() -> dict[str, Projection]:
    behind = {"o": "post_self_attn_layernorm", "down": "post_mlp_layernorm"}
    plain = _fused_gate(_llama_projections("attention_bias", False, False))
    return {role: replace(p, after=behind.get(role), bias_default=role in ("q", "k", "v")) for role, p in plain.items()}


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
        Family("llama", _llama_projections("attention_bias", "attention_bias", "mlp_bias")),
        Family("mistral", _llama_projections(False, False, False)),
        Family("qwen2", _llama_projections(True, False, False)),
        Family("qwen3", _llama_projections("attention_bias", "attention_bias", False), extra=_HEAD_NORMS),
        Family("phi3", _phi3_projections(), fused="stacked"),
        Family("gemma", _llama_projections("attention_bias", "attention_bias", False), **_GEMMA),
        Family("gemma2", _sandwiched(_llama_projections("attention_bias", "attention_bias", False)), **_GEMMA),
        Family(
            "gemma3_text",
            _sandwiched(_llama_projections("attention_bias", "attention_bias", False)),
            extra=_HEAD_NORMS,
            **_GEMMA,
        ),
        Family(
            "gpt_neox",
            _fused_projections("attention", "attention_bias"),
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
            _fused_projections("self_attention", True),
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
        Family("smollm3", _llama_projections("attention_bias", "attention_bias", "mlp_bias"), tied=True),
        Family(
            "olmo2",
            _behind(_llama_projections("attention_bias", "attention_bias", False)),
            epsilon_default=1e-5,
            extra=_HEAD_NORMS,
        ),
        Family(
            "olmo3",
            _behind(_llama_projections("attention_bias", "attention_bias", False)),
            epsilon_default=1e-5,
            extra=_HEAD_NORMS,
        ),
        Family("granite", _llama_projections("attention_bias", "attention_bias", "mlp_bias"), multipliers=True),
        Family("ministral", _llama_projections(False, False, False)),
        Family("ministral3", _llama_projections(False, False, False), epsilon_default=1e-5, head_dim=128),
        Family(
            "seed_oss",
            {
                role: replace(p, bias_default=role in ("q", "k", "v"))
                for role, p in _llama_projections("attention_bias", "attention_out_bias", "mlp_bias").items()
            },
            head_dim=128,
        ),
        Family(
            "ernie4_5",
            _llama_projections("use_bias", "use_bias", "use_bias"),
            tied=True,
            epsilon_default=1e-5,
            head_dim=128,
        ),
        Family("helium", _llama_projections("attention_bias", False, "mlp_bias"), epsilon_default=1e-8, head_dim=128),
        Family(
            "hunyuan_v1_dense",
            _llama_projections("attention_bias", "attention_bias", False),
            epsilon_default=1e-5,
            extra=("self_attn.query_layernorm.weight", "self_attn.key_layernorm.weight"),
        ),
        Family("exaone4", _behind(_llama_projections(False, False, False)), epsilon_default=1e-5, extra=_HEAD_NORMS),
        Family(
            "stablelm",
            _llama_projections("use_qkv_bias", False, False),
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
            _without(_llama_projections("attention_bias", "attention_bias", "mlp_bias"), "gate"),
            epsilon_default=1e-5,
        ),
        Family(
            "nemotron",
            _without(_llama_projections("attention_bias", "attention_bias", "mlp_bias"), "gate"),
            layer_norm=True,
            gain_offset=1.0,
            epsilon="norm_eps",
        ),
        Family(
            "cohere",
            _parallel(_llama_projections("attention_bias", "attention_bias", False)),
            tied=True,
            layer_norm=True,
            norm_parts=("weight",),
            epsilon="layer_norm_eps",
            logit_scale=0.0625,
            optional=_HEAD_NORMS,
        ),
        Family(
            "cohere2",
            _parallel(_llama_projections("attention_bias", "attention_bias", False)),
            tied=True,
            layer_norm=True,
            norm_parts=("weight",),
            epsilon="layer_norm_eps",
            logit_scale=0.0625,
        ),
        Family(
            "glm",
            {role: replace(p, after=None) for role, p in _glm4_projections().items()},
            fused="stacked",
            epsilon_default=1.5625e-07,
            head_dim=128,
        ),
        Family("glm4", _glm4_projections(), fused="stacked", epsilon_default=1.5625e-07, head_dim=128),
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
            _llama_projections("attention_bias", "attention_bias", False),
            layer_norm=True,
            norm_parts=(),
            epsilon="layer_norm_eps",
        ),
    )
}


@dataclass(frozen=True)
class Shape:
    """The sizes of one model in the notation of the method: V, d, h, H, G, f, L."""

    V: int
    d: int
    h: int
    H: int
    G: int
    f: int
    L: int

    @property
    def attention(self) -> str:
        return "MHA" if self.G == self.H else "MQA" if self.G == 1 else f"GQA {self.H}:{self.G}"

    def expected(self, role: str) -> tuple[int, int]:
        """(out, in) of an unfused projection."""
        return {
            "q": (self.H * self.h, self.d),
            "k": (self.G * self.h, self.d),
            "v": (self.G * self.h, self.d),
            "o": (self.d, self.H * self.h),
            "gate": (self.f, self.d),
            "up": (self.f, self.d),
            "down": (self.d, self.f),
        }[role]


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
_WRAPPED_PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "model.text_model.",
    "model.language_model.model.",
    "language_model.",
    "model.",
)


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


def shape_of(config: dict[str, Any], family: Family, where: str) -> Shape:
    """Reads the sizes from config.json, with transformers' own defaults for absent optional keys."""

    def read(key: str, default: int | None = None) -> int:
        names = (key, *family.config_names.get(key, ()))
        value = next((config[name] for name in names if config.get(name) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LoraSuiteError(f"{where}: config.json needs a positive integer {names[-1]}, found {value!r}")
        return value

    for key, understood in family.refused.items():
        if config.get(key, understood) != understood:
            raise LoraSuiteError(f"{where}: config.json sets {key} to {config[key]!r}, which is not supported")
    H, d = read("num_attention_heads"), read("hidden_size")
    G = H if family.fused == "blocks" else family.kv_heads or read("num_key_value_heads", H)
    h = read("head_dim", family.head_dim or d // H)
    if H % G:
        raise LoraSuiteError(f"{where}: config.json: {H} attention heads cannot share {G} key/value heads")
    ratio = family.mlp_ratio * d if family.mlp_ratio else None
    stated = ratio is None or "intermediate_size" in family.config_names
    f = read("intermediate_size", ratio) if stated else ratio
    assert f is not None
    return Shape(V=read("vocab_size"), d=d, h=h, H=H, G=G, f=f, L=read("num_hidden_layers"))
