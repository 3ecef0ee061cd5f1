"""Divergence of a linear head from sparse targets, and its gradient, without the logits of all positions at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .dispatch import _LIBRARY, check_one_device, define, wide

_ELEMENTS = 2**24
"""Logits the twin forms at once."""
_CONVERTED = 2**22
"""Elements of a half-precision head the twin converts at once."""


def linear_target_kl(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    log_p: Tensor,
    log_rest: Tensor,
    *,
    bias: Tensor | None = None,
    shared: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """KL(target ‖ softmax(logits)) of each position, the target's tail counted as one outcome.

    The logits are `scale · (x weight^T + bias)`, then `cap · tanh(logits / cap)`. With K a position's tokens in
    `index`, q its softmax over the shared tokens and r the mass q leaves to those outside K, the divergence is
    `sum_K p (log p - log q) + rest (log rest - log r)`.

    Args:
        x: (n, d) float, what the head reads. The result is differentiable with respect to it alone.
        weight: (V, d) float, the frozen head.
        index: (n, k) int64, distinct shared tokens of each row.
        log_p: (n, k) float, the target's log-probabilities of them; -inf adds nothing.
        log_rest: (n,) float, that of all other shared tokens together; -inf where there is none.
        bias: (V,) or None.
        shared: (V,) bool, the tokens the softmax runs over; None for all.
        scale: factor of the logits.
        cap: bound of the logits (Gemma 2); None leaves them.

    Returns:
        (n,) float32, float64 if x or weight is, in nats. Memory beyond the arguments: the twin holds the logits of as
        many rows as make 16 million; the kernel one bit a logit and a slice of 8,192 tokens of its gradient.

    Raises:
        ValueError: on shapes that do not fit, or a weight or bias that requires a gradient.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x and weight must be (n, d) and (V, d); got {tuple(x.shape)} and {tuple(weight.shape)}")
    if index.ndim != 2 or index.shape[0] != x.shape[0] or index.shape != log_p.shape:
        raise ValueError(f"index and log_p must be ({x.shape[0]}, k); got {tuple(index.shape)}, {tuple(log_p.shape)}")
    if log_rest.shape != x.shape[:1]:
        raise ValueError(f"log_rest must be ({x.shape[0]},); got {tuple(log_rest.shape)}")
    for name, vector in (("bias", bias), ("shared", shared)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"{name} must be ({weight.shape[0]},); got {tuple(vector.shape)}")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap must be above 0; got {cap}")
    learning = torch.is_grad_enabled()
    if learning and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("the head must be frozen: weight or bias requires a gradient")
    given = {"bias": bias, "shared": shared}
    check_one_device(x=x, weight=weight, index=index, **{n: t for n, t in given.items() if t is not None})
    gradient = learning and x.requires_grad
    loss: Tensor = _target_kl_op(x, weight, bias, index, log_p, log_rest, shared, scale, cap, gradient)[0]
    return loss


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Cross-entropy of one label for each position: `linear_target_kl` with all mass on it.

    Args:
        x: (n, d), weight: (V, d), bias: (V,) or None, scale, cap: as `linear_target_kl` has them.
        labels: (n,) int64, all of them counted: leave out rows without a label beforehand.

    Returns:
        (n,) float32, float64 if x or weight is, in nats.

    Raises:
        ValueError: as `linear_target_kl`.
    """
    certain = torch.zeros(labels.shape[0], 1, device=labels.device)
    nothing = torch.full(labels.shape[:1], -math.inf, device=labels.device)
    return linear_target_kl(x, weight, labels[:, None], certain, nothing, bias=bias, scale=scale, cap=cap)


def losses(kept: Tensor, rest: Tensor, log_p: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and log-normaliser, (n,) each, from the kept logits (n, k) and the log-sum-exp of the others (n,)."""
    log_z = torch.logaddexp(kept.logsumexp(-1), rest) if kept.shape[1] else rest
    p, p_rest = log_p.exp(), log_rest.exp()
    # What is impossible in the target adds nothing, whatever is found there.
    found = torch.where(p > 0, p * (log_p - kept + log_z[:, None]), 0).sum(-1)
    return found + torch.where(p_rest > 0, p_rest * (log_rest - rest + log_z), 0), log_z


def _rows_logits(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    if x.dtype == weight.dtype:
        logits = x @ weight.T
    else:
        logits = x.new_empty(x.shape[0], weight.shape[0])
        step = max(1, _CONVERTED // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], step):
            torch.mm(x, weight[start : start + step].to(x).T, out=logits[:, start : start + step])
    if bias is not None:
        logits += bias
    if scale != 1:
        logits *= scale
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    if gradient.dtype == weight.dtype:
        return gradient @ weight
    total = gradient.new_zeros(gradient.shape[0], weight.shape[1])
    step = max(1, _CONVERTED // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        total += gradient[:, start : start + step] @ weight[start : start + step].to(gradient)
    return total


def _twin(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    log_p: Tensor,
    log_rest: Tensor,
    shared: Tensor | None,
    scale: float,
    cap: float | None,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    dtype = wide(x, weight)
    n, d = x.shape
    loss = x.new_empty(n, dtype=dtype)
    dx = x.new_empty(n if gradient else 0, d, dtype=dtype)
    unshared = None if shared is None else ~shared
    step = max(1, _ELEMENTS // max(1, weight.shape[0]))
    for start in range(0, n, step):
        part = slice(start, start + step)
        logits = _rows_logits(x[part].to(dtype), weight, bias, scale, cap)
        slope = None if cap is None or not gradient else 1 - (logits / cap) ** 2
        kept = logits.gather(1, index[part])
        if unshared is not None:
            logits.masked_fill_(unshared, -math.inf)
        logits.scatter_(1, index[part], -math.inf)
        most = logits.amax(-1).masked_fill_(logits.amax(-1) == -math.inf, 0)
        logits.sub_(most[:, None]).exp_()
        rest = most + logits.sum(-1).log()
        wanted, wanted_rest = log_p[part].to(dtype), log_rest[part].to(dtype)
        loss[part], log_z = losses(kept, rest, wanted, wanted_rest)
        if gradient:
            p, p_rest = wanted.exp(), wanted_rest.exp()
            mass = p.sum(-1) + p_rest
            share = torch.where(p_rest > 0, (wanted_rest + most - rest).exp(), 0)
            logits.mul_((mass * (most - log_z).exp() - share)[:, None])
            logits.scatter_(1, index[part], mass[:, None] * (kept - log_z[:, None]).exp() - p)
            if slope is not None:
                logits.mul_(slope)
            dx[part] = _times_weight(logits, weight) * scale
    return loss, dx


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    log_p: Tensor,
    log_rest: Tensor,
    shared: Tensor | None,
    scale: float,
    cap: float | None,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    n, d = x.shape
    dtype = wide(x, weight)
    return x.new_empty(n, dtype=dtype), x.new_empty((n if gradient else 0, d), dtype=dtype)


_target_kl_op = define(
    "linear_target_kl(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor log_p, Tensor log_rest,"
    " Tensor? shared, float scale, float? cap, bool gradient) -> (Tensor, Tensor)",
    twin=_twin,
    fake=_fake,
    kernel=("target_kl_kernels", "linear_target_kl"),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # The loss of a row depends on that row alone: its gradient, formed with the loss, only has to be weighted.
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, weights: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (dx,) = ctx.saved_tensors
    return ((weights[:, None] * dx).to(ctx.dtype), *(None,) * 9)


torch.library.register_autograd(
    add_op_namespace_prefix("linear_target_kl"), _backward, setup_context=_keep, lib=_LIBRARY
)
