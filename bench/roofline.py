"""Predicts each kernel's time on an H100 from its operations and bytes, beside two ways to do the same in PyTorch.

    python bench/roofline.py    # writes bench/reports/roofline.md

Nothing here is measured: time is the largest of operations / 798 TFLOP/s, bytes of memory / 3.0 TB/s, bytes requested
of the L2 cache / 6 TB/s, and what it takes to start the kernels: 5 µs a PyTorch operation, 20 µs a Triton kernel. The
first two rates were measured elsewhere on an H100 with bfloat16 products and plain copies. Shapes are those of
Llama-2-7B -> Llama-3-8B.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels" / "torch-ext"))

from lorasuite_kernels.configs import PACKED_TILE, SUMMED_ROWS, TABLES, Config  # noqa: E402

REPORT = ROOT / "bench" / "reports" / "roofline.md"
FLOPS, BYTES, CACHE_BYTES = 798e12, 3.0e12, 6.0e12
PYTORCH_START, TRITON_START = 5e-6, 20e-6
HALF, SINGLE, DOUBLE = 2, 4, 8

L, M, D, H_O, H_N, G_O, G_N, SIZE = 32, 512, 4096, 32, 32, 32, 8, 128
SHARED = 30_000
"""Tokens the two vocabularies (32,000 and 128,256) share; assumed."""
MULTIPROCESSORS = 132
"""Programs of a large tile that run at a time; what a wave of them shares comes from memory once."""


@dataclass(frozen=True)
class Cost:
    """Operations (a multiply-add is two) and bytes of global memory traffic."""

    flop: float
    bytes: float

    @property
    def seconds(self) -> float:
        return max(self.flop / FLOPS, self.bytes / BYTES)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flop + other.flop, self.bytes + other.bytes)


@dataclass(frozen=True)
class Row:
    """One operation: what must be done, what the kernel does, what PyTorch does vectorised and as published."""

    name: str
    least: Cost
    kernel: Cost
    vectorised: Cost
    published: Cost
    requested: float
    """Bytes the kernel's programs load and store, most of which the L2 cache serves."""
    starts: tuple[int, int]
    """PyTorch operations and Triton kernels the kernel's form starts."""
    starts_vectorised: int
    """PyTorch operations the vectorised form starts."""
    note: str

    @property
    def predicted(self) -> float:
        """Seconds of the kernel's form: starting its kernels overlaps with their work."""
        starting = self.starts[0] * PYTORCH_START + self.starts[1] * TRITON_START
        return max(self.kernel.seconds, self.requested / CACHE_BYTES, starting)

    @property
    def predicted_vectorised(self) -> float:
        return max(self.vectorised.seconds, self.starts_vectorised * PYTORCH_START)


def config(kernel: str, size: int = 1) -> Config:
    """The configuration an H100 would take in bfloat16."""
    entries = TABLES[kernel]["sm_90"]["half"]
    return next((entry for entry in entries if entry.up_to is None or size <= entry.up_to), entries[-1])


def product(rows: float, inner: float, columns: float, out: int = HALF) -> Cost:
    """A matrix product of bfloat16 operands, each read once, written once."""
    return Cost(2 * rows * inner * columns, HALF * inner * (rows + columns) + out * rows * columns)


def times(count: float, cost: Cost) -> Cost:
    return Cost(count * cost.flop, count * cost.bytes)


def gram() -> Row:
    layers, half = 2 * L, M * (M + 1) / 2
    blocks = math.ceil(M / PACKED_TILE)
    tiles = blocks * (blocks + 1) / 2
    read = HALF * layers * M * D
    written = layers * (tiles * PACKED_TILE**2 * HALF + 2 * blocks * M * SINGLE)
    # Once for the means, once for the tiles: a layer (4 MB) stays in the L2 cache while its tiles run.
    kernel = Cost(2 * layers * tiles * PACKED_TILE**2 * D, 2 * read + written)
    requested = read + layers * tiles * 2 * PACKED_TILE * D * HALF + written
    vectorised = times(layers, product(M, D, M)) + Cost(0, 3 * read + 4 * layers * M * M * HALF)
    return Row(
        "gram",
        Cost(2 * layers * half * D, read + HALF * layers * half),
        kernel,
        vectorised,
        times(L + L * L, product(M, D, M)) + Cost(0, 2 * (L + L * L) * M * M * HALF),
        requested,
        (3, 1),
        4,
        f"64 layers, m {M}, d {D}; the kernel reads x once more for the means; as published (torch-cka), a new layer's "
        "matrix is formed again for every old layer",
    )


