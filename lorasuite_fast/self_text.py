"""Text an adapted model writes itself: unlabelled text of the adapter's own domain, without any of the user's data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .adapter import WEIGHTS, Adapter
from .checkpoint import Checkpoint
from .errors import LoraSuiteError

TEMPERATURE = 0.9
_TOKENS = 128
_BATCH = 64
_LEAST_CHARACTERS = 16


def self_written(
    model: Checkpoint,
    adapter: Adapter,
    count: int,
    seed: int,
    *,
    device: torch.device,
    trust_remote_code: bool = False,
    report: Callable[[int], None] | None = None,
) -> list[str]:
    """`count` texts of up to 128 tokens, sampled from the model with its adapter at temperature 0.9.

    The model is loaded whole, through transformers. The texts depend on the adapter, not on the new model, and are kept
    in the user's cache (XDG_CACHE_HOME, else ~/.cache) under what they depend on, so that another successor or
    another run needs no second writing.

    Raises:
        LoraSuiteError: a model or adapter that cannot be loaded, or that writes nothing.
    """
    path = _cache_folder() / f"{_key(model, adapter, count, seed, device)}.jsonl"
    if path.is_file():
        return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    texts = _write(model, adapter, count, seed, device, trust_remote_code, report)
    texts = [text for text in texts if len(text.strip()) >= _LEAST_CHARACTERS]
    if len(texts) < count // 4:
        raise LoraSuiteError(
            f"{model.folder}: with {adapter.where} it wrote only {len(texts)} usable texts of {count}; pass text "
            "of the adapter's domain with --calibration"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        temporary.replace(path)
    except OSError:
        # A cache that cannot be written only costs the time to write the text again.
        pass
    return texts


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "lorasuite-fast" / "self-written"


def _key(model: Checkpoint, adapter: Adapter, count: int, seed: int, device: torch.device) -> str:
    digest = hashlib.sha256(f"{model.fingerprint()} {count} {seed} {device.type} {torch.__version__}".encode())
    digest.update(json.dumps(adapter.config, sort_keys=True, default=str).encode())
    digest.update((Path(adapter.where) / WEIGHTS).read_bytes())
    return digest.hexdigest()[:32]


def _write(
    model: Checkpoint,
    adapter: Adapter,
    count: int,
    seed: int,
    device: torch.device,
    trust_remote_code: bool,
    report: Callable[[int], None] | None,
) -> list[str]:
    from .aligned_states import LoadedModel

    loaded = LoadedModel(model.folder, "OLD", device=device, dtype=torch.float32, trust_remote_code=trust_remote_code)
    loaded.attach(adapter.where)
    tokenizer: Any = model.tokenizer(trust_remote_code=trust_remote_code)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise LoraSuiteError(f"{model.folder}: its tokenizer has neither BOS nor EOS, with which a text could begin")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start
    texts: list[str] = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        while len(texts) < count:
            prompt = torch.full((min(_BATCH, count - len(texts)), 1), start, device=device)
            written = loaded.peft.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                max_new_tokens=_TOKENS,
                pad_token_id=pad,
            )
            texts += tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)
            if report:
                report(len(texts))
    return texts
