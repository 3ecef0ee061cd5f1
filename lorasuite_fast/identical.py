"""A new model that is the old one: every weight is compared, and the adapter's files are given back as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import CONFIG, WEIGHTS, Adapter
from .checkpoint import Checkpoint
from .errors import LoraSuiteError
from .json_files import read_json
from .kinship import same_computation
from .loader import Layer
from .projection import update_norm
from .result import LayerResult

_ROWS = 2048


def same_tensors(old: Checkpoint, new: Checkpoint) -> bool:
    """Whether two models hold tensors of the same names and shapes and compute alike with them; none is read."""
    alike = old.family is new.family and old.shape == new.shape and same_computation(old, new)
    return alike and set(_names(old)) == set(_names(new))


def same_weights(old: Checkpoint, new: Checkpoint) -> bool:
    """Whether two models of the `same_tensors` are one: NEW is OLD, a copy of it, or OLD in another dtype.

    Weights of another dtype count as the same where they are the old ones, rounded to it.
    """
    names = _names(old), _names(new)
    return all(_equal(old, names[0][name], new, names[1][name]) for name in sorted(names[0])) and _same_head(old, new)


def _names(model: Checkpoint) -> dict[str, str]:
    """Every tensor but the head's, by its name without the transformer's prefix."""
    heads = {f"{head}.{kind}" for head in model.family.head for kind in ("weight", "bias")}
    return {
        name.removeprefix(model.prefix): name
        for name in model.tensors.entries
        if name not in heads and not name.endswith(model.family.ignored)
    }


def _same_head(old: Checkpoint, new: Checkpoint) -> bool:
    """A head that is tied to the embedding is the same as one stored with the embedding's values."""
    biases = old.head("bias"), new.head("bias")
    if (biases[0] is None) != (biases[1] is None):
        return False
    pairs = [(old.head() or old.embedding_name, new.head() or new.embedding_name)]
    if biases[0] is not None and biases[1] is not None:
        pairs.append((biases[0], biases[1]))
    return all(_equal(old, name_o, new, name_n) for name_o, name_n in pairs)


def _equal(old: Checkpoint, name_o: str, new: Checkpoint, name_n: str) -> bool:
    entries = old.tensors.entry(name_o), new.tensors.entry(name_n)
    if entries[0].shape != entries[1].shape:
        return False
    same = all(torch.equal(o.to(n.dtype), n) for o, n in _blocks(old, name_o, new, name_n))
    old.tensors.release([name_o])
    new.tensors.release([name_n])
    return same


def _blocks(old: Checkpoint, name_o: str, new: Checkpoint, name_n: str) -> Iterator[tuple[Tensor, Tensor]]:
    """A tensor of each model, a block of rows at a time."""
    sides = old.tensors.view(name_o), new.tensors.view(name_n)
    if not sides[0].ndim:
        yield sides
        return
    yield from zip(sides[0].split(_ROWS), sides[1].split(_ROWS), strict=True)


def returned_files(source: Adapter, base: str) -> dict[str, bytes]:
    """The adapter's own files; only the base model's name in its configuration is the new one's.

    Raises:
        LoraSuiteError: a file that cannot be read.
    """
    folder = Path(source.where)
    try:
        files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    except OSError as error:
        raise LoraSuiteError(
            f"ADAPTER {folder}: cannot be read ({error.strerror or error}); check the folder"
        ) from None
    config = read_json(folder / CONFIG)
    if config.get("base_model_name_or_path") != base:
        config |= {"base_model_name_or_path": base, "revision": None}
        files[CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return files


def update_sizes(source: Adapter, new: Checkpoint) -> list[LayerResult]:
    """One result a layer: every layer is its own partner."""
    found: dict[int, dict[str, float]] = {}
    for (layer, role), update in sorted(source.updates.items()):
        weight = Layer.of(new, layer, (role,)).weight(role, torch.float32)
        size = float(torch.linalg.vector_norm(weight))
        share = abs(update.scale) * update_norm(update.factors) / size if size else 0.0
        found.setdefault(layer, {})[role] = share
    return [LayerResult(layer, layer, None, None, None, sizes) for layer, sizes in found.items()]


def identity_tensors(new: Checkpoint, roles: tuple[str, ...]) -> dict[str, Tensor]:
    """What a plan of method copy holds where both models are one. Layers are not compared: each is its own partner."""
    d, L = new.shape.d, new.shape.L
    tensors = {"W_h": torch.eye(d), "S": torch.eye(d), "cka": torch.eye(L)}
    for layer in range(L):
        read = Layer.of(new, layer, roles)
        for role in roles:
            tensors[f"layers.{layer}.{role}.norm"] = torch.linalg.vector_norm(read.weight(role, torch.float32)).view(1)
        read.release()
    return tensors


def identity_facts(vocabulary: int, rank: int) -> dict[str, Any]:
    """The facts of such a plan."""
    return {
        "same_vocabulary": True,
        "shared_tokens": vocabulary,
        "untrained_tokens": 0,
        "rank": rank,
        "rms_ratio": 1.0,
        "embedding_factor": 1.0,
        "r2": 1.0,
        "r2_back": 1.0,
    }
