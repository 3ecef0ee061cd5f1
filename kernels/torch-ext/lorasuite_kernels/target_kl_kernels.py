"""Kernels of `linear_target_kl`: log-sum-exp and gradient of logits that live in one tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose, precision
from .target_kl import losses
from .tiles import rounded, row_products

_SLICE = 8192
"""Tokens whose gradient is held at once."""
_GATHERED = 2**22
"""Elements of the head gathered at once for the kept tokens."""
_WHOLE = 128
"""Tokens in multiples of which the bits are stored: a multiple of every BLOCK_V."""


@triton.jit
def logits_tile(
    x,
    weight,
    bias,
    rows,
    tokens,
    row_mask,
    token_mask,
    x_row_stride,
    x_column_stride,
    weight_row_stride,
    weight_column_stride,
    width,
    scale,
    cap,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(rows, tokens) of the logits in float32."""
    logits = row_products(
        x,
        rows,
        x_row_stride,
        x_column_stride,
        row_mask,
        weight,
        tokens,
        weight_row_stride,
        weight_column_stride,
        token_mask,
        0,
        width,
        BLOCK_K,
        PRECISION,
    )
    if BIASED:
        logits += tl.load(bias + tokens, mask=token_mask, other=0.0).to(tl.float32)[None, :]
    logits *= scale
    if CAPPED:
        # tanh(y) = 2 sigmoid(2 y) - 1
        logits = cap * (2.0 / (1.0 + tl.exp(-2.0 * logits / cap)) - 1.0)
    return logits


