"""One attention layer pair, MiniCPM-S-1B -> MiniCPM-2B shaped: similarity, mapping and projection of q, k, v, o.

Random float32 weights in memory-mapped files. Compared, in one run, with the machine's own torch.mm rate on the
operations the layer needs, and with the published algorithm (one d x d interaction matrix per head, a cosine per pair
of heads, a dense update and a full SVD per projection), which is timed on a few head pairs and scaled.

    python bench/attention.py
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from measure import MINICPM_2B, MINICPM_S_1B, machine, median_seconds, product_rate, random_checkpoint, write_report
from torch import Tensor

from lorasuite_fast.adapters.factors import Factors, balanced
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.families import ATTENTION, Shape
from lorasuite_fast.models.loader import Layer
from lorasuite_fast.transfer.projection import METHODS, Pair, PlannedLayer

RANK, PAIRS_TIMED, REPEATS = 32, 4, 5
OLD, NEW = replace(MINICPM_S_1B, V=600, L=1), replace(MINICPM_2B, V=600, L=1)


def operations(old: Shape, new: Shape) -> float:
    """FLOP of the exact form: carrying the old weights, the products of all pairs of heads, and the norms."""
    rows_o, rows_n = 2 * (old.H + old.G) * old.h, 2 * (new.H + new.G) * new.h
    carry = 2 * rows_o * old.d * new.d
    products = 2 * 2 * (old.H * old.h * new.H * new.h + old.G * old.h * new.G * new.h) * new.d
    norms = 2 * new.d * (rows_o * old.h + rows_n * new.h)
    return carry + products + norms


def published_operations(old: Shape, new: Shape) -> float:
    """FLOP of the published algorithm's interaction matrices, both products of both sides for every pair of heads."""
    carried = 2 * old.d * old.d * old.h + 2 * new.d * old.d * old.d + 2 * new.d * old.d * new.d
    return old.H * new.H * 2 * (carried + 2 * new.d * new.d * new.h)


def published(weights_o: list[Tensor], weights_n: list[Tensor], W_h: Tensor) -> float:
    """Seconds the published algorithm needs for the layer, from a few pairs of heads and one projection."""
    q_o, k_o, v_o, o_o = weights_o
    q_n, k_n, v_n, o_n = weights_n

    def one_pair() -> Tensor:
        a = slice(0, OLD.h)
        b = slice(0, NEW.h)
        qk = (W_h.T @ (q_o[a].T @ k_o[a]) @ W_h).flatten()
        vo = (W_h.T @ (v_o[a].T @ o_o[:, a].T) @ W_h).flatten()
        old = torch.cat([qk, vo])
        new = torch.cat([(q_n[b].T @ k_n[b]).flatten(), (v_n[b].T @ o_n[:, b].T).flatten()])
        return torch.nn.functional.cosine_similarity(old, new, dim=0)

    pair = median_seconds(one_pair, repeats=PAIRS_TIMED)
    dense = torch.randn(NEW.d, RANK) @ torch.randn(RANK, NEW.d)
    svd = median_seconds(lambda: torch.linalg.svd(dense), repeats=1, warm_up=0)
    return OLD.H * NEW.H * pair + len(ATTENTION) * svd


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    lines = [
        "# One attention layer pair",
        "",
        f"`python bench/attention.py`, {machine()}, float32, random weights, medians of {REPEATS}.",
        f"d {OLD.d} -> {NEW.d}, {OLD.H} heads / {OLD.G} kv -> {NEW.H} heads / {NEW.G} kv, h {OLD.h}, rank {RANK}.",
        "",
        "| what | seconds | GFLOP/s | share of torch.mm | published / this |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as root:
        old = Checkpoint(random_checkpoint(Path(root) / "old", OLD, torch.float32, "o", 300))
        new = Checkpoint(random_checkpoint(Path(root) / "new", NEW, torch.float32, "n", 300))
        W_h = torch.randn(OLD.d, NEW.d) * OLD.d**-0.5
        S = torch.linalg.pinv(W_h)
        pair = Pair(Layer.of(old, 0), Layer.of(new, 0), W_h, S)
        factors = {
            role: Factors(torch.randn(OLD.expected(role)[0], RANK), torch.randn(RANK, OLD.expected(role)[1]))
            for role in ATTENTION
        }
        flop = operations(OLD, NEW)
        rate = product_rate(NEW.d, NEW.d, NEW.d)
        slow = published(pair.weights(pair.old, ATTENTION), pair.weights(pair.new, ATTENTION), W_h)
        lines.append(f"| torch.mm, {NEW.d} cubed | – | {rate / 1e9:.1f} | 100 % | – |")
        for name, method in METHODS.items():

            def whole_layer(method: object = method) -> list[Tensor]:
                tensors = METHODS[method.name].build(pair, ATTENTION)  # type: ignore[attr-defined]
                layer = PlannedLayer(0, 0, tensors, W_h, S, OLD, NEW, lambda: (old, new))
                return [
                    balanced(METHODS[method.name].project(layer, role, factors[role]))[1]  # type: ignore[attr-defined]
                    for role in ATTENTION
                ]

            seconds = median_seconds(whole_layer, repeats=REPEATS)
            share = flop / seconds / rate
            lines.append(
                f"| {name} | {seconds:.3f} | {flop / seconds / 1e9:.1f} | {share:.0%} | {slow / seconds:,.0f} |"
            )
    lines += [
        "",
        f"The layer needs {flop / 1e9:.1f} GFLOP in this form, the published algorithm",
        f"{published_operations(OLD, NEW) / flop:,.0f} times as many. The latter takes {slow:,.0f} s, scaled from the",
        f"median of {PAIRS_TIMED} of its {OLD.H * NEW.H} head pairs and one of its {len(ATTENTION)} full SVDs.",
        "Targets: at least 65 % of torch.mm, at least 700 times the published algorithm.",
        "",
    ]
    write_report("attention", "\n".join(lines))


if __name__ == "__main__":
    main()
