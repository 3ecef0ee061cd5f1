"""Measures every kernel on a GPU beside vectorised PyTorch, and checks it against float64, in under 8 minutes.

    python bench/gpu.py            # shapes of Llama-2-7B -> Llama-3-8B; writes bench/reports/gpu.md
    python bench/gpu.py --quick    # small shapes; prints
    python bench/gpu.py --cpu --quick   # the same script through the PyTorch twins, to see that it runs

Times are medians over CUDA events, the L2 cache flushed between runs. The published formulation is timed on one pair of
layers or heads and scaled. On an H100 the predictions of bench/roofline.py stand beside what was measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels" / "torch-ext"), str(ROOT / "bench")]

import roofline  # noqa: E402

from lorasuite_kernels import backend, cka, gram, head_similarity, hsic, project_heads, shared_gram  # noqa: E402

REPORT = ROOT / "bench" / "reports" / "gpu.md"
SECONDS_EACH = 3.0
"""Measuring stops for one function once it has taken this long."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of one run: Llama-2-7B -> Llama-3-8B, or small ones."""

    layers: int = roofline.L
    m: int = roofline.M
    d: int = roofline.D
    heads: tuple[int, int] = (roofline.H_O, roofline.H_N)
    kv_heads: tuple[int, int] = (roofline.G_O, roofline.G_N)
    size: int = roofline.SIZE
    ranks: int = roofline.R * roofline.ADAPTERS
    vocabularies: tuple[int, int] = (32_000, 128_256)
    shared: int = roofline.SHARED


QUICK = Shapes(4, 64, 128, (4, 4), (4, 2), 32, 32, (500, 700), 400)


@dataclass(frozen=True)
class Case:
    """One operation: through the kernel, in vectorised PyTorch, as published (and how often), and in float64."""

    name: str
    kernel: Callable[[], Tensor]
    vectorised: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    published: Callable[[], object] | None = None
    scale: float = 1.0


def seconds(work: Callable[[], object], device: str, budget: float = SECONDS_EACH) -> float:
    """Median seconds of one call after a warm-up, within a time budget."""
    work()
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=device)  # larger than any L2 cache
    torch.cuda.synchronize()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 50 and time.perf_counter() - started < budget):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Memory a call allocates at its peak, beyond what was there."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def plain_hsic(x: Tensor, y: Tensor) -> Tensor:
    """All pairs from full matrices, in the dtype of x."""
    return hsic_of(full_grams(x), full_grams(y))


def full_grams(x: Tensor) -> Tensor:
    """Centred Gram matrices with zero diagonal, (L, m, m)."""
    centred = x - x.mean(1, keepdim=True)
    k = centred @ centred.mT
    k.diagonal(dim1=1, dim2=2).zero_()
    return k


def hsic_of(k: Tensor, l: Tensor) -> Tensor:
    m = k.shape[1]
    rows_k, rows_l = k.sum(2), l.sum(2)
    trace = k.flatten(1) @ l.flatten(1).T
    totals = rows_k.sum(1)[:, None] * rows_l.sum(1) / ((m - 1) * (m - 2))
    return (trace + totals - 2 / (m - 2) * (rows_k @ rows_l.T)) / (m * (m - 3))


def plain_cka(x: Tensor, y: Tensor) -> Tensor:
    own = [plain_hsic(side, side).diagonal().clamp_min(0).sqrt() for side in (x, y)]
    return plain_hsic(x, y) / torch.outer(*own)


