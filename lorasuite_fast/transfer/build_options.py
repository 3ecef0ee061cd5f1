"""What a plan is built from, and what a build gives."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..errors import LoraSuiteError
from ..models.checkpoint import Checkpoint
from ..models.vocabulary import common_ids
from ..text.calibration import MIN_EXAMPLES, load_examples
from .memory import Limits

MAX_TOKENS = 128
"""Of each calibration example."""


EXACT_R2 = 0.999
"""From here on, on held-out tokens, the models' residual streams count as linear images of one another."""


AUTO = "auto"


SELF = "self"
"""As calibration text: what the old model with its adapter writes itself."""


@dataclass(frozen=True)
class Options:
    """How a plan is built; see `TransferPlan.build`."""

    calibration: str | os.PathLike[str] | None
    examples: int
    layers: str
    similarity: str
    heads: str
    transfer: str
    method: str
    roles: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    seed: int
    ridge: float
    memory: int | None
    mapped: bool
    trust_remote_code: bool
    tf32: bool = False
    """Whether the forward passes may round the operands of float32 products to TF32."""

    def as_dict(self) -> dict[str, Any]:
        """Those the result depends on, as plain data."""
        return {
            "calibration": "shipped" if self.calibration is None else os.fspath(self.calibration),
            "max_tokens": MAX_TOKENS,
            "layers": self.layers,
            "similarity": self.similarity,
            "heads": self.heads,
            "transfer": self.transfer,
            "method": self.method,
            "roles": list(self.roles),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": self.seed,
            "ridge": self.ridge,
        } | ({"tf32": True} if self.tf32 else {})


@dataclass
class Inputs:
    """Both models opened, and the calibration text as token ids of each."""

    old: Checkpoint
    new: Checkpoint
    tokenizers: tuple[Any, Any]
    texts: list[str]
    ids: tuple[list[list[int]], list[list[int]]]

    @classmethod
    def open(cls, old: str | os.PathLike[str], new: str | os.PathLike[str], options: Options) -> Inputs:
        models = Checkpoint(old, "old", mapped=options.mapped), Checkpoint(new, "new", mapped=options.mapped)
        for model in models:
            _check_positions(model)
        tokenizers = tuple(m.tokenizer(trust_remote_code=options.trust_remote_code) for m in models)
        # Text an adapter writes is not there yet, and CKA compares the models without one.
        calibration = options.calibration
        source = None if calibration is not None and os.fspath(calibration) == SELF else calibration
        texts = load_examples(source, options.examples, options.seed)
        ids = common_ids(tokenizers[0], tokenizers[1], texts, MAX_TOKENS)
        if len(ids[0]) < MIN_EXAMPLES:
            raise LoraSuiteError(
                f"only {len(ids[0])} calibration examples hold tokens both vocabularies know; CKA needs {MIN_EXAMPLES}"
            )
        return cls(*models, (tokenizers[0], tokenizers[1]), texts, ids)

    def identity(self, options: Options) -> dict[str, Any]:
        """Everything a plan's bits depend on, for telling whether unfinished work belongs to it."""
        import transformers

        text = hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()[:32]
        return {
            "old model": files_identity(self.old),
            "new model": files_identity(self.new),
            "calibration text": text,
            "versions": [__version__, torch.__version__, transformers.__version__],
        } | {f"option {name}": value for name, value in options.as_dict().items() if name != "calibration"}


def _check_positions(model: Checkpoint) -> None:
    """Refuses a model whose table of learned positions is shorter than the pieces the calibration text is read in."""
    if not any("position" in name or "wpe" in name for name in model.family.outside):
        return
    held = model.config.get("n_positions") or model.config.get("max_position_embeddings")
    if isinstance(held, int) and held < MAX_TOKENS:
        raise LoraSuiteError(
            f"{model.folder}: has learned positions for {held} tokens, and the calibration text is read in pieces of "
            f"{MAX_TOKENS}; choose a model that reads as many"
        )


def files_identity(model: Checkpoint) -> dict[str, Any]:
    """What tells a model's weights and configuration from others, without reading the weights."""
    files = sorted({entry.file for entry in model.tensors.entries.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"fingerprint": model.fingerprint(), "files": hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}


@dataclass(frozen=True)
class Built:
    """What a plan is made of."""

    mapping: dict[int, int]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    examples: int
    limits: Limits
    method: str
    roles: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    """The methods `apply` is to judge; none where the method was asked for, or needs no measurement."""
