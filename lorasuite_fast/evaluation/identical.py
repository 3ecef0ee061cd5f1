"""Whether two models are the same: every weight is compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..models.checkpoint import Checkpoint
from ..transfer.kinship import same_computation

_ROWS = 2048


def same_tensors(old: Checkpoint, new: Checkpoint) -> bool:
    """Whether two models hold tensors of the same names and shapes, compute alike with them and give the tokens the
    same ids; no tensor is read."""
    alike = old.family is new.family and old.shape == new.shape and same_computation(old, new)
    return alike and set(_names(old)) == set(_names(new)) and _same_tokens(old, new)


def same_weights(old: Checkpoint, new: Checkpoint) -> bool:
    """Whether two models of the `same_tensors` are one: NEW is OLD, a copy of it, or OLD in another dtype.

    Weights of another dtype count as the same where they are the old ones, rounded to it.
    """
    names = _names(old), _names(new)
    return all(_equal(old, names[0][name], new, names[1][name]) for name in sorted(names[0])) and _same_head(old, new)


def _same_tokens(old: Checkpoint, new: Checkpoint) -> bool:
    """Whether both tokenizers cut text alike into the same ids; a folder without a tokenizer says nothing else."""
    files = [model.folder / "tokenizer.json" for model in (old, new)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return True
    try:
        sides = [_cutting(model.tokenizer()) for model in (old, new)]
    except LoraSuiteError:
        return True
    return sides[0] == sides[1]


def _cutting(tokenizer: Any) -> tuple[dict[str, int], list[Any]]:
    """The ids of a tokenizer's tokens, and what decides how it cuts text into them, as far as it can be read."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    return tokenizer.get_vocab(), [rules.get(part) for part in ("normalizer", "pre_tokenizer", "model")]


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