def hsic() -> Row:
    blocks = math.ceil(M / PACKED_TILE)
    entries = blocks * (blocks + 1) / 2 * PACKED_TILE**2
    sizes = config("hsic").blocks
    splits = 264
    reads = entries * (L * math.ceil(L / sizes["BLOCK_Y"]) + L * math.ceil(L / sizes["BLOCK_X"])) * HALF
    padded = sizes["BLOCK_X"] * sizes["BLOCK_Y"]
    one = times(3, product(M, M, M))
    return Row(
        "hsic",
        Cost(L * L * M * M, 2 * L * M * M / 2 * HALF),
        Cost(2 * padded * entries, 2 * L * entries * HALF + 2 * splits * (L * L + 2 * L) * SINGLE),
        product(L, M * M, L) + Cost(8 * L * M * M, 6 * 2 * L * M * M * HALF),
        times(L * L, one),
        reads + 2 * splits * (L * L + 2 * L) * SINGLE,
        (1, 2),
        18,
        f"{L} × {L} pairs of layers; vectorised: flattened full matrices and passes for diagonal, sums and squares",
    )


def cka() -> Row:
    grams, pairs = gram(), hsic()
    published = grams.published + pairs.published
    return Row(
        "cka",
        grams.least + pairs.least,
        grams.kernel + pairs.kernel,
        grams.vectorised + pairs.vectorised,
        published,
        grams.requested + pairs.requested,
        (2, 5),
        40,
        f"{L} and {L} layers; both of the above",
    )


