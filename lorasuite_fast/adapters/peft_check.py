"""Whether PEFT would load an adapter that is about to be written: its own classes try, on weights without memory."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LoraSuiteError
from ..io.json_files import parse_unique
from ..models.families import Family, Shape
from .adapter_config import CONFIG, WEIGHTS

_PREFIX = "base_model.model."


def skeleton(family: Family, shape: Shape) -> nn.Module:
    """The linear maps of a family's causal language model by their module paths, on the meta device."""
    root = nn.Module()
    for i in range(shape.L):
        for module in family.modules():
            out, into = family.module_shape(module, shape)
            _put(root, f"{family.layer(i)}.{module}", _linear(out, into, transposed=family.transposed))
    _put(root, f"{family.prefix}{family.embedding}", nn.Embedding(shape.V, shape.d, device="meta"))
    _put(root, family.head[0], nn.Linear(shape.d, shape.V, bias=False, device="meta"))
    return root


def _linear(out: int, into: int, *, transposed: bool) -> nn.Module:
    if not transposed:
        return nn.Linear(into, out, bias=False, device="meta")
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        conv: nn.Module = Conv1D(out, into)
    return conv


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def empty_model(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """A model folder's causal language model on the meta device. Raises LoraSuiteError if it cannot be built."""
    from ..models.loading import loading
    from ..models.pretrained import load_config, model_class

    config = load_config(folder, trust_remote_code=trust_remote_code)
    what = f"{folder}: transformers cannot build this model"
    with loading(what, trust_remote_code=trust_remote_code), torch.device("meta"):
        model: nn.Module = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return model


def check_loads(files: Mapping[str, Any], model: nn.Module, name: str) -> None:
    """Puts an adapter on a model without memory, as PEFT does when it loads one.

    Args:
        files: adapter_config.json and adapter_model.safetensors as bytes, among others.
        model: modules on the meta device; PEFT's are put into it. name: of the model, for messages.

    Raises:
        LoraSuiteError: PEFT does not understand the configuration, or would leave a tensor out, or miss one.
    """
    fault = _fault(files, model)
    if fault:
        raise LoraSuiteError(
            f"the adapter made for {name}: PEFT would not load it whole ({fault}); nothing was written, report it with "
            "the adapter_config.json it came from"
        )


def _fault(files: Mapping[str, Any], model: nn.Module) -> str | None:
    from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model

    stored = _shapes(files[WEIGHTS])
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (Path(folder) / CONFIG).write_bytes(files[CONFIG])
            config = PeftConfig.from_pretrained(folder)
            inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
            placed = get_peft_model_state_dict(model, save_embedding_layers=False)
    except OSError:
        raise
    except Exception as error:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    expected = {key: tuple(tensor.shape) for key, tensor in placed.items()}
    for key, shape in sorted(expected.items()):
        if key not in stored:
            return f"it has no tensor for {key}"
        if stored[key] != shape:
            return f"its {key} is {list(stored[key])}, the model's place for it {list(shape)}"
    lost = sorted(key for key in stored if key not in expected and "lora_" in key)
    return f"the model has no place for {lost[0]}" if lost else None


def _shapes(data: bytes) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a safetensors file's bytes, by their names in the bare model."""
    header = parse_unique(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    return {name.removeprefix(_PREFIX): tuple(entry["shape"]) for name, entry in header.items()}
