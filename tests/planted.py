"""Planted upgrades: a new model and tokenizer that compute the old model's function in another shape.

All six aspects of an upgrade change at once (vocabulary, width, intermediate size, depth, heads, attention type), and
every map between old and new is known exactly. Notation as in METHOD.md: `o` old, `n` new, row vectors, Linear weights
are (out, in). Arithmetic is float64 throughout; results are cast to the old model's dtype.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TOKEN_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Planted:
    """An upgrade whose right answer is known.

    `layer_map[i]` is the new index of old layer i, `head_map[i][a]` the new query head of old query head a in that
    layer, `neuron_map[i][u]` the new index of old neuron u and `neuron_scale[i][u]` the signed factor on its up row
    (the down column carries the inverse). `token_map` maps old ids to new ids; dropped tokens are missing.
    `Q` (d_o, d_n) float64 has orthonormal rows and `x_n = x_o Q` for every residual state.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    layer_map: list[int]
    head_map: list[list[int]]
    neuron_map: list[list[int]]
    neuron_scale: list[Tensor]
    Q: Tensor
    token_map: dict[int, int]

    @property
    def shared_old(self) -> Tensor:
        """Old ids of the shared tokens, ascending; (shared,) int64."""
        return torch.tensor(sorted(self.token_map))

    @property
    def shared_new(self) -> Tensor:
        """New ids of the shared tokens, in the order of `shared_old`; (shared,) int64."""
        return torch.tensor([self.token_map[old] for old in sorted(self.token_map)])

    def random_ids(self, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """The same random sequences of shared tokens in old ids and in new ids; both (batch, length) int64."""
        rng = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(self.token_map), (batch, length), generator=rng)
        return self.shared_old[picks], self.shared_new[picks]

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write config.json, model.safetensors in `dtype` and the tokenizer files; returns the folder."""
        return save_folder(self.model, self.tokenizer, folder, dtype)


def save_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a Hugging Face folder with weights in `dtype`; returns the folder."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Path(folder)


def plant(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    d_new: int,
    layers_new: int,
    heads_new: int,
    intermediate_new: int,
    added_tokens: int,
    seed: int,
    kv_heads_new: int | None = None,
    identity_at: Sequence[int] | None = None,
    dropped: float = 0.1,
    flip_neurons: bool = False,
) -> Planted:
    """Plant an upgrade of a llama, mistral, qwen2 or qwen3 model.

    `kv_heads_new` defaults to `heads_new` (MHA). `identity_at` gives the new indices of the inserted layers; by default
    they are drawn at random. `flip_neurons` also rescales neurons and flips the sign of some. Raises ValueError where
    the new shape cannot hold the old one.
    """
    old = model.config
    if old.model_type not in FAMILIES:
        raise ValueError(f"cannot plant a {old.model_type}; known: {', '.join(FAMILIES)}")
    d_o, layers_o, inner_o = old.hidden_size, old.num_hidden_layers, old.intermediate_size
    if d_new < d_o or layers_new < layers_o or intermediate_new < inner_o:
        raise ValueError(f"(d, layers, intermediate) cannot shrink: {(d_o, layers_o, inner_o)} to "
                         f"{(d_new, layers_new, intermediate_new)}")  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    kv_heads_new = kv_heads_new or heads_new
    identity = set(_draw(rng, layers_new, layers_new - layers_o) if identity_at is None else identity_at)
    layer_map = [j for j in range(layers_new) if j not in identity]
    if len(layer_map) != layers_o:
        raise ValueError(f"{layers_new} layers without {sorted(identity)} leave {len(layer_map)}, need {layers_o}")

    Q = torch.linalg.qr(_normal(rng, d_new, d_o)).Q.T
    new_tokenizer, token_map, vocab_n = _plant_tokenizer(tokenizer, old.vocab_size, added_tokens, dropped, rng)
    config = _planted_config(
        old,
        layer_map,
        token_map,
        vocab_size=vocab_n,
        hidden_size=d_new,
        intermediate_size=intermediate_new,
        num_hidden_layers=layers_new,
        num_attention_heads=heads_new,
        num_key_value_heads=kv_heads_new,
    )
    new_model = type(model)(config).to(model.dtype).eval()
    new_model.generation_config = _planted_generation(model, token_map)

    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    lm_head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    shrink = math.sqrt(d_o / d_new)
    planted: dict[str, Tensor] = {"model.norm.weight": torch.ones(d_new, dtype=torch.float64)}
    unembedding = lm_head * weights["model.norm.weight"] * shrink
    for name, matrix in (
        ("model.embed_tokens.weight", weights["model.embed_tokens.weight"]),
        ("lm_head.weight", unembedding),
    ):
        rows = _normal(rng, vocab_n, d_o) * matrix.std()
        rows[list(token_map.values())] = matrix[list(token_map)]
        planted[name] = rows @ Q

    head_maps, neuron_maps, scales = [], [], []
    for i, j in enumerate(layer_map):
        head_map = _head_map(rng, old.num_attention_heads, old.num_key_value_heads, heads_new, kv_heads_new)
        neuron_map = _draw(rng, intermediate_new, inner_o)
        scale = _neuron_scale(rng, inner_o) if flip_neurons else torch.ones(inner_o, dtype=torch.float64)
        layer = _subtree(weights, f"model.layers.{i}.")
        new_layer = _plant_attention(layer, Q, head_map, old, config, rng) | _plant_mlp(
            layer, Q, neuron_map, scale, intermediate_new
        )
        planted |= {f"model.layers.{j}.{name}": tensor for name, tensor in new_layer.items()}
        head_maps.append(head_map)
        neuron_maps.append(neuron_map)
        scales.append(scale)
    for j in sorted(identity):
        template = _subtree(planted, f"model.layers.{layer_map[0]}.")
        planted |= {f"model.layers.{j}.{name}": tensor for name, tensor in _identity_layer(template, rng).items()}

    new_model.load_state_dict(planted, strict=True)
    return Planted(new_model, new_tokenizer, layer_map, head_maps, neuron_maps, scales, Q, token_map)


def _plant_attention(
    layer: Mapping[str, Tensor],
    Q: Tensor,
    head_map: Sequence[int],
    old: PreTrainedConfig,
    new: PreTrainedConfig,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Attention tensors of one new layer, its input norm included, from those of the old `layer`.

    q/k norms share the model's epsilon, which shrinks with the width, so what they read shrinks with it too.
    """
    d_o, d_n = Q.shape
    h = new.head_dim
    shrink = math.sqrt(d_o / d_n)
    group_o = old.num_attention_heads // old.num_key_value_heads
    group_n = new.num_attention_heads // new.num_key_value_heads
    query = {b: a for a, b in enumerate(head_map)}
    key_value = {b // group_n: a // group_o for b, a in query.items()}
    gain = layer["input_layernorm.weight"]
    normed = "self_attn.q_norm.weight" in layer

    out = {"input_layernorm.weight": torch.ones(d_n, dtype=torch.float64)}
    for name, heads_n, source in (
        ("q_proj", new.num_attention_heads, query),
        ("k_proj", new.num_key_value_heads, key_value),
        ("v_proj", new.num_key_value_heads, key_value),
    ):
        before_norm = shrink if normed and name != "v_proj" else 1.0
        matrix = (layer[f"self_attn.{name}.weight"] * gain) @ Q * shrink * before_norm
        out[f"self_attn.{name}.weight"] = _place_heads(matrix, source, heads_n, h, rng)
        if f"self_attn.{name}.bias" in layer:
            bias = layer[f"self_attn.{name}.bias"] * before_norm
            out[f"self_attn.{name}.bias"] = _place_heads(bias, source, heads_n, h, rng)
    for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        if name in layer:
            out[name] = layer[name]

    o = torch.zeros(d_n, new.num_attention_heads, h, dtype=torch.float64)
    o[:, list(head_map)] = (Q.T @ layer["self_attn.o_proj.weight"]).unflatten(1, (-1, h))
    out["self_attn.o_proj.weight"] = o.flatten(1)
    if "self_attn.o_proj.bias" in layer:
        out["self_attn.o_proj.bias"] = layer["self_attn.o_proj.bias"] @ Q
    return out


def _plant_mlp(
    layer: Mapping[str, Tensor], Q: Tensor, neuron_map: Sequence[int], scale: Tensor, inner_n: int
) -> dict[str, Tensor]:
    """MLP tensors of one new layer, its norm included; the added neurons are zero."""
    d_o, d_n = Q.shape
    gain = layer["post_attention_layernorm.weight"]
    slots = list(neuron_map)
    out = {"post_attention_layernorm.weight": torch.ones(d_n, dtype=torch.float64)}
    for name, factor in (("gate_proj", torch.ones_like(scale)), ("up_proj", scale)):
        out[f"mlp.{name}.weight"] = torch.zeros(inner_n, d_n, dtype=torch.float64)
        read = (layer[f"mlp.{name}.weight"] * gain) @ Q * math.sqrt(d_o / d_n)
        out[f"mlp.{name}.weight"][slots] = factor[:, None] * read
        if f"mlp.{name}.bias" in layer:
            out[f"mlp.{name}.bias"] = torch.zeros(inner_n, dtype=torch.float64)
            out[f"mlp.{name}.bias"][slots] = factor * layer[f"mlp.{name}.bias"]
    out["mlp.down_proj.weight"] = torch.zeros(d_n, inner_n, dtype=torch.float64)
    out["mlp.down_proj.weight"][:, slots] = Q.T @ layer["mlp.down_proj.weight"] / scale
    if "mlp.down_proj.bias" in layer:
        out["mlp.down_proj.bias"] = layer["mlp.down_proj.bias"] @ Q
    return out


def _identity_layer(template: Mapping[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    """Random weights of the template's shapes and sizes, with nothing written to the residual stream."""
    layer = {}
    for name, tensor in template.items():
        if "norm" in name:
            layer[name] = tensor.clone()
        elif "o_proj" in name or "down_proj" in name:
            layer[name] = torch.zeros_like(tensor)
        else:
            layer[name] = _normal(rng, *tensor.shape) * tensor.std()
    return layer


def _place_heads(rows: Tensor, source: Mapping[int, int], heads: int, h: int, rng: torch.Generator) -> Tensor:
    """New rows (heads * h, ...): head b holds old head `source[b]`, dead heads hold noise of the same size."""
    old = rows.unflatten(0, (-1, h))
    new = _normal(rng, heads, *old.shape[1:]) * rows.std()
    new[list(source)] = old[list(source.values())]
    return new.flatten(0, 1)


def _head_map(rng: torch.Generator, heads_o: int, kv_o: int, heads_n: int, kv_n: int) -> list[int]:
    """New query head of each old one: every new kv group serves heads of one old kv group, or dead heads only."""
    group_o, group_n = heads_o // kv_o, heads_n // kv_n
    per_group = math.ceil(group_o / group_n)
    if heads_n % kv_n or per_group * kv_o > kv_n:
        raise ValueError(f"{heads_n} heads over {kv_n} kv heads cannot hold {heads_o} heads over {kv_o}")
    groups = _draw(rng, kv_n, per_group * kv_o)
    head_map = []
    for g in range(kv_o):
        slots = [c * group_n + k for c in groups[g * per_group : (g + 1) * per_group] for k in range(group_n)]
        head_map += [slots[k] for k in _draw(rng, len(slots), group_o)]
    return head_map


def _neuron_scale(rng: torch.Generator, count: int) -> Tensor:
    """Signed factors, size 0.5 to 2; (count,) float64."""
    size = 2.0 ** (2 * torch.rand(count, generator=rng, dtype=torch.float64) - 1)
    return torch.where(torch.rand(count, generator=rng) < 0.5, -size, size)


def _planted_config(
    old: PreTrainedConfig, layer_map: Sequence[int], token_map: Mapping[int, int], **shape: int
) -> PreTrainedConfig:
    """The old configuration with the new shape, an untied unembedding and the epsilon rescaled to the new width."""
    fields = old.to_dict() | shape
    fields["head_dim"] = head_dim(old)
    fields["tie_word_embeddings"] = False
    fields["rms_norm_eps"] = old.rms_norm_eps * old.hidden_size / shape["hidden_size"]
    fields |= {name: _map_ids(fields.get(name), token_map) for name in TOKEN_ID_FIELDS}
    if fields.get("layer_types") is not None:
        kinds = dict(zip(layer_map, old.layer_types, strict=True))
        fields["layer_types"] = [kinds.get(j, "full_attention") for j in range(shape["num_hidden_layers"])]
    return type(old)(**fields)


def _planted_generation(model: PreTrainedModel, token_map: Mapping[int, int]) -> Any:
    """The old generation settings with the special ids mapped."""
    settings = copy.deepcopy(model.generation_config)
    for name in TOKEN_ID_FIELDS:
        setattr(settings, name, _map_ids(getattr(settings, name), token_map))
    return settings


def _map_ids(ids: int | list[int] | None, token_map: Mapping[int, int]) -> int | list[int] | None:
    if isinstance(ids, list):
        return [token_map[i] for i in ids if i in token_map]
    return None if ids is None else token_map.get(ids)


def head_dim(config: PreTrainedConfig) -> int:
    """Head size h, given or implied by the width."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _plant_tokenizer(
    tokenizer: PreTrainedTokenizerFast, rows: int, added: int, dropped: float, rng: torch.Generator
) -> tuple[PreTrainedTokenizerFast, dict[int, int], int]:
    """Permute, thin and extend a BPE vocabulary; returns the tokenizer, old id -> new id and the new row count.

    Special tokens, single characters and byte-fallback tokens stay, so every text can still be encoded. Added tokens
    are concatenations of kept ones with merges of lowest priority. Embedding rows without a token follow at the end.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise ValueError(f"only BPE tokenizers can be planted, not {state['model']['type']}")
    special = {entry["content"]: entry["id"] for entry in state["added_tokens"]}
    old_vocab: dict[str, int] = state["model"]["vocab"] | special
    plain = [t for t in old_vocab if t not in special and len(t) > 1 and not BYTE_FALLBACK.fullmatch(t)]
    gone = {plain[k] for k in _draw(rng, len(plain), round(dropped * len(plain)))}

    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in state["model"]["merges"]]
    merges = [(a, b) for a, b in merges if not {a, b, a + b} & gone]
    kept = [t for t in old_vocab if t not in gone]
    parts = [t for t in kept if t not in special and not BYTE_FALLBACK.fullmatch(t)]
    fresh: dict[str, tuple[str, str]] = {}
    while len(fresh) < added:
        a, b = (parts[k] for k in torch.randint(len(parts), (2,), generator=rng).tolist())
        if a + b not in old_vocab:
            fresh.setdefault(a + b, (a, b))
    names = kept + list(fresh)
    new_vocab = dict(zip(names, _draw(rng, len(names), len(names)), strict=True))
    token_map = {old_vocab[t]: new_vocab[t] for t in kept}
    unnamed = sorted(set(range(rows)) - set(old_vocab.values()))
    token_map |= {old: len(names) + k for k, old in enumerate(unnamed)}

    state["model"]["vocab"] = dict(sorted(new_vocab.items(), key=lambda item: item[1]))
    state["model"]["merges"] = [list(pair) for pair in merges + list(fresh.values())]
    state["added_tokens"] = sorted(
        (entry | {"id": new_vocab[entry["content"]]} for entry in state["added_tokens"]), key=lambda entry: entry["id"]
    )
    _map_template_ids(state["post_processor"], token_map)
    return _wrap_tokenizer(state, tokenizer), token_map, len(names) + len(unnamed)


def _map_template_ids(processor: dict[str, Any] | None, token_map: Mapping[int, int]) -> None:
    """Map the special ids that TemplateProcessing holds, in place, also inside a Sequence."""
    if processor is None:
        return
    for inner in processor.get("processors", []):
        _map_template_ids(inner, token_map)
    for entry in processor.get("special_tokens", {}).values():
        entry["ids"] = [token_map[i] for i in entry["ids"]]


def _wrap_tokenizer(state: Mapping[str, Any], like: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer around a tokenizer.json state, with the special roles of `like`."""
    roles = {role: str(getattr(like, role)) for role in SPECIAL_ROLES if getattr(like, role, None) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=like.model_max_length,
        padding_side=like.padding_side,
        chat_template=like.chat_template,
        clean_up_tokenization_spaces=False,
        **roles,
    )


def tiny_model(
    family: str,
    seed: int,
    *,
    d: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    intermediate: int = 48,
    vocab: int = 320,
    tied: bool = False,
    gains: bool = True,
    eps: float = 1e-5,
) -> PreTrainedModel:
    """A random float32 model, std 1/sqrt(fan in), biases 0.3, norm gains uniform in (0.5, 1.5) or all one.

    bos is 1 and eos 2, as in `tiny_tokenizer`. With vocab >= d the embedding has full rank.
    """
    config = FAMILIES[family](
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        rms_norm_eps=eps,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.copy_(_normal(rng, *weight.shape) / math.sqrt(weight.shape[1]))
            elif name.endswith("bias"):
                weight.copy_(_normal(rng, *weight.shape) * 0.3)
            elif gains:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=rng))
    return model


def tiny_tokenizer(vocab: int = 320, kind: str = "bytelevel", seed: int = 0) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of exactly `vocab` tokens with generated merges; bos is 1 and eos 2.

    `bytelevel` writes a space as Ġ and splits like GPT-2; `sentencepiece` writes it as ▁, has <0xNN> fallback and
    prepends bos. AutoTokenizer reads any qwen2 folder with Qwen's own byte-level rules: use `bytelevel` there. Raises
    ValueError when `vocab` cannot hold the special tokens and the base alphabet.
    """
    rng = torch.Generator().manual_seed(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    if kind == "bytelevel":
        special, space = ["<|endoftext|>", "<s>", "</s>"], "Ġ"
        base = list(_byte_alphabet().values())
    elif kind == "sentencepiece":
        special, space = ["<unk>", "<s>", "</s>"], "▁"
        base = [f"<0x{byte:02X}>" for byte in range(256)] + [space, *letters, *letters.upper(), *".,!?'éü"]
    else:
        raise ValueError(f"kind is 'bytelevel' or 'sentencepiece', not {kind!r}")
    tokens = special + base
    if vocab < len(tokens):
        raise ValueError(f"a {kind} tokenizer needs at least {len(tokens)} tokens, asked for {vocab}")

    known, stems, merges = set(tokens), [space, *letters], []
    while len(tokens) < vocab:
        # Squared, so that common letters and short stems are preferred and the merges meet real text.
        a, b = (stems[int(len(stems) * u * u)] for u in torch.rand(2, generator=rng).tolist())
        if a + b not in known and space not in b and len(a + b) <= 12:
            known.add(a + b)
            tokens.append(a + b)
            stems.append(a + b)
            merges.append([a, b])

    state = _bytelevel_rules() if kind == "bytelevel" else _sentencepiece_rules()
    state["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    state["added_tokens"] = [
        {"id": i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(special)
    ]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        **({"pad_token": "<|endoftext|>"} if kind == "bytelevel" else {"unk_token": "<unk>"}),
    )


def _bytelevel_rules() -> dict[str, Any]:
    """tokenizer.json of a GPT-2-like tokenizer, vocabulary left out."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _tokenizer_state(
        normalizer=None,
        pre_tokenizer=byte_level,
        post_processor=None,
        decoder=byte_level,
        byte_fallback=False,
        unk_token=None,
    )


def _sentencepiece_rules() -> dict[str, Any]:
    """tokenizer.json of a Llama-2-like tokenizer, vocabulary left out."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    restore = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return _tokenizer_state(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        pre_tokenizer=None,
        post_processor={
            "type": "TemplateProcessing",
            "single": [bos, a],
            "pair": [bos, a, bos, b],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                restore,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        byte_fallback=True,
        unk_token="<unk>",
    )


def _tokenizer_state(*, byte_fallback: bool, unk_token: str | None, **stages: Any) -> dict[str, Any]:
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
    }
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "model": bpe, **stages}


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + k) for k, byte in enumerate(hidden)}


