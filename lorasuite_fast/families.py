"""Model architectures as data: where a checkpoint keeps its embedding, layers, projections and norms.

Adding a family is adding a row. Names are checked against the checkpoint's own tensors and shapes before any use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .errors import LoraSuiteError

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
ROLES = ATTENTION + MLP


@dataclass(frozen=True)
class Projection:
    """One linear map of a layer.

    Attributes:
        module: module path inside the layer; its weight is (out, in).
        norm: the norm whose output it reads; None where it reads heads (o) or neurons (down). Two projections naming
            one norm are parallel.
        part: None, or which part of a fused weight this is (see `Family.fused`).
        bias: the config key that says whether there is a bias, or True / False.
    """

    module: str
    norm: str | None = None
    part: str | None = None
    bias: str | bool = False


@dataclass(frozen=True)
class Family:
    """Where everything is in one architecture.

    Attributes:
        prefix: of the transformer's own modules in the checkpoint of the causal language model.
        fused: layout of a fused q, k, v weight: None, "blocks" (per head q, k, v) or "stacked" (all q, all k, all v).
        gain_offset: added to a norm's stored weight to get its gain (1 where the file stores gain - 1).
        extra: further tensors a layer holds, that no projection needs.
        ignored: tensor name endings some files hold though they follow from the config.
    """

    model_type: str
    projections: dict[str, Projection]
    prefix: str = "model."
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    head: str = "lm_head"
    fused: str | None = None
    gain_offset: float = 0.0
    extra: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "masked_bias", "attention.bias")
    config_names: dict[str, str] = field(default_factory=dict)

    def layer(self, i: int) -> str:
        return f"{self.prefix}{self.layers}.{i}"

    def norms(self) -> list[str]:
        return sorted({p.norm for p in self.projections.values() if p.norm})


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


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", _llama_projections("attention_bias", "attention_bias", "mlp_bias")),
        Family("mistral", _llama_projections(False, False, False)),
        Family("qwen2", _llama_projections(True, False, False)),
        Family(
            "qwen3",
            _llama_projections("attention_bias", "attention_bias", False),
            extra=("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
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


def family_of(config: dict[str, Any], where: str) -> Family:
    """The row for a config's `model_type`. Raises LoraSuiteError naming the family and the known ones."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise LoraSuiteError(f"{where}: config.json has no model_type; it is not a Hugging Face model folder")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise LoraSuiteError(f"{where}: model family {model_type!r} is not supported; known families: {known}")
    return FAMILIES[model_type]


def shape_of(config: dict[str, Any], family: Family, where: str) -> Shape:
    """Reads the sizes from config.json, with transformers' own defaults for absent optional keys."""

    def read(key: str, default: int | None = None) -> int:
        name = family.config_names.get(key, key)
        value = config.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LoraSuiteError(f"{where}: config.json needs a positive integer {name}, found {value!r}")
        return value

    H, d = read("num_attention_heads"), read("hidden_size")
    G = read("num_key_value_heads", H)
    h = read("head_dim", d // H)
    if H % G:
        raise LoraSuiteError(f"{where}: config.json: {H} attention heads cannot share {G} key/value heads")
    return Shape(V=read("vocab_size"), d=d, h=h, H=H, G=G, f=read("intermediate_size"), L=read("num_hidden_layers"))
