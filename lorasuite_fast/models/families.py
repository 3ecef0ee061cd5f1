"""Model architectures as data: where a checkpoint keeps its embedding, layers, projections and norms.

Adding a family is adding a row. Names are checked against the checkpoint's own tensors and shapes before any use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import ATTENTION as ATTENTION
from ..config import MLP as MLP
from ..config import ROLES as ROLES
from ..errors import LoraSuiteError


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
        experts: modules of a layer, experts and routers among them, of which no tensor is read but for a forward pass.
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
    experts: tuple[str, ...] = ()
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

    def is_expert(self, name: str) -> bool:
        """Whether a tensor or module, by its path inside a layer, belongs to the experts or their router."""
        return any(name == module or name.startswith(f"{module}.") for module in self.experts)

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


_WRAPPED_PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "model.text_model.",
    "model.language_model.model.",
    "language_model.",
    "model.",
)


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