def random_adapter(
    folder_of_model: str | Path,
    out: str | Path,
    *,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    seed: int,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
    size: float = 0.15,
    **lora: Any,
) -> Path:
    """Write a random PEFT LoRA adapter whose update has Frobenius norm `size` times the weight's; returns `out`.

    Further keywords (`use_dora`, ...) go to LoraConfig.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        use_rslora=rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        layers_to_transform=None if layers is None else list(layers),
        **lora,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder_of_model, dtype=torch.float32), config)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
                A.copy_(_normal(rng, *A.shape) / math.sqrt(A.shape[1]))
                B.copy_(_normal(rng, *B.shape))
                update = module.scaling["default"] * (B @ A).norm()
                B.mul_(size * module.get_base_layer().weight.norm() / update)
    model.save_pretrained(out)
    return Path(out)


def effect(
    model: PreTrainedModel, adapter_folder: str | Path, ids: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Change of the logits (batch, length, V) under a PEFT adapter for `ids` (batch, length); `model` is untouched."""
    base = in_float64(model) if dtype == torch.float64 else copy.deepcopy(model).to(dtype)
    before = logits(base, ids)
    adapted = PeftModel.from_pretrained(base, adapter_folder, autocast_adapter_dtype=False).to(dtype).eval()
    return logits(adapted, ids) - before


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (batch, length, V) for `ids` (batch, length), in the model's dtype."""
    return model(input_ids=ids, use_cache=False).logits


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes in float64 throughout; transformers' own RMSNorm rounds to float32 inside."""
    exact = copy.deepcopy(model).double()
    for name, module in list(exact.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            exact.set_submodule(name, _Float64Norm(module.weight, module.variance_epsilon))
    return exact


class _Float64Norm(nn.Module):
    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def _subtree(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix`, keyed without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def _draw(rng: torch.Generator, population: int, count: int) -> list[int]:
    """`count` distinct numbers below `population`, in random order."""
    return torch.randperm(population, generator=rng)[:count].tolist()
