"""W_h from 50,000 shared tokens, 1536 -> 2304, against `torch.linalg.pinv(E_o) @ E_n`, with accuracy and memory.

python bench/transfer.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from measure import machine, write_report

from lorasuite_fast.io.phases import PhaseClock, anonymous_memory
from lorasuite_fast.transfer.embeddings import normal_equations, solve_normal

TOKENS, D_O, D_N = 50_000, 1536, 2304
REPEATS = 3


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def measured(work: Callable[[], torch.Tensor], repeats: int) -> tuple[torch.Tensor, float, float]:
    """The result, the median seconds, and the peak anonymous memory above what was there before, in MiB."""
    seconds, peaks = [], []
    for _ in range(repeats):
        before, clock = anonymous_memory(), PhaseClock()
        with clock.phase("work", 1):
            result = work()
        seconds.append(clock.phases[0].seconds)
        peaks.append((clock.phases[0].peak_memory - before) / 2**20)
    return result, statistics.median(seconds), max(peaks)


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    lines = [
        "# The transfer matrix W_h",
        "",
        f"`python bench/transfer.py`, {machine()}.",
        f"{TOKENS:,} shared tokens, {D_O} -> {D_N}; Gaussian tables, and",
        "tables whose old singular values span a factor of 100, as those of real models do. Well-conditioned tables",
        "are multiplied in float32 and summed in float64, others multiplied in float64.",
        f"Medians of {REPEATS}; memory above that of the tables.",
        "",
        "| tables | what | seconds | times faster | relative error against float64 | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    base, noise = torch.randn(TOKENS, D_O), torch.randn(TOKENS, D_N)
    ids = torch.arange(TOKENS)
    for dtype, span in ((torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, -2)):
        e_o = (base * torch.logspace(0, span, D_O)).to(dtype)
        e_n = (e_o.float() @ torch.randn(D_O, D_N) * D_O**-0.5 + 0.1 * noise).to(dtype)
        wide_o, wide_n = e_o.double(), e_n.double()
        q, r = torch.linalg.qr(wide_o)
        exact = torch.linalg.solve_triangular(r, q.T @ wide_n, upper=True)
        del q, wide_o, wide_n

        def ours(both: bool = False, e_o: torch.Tensor = e_o, e_n: torch.Tensor = e_n) -> torch.Tensor:
            gram = normal_equations(e_o, e_n, ids, ids, both=both)
            if gram.nn is not None:
                solve_normal(gram.nn, gram.on.T)
            return solve_normal(gram.oo, gram.on)[0].float()

        def published(e_o: torch.Tensor = e_o, e_n: torch.Tensor = e_n) -> torch.Tensor:
            return torch.linalg.pinv(e_o.float()) @ e_n.float()

        name = str(dtype).removeprefix("torch.") + (", spread 100" if span else "")
        found, slow, memory = measured(published, 1)
        lines.append(
            f"| {name} | pinv(E_o) @ E_n | {slow:.1f} | 1 | {relative(found, exact):.1e} | {memory:,.0f} MiB |"
        )
        found, fast, memory = measured(ours, REPEATS)
        error = relative(found, exact)
        lines.append(f"| {name} | W_h here | {fast:.1f} | {slow / fast:.1f} | {error:.1e} | {memory:,.0f} MiB |")
        _, both, memory = measured(lambda ours=ours: ours(both=True), 1)
        lines.append(f"| {name} | W_h and S here | {both:.1f} | {slow / both:.1f} | – | {memory:,.0f} MiB |")
    limit = 4 * D_N**2 * 8 / 2**20
    lines += [
        "",
        "Targets: 3 times faster from float32, 5 times from bfloat16, no less accurate, peak memory of W_h at most",
        f"four float64 matrices of {D_N} squared ({limit:,.0f} MiB) and one chunk.",
        "",
    ]
    write_report("transfer", "\n".join(lines))


if __name__ == "__main__":
    main()
