"""Planted upgrades of mixtures of experts: the attention as everywhere, the neurons of every expert in other places.

The experts are carried in the layout of transformers' own modules, all of a layer in one tensor; `save_pretrained`
writes them as the files of the family have them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from planted_families import _Planter
from torch import Tensor
from transformers import AutoModelForCausalLM

from planted import _draw, _normal

ACROSS = ("gpt_oss", "llama4_text")
"""Mixtures whose experts are stored (in, out)."""
IN_TURN = ("gpt_oss",)
"""Mixtures whose gate and up take turns in a tensor, instead of one following the other."""


class Planter(_Planter):
    """Carries a mixture: the tensors of `mlp` or `feed_forward` by what their names and shapes say."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(self.config_n)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}

    def _attention(self, old: str, new: str, head_map: list[int], size: float) -> None:
        super()._attention(old, new, head_map, size)
        sinks = self.old.get(f"{old}self_attn.sinks")
        if sinks is not None:
            self.new[f"{new}self_attn.sinks"] = _normal(self.rng, self.H_n)
            self.new[f"{new}self_attn.sinks"][head_map] = sinks

    def _mlp(self, old: str, new: str, neuron_map: list[int], size: float) -> None:
        norms = [f"{side}{self.names.mlp_norm}" for side in (old, new)]
        places: dict[int, list[int]] = {}
        kind = self.config_o.model_type
        for name, tensor in self.old.items():
            inside = name.removeprefix(old)
            if inside == name or not inside.startswith(("mlp.", "feed_forward.")):
                continue
            shape, module = self.shapes[new + inside], re.split(r"\.(?:gate_up|gate|up|down)_proj", inside)[0]
            across = kind in ACROSS and tensor.ndim == 3
            if "gate_up" in inside or "gate_proj" in inside or "up_proj" in inside:
                parts = 2 if "gate_up" in inside else 1
                bias = inside.endswith("bias")
                value = tensor if bias else tensor.transpose(-1, -2) if across else tensor
                value = value if bias else self._read(value, norms)
                width = (shape[-1] if bias or across else shape[-2]) // parts
                self.new[new + inside] = self._placed(value, parts, width, kind, places, module, bias=bias)
                if across and not bias:
                    self.new[new + inside] = self.new[new + inside].transpose(-1, -2).contiguous()
            elif "down_proj" in inside and not inside.endswith("bias"):
                value = tensor.transpose(-1, -2) if across else tensor
                wide = torch.zeros(*value.shape[:-2], self.d_n, shape[-2] if across else shape[-1]).double()
                wide[..., self._map(value.shape[-1], wide.shape[-1], places, module)] = self.Q.T @ value * size
                self.new[new + inside] = wide.transpose(-1, -2).contiguous() if across else wide
            elif "down_proj" in inside:
                self.new[new + inside] = tensor @ self.Q * size
            elif tensor.ndim == 2:
                self.new[new + inside] = self._read(tensor, norms)
            else:
                self.new[new + inside] = tensor

    def _read(self, weight: Tensor, norms: list[str]) -> Tensor:
        return self.read(weight.reshape(-1, self.d_o), None, *norms)[0].view(*weight.shape[:-1], self.d_n)

    def _map(self, f_o: int, f_n: int, places: dict[Any, list[int]], module: str) -> list[int]:
        if module not in places:
            places[module] = _draw(self.rng, f_n, f_o)
        return places[module]

    def _placed(
        self, value: Tensor, parts: int, width: int, kind: str, places: Any, module: str, *, bias: bool
    ) -> Tensor:
        """Rows of neurons, at `-1` of biases and `-2` of weights, among random ones."""
        rows = value[..., None] if bias else value
        f_o = rows.shape[-2] // parts
        split = (f_o, parts) if kind in IN_TURN else (parts, f_o)
        rows = rows.unflatten(-2, split)
        rows = rows.transpose(-2, -3) if kind in IN_TURN else rows
        wide = _normal(self.rng, *rows.shape[:-2], width, rows.shape[-1]) * rows.std()
        wide[..., self._map(f_o, width, places, module), :] = rows
        wide = wide.transpose(-2, -3) if kind in IN_TURN else wide
        wide = wide.flatten(-3, -2)
        return wide[..., 0] if bias else wide
