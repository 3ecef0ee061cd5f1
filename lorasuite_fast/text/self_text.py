"""Text an adapted model writes itself: unlabelled text of the adapter's own domain, without any of the user's data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter_folder import adapter_digest
from ..errors import LoraSuiteError
from ..models.checkpoint import Checkpoint
from .text_start import text_start

TEMPERATURE = 0.9
_TOKENS = 128
_BATCH = 64
_LEAST_CHARACTERS = 16
_EMPTY = 3
"""Batches in a row without one usable text, after which a model counts as one that writes none."""

Report = Callable[[int], None]


def self_written(
    model: Checkpoint,
    adapter: str | os.PathLike[str] | None,
    *,
    count: int | None = None,
    size: int | None = None,
    seed: int,
    device: torch.device,
    tokens: int = _TOKENS,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    report: Report | None = None,
) -> list[str]:
    """Texts of up to `tokens` tokens, sampled from the model with its adapter at temperature 0.9.

    The model is loaded whole, through transformers. The texts depend on the adapter, not on the new model, and are kept
    in the user's cache (XDG_CACHE_HOME, else ~/.cache) under what they depend on, so that another successor or
    another run needs no second writing.

    Args:
        adapter: PEFT folder; None lets the bare model write, which is a control.
        count, size: texts wanted, or UTF-8 bytes; one of the two.
        report: called with the texts or bytes written so far.

    Raises:
        LoraSuiteError: a model or adapter that cannot be loaded, or that writes (next to) nothing.
    """
    depends = [
        model.fingerprint(),
        None if adapter is None else adapter_digest(adapter),
        *(count, size, seed, tokens, device.type, str(dtype), torch.__version__),
    ]
    path = _cache_folder() / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]}.jsonl"
    with suppress(OSError, ValueError, KeyError, TypeError):
        # A damaged cache counts as none.
        return [str(json.loads(line)["text"]) for line in path.read_text("utf-8").splitlines()]
    texts = _write(model, adapter, count, size, seed, device, tokens, dtype, trust_remote_code, report)
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


def _write(
    model: Checkpoint,
    adapter: str | os.PathLike[str] | None,
    count: int | None,
    size: int | None,
    seed: int,
    device: torch.device,
    tokens: int,
    dtype: torch.dtype,
    trust_remote_code: bool,
    report: Report | None,
) -> list[str]:
    from transformers import GenerationConfig

    from ..adapters.aligned_states import LoadedModel

    loaded = LoadedModel(model.folder, "OLD", device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    # The text is kept under what was read of these files.
    model.tensors.check_same()
    if adapter is not None:
        loaded.attach(adapter)
    tokenizer: Any = model.tokenizer(trust_remote_code=trust_remote_code)
    start = text_start(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(start.prompts[0, 0])
    begin = start.prompts.shape[1]
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or tokens + begin
    # Of what the folder says about generation (penalties, other warpings) only where a text ends.
    loaded.model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        max_new_tokens=min(tokens, context - begin),
        pad_token_id=pad,
        # Where no file names an end, what transformers takes for one is some other token.
        eos_token_id=None if start.in_text else loaded.model.generation_config.eos_token_id,
    )
    texts: list[str] = []
    written = begun = empty = 0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        while len(texts) < count if count is not None else written < (size or 0):
            wanted = _BATCH if count is None else min(_BATCH, count - len(texts))
            prompt = start.rows(begun, wanted).to(device)
            begun += wanted
            rows = (loaded.peft or loaded.model).generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
            own = rows if start.in_text else rows[:, begin:]
            new = tokenizer.batch_decode(own, skip_special_tokens=True)
            # A character the last token cuts in two decodes to U+FFFD.
            new = [text.rstrip("\ufffd") for text in new]
            new = [text for text in new if len(text.strip()) >= _LEAST_CHARACTERS]
            empty = 0 if new else empty + 1
            if empty == _EMPTY:
                raise LoraSuiteError(
                    f"{model.folder}: with {adapter or 'no adapter'} it writes no usable text; give text of the "
                    "adapter's domain"
                )
            for text in new:
                if size is None or written < size:
                    texts.append(text)
                    written += len(text.encode("utf-8", "surrogatepass"))
            if report:
                report(len(texts) if size is None else min(written, size))
    return texts