def plain_heads(old: list[Tensor], new: list[Tensor], H: tuple[int, int], G: tuple[int, int]) -> Tensor:
    """Repeated key/value heads, four full products, a blockwise sum."""

    def both(a: list[Tensor], b: list[Tensor], heads: tuple[int, int], groups: tuple[int, int]) -> Tensor:
        total = None
        for per_head, per_group in ((0, 1), (3, 2)):
            left, right = (w[0] if per_head == 0 else w[3].T for w in (a, b))
            size = left.shape[0] // heads[0], right.shape[0] // heads[1]
            shared = [
                w[per_group].view(g, -1, w[per_group].shape[1]).repeat_interleave(h // g, 0).flatten(0, 1)
                for w, h, g in zip((a, b), heads, groups, strict=True)
            ]
            product = (left @ right.T) * (shared[0] @ shared[1].T)
            block = product.view(heads[0], size[0], heads[1], size[1]).sum((1, 3), dtype=left.dtype)
            total = block if total is None else total + block
        assert total is not None
        return total

    own = [both(w, w, (h, h), (g, g)).diagonal().sqrt() for w, h, g in zip((old, new), H, G, strict=True)]
    return both(old, new, H, G) / torch.outer(*own)


def published_pair(old: list[Tensor], new: list[Tensor], size: int, W_h: Tensor) -> Tensor:
    """One pair of heads through d × d interaction matrices, the old ones carried by W_h."""
    a = slice(0, size)
    qk, vo = old[0][a].T @ old[1][a], old[2][a].T @ old[3][:, a].T
    carried = torch.cat([(W_h.T @ w @ W_h).flatten() for w in (qk, vo)])
    qk, vo = new[0][a].T @ new[1][a], new[2][a].T @ new[3][:, a].T
    return torch.nn.functional.cosine_similarity(carried, torch.cat([qk.flatten(), vo.flatten()]), dim=0)


def plain_projection(left: Tensor, right: Tensor, x: Tensor, match: Tensor, weight: Tensor, G: tuple) -> Tensor:
    """Blocks written out, then applied."""
    share_o, share_n = match.shape[0] // G[0], match.shape[0] // G[1]
    old = match // max(share_o, 1)
    c = left.view(G[0], -1, left.shape[1])[old] @ right.view(G[1], -1, right.shape[1]).repeat_interleave(share_n, 0).mT
    y = c.mT @ x.view(G[0], -1, x.shape[1])[old] * weight[:, None, None].to(x)
    return y.view(G[1], share_n, -1, x.shape[1]).sum(1).flatten(0, 1)


def published_projection(left: Tensor, right: Tensor, x: Tensor, rank: int) -> Tensor:
    """The full singular value decomposition of one dense (d, d) update."""
    dense = right.T.float()[:, : x.shape[0]] @ x.float()[: right.shape[0], :rank]
    return torch.linalg.svd(dense @ left.float()[:rank])[1]


def cases(shapes: Shapes, dtype: torch.dtype, device: str) -> list[Case]:
    """Fresh random inputs on the device, and the ways to compute on them."""
    generator = torch.Generator(device).manual_seed(torch.seed() % 2**31)

    def random(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * size[-1] ** -0.5).to(dtype)

    features = random(shapes.m, 64).float() * 8
    x, y = (
        (torch.randn(shapes.layers, shapes.m, shapes.d, generator=generator, device=device)).add_(
            features @ torch.randn(64, shapes.d, generator=generator, device=device)
        )
        for _ in range(2)
    )
    x, y = x.to(dtype), y.to(dtype)
    gx, gy = gram(x), gram(y)
    full = [full_grams(side) for side in (x, y)]
    (H_o, H_n), (G_o, G_n), h, d = shapes.heads, shapes.kv_heads, shapes.size, shapes.d
    old = [random(H_o * h, d), random(G_o * h, d), random(G_o * h, d), random(d, H_o * h)]
    new = [random(H_n * h, d), random(G_n * h, d), random(G_n * h, d), random(d, H_n * h)]
    W_h = random(d, d)
    match = torch.randperm(H_n, generator=generator, device=device) % H_o
    weight = torch.full((H_n,), G_n / H_n, device=device)
    factor = random(G_o * h, shapes.ranks)
    e_o, e_n = (random(rows, d) for rows in shapes.vocabularies)
    idx_o, idx_n = (torch.randperm(rows, device=device)[: shapes.shared] for rows in shapes.vocabularies)
    head_shape = {"heads": shapes.heads, "kv_heads": shapes.kv_heads}
    projection = {"blocks": shapes.kv_heads, "old_share": H_o // G_o}

    def doubles(weights: list[Tensor]) -> list[Tensor]:
        return [w.double() for w in weights]

    def one_published_layer() -> Tensor:
        k, l = x[0] @ x[0].T, y[0] @ y[0].T
        return torch.trace(k @ l) + torch.trace(k @ k) + torch.trace(l @ l)

    return [
        Case(
            "gram",
            lambda: gram(x).totals,
            lambda: (x - x.mean(1, keepdim=True)) @ (x - x.mean(1, keepdim=True)).mT,
            lambda: -(x.double() - x.double().mean(1, keepdim=True)).square().sum((1, 2)),
        ),
        Case(
            "hsic",
            lambda: hsic(gx, gy),
            lambda: hsic_of(*full),
            lambda: torch.cat([plain_hsic(layer[None].double(), y.double()) for layer in x]),
            one_published_layer,
            shapes.layers**2,
        ),
        Case(
            "cka",
            lambda: cka(x, y),
            lambda: plain_cka(x, y),
            lambda: plain_cka(x.double(), y.double()),
            one_published_layer,
            shapes.layers**2,
        ),
        Case(
            "head_similarity",
            lambda: head_similarity(*old, *new, **head_shape),
            lambda: plain_heads(old, new, shapes.heads, shapes.kv_heads),
            lambda: plain_heads(doubles(old), doubles(new), shapes.heads, shapes.kv_heads),
            lambda: published_pair(old, new, h, W_h),
            H_o * H_n,
        ),
        Case(
            "project_heads",
            lambda: project_heads(old[1], new[1], factor, match, weight, **projection),
            lambda: plain_projection(old[1], new[1], factor, match, weight, shapes.kv_heads),
            lambda: plain_projection(*doubles([old[1], new[1], factor]), match, weight.double(), shapes.kv_heads),
            lambda: published_projection(old[1], new[1], factor, min(16, shapes.ranks)),
            1.0,
        ),
        Case(
            "shared_gram",
            lambda: shared_gram(e_o, e_n, idx_o, idx_n, both=True).on,
            lambda: [a.T @ b for a, b in _pairs(e_o[idx_o], e_n[idx_n])][1],
            lambda: e_o[idx_o].double().T @ e_n[idx_n].double(),
        ),
    ]


def _pairs(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(a, a), (a, b), (b, b)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes; prints and writes no report")
    parser.add_argument("--cpu", action="store_true", help="run the twins on the CPU: checks this script only")
    arguments = parser.parse_args()
    if not (arguments.cpu or torch.cuda.is_available()):
        sys.exit("no GPU is present; --cpu --quick runs this script through the PyTorch twins")
    device = "cpu" if arguments.cpu else "cuda"
    shapes = QUICK if arguments.quick else Shapes()
    started = time.perf_counter()
    predicted = {row.name: row.kernel.seconds for row in roofline.rows()}
    lines = [
        "| operation | dtype | kernel µs | vectorised µs | times faster | published (scaled) µs | predicted µs "
        "| error | plain error | kernel peak MiB | vectorised peak MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for dtype in (torch.bfloat16, torch.float32):
        for case in cases(shapes, dtype, device):
            with backend("torch" if arguments.cpu else "triton"):
                taken, memory = seconds(case.kernel, device), peak_bytes(case.kernel, device)
                result = case.kernel().double()
            plain, plain_memory = seconds(case.vectorised, device), peak_bytes(case.vectorised, device)
            published = f"{case.scale * seconds(case.published, device, 1.0) * 1e6:,.0f}" if case.published else ""
            exact = case.exact()
            scale = float(exact.abs().max())
            error = float((result - exact).abs().max()) / scale
            vectorised = case.vectorised().double()
            same = vectorised.shape == exact.shape
            plain_error = f"{float((vectorised - exact).abs().max()) / scale:.1e}" if same else ""
            known = f"{predicted[case.name] * 1e6:,.0f}" if dtype == torch.bfloat16 and case.name in predicted else ""
            lines.append(
                f"| {case.name} | {str(dtype).removeprefix('torch.')} | {taken * 1e6:,.1f} | {plain * 1e6:,.1f} "
                f"| {plain / taken:.2f} | {published} | {known} | {error:.1e} | {plain_error} "
                f"| {memory / 2**20:,.0f} | {plain_memory / 2**20:,.0f} |"
            )
            print(lines[-1], flush=True)
    name = "CPU, twins" if arguments.cpu else torch.cuda.get_device_name()
    text = (
        f"# Kernels on a GPU\n\nMeasured with `python bench/gpu.py` on {name}, torch {torch.__version__}, in "
        f"{time.perf_counter() - started:.0f} s. float32 at precision `{torch.get_float32_matmul_precision()}`. Errors "
        "are the largest against float64, relative to the largest element. Predictions are bench/roofline.py's, for an "
        "H100 (project_heads: all four projections there, k alone here).\n\n" + "\n".join(lines) + "\n"
    )
    if arguments.quick:
        print(text)
    else:
        REPORT.write_text(text)


if __name__ == "__main__":
    main()
