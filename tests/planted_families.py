"""Planted upgrades of the families that `planted` does not know: LayerNorm, parallel blocks, fused weights, Gemma.

As there, the new model computes the old one's function in another shape, so that every map between them is known:
`x_n = stretch · x_o Q` for the residual streams. Norms keep arbitrary gains and shifts on both sides. Written against
the layouts of transformers' own modules, in float64.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import dense_oracle as oracle
from planted import Planted, _draw, _head_map, _map_ids, _normal, _plant_tokenizer, _planted_generation


@dataclass(frozen=True)
class Names:
    """Where transformers keeps a family's tensors; per layer where not said otherwise.

    `attention_norm` and `mlp_norm` are None where the projections read the stream as it is; `positions` is a table of
    learned ones outside the layers; `head_norms` are those of q and k, over a head or (`wide_norms`) over all heads.
    """

    prefix: str
    embedding: str
    layers: str
    final_norm: str
    q: str
    o: str
    up: str
    down: str
    attention_norm: str | None
    mlp_norm: str | None
    k: str | None = None
    v: str | None = None
    gate: str | None = None
    after_attention: str | None = None
    after_mlp: str | None = None
    layer_norm: bool = True
    offset: float = 0.0
    fused: str | None = None
    head_bias: bool = False
    embedding_norm: str | None = None
    positions: str | None = None
    transposed: bool = False
    head_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    wide_norms: bool = False

    @property
    def targets(self) -> tuple[list[str], list[str]]:
        """PEFT target modules of the attention, and of the MLP."""
        attention = list(dict.fromkeys(m for m in (self.q, self.k, self.v, self.o) if m))
        mlp = list(dict.fromkeys(m for m in (self.gate, self.up, self.down) if m))
        last = [m.rpartition(".")[2] for m in (*attention, *mlp)]

        def short(module: str) -> str:
            end = module.rpartition(".")[2]
            return end if last.count(end) == 1 else module

        return [short(m) for m in attention], [short(m) for m in mlp]


_GEMMA: dict[str, Any] = {
    "prefix": "model.", "embedding": "embed_tokens", "layers": "layers", "final_norm": "norm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "layer_norm": False, "offset": 1.0,
}  # fmt: skip
_LLAMA = _GEMMA | {"offset": 0.0}
_BEFORE: dict[str, Any] = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_ONE: dict[str, Any] = {"attention_norm": "input_layernorm", "mlp_norm": "input_layernorm"}
_BEHIND: dict[str, Any] = {
    "attention_norm": None, "mlp_norm": None, "after_attention": "post_attention_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "prefix": "transformer.", "embedding": "wte", "layers": "h", "final_norm": "ln_f", "q": "attn.c_attn",
    "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "attention_norm": "ln_1", "mlp_norm": "ln_2",
}  # fmt: skip
_SANDWICH: dict[str, Any] = {
    "attention_norm": "input_layernorm", "after_attention": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "after_mlp": "post_feedforward_layernorm",
}  # fmt: skip

NAMES = {
    "gpt_neox": Names(
        "gpt_neox.", "embed_in", "layers", "final_layer_norm", "attention.query_key_value", "attention.dense",
        "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "input_layernorm", "post_attention_layernorm", fused="per head",
    ),
    "bloom": Names(
        "transformer.", "word_embeddings", "h", "ln_f", "self_attention.query_key_value", "self_attention.dense",
        "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "input_layernorm", "post_attention_layernorm", fused="per head",
        embedding_norm="word_embeddings_layernorm",
    ),
    "phi": Names(
        "model.", "embed_tokens", "layers", "final_layernorm", "self_attn.q_proj", "self_attn.dense", "mlp.fc1",
        "mlp.fc2", "input_layernorm", "input_layernorm", k="self_attn.k_proj", v="self_attn.v_proj", head_bias=True,
    ),
    "phi3": Names(
        "model.", "embed_tokens", "layers", "norm", "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj",
        "mlp.down_proj", "input_layernorm", "post_attention_layernorm", gate="mlp.gate_up_proj", layer_norm=False,
        fused="stacked",
    ),
    "gemma": Names(**_GEMMA, attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    "gemma2": Names(**_GEMMA, **_SANDWICH),
    "gemma3_text": Names(**_GEMMA, **_SANDWICH),
    "smollm3": Names(**_LLAMA, **_BEFORE),
    "olmo2": Names(**_LLAMA, **_BEHIND, wide_norms=True),
    "olmo3": Names(**_LLAMA, **_BEHIND, wide_norms=True),
    "granite": Names(**_LLAMA, **_BEFORE),
    "ministral": Names(**_LLAMA, **_BEFORE),
    "ministral3": Names(**_LLAMA, **_BEFORE),
    "seed_oss": Names(**_LLAMA, **_BEFORE),
    "ernie4_5": Names(**_LLAMA, **_BEFORE),
    "helium": Names(**_LLAMA, **_BEFORE),
    "hunyuan_v1_dense": Names(
        **_LLAMA, **_BEFORE, head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm")
    ),
    "exaone4": Names(**_LLAMA, **_BEHIND),
    "stablelm": Names(**_LLAMA | {"layer_norm": True}, **_BEFORE),
    "starcoder2": Names(
        **_LLAMA | {"layer_norm": True, "gate": None, "up": "mlp.c_fc", "down": "mlp.c_proj"}, **_BEFORE
    ),
    "arcee": Names(**_LLAMA | {"gate": None}, **_BEFORE),
    "nemotron": Names(**_LLAMA | {"layer_norm": True, "gate": None, "offset": 1.0}, **_BEFORE),
    "cohere": Names(**_LLAMA | {"layer_norm": True}, **_ONE),
    "cohere2": Names(**_LLAMA | {"layer_norm": True}, **_ONE),
    "glm": Names(**_LLAMA | {"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"}, **_BEFORE),
    "glm4": Names(
        **_LLAMA | {"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"}, **_BEFORE,
        after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm",
    ),
    "gpt2": Names(**_GPT2, fused="stacked", positions="wpe", transposed=True),
    "gpt_bigcode": Names(**_GPT2, fused="stacked", positions="wpe"),
    "opt": Names(
        "model.decoder.", "embed_tokens", "layers", "final_layer_norm", "self_attn.q_proj", "self_attn.out_proj",
        "fc1", "fc2", "self_attn_layer_norm", "final_layer_norm", k="self_attn.k_proj", v="self_attn.v_proj",
        positions="embed_positions",
    ),
    "falcon": Names(
        "transformer.", "word_embeddings", "h", "ln_f", "self_attention.query_key_value", "self_attention.dense",
        "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "input_layernorm", "input_layernorm", fused="stacked",
    ),
    "gptj": Names(
        "transformer.", "wte", "h", "ln_f", "attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out", "ln_1", "ln_1",
        k="attn.k_proj", v="attn.v_proj", head_bias=True,
    ),
    "mpt": Names(
        "transformer.", "wte", "blocks", "norm_f", "attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj",
        "norm_1", "norm_2", fused="stacked",
    ),
    "olmo": Names(**_LLAMA | {"layer_norm": True}, **_BEFORE),
}  # fmt: skip
MIXTURES = {
    "mixtral": Names(**_LLAMA, **_BEFORE),
    "qwen2_moe": Names(**_LLAMA, **_BEFORE),
    "qwen3_moe": Names(**_LLAMA, **_BEFORE),
    "olmoe": Names(**_LLAMA, **_BEFORE, wide_norms=True),
    "gpt_oss": Names(**_LLAMA, **_BEFORE),
    "glm4_moe": Names(**_LLAMA, **_BEFORE),
    "llama4_text": Names(**_LLAMA, **_BEFORE),
}
"""Mixtures of experts; `planted_experts` carries what is not their attention."""
TARGETS = {family: names.targets for family, names in NAMES.items()}
EXTRA: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 0, 1],},
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "cohere2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "logit_scale": 0.4},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.4,
                "logits_scaling": 0.5},
    "cohere": {"logit_scale": 0.4},
    "stablelm": {"use_qkv_bias": True},
    "gptj": {"rotary_dim": 4},
    "falcon": {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                 "first_k_dense_replace": 0, "use_qk_norm": True},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40,
                    "no_rope_layers": [1, 0, 1], "layer_types": ["chunked_attention", "full_attention",
                                                                 "chunked_attention"]},
}  # fmt: skip
"""Config keys of a family beside the usual ones."""
_GPT_KEYS = {
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd", "head_dim": "",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "rms_norm_eps": "layer_norm_epsilon",
    "num_key_value_heads": "",
}  # fmt: skip
RENAMED: dict[str, dict[str, str]] = {
    "stablelm": {"rms_norm_eps": "layer_norm_eps", "head_dim": ""},
    "starcoder2": {"rms_norm_eps": "norm_epsilon", "head_dim": ""},
    "nemotron": {"rms_norm_eps": "norm_eps"},
    "cohere": {"rms_norm_eps": "layer_norm_eps", "head_dim": ""},
    "cohere2": {"rms_norm_eps": "layer_norm_eps"},
    "gpt2": _GPT_KEYS,
    "gpt_bigcode": _GPT_KEYS,
    "gptj": _GPT_KEYS,
    "opt": {"rms_norm_eps": "", "intermediate_size": "ffn_dim", "num_key_value_heads": "", "head_dim": ""},
    "falcon": {"rms_norm_eps": "layer_norm_epsilon", "intermediate_size": "ffn_hidden_size",
               "num_key_value_heads": "", "head_dim": ""},
    "mpt": {"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "hidden_size": "d_model",
            "rms_norm_eps": "layer_norm_epsilon", "intermediate_size": "", "num_key_value_heads": "", "head_dim": "",
            "max_position_embeddings": "max_seq_len", "pad_token_id": ""},
    "olmo": {"rms_norm_eps": "", "head_dim": ""},
}  # fmt: skip
"""What a family's config calls a usual key; "" for one it does not have."""


