"""What the benchmarks share: median times, the machine's own product rate, random checkpoints of real shapes."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorasuite_fast.models.families import Shape
from lorasuite_fast.models.family_table import FAMILIES

REPORTS = Path(__file__).parent / "reports"

MINICPM_S_1B = Shape(V=73_440, d=1536, h=64, H=24, G=8, f=3840, L=52)
MINICPM_2B = Shape(V=122_753, d=2304, h=64, H=36, G=36, f=5760, L=40)


def median_seconds(work: Callable[[], object], repeats: int = 5, warm_up: int = 1) -> float:
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def product_rate(rows: int, inner: int, columns: int, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of torch.mm on random (rows, inner) x (inner, columns)."""
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    return 2 * rows * inner * columns / median_seconds(lambda: torch.mm(a, b), repeats=7)


def machine() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_report(name: str, text: str) -> None:
    REPORTS.mkdir(exist_ok=True)
    (REPORTS / f"{name}.md").write_text(text)
    print(text)


def random_tokenizer(vocab: int, shared: int, side: str) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary of which the first `shared` tokens are the same on both sides; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"t{i}" for i in range(shared - len(alphabet)))]
    words += [f"{side}{i}" for i in range(vocab - shared)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0])


def random_checkpoint(folder: Path, shape: Shape, dtype: torch.dtype, side: str, shared: int, shard: int = 8) -> Path:
    """A Llama checkpoint of random weights, written a few layers at a time; kept if it is there already."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(len(side) + shape.d)
    family = FAMILIES["llama"]
    random_tokenizer(shape.V, shared, side).save_pretrained(folder)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.V,
        "hidden_size": shape.d,
        "head_dim": shape.h,
        "num_attention_heads": shape.H,
        "num_key_value_heads": shape.G,
        "intermediate_size": shape.f,
        "num_hidden_layers": shape.L,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}

    shards = 1 + -(-shape.L // shard)

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(*size) * size[-1] ** -0.5).to(dtype)

    embedding = torch.cat([normal(min(8192, shape.V - i), shape.d) for i in range(0, shape.V, 8192)])
    ends = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(shape.d, dtype=dtype)}
    write(1, ends)
    for first in range(0, shape.L, shard):
        tensors = {}
        for i in range(first, min(first + shard, shape.L)):
            for role, projection in family.projections.items():
                tensors[f"{family.layer(i)}.{projection.module}.weight"] = normal(*shape.expected(role))
            for norm in family.norms():
                tensors[f"{family.layer(i)}.{norm}.weight"] = torch.ones(shape.d, dtype=dtype)
        write(2 + first // shard, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def random_adapter(folder: Path, base: str, shape: Shape, rank: int, roles: tuple[str, ...]) -> Path:
    """A PEFT LoRA folder of random factors for a random Llama checkpoint."""
    if (folder / "adapter_model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    family = FAMILIES["llama"]
    tensors = {}
    for i in range(shape.L):
        for role in roles:
            key = f"base_model.model.{family.layer(i)}.{family.projections[role].module}"
            out, into = shape.expected(role)
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, into) * into**-0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [family.projections[role].module.rpartition(".")[2] for role in roles],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
