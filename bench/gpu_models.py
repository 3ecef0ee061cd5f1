"""Random checkpoints of real shapes, made on the device and written to local disk, with tokenizers and adapters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gpu_rows import DEVICE, DRY
from measure import random_adapter, random_tokenizer
from safetensors.torch import save_file
from torch import Tensor

from lorasuite_fast.models.families import ROLES, Shape
from lorasuite_fast.models.family_table import FAMILIES

LLAMA_2_7B = Shape(V=32_000, d=4096, h=128, H=32, G=32, f=11_008, L=32)
LLAMA_3_8B = Shape(V=128_256, d=4096, h=128, H=32, G=8, f=14_336, L=32)
SMALL = Shape(V=400, d=32, h=8, H=4, G=4, f=48, L=2), Shape(V=600, d=48, h=12, H=4, G=2, f=64, L=3)
OLD, NEW = SMALL if DRY else (LLAMA_2_7B, LLAMA_3_8B)
SHARED = 380 if DRY else 30_000
RANK = 4 if DRY else 16
_SHARD_LAYERS = 8


def parameters(shape: Shape) -> int:
    """Of one model, embedding and head included."""
    layer = sum(out * into for out, into in (shape.expected(role) for role in ROLES))
    return 2 * shape.V * shape.d + shape.L * layer


def _config(shape: Shape) -> dict[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.V,
        "hidden_size": shape.d,
        "head_dim": shape.h,
        "num_attention_heads": shape.H,
        "num_key_value_heads": shape.G,
        "intermediate_size": shape.f,
        "num_hidden_layers": shape.L,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }


def checkpoint(folder: Path, shape: Shape, side: str) -> Path:
    """A Llama checkpoint of random bfloat16 weights, each tensor made on the device."""
    folder.mkdir(parents=True)
    generator = torch.Generator(DEVICE).manual_seed(shape.V)
    family = FAMILIES["llama"]
    random_tokenizer(shape.V, SHARED, side).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    weight_map: dict[str, str] = {}
    shards = 1 + -(-shape.L // _SHARD_LAYERS)

    def normal(*size: int) -> Tensor:
        made = torch.randn(*size, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        return made.mul_(size[-1] ** -0.5).cpu()

    def ones() -> Tensor:
        return torch.ones(shape.d, dtype=torch.bfloat16)

    def write(number: int, tensors: dict[str, Tensor]) -> None:
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    ends = {name: normal(shape.V, shape.d) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write(1, ends | {"model.norm.weight": ones()})
    for first in range(0, shape.L, _SHARD_LAYERS):
        tensors = {}
        for i in range(first, min(first + _SHARD_LAYERS, shape.L)):
            for role, projection in family.projections.items():
                tensors[f"{family.layer(i)}.{projection.module}.weight"] = normal(*shape.expected(role))
            for norm in family.norms():
                tensors[f"{family.layer(i)}.{norm}.weight"] = ones()
        write(2 + first // _SHARD_LAYERS, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def pair(folder: Path) -> tuple[Path, Path, Path]:
    """(old model, new model, adapter of the old one) below a folder."""
    old, new = checkpoint(folder / "old", OLD, "o"), checkpoint(folder / "new", NEW, "n")
    adapter = random_adapter(folder / "adapter", str(old), OLD, RANK, ("q", "k", "v", "o"))
    return old, new, adapter
