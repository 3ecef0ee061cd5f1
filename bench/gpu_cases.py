"""The operations bench/gpu.py measures, each beside fair PyTorch, the published formulation and float64.

Fair PyTorch makes the same use of the structure as the kernel: a Gram stack is centred and formed once, key/value heads
are not repeated, a gathered product keeps float32 sums. The published formulation is timed on one pair of layers or
heads and scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gpu_plain as plain
import roofline
import torch
from gpu_rows import DEVICE, DRY
from torch import Tensor

from lorasuite_kernels import Gram, cka, gram, head_similarity, hsic, shared_gram


@dataclass(frozen=True)
class Shapes:
    """Sizes of one run: Llama-2-7B -> Llama-3-8B, or small ones."""

    layers: int = roofline.L
    m: int = roofline.M
    d: int = roofline.D
    heads: tuple[int, int] = (roofline.H_O, roofline.H_N)
    kv_heads: tuple[int, int] = (roofline.G_O, roofline.G_N)
    size: int = roofline.SIZE
    vocabularies: tuple[int, int] = (32_000, 128_256)
    shared: int = roofline.SHARED


SHAPES = Shapes(4, 64, 128, (4, 4), (4, 2), 32, (500, 700), 400) if DRY else Shapes()


@dataclass(frozen=True)
class Case:
    """One operation: through this package, in fair PyTorch, in float64, and as published (and how often)."""

    kernel: Callable[[], Tensor]
    fair: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    published: Callable[[], object] | None = None
    scale: float = 1.0


def _generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(torch.seed() % 2**31)


def _random(generator: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    return (torch.randn(*size, generator=generator, device=DEVICE) * size[-1] ** -0.5).to(dtype)


def _states(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two stacks of layers (L, m, d) that share 64 features."""
    generator = _generator()
    features = torch.randn(SHAPES.m, 64, generator=generator, device=DEVICE)
    sides = []
    for _ in range(2):
        own = torch.randn(SHAPES.layers, SHAPES.m, SHAPES.d, generator=generator, device=DEVICE)
        sides.append(own.add_(features @ torch.randn(64, SHAPES.d, generator=generator, device=DEVICE)).to(dtype))
    return sides[0], sides[1]


def gram_case(dtype: torch.dtype) -> Case:
    x, y = _states(dtype)
    both = torch.cat([x, y])

    def exact() -> Tensor:
        # The sum of the centred matrix without its diagonal: minus the trace.
        wide = both.double()
        return -(wide - wide.mean(1, keepdim=True)).square().sum((1, 2))

    return Case(lambda: gram(both).totals, lambda: plain.full_grams(both).sum((1, 2)), exact)


def _one_published_pair(x: Tensor, y: Tensor) -> Tensor:
    k, l = x[0] @ x[0].T, y[0] @ y[0].T
    return torch.trace(k @ l) + torch.trace(k @ k) + torch.trace(l @ l)


def hsic_case(dtype: torch.dtype) -> Case:
    x, y = _states(dtype)
    gx, gy = gram(x), gram(y)
    full = [plain.full_grams(side) for side in (x, y)]
    return Case(
        lambda: hsic(gx, gy),
        lambda: plain.hsic_of(*full),
        lambda: plain.hsic_of(*(plain.full_grams(side.double()) for side in (x, y))),
        lambda: _one_published_pair(x, y),
        SHAPES.layers**2,
    )


def cka_case(dtype: torch.dtype) -> Case:
    x, y = _states(dtype)
    return Case(
        lambda: cka(x, y),
        lambda: plain.cka(x, y),
        lambda: plain.cka(x.double(), y.double()),
        lambda: _one_published_pair(x, y),
        SHAPES.layers**2,
    )


def heads_case(dtype: torch.dtype) -> Case:
    generator, (H_o, H_n), (G_o, G_n) = _generator(), SHAPES.heads, SHAPES.kv_heads
    d, h = SHAPES.d, SHAPES.size
    shapes_o = (H_o * h, d), (G_o * h, d), (G_o * h, d), (d, H_o * h)
    shapes_n = (H_n * h, d), (G_n * h, d), (G_n * h, d), (d, H_n * h)
    old, new = ([_random(generator, dtype, *shape) for shape in side] for side in (shapes_o, shapes_n))
    W_h = _random(generator, dtype, d, d)
    wide = [[w.double() for w in side] for side in (old, new)]
    return Case(
        lambda: head_similarity(*old, *new, heads=SHAPES.heads, kv_heads=SHAPES.kv_heads),
        lambda: plain.heads(old, new, SHAPES.heads, SHAPES.kv_heads),
        lambda: plain.heads(*wide, SHAPES.heads, SHAPES.kv_heads),
        lambda: plain.published_pair(old, new, h, W_h),
        H_o * H_n,
    )


def shared_gram_case(dtype: torch.dtype) -> Case:
    generator = _generator()
    e_o, e_n = (_random(generator, dtype, rows, SHAPES.d) for rows in SHAPES.vocabularies)
    idx_o, idx_n = (torch.randperm(rows, device=DEVICE)[: SHAPES.shared] for rows in SHAPES.vocabularies)
    return Case(
        lambda: shared_gram(e_o, e_n, idx_o, idx_n, both=True).on,
        lambda: plain.shared_gram(e_o, e_n, idx_o, idx_n)[1],
        lambda: e_o[idx_o].double().T @ e_n[idx_n].double(),
    )


def layer_grams_case(dtype: torch.dtype) -> Case:
    """HSIC of both models' layers from states, the way a plan takes it: one gram a model, then hsic."""
    x, y = _states(dtype)

    def ours() -> Tensor:
        sides: list[Gram] = [gram(x), gram(y)]
        return hsic(*sides)

    def exact() -> Tensor:
        return plain.hsic_of(*(plain.full_grams(side.double()) for side in (x, y)))

    return Case(ours, lambda: plain.hsic_of(plain.full_grams(x), plain.full_grams(y)), exact)


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "gram": gram_case,
    "hsic": hsic_case,
    "cka": cka_case,
    "head_similarity": heads_case,
    "shared_gram": shared_gram_case,
    "plan_hsic": layer_grams_case,
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