@triton.jit
def in_rest(passed, rows, tokens, count, bytes_a_row):
    """Which cells of a tile are shared tokens that the target does not name, from one bit a cell.

    The bits fill whole tiles, those past the vocabulary are set; rows past the last read it once more.
    """
    cells = passed + tl.minimum(rows, count - 1)[:, None].to(tl.int64) * bytes_a_row + (tokens // 8)[None, :]
    return ((tl.load(cells).to(tl.int32) >> (tokens % 8)[None, :]) & 1) == 0


@triton.jit
def rest_sums_kernel(
    x,
    weight,
    bias,
    passed,
    most,
    total,
    x_row_stride,
    x_column_stride,
    weight_row_stride,
    weight_column_stride,
    count,
    vocabulary,
    width,
    bytes_a_row,
    scale,
    cap,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Largest logit of the rest, and the sum of exponentials below it, of each row in one block of tokens.

    most, total: (blocks of tokens, count) float32.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask, token_mask = rows < count, tokens < vocabulary
    logits = logits_tile(
        x,
        weight,
        bias,
        rows,
        tokens,
        row_mask,
        token_mask,
        x_row_stride,
        x_column_stride,
        weight_row_stride,
        weight_column_stride,
        width,
        scale,
        cap,
        BIASED,
        CAPPED,
        BLOCK_K,
        PRECISION,
    )
    logits = tl.where(in_rest(passed, rows, tokens, count, bytes_a_row), logits, float("-inf"))
    largest = tl.max(logits, axis=1)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    summed = tl.sum(tl.exp(logits - base[:, None]), axis=1)
    cells = tl.program_id(1).to(tl.int64) * count + rows
    tl.store(most + cells, largest, mask=row_mask)
    tl.store(total + cells, summed, mask=row_mask)


@triton.jit
def gradient_kernel(
    x,
    weight,
    bias,
    passed,
    rest,
    factor,
    out,
    x_row_stride,
    x_column_stride,
    weight_row_stride,
    weight_column_stride,
    count,
    first,
    stop,
    width,
    bytes_a_row,
    out_row_stride,
    scale,
    cap,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """factor · exp(logits - rest) of the rest, 0 elsewhere, for tokens first..stop; out: (count, stop - first)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = first + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask, token_mask = rows < count, tokens < stop
    logits = logits_tile(
        x,
        weight,
        bias,
        rows,
        tokens,
        row_mask,
        token_mask,
        x_row_stride,
        x_column_stride,
        weight_row_stride,
        weight_column_stride,
        width,
        scale,
        cap,
        BIASED,
        CAPPED,
        BLOCK_K,
        PRECISION,
    )
    base = tl.load(rest + rows, mask=row_mask, other=0.0)
    values = tl.load(factor + rows, mask=row_mask, other=0.0)[:, None] * tl.exp(logits - base[:, None])
    if CAPPED:
        values *= 1.0 - (logits / cap) * (logits / cap)
    values = tl.where(in_rest(passed, rows, tokens, count, bytes_a_row), values, 0.0)
    cells = out + rows[:, None].to(tl.int64) * out_row_stride + (tokens - first)[None, :]
    tl.store(cells, rounded(values, out.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


def _passed_bits(index: Tensor, vocabulary: int, shared: Tensor | None) -> Tensor:
    """(n, bytes) uint8: a bit is set for each token that is kept or not shared, and past the vocabulary."""
    passed = torch.ones(triton.cdiv(vocabulary, _WHOLE) * _WHOLE, dtype=torch.uint8, device=index.device)
    passed[:vocabulary] = 0 if shared is None else ~shared
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=index.device)
    bits = (passed.view(-1, 8) * powers).sum(-1, dtype=torch.uint8).repeat(index.shape[0], 1)
    return bits.scatter_add_(1, index // 8, powers[index % 8])


def _kept_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, scale: float, cap: float | None
) -> Tensor:
    kept = x.new_empty(index.shape, dtype=torch.float32)
    step = max(1, _GATHERED // max(1, index.shape[1] * x.shape[1]))
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        kept[part] = torch.bmm(weight[index[part]].float(), x[part].float()[:, :, None])[:, :, 0]
    if bias is not None:
        kept += bias[index].float()
    kept *= scale
    return kept if cap is None else kept.div_(cap).tanh_().mul_(cap)


def linear_target_kl(
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
    """Kernel of `target_kl.linear_target_kl`: two passes over the tiles of the logits, the second for the gradient."""
    if x.dtype != weight.dtype:
        x = x.to(weight.dtype) if x.dtype == torch.float32 else x.float()
        weight = weight if x.dtype == weight.dtype else weight.float()
    (n, width), vocabulary = x.shape, weight.shape[0]
    if n == 0 or vocabulary == 0 or width == 0:
        raise ValueError(f"x and weight must have elements; got {tuple(x.shape)} and {tuple(weight.shape)}")
    passed = _passed_bits(index, vocabulary, shared)
    config = choose("target_kl", x.dtype, x.device)
    rows, step = triton.cdiv(n, config.blocks["BLOCK_N"]), config.blocks["BLOCK_V"]
    blocks = triton.cdiv(vocabulary, step)
    most, total = (x.new_empty(blocks, n, dtype=torch.float32) for _ in range(2))
    inputs = x, weight, weight if bias is None else bias, passed
    strides = *x.stride(), *weight.stride()
    keywords = {"BIASED": bias is not None, "CAPPED": cap is not None, **precision(x.dtype, x.device)}
    ends = scale, 1.0 if cap is None else cap
    rest_sums_kernel[(rows, blocks)](
        *inputs,
        most,
        total,
        *strides,
        n,
        vocabulary,
        width,
        passed.shape[1],
        *ends,
        **keywords,
        **config.keywords,
    )
    rest = (most + total.log()).logsumexp(0)
    kept = _kept_logits(x, weight, bias, index, scale, cap)
    log_p, log_rest = log_p.float(), log_rest.float()
    loss, log_z = losses(kept, rest, log_p, log_rest)
    if not gradient:
        return loss, x.new_empty(0, width, dtype=torch.float32)
    p, p_rest = log_p.exp(), log_rest.exp()
    mass = p.sum(-1) + p_rest
    factor = mass * (rest - log_z).exp() - p_rest
    base = rest.masked_fill(rest == -torch.inf, 0)
    on_kept = mass[:, None] * (kept - log_z[:, None]).exp() - p
    if cap is not None:
        on_kept *= 1 - (kept / cap) ** 2
    dx = x.new_zeros(n, width, dtype=torch.float32)
    # float16 would lose the small gradients of most tokens.
    held = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    # One column more than tokens: the kept ones outside a slice are written there.
    out = x.new_empty(n, _SLICE + 8, dtype=held)
    for first in range(0, vocabulary, _SLICE):
        stop = min(first + _SLICE, vocabulary)
        gradient_kernel[(rows, triton.cdiv(stop - first, step))](
            *inputs,
            base,
            factor,
            out,
            *strides,
            n,
            first,
            stop,
            width,
            passed.shape[1],
            out.stride(0),
            *ends,
            **keywords,
            **config.keywords,
        )
        inside = (index >= first) & (index < stop)
        out.scatter_(1, torch.where(inside, index - first, _SLICE), on_kept.to(held))
        dx += out[:, : stop - first] @ weight[first:stop].to(held)
    return loss, dx * scale
