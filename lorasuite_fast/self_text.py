"""Text a model writes itself, with its adapter: what the adapter was trained for, without any of the user's data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .aligned_states import LoadedModel, load_tokenizer
from .checkpoint import Checkpoint
from .errors import LoraSuiteError
from .output import write_file

TEMPERATURE = 0.9
MAX_TOKENS = 256
BATCH = 64
_EMPTY = 3
"""Batches in a row without a single byte of text before a model counts as one that writes nothing."""

Report = Callable[[int], None]


def adapter_digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over an adapter's configuration and weights, 32 hex digits."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        try:
            digest.update((Path(folder).expanduser() / name).read_bytes())
        except OSError as error:
            raise LoraSuiteError(f"{folder}: {name} cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()[:32]


def self_text(
    old: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    size: int,
    *,
    temperature: float = TEMPERATURE,
    max_tokens: int = MAX_TOKENS,
    batch: int = BATCH,
    seed: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
    trust_remote_code: bool = False,
    report: Report | None = None,
) -> list[str]:
    """Samples texts from the old model with its adapter until they hold `size` bytes.

    Every text begins behind the beginning-of-text token and ends at the model's end-of-text token or after
    `max_tokens` tokens, or what the model's context holds. The same seed, batch and device give the same texts.

    Args:
        old: model folder or hub id. adapter: PEFT folder; None lets the bare model write, which is a control.
        size: UTF-8 bytes wanted. temperature: of the sampling, which leaves no token out. batch: texts written at once.
        cache: a folder in which the texts are kept as .jsonl under a name that says all they depend on.
        report: called with the bytes written so far.

    Raises:
        LoraSuiteError: for a model or adapter that cannot be used, or a model that writes nothing.
    """
    device = device or torch.device("cpu")
    path = None
    if cache is not None:
        depends = [
            Checkpoint(old, "old").fingerprint(),
            None if adapter is None else adapter_digest(adapter),
            *(size, temperature, max_tokens, batch, seed, device.type, str(dtype)),
        ]
        path = cache / f"text-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}.jsonl"
        if path.exists():
            return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    model = LoadedModel(old, "OLD", device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if adapter is not None:
        model.attach(adapter)
    tokenizer = load_tokenizer(old, "OLD", trust_remote_code=trust_remote_code)
    texts = _sample(model, tokenizer, size, temperature, max_tokens, batch, seed, report)
    if path is not None:
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_file(path, lambda temporary: temporary.write_text(lines, "utf-8"), overwrite=True)
    return texts


def _sample(
    model: LoadedModel,
    tokenizer: Any,
    size: int,
    temperature: float,
    max_tokens: int,
    batch: int,
    seed: int,
    report: Report | None,
) -> list[str]:
    config = model.model.config.get_text_config()
    start = next((i for i in (tokenizer.bos_token_id, config.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    context = getattr(config, "max_position_embeddings", None) or max_tokens + 1
    ids = torch.full((batch, 1), start, device=model.device)
    texts: list[str] = []
    written = empty = 0
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        while written < size:
            rows = (model.peft or model.model).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=min(max_tokens, context - 1),
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
            # A character cut in two by the last token decodes to U+FFFD.
            decoded = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            new = [text for row in decoded if (text := row.rstrip("\ufffd")).strip()]
            empty = 0 if new else empty + 1
            if empty == _EMPTY:
                raise LoraSuiteError(f"{model.name}: with {model.adapter or 'no adapter'} it writes no text; give some")
            for text in new:
                if written < size:
                    texts.append(text)
                    written += len(text.encode("utf-8", "surrogatepass"))
            if report:
                report(min(written, size))
    return texts