def _plain_config(family: str, common: dict[str, Any], usual: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """A config whose keys are the usual ones, but for RENAMED, with those of EXTRA."""
    renamed = RENAMED.get(family, {})
    keys = {renamed.get(key, key): value for key, value in (common | usual | sizes).items()}
    layers = usual["num_hidden_layers"]
    extra = {k: (v * layers)[:layers] if isinstance(v, list) else v for k, v in EXTRA.get(family, {}).items()}
    return CONFIG_MAPPING[family](**{k: v for k, v in keys.items() if k}, **extra)


def kv_heads_of(config: Any) -> int:
    """G, as transformers' modules have it."""
    if config.model_type in ("falcon", "gpt_bigcode"):
        return 1
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def neurons_of(config: Any) -> int:
    """f, as transformers' modules have it."""
    named = ("ffn_dim", "ffn_hidden_size", "n_inner") if config.model_type != "bloom" else ()
    usual = () if config.model_type == "bloom" else ("intermediate_size",)
    found = (getattr(config, name, None) for name in (*named, *usual))
    return next((f for f in found if f), 4 * config.hidden_size)


def config_of(family: str, *, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, f: int, vocab: int,
              eps: float = 1e-6, tied: bool = False, parallel: bool = True) -> Any:  # fmt: skip
    """A configuration of the given sizes; bos 1 and eos 2. What a family derives from the width is checked."""
    common: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": d, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied,
    }  # fmt: skip
    usual = {"num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": f,
             "max_position_embeddings": 256, "pad_token_id": 0}  # fmt: skip
    if family not in OLDER:
        sizes = {"rms_norm_eps": eps, "num_key_value_heads": kv_heads, "head_dim": head_dim}
        return _plain_config(family, common, usual, sizes)
    if family not in ("gemma", "gemma2", "gemma3_text") and head_dim != d // heads:
        raise ValueError(f"{family} has heads of d / H = {d // heads}, not {head_dim}")
    if family == "bloom":
        if f != 4 * d:
            raise ValueError("Bloom has f = 4 d")
        return BloomConfig(**common, n_layer=layers, n_head=heads, layer_norm_epsilon=eps, pad_token_id=0)
    if family == "gpt_neox":
        return GPTNeoXConfig(**common, **usual, layer_norm_eps=eps, use_parallel_residual=parallel, hidden_act="gelu")
    if family == "phi":
        return PhiConfig(**common, **usual, layer_norm_eps=eps, num_key_value_heads=kv_heads)
    if family == "phi3":
        return Phi3Config(**common, **usual, rms_norm_eps=eps, num_key_value_heads=kv_heads,
                          original_max_position_embeddings=256)  # fmt: skip
    gemma = {"rms_norm_eps": eps, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    if family == "gemma":
        return GemmaConfig(**common, **usual, **gemma)
    gemma |= {"query_pre_attn_scalar": 12, "sliding_window": 8, "attn_logit_softcapping": None}
    if family == "gemma2":
        return Gemma2Config(**common, **usual, **gemma, final_logit_softcapping=8.0)
    return Gemma3TextConfig(**common, **usual, **gemma)


OLDER = ("gpt_neox", "bloom", "phi", "phi3", "gemma", "gemma2", "gemma3_text")
"""Families whose configurations are written out."""
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_LOGITS = {"logit_scale": 0.6}
MULTIPLIED: dict[str, dict[str, float]] = {
    "granite": {"embedding_multiplier": 1.5, "residual_multiplier": 0.8, "attention_multiplier": 0.25,
                "logits_scaling": 0.7},
    "cohere": _LOGITS,
    "cohere2": _LOGITS,
}  # fmt: skip
"""What multiplies where in the new model of a planted upgrade."""


def random_model(config: Any, seed: int) -> PreTrainedModel:
    """Random float32 weights: std 1/sqrt(fan in), biases 0.3, gains in (0.5, 1.5)."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    names = (NAMES | MIXTURES)[config.model_type]
    offset = names.offset
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                stored_across = names.transposed and f".{names.layers}." in name
                weight.copy_(_normal(rng, *weight.shape) / math.sqrt(weight.shape[0 if stored_across else 1]))
            elif weight.ndim == 3:
                weight.copy_(_normal(rng, *weight.shape) / math.sqrt(config.hidden_size))
            elif name.endswith(("bias", "sinks")):
                weight.copy_(_normal(rng, *weight.shape) * 0.3)
            else:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=rng) - offset)
        if config.model_type == "bloom":
            # A gain that differs by channel does not survive a rotation of the stream it writes to.
            model.transformer.word_embeddings_layernorm.weight.fill_(1.3)
    return model


def _rotation(rng: torch.Generator, names: Names, d_o: int, d_n: int) -> Tensor:
    """Q (d_o, d_n), orthonormal rows: keeps the mean for LayerNorm, a signed choice of channels where norms behind the
    projections have gains of their own, else anything."""
    if names.after_attention:
        signs = torch.where(torch.rand(d_o, generator=rng) < 0.5, -1.0, 1.0).double()
        Q = torch.zeros(d_o, d_n, dtype=torch.float64)
        Q[torch.arange(d_o), _draw(rng, d_n, d_o)] = signs
        return Q
    if not names.layer_norm:
        return torch.linalg.qr(_normal(rng, d_n, d_o)).Q.T

    def basis(d: int) -> Tensor:
        start = torch.cat([torch.ones(d, 1, dtype=torch.float64), _normal(rng, d, d - 1)], 1)
        found = torch.linalg.qr(start).Q
        return found * torch.where(found[0, 0] < 0, -1.0, 1.0)

    return basis(d_o) @ basis(d_n)[:, :d_o].T


class _Planter:
    """Carries one model's tensors; `self.old` and `self.new` are state dicts in float64."""

    def __init__(self, model: PreTrainedModel, config: Any, rng: torch.Generator, stretch: float) -> None:
        self.names = (NAMES | MIXTURES)[config.model_type]
        self.config_o, self.config_n, self.rng, self.stretch = model.config, config, rng, stretch
        self.old = {name: self.turned(name, tensor.double()) for name, tensor in model.state_dict().items()}
        self.new: dict[str, Tensor] = {}
        self.d_o, self.d_n = model.config.hidden_size, config.hidden_size
        self.Q = _rotation(rng, self.names, self.d_o, self.d_n)
        self.H_o, self.H_n = model.config.num_attention_heads, config.num_attention_heads
        self.G_o, self.G_n = (kv_heads_of(c) for c in (model.config, config))
        self.h_o, self.h_n = (
            getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads for c in (model.config, config)
        )
        self.R = torch.eye(self.h_o, dtype=torch.float64)
        if self.h_n != self.h_o:
            self.R = torch.linalg.qr(_normal(rng, self.h_n, self.h_o)).Q.T

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """A weight of a layer as (out, in), from how it is stored, and back."""
        return tensor.T if self.names.transposed and tensor.ndim == 2 and f".{self.names.layers}." in name else tensor

    def times(self, key: str) -> float:
        """A multiplier of the old model over the new one's."""
        old, new = ((getattr(config, key, None) or 1.0) for config in (self.config_o, self.config_n))
        return float(old / new)

    def norm(self, old: str, new: str) -> None:
        """A norm in front of something, with new gains and shifts; what reads through it makes up for them."""
        if f"{old}.weight" in self.old:
            self.new[f"{new}.weight"] = 0.5 + torch.rand(self.d_n, generator=self.rng).double() - self.names.offset
        if f"{old}.bias" in self.old:
            # Off centre: the constant an adapter reads off the old shift can then be expressed (see _with_constant).
            self.new[f"{new}.bias"] = _normal(self.rng, self.d_n) * 0.3 + 0.2

    def gains(self, old: str, new: str) -> tuple[Tensor, Tensor]:
        if f"{old}.weight" not in self.old:
            return torch.ones(self.d_o).double(), torch.ones(self.d_n).double()
        return self.old[f"{old}.weight"] + self.names.offset, self.new[f"{new}.weight"] + self.names.offset

    def read(
        self, weight: Tensor, bias: Tensor | None, old: str | None, new: str | None
    ) -> tuple[Tensor, Tensor | None]:
        """An old map (out, d_o) of what norm `old` gives as a map of what norm `new` gives, and its bias."""
        if old is None or new is None:
            return weight @ self.Q / self.stretch, bias
        g_o, g_n = self.gains(old, new)
        folded = weight * g_o
        if self.names.layer_norm:
            folded = folded - folded.mean(1, keepdim=True)
        carried = folded @ self.Q * math.sqrt(self.d_o / self.d_n) / g_n
        if not self.names.layer_norm:
            return carried, bias
        # What a LayerNorm hands on has no part along 1 / g, so the map may have any there.
        carried = carried + _normal(self.rng, len(weight), 1) * 0.2 / g_n
        if f"{old}.bias" not in self.old:
            return carried, bias
        b_o, b_n = self.old[f"{old}.bias"], self.new[f"{new}.bias"]
        wanted = weight @ b_o - carried @ b_n
        if bias is None:
            return carried + (wanted / (b_n / g_n).sum())[:, None] / g_n, None
        return carried, bias + wanted

    def ends(self, token_map: Mapping[int, int]) -> None:
        names, rng, V = self.names, self.rng, self.config_n.vocab_size
        table = f"{names.prefix}{names.embedding}.weight"
        rows = list(token_map.values())

        def placed(matrix: Tensor) -> Tensor:
            new = _normal(rng, V, *matrix.shape[1:]) * matrix.std()
            new[rows] = matrix[list(token_map)]
            return new

        scaled = math.sqrt(self.d_o / self.d_n) if "gemma" in self.config_o.model_type else 1.0
        scaled *= self.times("embedding_multiplier")
        self.new[table] = placed(self.old[table]) @ self.Q * self.stretch * scaled
        if names.positions:
            table_of_positions = f"{names.prefix}{names.positions}.weight"
            self.new[table_of_positions] = self.old[table_of_positions] @ self.Q * self.stretch
        if names.embedding_norm:
            norm = f"{names.prefix}{names.embedding_norm}"
            gain = self.old[f"{norm}.weight"][0] * self.stretch * math.sqrt(self.d_o / self.d_n)
            self.new[f"{norm}.weight"] = torch.full((self.d_n,), float(gain), dtype=torch.float64)
            self.new[f"{norm}.bias"] = self.old[f"{norm}.bias"] @ self.Q * self.stretch
        final = f"{names.prefix}{names.final_norm}"
        self.norm(final, final)
        head = self.old.get("lm_head.weight", self.old[table])
        bias = placed(self.old["lm_head.bias"]) if names.head_bias else None
        self.new["lm_head.weight"], bias = self.read(placed(head), bias, final, final)
        self.new["lm_head.weight"] *= self.times("logit_scale") / self.times("logits_scaling")
        if bias is not None:
            self.new["lm_head.bias"] = bias

    def layer(self, i: int, j: int, head_map: list[int], neuron_map: list[int], *, empty: bool) -> None:
        """New layer j from old layer i; an empty one has random weights that write nothing."""
        names = self.names
        old, new = (f"{names.prefix}{names.layers}.{n}." for n in (i, j))
        for norm in sorted({names.attention_norm, names.mlp_norm} - {None}):
            self.norm(f"{old}{norm}", f"{new}{norm}")
        self._head_norms(old, new, head_map)
        sizes = {}
        for norm in filter(None, (names.after_attention, names.after_mlp)):
            # Sizes of the outputs are free here; rotated channels keep their gains.
            sizes[norm] = 0.5 + float(torch.rand(1, generator=self.rng))
            gain = self.Q.abs().T @ (self.old[f"{old}{norm}.weight"] + names.offset) * math.sqrt(self.d_o / self.d_n)
            self.new[f"{new}{norm}.weight"] = gain * self.stretch + (gain == 0) - names.offset
        keep = 0.0 if empty else self.times("residual_multiplier")
        self._attention(old, new, head_map, keep * sizes.get(names.after_attention or "", self.stretch))
        self._mlp(old, new, neuron_map, keep * sizes.get(names.after_mlp or "", self.stretch))

    def _head_norms(self, old: str, new: str, head_map: list[int]) -> None:
        """Norms of q and k: of a head as they were; over all heads, of which new ones are silent, in their places."""
        group_o, group_n = self.H_o // self.G_o, self.H_n // self.G_n
        grouped = {b // group_n: a // group_o for a, b in enumerate(head_map)}
        places = {b: a for a, b in enumerate(head_map)}, grouped
        for norm, source, counts in zip(
            self.names.head_norms, places, ((self.H_o, self.H_n), (self.G_o, self.G_n)), strict=True
        ):
            if f"{old}{norm}.weight" not in self.old:
                continue
            gain = self.old[f"{old}{norm}.weight"]
            if self.names.wide_norms:
                wide = torch.ones(counts[1], self.h_n, dtype=torch.float64)
                scale = math.sqrt(counts[0] / counts[1])
                wide[list(source)] = scale * gain.view(-1, self.h_o)[list(source.values())]
                gain = wide.flatten()
            self.new[f"{new}{norm}.weight"] = gain

    def _split(self, module: str) -> tuple[list[Tensor], list[Tensor | None]]:
        """q, k and v of the old layer: weights (heads, h, d) and biases (heads, h)."""
        H, G, h = self.H_o, self.G_o, self.h_o
        weight, bias = self.old[f"{module}.weight"], self.old.get(f"{module}.bias")
        if self.names.fused == "per head":
            parts = weight.view(H, 3, h, -1)
            biases = None if bias is None else bias.view(H, 3, h)
            return [parts[:, n] for n in range(3)], [None if biases is None else biases[:, n] for n in range(3)]
        sizes = [H * h, G * h, G * h]
        parts = [w.view(-1, h, w.shape[1]) for w in weight.split(sizes)]
        return parts, [None] * 3 if bias is None else [b.view(-1, h) for b in bias.split(sizes)]

    def _attention(self, old: str, new: str, head_map: list[int], size: float) -> None:
        names, h_n = self.names, self.h_n
        if names.fused:
            weights, biases = self._split(f"{old}{names.q}")
        else:
            modules = [f"{old}{name}" for name in (names.q, names.k, names.v)]
            weights = [self.old[f"{m}.weight"].view(-1, self.h_o, self.d_o) for m in modules]
            found = [self.old.get(f"{m}.bias") for m in modules]
            biases = [None if b is None else b.view(-1, self.h_o) for b in found]
        group_o, group_n = self.H_o // self.G_o, self.H_n // self.G_n
        query = {b: a for a, b in enumerate(head_map)}
        grouped = {b // group_n: a // group_o for b, a in query.items()}
        norms = [names.attention_norm and f"{side}{names.attention_norm}" for side in (old, new)]
        made = []
        for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            source, count = (query, self.H_n) if n == 0 else (grouped, self.G_n)
            factor = math.sqrt(self.h_n / self.h_o) * self.times("attention_multiplier") if n == 0 else 1.0
            flat, flat_bias = self.read(weight.flatten(0, 1), None if bias is None else bias.flatten(), *norms)
            rows = factor * torch.einsum("ahd,hk->akd", flat.view(-1, self.h_o, self.d_n), self.R)
            silent = 0.0 if names.wide_norms and n < 2 else 1.0
            placed = _normal(self.rng, count, h_n, self.d_n) * rows.std() * silent
            placed[list(source)] = rows[list(source.values())]
            shift = None
            if flat_bias is not None:
                shift = _normal(self.rng, count, h_n) * 0.3
                shift[list(source)] = (factor * flat_bias.view(-1, self.h_o) @ self.R)[list(source.values())]
            made.append((placed, shift))
        if names.fused == "per head":
            self.new[f"{new}{names.q}.weight"] = torch.stack([w for w, _ in made], 1).reshape(-1, self.d_n)
            if made[0][1] is not None:
                self.new[f"{new}{names.q}.bias"] = torch.stack([b for _, b in made], 1).flatten()
        elif names.fused:
            self.new[f"{new}{names.q}.weight"] = torch.cat([w.flatten(0, 1) for w, _ in made])
            if made[0][1] is not None:
                self.new[f"{new}{names.q}.bias"] = torch.cat([b.flatten() for _, b in made])
        else:
            for name, (weight, bias) in zip((names.q, names.k, names.v), made, strict=True):
                self.new[f"{new}{name}.weight"] = weight.flatten(0, 1)
                if bias is not None:
                    self.new[f"{new}{name}.bias"] = bias.flatten()
        o = torch.zeros(self.d_n, self.H_n, h_n, dtype=torch.float64)
        o[:, head_map] = (self.Q.T @ self.old[f"{old}{names.o}.weight"]).unflatten(1, (-1, self.h_o)) @ self.R * size
        self._write(old, new, names.o, o.flatten(1), size)

    def _mlp(self, old: str, new: str, neuron_map: list[int], size: float) -> None:
        names = self.names
        f_o, f_n = (neurons_of(c) for c in (self.config_o, self.config_n))
        norms = [names.mlp_norm and f"{side}{names.mlp_norm}" for side in (old, new)]
        for module in dict.fromkeys(filter(None, (names.gate, names.up))):
            weight, bias = self.read(self.old[f"{old}{module}.weight"], self.old.get(f"{old}{module}.bias"), *norms)
            parts = len(weight) // f_o
            rows = _normal(self.rng, parts, f_n, self.d_n) * weight.std()
            rows[:, neuron_map] = weight.view(parts, f_o, -1)
            self.new[f"{new}{module}.weight"] = rows.flatten(0, 1)
            if bias is not None:
                shift = _normal(self.rng, f_n) * 0.3
                shift[neuron_map] = bias
                self.new[f"{new}{module}.bias"] = shift
        down = torch.zeros(self.d_n, f_n, dtype=torch.float64)
        down[:, neuron_map] = self.Q.T @ self.old[f"{old}{names.down}.weight"] * size
        self._write(old, new, names.down, down, size)

    def _write(self, old: str, new: str, module: str, weight: Tensor, size: float) -> None:
        self.new[f"{new}{module}.weight"] = weight
        if f"{old}{module}.bias" in self.old:
            self.new[f"{new}{module}.bias"] = self.old[f"{old}{module}.bias"] @ self.Q * size


def plant_family(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    d_new: int,
    layers_new: int,
    heads_new: int,
    f_new: int,
    seed: int,
    kv_heads_new: int | None = None,
    head_dim_new: int | None = None,
    head_map: list[int] | None = None,
    stretch: float = 1.0,
    planter_class: type[_Planter] = _Planter,
) -> Planted:
    """Plant an upgrade of a model made by `random_model`; see `planted.plant`.

    `head_dim_new` may be larger than the old one where there is no rotary embedding. `head_map` replaces a random one.
    """
    old, rng = model.config, torch.Generator().manual_seed(seed)
    family, layers_o = old.model_type, old.num_hidden_layers
    new_tokenizer, token_map, vocab = _plant_tokenizer(tokenizer, old.vocab_size, 20, 0.1, rng)
    kv_heads_o = kv_heads_of(old)
    h = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    epsilon = next((getattr(old, key) for key in _EPSILONS if hasattr(old, key)), 1e-5)
    config = config_of(
        family,
        d=d_new,
        layers=layers_new,
        heads=heads_new,
        kv_heads=kv_heads_new or heads_new,
        head_dim=head_dim_new or h,
        f=f_new,
        vocab=vocab,
        eps=epsilon * stretch**2 * old.hidden_size / d_new,
        parallel=getattr(old, "use_parallel_residual", True),
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, _map_ids(getattr(old, name, None), token_map))
    identity = set(_draw(rng, layers_new, layers_new - layers_o))
    layer_map = [j for j in range(layers_new) if j not in identity]
    if getattr(old, "layer_types", None) is not None:
        kinds = dict(zip(layer_map, old.layer_types, strict=True))
        config.layer_types = [kinds.get(j, "full_attention") for j in range(layers_new)]
    if getattr(old, "no_rope_layers", None) is not None:
        rotary = dict(zip(layer_map, old.no_rope_layers, strict=True))
        config.no_rope_layers = [rotary.get(j, 1) for j in range(layers_new)]
    if family in MULTIPLIED:
        for key, value in MULTIPLIED[family].items():
            setattr(config, key, value)
    planter = planter_class(model, config, rng, stretch)
    planter.ends(token_map)
    f_o = neurons_of(old)
    head_maps, neuron_maps = [], []
    for j in range(layers_new):
        heads = head_map or _head_map(rng, old.num_attention_heads, kv_heads_o, heads_new, kv_heads_new or heads_new)
        neurons = _draw(rng, f_new, f_o)
        planter.layer(layer_map.index(j) if j in layer_map else 0, j, heads, neurons, empty=j in identity)
        if j in layer_map:
            head_maps.append(heads)
            neuron_maps.append(neurons)
    new = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    new.generation_config = _planted_generation(model, token_map)
    state = {name: planter.turned(name, tensor) for name, tensor in planter.new.items()}
    missing = new.load_state_dict(copy.deepcopy(state), strict=False)
    if missing.unexpected_keys or [name for name in missing.missing_keys if "inv_freq" not in name]:
        raise ValueError(f"{family}: {missing}")
    ones = [torch.ones(f_o, dtype=torch.float64) for _ in layer_map]
    return Planted(new, new_tokenizer, layer_map, head_maps, neuron_maps, ones, planter.Q, token_map)


def dense_layer(model: PreTrainedModel, adapter: Path, i: int) -> tuple[dict[str, Tensor], dict[str, oracle.Lora]]:
    """A layer's weights (out, in) and an adapter's updates of them by role, float64, fused ones taken apart."""
    names, config = (NAMES | MIXTURES)[model.config.model_type], model.config
    layer = f"{names.prefix}{names.layers}.{i}."
    tensors = load_file(adapter / "adapter_model.safetensors")
    alpha, r = (json.loads((adapter / "adapter_config.json").read_text())[key] for key in ("lora_alpha", "r"))
    H, G, f = config.num_attention_heads, kv_heads_of(config), neurons_of(config)
    h = getattr(config, "head_dim", None) or config.hidden_size // H
    sizes = {"q": H * h, "k": G * h, "v": G * h, "gate": f, "up": f}
    paths = {"q": names.q, "k": names.k or names.q, "v": names.v or names.q, "o": names.o, "gate": names.gate,
             "up": names.up, "down": names.down}  # fmt: skip
    weights, updates, starts = {}, {}, dict.fromkeys(paths.values(), 0)
    for role, path in paths.items():
        if path is None:
            continue
        weight = model.get_parameter(f"{layer}{path}.weight").detach().double()
        weight = weight.T if names.transposed else weight
        b, a = (tensors[f"base_model.model.{layer}{path}.lora_{x}.weight"].double() for x in "BA")
        size = sizes.get(role, len(weight))
        rows = slice(starts[path], starts[path] + size)
        starts[path] += size
        weights[role], updates[role] = weight[rows], oracle.Lora(b[rows], a, alpha / r)
    return weights, updates
