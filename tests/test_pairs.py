"""The pairs of LoRASuite, in their true shapes at reduced depth: built, applied, checked on one layer, loaded by PEFT.

Weights are random, and the vocabulary is as small as the width allows. Widths are a half (Bloom, MiniCPM), a quarter or
an eighth (Llama-2-13B to Llama-3.1-70B) of the true ones, with heads of their true size and as many of them per
key/value head as the width leaves. With --full-width they are the true ones, as in bench/reports/widths.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from lorasuite_fast import PlanConfig, TransferPlan
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.vocabulary import shared_tokens

import dense_oracle as oracle
from planted import random_adapter, save_folder, tiny_tokenizer


@dataclass(frozen=True)
class Model:
    """d, f, L (reduced), H, G of one model; its attention and MLP modules by role, fused ones as `module[n]`."""

    config: type[PreTrainedConfig]
    d: int
    f: int
    layers: int
    heads: int
    kv_heads: int
    kind: str = "bytelevel"

    def make(self, vocab: int) -> PreTrainedConfig:
        common: dict[str, Any] = {"vocab_size": vocab, "hidden_size": self.d, "bos_token_id": 1, "eos_token_id": 2}
        if self.config is BloomConfig:
            return BloomConfig(**common, n_layer=self.layers, n_head=self.heads, pad_token_id=0)
        common |= {
            "intermediate_size": self.f, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "max_position_embeddings": 512, "pad_token_id": 0, "tie_word_embeddings": True,
        }  # fmt: skip
        if self.config is not GPTNeoXConfig:
            common["num_key_value_heads"] = self.kv_heads
        return self.config(**common)


def pythia(d: int, heads: int, layers: int) -> Model:
    return Model(GPTNeoXConfig, d, 4 * d, layers, heads, heads)


def bloom(d: int, heads: int, layers: int) -> Model:
    return Model(BloomConfig, d, 4 * d, layers, heads, heads)


def phi(d: int, heads: int, layers: int) -> Model:
    return Model(PhiConfig, d, 4 * d, layers, heads, heads)


def llama(d: int, f: int, layers: int, heads: int, kv_heads: int, kind: str = "sentencepiece") -> Model:
    return Model(LlamaConfig, d, f, layers, heads, kv_heads, kind)


def qwen(d: int, f: int, layers: int, heads: int, kv_heads: int) -> Model:
    return Model(Qwen2Config, d, f, layers, heads, kv_heads)


PAIRS = {
    "Yi-6B to Yi-1.5-9B": (llama(1024, 2752, 2, 8, 1), llama(1024, 2752, 3, 8, 1)),
    "Pythia-1B to 1.4B": (pythia(512, 2, 2), pythia(512, 4, 3)),
    "Bloom-560m to Bloomz-1b1": (bloom(512, 8, 2), bloom(768, 8, 2)),
    "Llama-2-7B to Llama-3-8B": (llama(1024, 2752, 2, 8, 8), llama(1024, 3584, 2, 8, 2, "bytelevel")),
    "Llama-2-13B to Llama-3.1-70B": (llama(640, 1728, 2, 5, 5), llama(1024, 3584, 3, 8, 1, "bytelevel")),
    "Qwen1.5-1.8B to Qwen2.5-3B": (qwen(512, 1376, 2, 4, 4), qwen(512, 2752, 3, 4, 2)),
    "Qwen1.5-1.8B to Qwen2-1.5B": (qwen(512, 1376, 2, 4, 4), qwen(384, 2240, 2, 3, 1)),
    "MiniCPM-S-1B to MiniCPM-2B": (llama(768, 1920, 3, 12, 4), llama(1152, 2880, 2, 18, 18)),
    "Phi-1.5 to Phi-2": (phi(512, 8, 2), phi(640, 8, 3)),
}
FULL = {
    "Yi-6B to Yi-1.5-9B": (llama(4096, 11008, 1, 32, 4), llama(4096, 11008, 2, 32, 4)),
    "Pythia-1B to 1.4B": (pythia(2048, 8, 1), pythia(2048, 16, 2)),
    "Bloom-560m to Bloomz-1b1": (bloom(1024, 16, 1), bloom(1536, 16, 2)),
    "Llama-2-7B to Llama-3-8B": (llama(4096, 11008, 1, 32, 32), llama(4096, 14336, 1, 32, 8, "bytelevel")),
    "Llama-2-13B to Llama-3.1-70B": (llama(5120, 13824, 1, 40, 40), llama(8192, 28672, 1, 64, 8, "bytelevel")),
    "Qwen1.5-1.8B to Qwen2.5-3B": (qwen(2048, 5504, 1, 16, 16), qwen(2048, 11008, 2, 16, 2)),
    "Qwen1.5-1.8B to Qwen2-1.5B": (qwen(2048, 5504, 1, 16, 16), qwen(1536, 8960, 2, 12, 2)),
    "MiniCPM-S-1B to MiniCPM-2B": (llama(1536, 3840, 2, 24, 8), llama(2304, 5760, 1, 36, 36)),
    "Phi-1.5 to Phi-2": (phi(2048, 32, 1), phi(2560, 32, 2)),
}
"""The same at their own widths; with fewer layers still, since every one of them is as large as it is."""
MODULES: dict[type[PreTrainedConfig], tuple[str, dict[str, str]]] = {
    GPTNeoXConfig: ("gpt_neox.layers", {
        "qkv": "attention.query_key_value", "o": "attention.dense", "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }),
    BloomConfig: ("transformer.h", {
        "qkv": "self_attention.query_key_value", "o": "self_attention.dense", "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }),
    PhiConfig: ("model.layers", {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.dense",
        "up": "mlp.fc1", "down": "mlp.fc2",
    }),
    LlamaConfig: ("model.layers", {r: f"self_attn.{r}_proj" for r in "qkvo"}
                  | {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}),
}  # fmt: skip
MODULES[Qwen2Config] = MODULES[LlamaConfig]


def dense_layer(tensors: dict[str, Tensor], model: Model, layer: int) -> dict[str, Tensor]:
    """Weights (out, in) of one layer by role, float64; fused ones taken apart head by head."""
    prefix, modules = MODULES[model.config]
    found = {role: tensors[f"{prefix}.{layer}.{module}.weight"].double() for role, module in modules.items()}
    return apart(found, model)


def apart(found: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    if "qkv" in found:
        h = model.d // model.heads
        rows: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        whole = found.pop("qkv")
        for head in range(model.heads):
            for n, role in enumerate("qkv"):
                start = (3 * head + n) * h
                rows[role].append(whole[start : start + h])
        found |= {role: torch.cat(parts) for role, parts in rows.items()}
    return found


def updates(folder: Path, model: Model, layer: int) -> dict[str, Tensor]:
    """Dense updates (out, in) of one layer by role; alpha = 2 r, so s = 2 for every module of the tests' adapters."""
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix, modules = MODULES[model.config]
    found = {}
    for role, module in modules.items():
        b, a = (tensors[f"base_model.model.{prefix}.{layer}.{module}.lora_{w}.weight"].double() for w in "BA")
        found[role] = 2 * b @ a
    return apart(found, model)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module", params=PAIRS, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    """One pair with its plan of Eq. (3) and an adapter carried by it."""
    models = (FULL if request.config.getoption("--full-width") else PAIRS)[request.param]
    root = tmp_path_factory.mktemp("pair")
    vocab = models[0].d + 800
    for name, model, seed in zip(("old", "new"), models, (1, 2), strict=True):
        torch.manual_seed(seed)
        vocab += 100
        made = AutoModelForCausalLM.from_config(model.make(vocab), dtype=torch.bfloat16)
        save_folder(made, tiny_tokenizer(vocab, model.kind, 0), root / name, torch.bfloat16)
        del made
    targets = [module.rpartition(".")[2] for module in MODULES[models[0].config][1].values()]
    random_adapter(root / "old", root / "adapter", targets=targets, rank=4, alpha=8, seed=3)
    plan = TransferPlan.build(root / "old", root / "new", config=PlanConfig(method="paper", examples=8, layers="last"))
    plan.apply(root / "adapter", root / "out")
    weights = [load_file(root / name / "model.safetensors") for name in ("old", "new")]
    yield root, models, plan, weights
    for file in root.rglob("*.safetensors"):
        file.unlink()


def test_every_shape_of_the_pair_is_carried(pair: tuple[Any, ...], record_property: Any) -> None:
    """One layer agrees with the dense form in float64: heads' cosines, attention and MLP updates."""
    root, (model_o, model_n), plan, (old, new) = pair
    checkpoints = Checkpoint(root / "old"), Checkpoint(root / "new")
    tokens = shared_tokens(*(c.tokenizer() for c in checkpoints))
    assert len(tokens) >= model_o.d
    W_h = plan.tensors["W_h"].double()
    j, i = next(iter(plan.layers.items()))
    w_o, w_n = dense_layer(old, model_o, i), dense_layer(new, model_n, j)
    sides = [
        oracle.Attention(w["q"], w["k"], w["v"], w["o"], m.heads, m.kv_heads)
        for w, m in ((w_o, model_o), (w_n, model_n))
    ]
    similarity = plan.tensors[f"layers.{j}.heads.similarity"].double()
    for a, b in ((0, 0), (model_o.heads - 1, model_n.heads // 2)):
        carried = torch.cat([W_h.T @ w @ W_h for w in oracle.interaction(sides[0], a)])
        target = torch.cat(oracle.interaction(sides[1], b))
        cosine = (carried * target).sum() / (carried.norm() * target.norm())
        assert float(similarity[a, b]) == pytest.approx(float(cosine), abs=1e-5)
        record_property("head cosine", abs(float(similarity[a, b]) - float(cosine)))
    match = plan.tensors[f"layers.{j}.heads.match"].tolist()
    mapping = {b: None if a < 0 else a for b, a in enumerate(match)}
    delta_o, delta_n = updates(root / "adapter", model_o, i), updates(root / "out", model_n, j)
    for role in "qkv":
        wanted = oracle._project_qkv(role, *sides, W_h, mapping, delta_o[role])
        record_property(role, relative(delta_n[role], wanted))
        assert relative(delta_n[role], wanted) < 1e-4
    wanted = oracle._project_o(*sides, W_h, mapping, delta_o["o"])
    record_property("o", relative(delta_n["o"], wanted))
    assert relative(delta_n["o"], wanted) < 1e-4
    # A.3 without a pseudo-inverse: U_o X = ΔU_o in the least-squares sense, W_h Y = X likewise.
    inner = solved(w_o["up"], delta_o["up"])
    # Bloom's stream behind the embedding has no mean, so that W_h lacks one dimension.
    deficient = model_o.config is BloomConfig
    wanted = w_n["up"] @ solved(W_h, inner, deficient) @ W_h
    record_property("up", relative(delta_n["up"], wanted))
    assert relative(delta_n["up"], wanted) < 1e-3
    # ΔD_n = pinv(W_h) ΔD_o pinv(D_o) W_h D_n.
    outer = solved(w_o["down"].T, delta_o["down"].T).T
    wanted = solved(W_h, outer, deficient) @ W_h @ w_n["down"]
    record_property("down", relative(delta_n["down"], wanted))
    assert relative(delta_n["down"], wanted) < 1e-3


def solved(a: Tensor, b: Tensor, deficient: bool = False) -> Tensor:
    """The solution of least norm; by QR, or by SVD where a lacks rank."""
    if deficient:
        return torch.linalg.lstsq(a, b, rcond=1e-5, driver="gelsd").solution
    return torch.linalg.lstsq(a, b, driver="gels").solution


def test_peft_loads_the_carried_adapter(pair: tuple[Any, ...]) -> None:
    root, (_, model_n), plan, _ = pair
    base = AutoModelForCausalLM.from_pretrained(root / "new", dtype=torch.float32)
    ids = torch.arange(3, 11).view(1, 8)
    with torch.no_grad():
        before = base(ids).logits
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
            loaded = PeftModel.from_pretrained(base, root / "out")
        after = loaded(ids).logits
    assert torch.isfinite(after).all()
    assert float((after - before).abs().max()) > 0
    stored = load_file(root / "out/adapter_model.safetensors")
    layers = {int(name.split(f"{MODULES[model_n.config][0]}.")[1].split(".")[0]) for name in stored}
    assert layers == set(plan.layers)
