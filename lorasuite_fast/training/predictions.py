"""What a model predicts at the positions a loss counts, without the logits of all others.

The head reads the last hidden states. Where it is one frozen linear map, they are taken in front of it, and only rows
that count go through it, in `lorasuite_kernels.linear_target_kl`. Other heads (with an adapter of their own, trained,
quantised, or in a model that makes more of its logits than a scale and a cap) run as the model runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.aligned_states import Head
from .teacher import Target, divergence

_PROBED = 8
"""Tokens on which the reading of a head is compared with the model's own logits."""
_AGREED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Heads that were compared, and what came out."""


@dataclass(frozen=True)
class Predictions:
    """Of one forward pass.

    Attributes:
        states: (rows, length, d), what the head reads; without a head (rows, length, V), the logits.
        head: the frozen head; None where the logits were formed.
    """

    states: Tensor
    head: Head | None

    def target_kl(self, row: Tensor, position: Tensor, wanted: Target, tokens: Tensor) -> Tensor:
        """KL(target ‖ model) in nats at the positions (row, position), over the shared tokens; (n,).

        Args:
            row, position: (n,) int64. wanted: of these n positions. tokens: (s,) int64, the shared tokens.
        """
        x = self.states[row, position]
        if self.head is None:
            return divergence(wanted, x[:, tokens].float())
        if wanted.index is None:
            return divergence(wanted, _logits(x, self.head)[:, tokens].float())
        from lorasuite_kernels import linear_target_kl

        shared = torch.zeros(self.head.size, dtype=torch.bool, device=x.device)
        shared[tokens] = True
        x, weight, bias = _in_precision(x, self.head)
        return linear_target_kl(
            x,
            weight,
            tokens[wanted.index],
            wanted.log_probs,
            wanted.log_rest,
            bias=bias,
            shared=shared,
            scale=self.head.scale,
            cap=self.head.cap,
        )

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """Of every label that counts, in nats, summed.

        Args:
            labels: (rows, length - 1), what follows each position; -100 where that does not count.
        """
        counted = labels != -100
        x = self.states[:, :-1][counted]
        if self.head is None:
            return functional.cross_entropy(_wide(x), labels[counted], reduction="sum")
        from lorasuite_kernels import linear_cross_entropy

        x, weight, bias = _in_precision(x, self.head)
        return linear_cross_entropy(
            x, weight, labels[counted], bias=bias, scale=self.head.scale, cap=self.head.cap
        ).sum()

    def log_probs(self, counted: Tensor) -> Tensor:
        """(n, V), at least float32, at the positions in front of those that count; counted (rows, length - 1) bool."""
        x = self.states[:, :-1][counted]
        return functional.log_softmax(_wide(x if self.head is None else _logits(x, self.head)), dim=-1)


def predictions(model: Any, ids: Tensor, mask: Tensor) -> Predictions:
    """Runs a causal language model of transformers or PEFT; ids, mask: (rows, length)."""
    head = _frozen_head(model, ids)
    if head is None:
        return Predictions(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, None)
    states, _ = _run(model, ids, mask, 1)
    return Predictions(states, head)


def _run(model: Any, ids: Tensor, mask: Tensor, passed: int) -> tuple[Tensor, Tensor]:
    """What the head reads, and the model's logits of the first `passed` positions."""
    seen: list[Tensor] = []

    def shorten(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(arguments[0])
        return (arguments[0][:, :passed], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(shorten)
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        handle.remove()
    return seen[0], logits


def _frozen_head(model: Any, ids: Tensor) -> Head | None:
    """The head where it is a frozen linear map, scaled and capped, that the model's own logits agree with."""
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear or any(p.requires_grad for p in module.parameters()) or not ids.numel():
        return None
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    head = Head(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))
    if module not in _AGREED:
        _AGREED[module] = _agrees(model, head, ids[:1, :_PROBED])
    return head if _AGREED[module] else None


@torch.no_grad()
def _agrees(model: Any, head: Head, ids: Tensor) -> bool:
    training = model.training
    # Without dropout, whose draws are the training's.
    model.eval()
    with torch.autocast(ids.device.type, enabled=False):
        states, logits = _run(model, ids, torch.ones_like(ids), _PROBED)
        found = head.logits(states)
    model.train(training)
    if found.shape != logits.shape:
        return False
    # A few roundings of the dtype the model computes in.
    tolerance = 8 * torch.finfo(head.weight.dtype).eps ** 0.75 * logits.abs().max()
    return bool((found - logits).abs().max() <= tolerance)


def _in_precision(x: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """States, weight and bias of the head in the dtype autocast would take, if it is on."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, head.weight, head.bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)


def _logits(x: Tensor, head: Head) -> Tensor:
    logits = functional.linear(x, head.weight, head.bias) * head.scale
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
