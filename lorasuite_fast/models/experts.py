"""A layer's experts as transformers' own module holds them, all in one tensor, whatever the form of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import LoraSuiteError

if TYPE_CHECKING:
    from .loader import Layer

_BEFORE = "layers.0."
"""What transformers' rules for names expect in front of a name inside a layer."""
_PACKED = ("_blocks", "_scales")
"""What the two parts of an mxfp4 tensor are called."""


def composed(layer: Layer, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of transformers' module of a layer, made of the file's tensors by transformers' own rules.

    Args:
        layer: with all its tensors. module: without weights. dtype: of what is returned.

    Raises:
        LoraSuiteError: NaN or infinity, or a parameter that the files lack.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules: list[Any] = get_checkpoint_conversion_mapping(layer.checkpoint.family.text_type) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    tensors: dict[str, Tensor] = {}
    fused: dict[str, Any] = {}
    for name in sorted(layer.inside, key=dot_natural_key):
        target, pattern = rename_source_key(_BEFORE + name, renamings, converters)
        if pattern is not None:
            rule = fused[target] = by_pattern[pattern]
            rule.add_tensor(target, _BEFORE + name, pattern, layer.read(name, dtype))
        elif name.endswith(_PACKED[0]):
            tensors[name.removesuffix(_PACKED[0])] = _unpacked(layer, name.removesuffix(_PACKED[0]), dtype)
        elif not name.endswith(_PACKED[1]):
            tensors[target.removeprefix(_BEFORE)] = layer.read(name, dtype)
    for target, rule in fused.items():
        tensors |= {name.removeprefix(_BEFORE): value for name, value in rule.convert(target).items()}
    for name, parameter in module.named_parameters():
        if name not in tensors or tensors[name].shape != parameter.shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise LoraSuiteError(
                f"{layer.checkpoint.folder}: {layer.prefix}{name} is {found}, transformers' module of "
                f"{layer.checkpoint.family.model_type} has {list(parameter.shape)}; fetch the model again"
            )
    return {name: tensors[name] for name, _ in module.named_parameters()}


def _unpacked(layer: Layer, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor that is stored in mxfp4: 32 values of 4 bits to a scale of 8."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = (layer.tensors[f"{layer.prefix}{name}{part}"] for part in _PACKED)
    value: Tensor = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    return value