def heads() -> Row:
    rows_o, rows_n = (2 * H_O + 2 * G_O) * SIZE, (2 * H_N + 2 * G_N) * SIZE
    weights = HALF * D * (rows_o + rows_n)
    pairs = 2 * (H_O * H_N + G_O * G_N) * SIZE**2
    norms = 2 * (H_O + G_O + H_N + G_N) * SIZE**2
    flop = 2 * D * (pairs + norms)
    sizes = config("heads", SIZE).blocks
    tile_loads = (sizes["BLOCK_O"] + sizes["BLOCK_N"]) * D * HALF
    products = 2 * (G_O * G_N * (1 + (H_O // G_O) * (H_N // G_N)) + (G_O + G_N) + (H_O + H_N))
    # Products of all pairs: the new side again for each wave of group pairs; then both sides once more for the norms.
    waves = math.ceil(G_O * G_N / MULTIPROCESSORS)
    kernel = Cost(2 * D * products * sizes["BLOCK_O"] * sizes["BLOCK_N"], 2 * weights + (waves - 1) * HALF * D * rows_n)
    full = 2 * H_O * SIZE * H_N * SIZE
    vectorised = Cost(
        2 * D * (2 * full + norms), weights + 2 * G_N * (H_N // G_N - 1) * SIZE * D * HALF + 5 * full * HALF
    )
    # Two d × d interaction matrices a head, the old ones carried by two d × d × d products each, per pair of heads.
    one = Cost(2 * (2 * SIZE * D * D) * 2 + 4 * 2 * D**3, 12 * D * D * HALF)
    return Row(
        "head_similarity",
        Cost(flop, weights),
        kernel,
        vectorised,
        times(H_O * H_N, one),
        products * tile_loads,
        (20, 6),
        20,
        f"H {H_O} and {H_N}, G {G_O} and {G_N}, h {SIZE}, one layer pair; vectorised repeats key/value heads and "
        "writes the products",
    )


def shared_gram() -> Row:
    sizes = config("shared_gram").blocks
    tile = sizes["TILE"]
    blocks = math.ceil(D / tile)
    tiles = blocks * (blocks + 1) + blocks * blocks  # two upper triangles and a full square
    tables = 2 * SHARED * D * HALF
    sums = 3 * D * D * DOUBLE
    launches = math.ceil(SHARED / SUMMED_ROWS)
    totals = launches * tiles * 2 * tile * tile * DOUBLE
    # A wave covers a few rows of tiles: it reads all of the right-hand rows, and little of the left.
    waves = math.ceil(blocks * blocks / MULTIPROCESSORS) + 2 * math.ceil(blocks * (blocks + 1) / 2 / MULTIPROCESSORS)
    kernel = Cost(2 * tiles * tile * tile * SHARED, (waves + 3) * SHARED * D * HALF + totals)
    gathered = Cost(0, 2 * tables)
    return Row(
        "shared_gram",
        Cost(2 * SHARED * (D * (D + 1) + D * D), tables + sums),
        kernel,
        times(3, product(D, SHARED, D, SINGLE)) + gathered,
        Cost(4 * SHARED * D * D + 8 * D**3 + 2 * SHARED * D * D, 6 * SHARED * D * SINGLE),
        tiles * 2 * tile * SHARED * HALF + totals,
        (20, 3 * launches),
        5 * launches,
        f"runs in PyTorch on NVIDIA; {SHARED:,} shared tokens, d {D} twice, both directions; as published, a dense "
        "float32 pseudo-inverse of E_o, one direction (its operations counted at the bfloat16 rate, which flatters it)",
    )


def table(rows: list[Row]) -> str:
    def cell(cost: Cost, predicted: float) -> str:
        bound = "operations" if cost.flop / FLOPS > cost.bytes / BYTES else "bytes"
        bound = bound if predicted == cost.seconds else "cache or starts"
        return f"{cost.flop / 1e9:,.1f} | {cost.bytes / 1e6:,.1f} | {predicted * 1e6:,.1f} ({bound})"

    lines = [
        "| operation | way | GFLOP | MB of memory | predicted µs (bound by) | MB requested |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        ways = ("must be done", row.least), ("this kernel", row.kernel)
        ways += ("PyTorch, vectorised", row.vectorised), ("PyTorch, as published", row.published)
        predicted = {"this kernel": row.predicted, "PyTorch, vectorised": row.predicted_vectorised}
        for name, cost in ways:
            requested = f"{row.requested / 1e6:,.1f}" if name == "this kernel" else ""
            lines.append(f"| {row.name} | {name} | {cell(cost, predicted.get(name, cost.seconds))} | {requested} |")
    return "\n".join(lines)


def rows() -> list[Row]:
    """All operations with a kernel."""
    return [gram(), hsic(), cka(), heads(), shared_gram()]


def main() -> None:
    every = rows()
    notes = "\n".join(f"- {row.name}: {row.note}." for row in every)
    text = f"""# Roofline of the kernels, predicted

**Predicted, not measured**: `python bench/roofline.py` counts operations and bytes; no GPU was used. Shapes of
Llama-2-7B -> Llama-3-8B, bfloat16, on an H100 taken at 798 TFLOP/s, 3.0 TB/s of memory, 6 TB/s of L2 cache, 5 µs to
start a PyTorch operation and 20 µs a Triton kernel; the largest of these terms is the prediction. `bench/gpu.sh`
measures the same where a GPU is present.

"Must be done": each input read once, each result written once, no symmetric half computed twice. "This kernel": the
sm_90 configuration, tiles in full, with data that the programs of one wave share read from memory once; "MB requested"
is what all its programs load and store, most of which the L2 cache (50 MB) has to serve. The PyTorch rows count each
operand and result of each of their products and passes once, and as published leave out the starts.

{table(every)}

{notes}
"""
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
