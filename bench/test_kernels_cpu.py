"""The kernels' twins on the CPU beside other ways to compute the same from the same tensors: time and peak memory.

    pip install --no-deps --target .cache/peers pytorch-cka==1.1.3 torch-cka==0.21
    pytest bench/test_kernels_cpu.py                        # writes bench/reports/kernels_cpu.md
    pytest bench/test_kernels_cpu.py --benchmark-disable    # small shapes, once each: checks that all agree

CKA of 52 and 40 layers against the two packages; head similarity and projection, at the shapes of MiniCPM-S-1B ->
MiniCPM-2B, against vectorised PyTorch and the published formulation. What would take minutes is timed on a part and
scaled. Peak memory is that of a process that does nothing else. PEERS names another folder of the two packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from attention import operations
from gpu_plain import heads as plain_heads
from gpu_plain import projection as plain_projection
from gpu_plain import published_pair
from measure import MINICPM_2B, MINICPM_S_1B, machine, product_rate, write_report
from torch import Tensor

from lorasuite_fast.io.phases import release_memory
from lorasuite_fast.models.families import Shape
from lorasuite_kernels import balance, cka, head_similarity, project_heads

PEERS = Path(os.environ.get("PEERS", Path(__file__).parent.parent / ".cache" / "peers"))
THREADS = 2


@dataclass(frozen=True)
class Case:
    """Sizes of one run."""

    layers: tuple[int, int]
    m: int
    d: tuple[int, int]
    old: Shape
    new: Shape
    rank: int


FULL = Case((52, 40), 512, (1536, 2304), MINICPM_S_1B, MINICPM_2B, 32)
SMALL = Case((6, 5), 96, (64, 80), Shape(9, 64, 8, 6, 2, 9, 1), Shape(9, 80, 8, 9, 9, 9, 1), 4)


@dataclass(frozen=True)
class Method:
    """One way to compute an operation, or a part of it whose time counts `scale` times."""

    name: str
    run: Callable[[], Tensor]
    part: Callable[[Tensor], Tensor] = lambda whole: whole
    """The part of the whole result that `run` returns."""
    scale: int = 1
    rounds: int = 5


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * size[-1] ** -0.5


class Replay(torch.nn.Module):
    """A model whose layers put out given tensors, for a package that reads them through hooks."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in features)

    def forward(self, _: Tensor) -> Tensor:
        for layer, feature in zip(self.layers, self.features, strict=True):
            layer(feature)
        return self.features[-1]


def torch_cka(x: Tensor, y: Tensor) -> Tensor:
    from torch_cka import CKA

    names = [[f"layers.{i}" for i in range(len(side))] for side in (x, y)]
    compared = CKA(Replay(x), Replay(y), "x", "y", *names)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1, 1)))
    compared.compare(loader, loader)
    return compared.export()["CKA"]


def pytorch_cka(x: Tensor, y: Tensor) -> Tensor:
    from cka import cka_from_features

    return cka_from_features(x, y)


def layer_methods(case: Case) -> list[Method]:
    """CKA of all pairs of layers, from hidden states that share some features: neither 0 nor 1."""
    shared = normal(case.m, 32, seed=0)
    x, y = (
        normal(count, case.m, d, seed=d).mul_(d**0.5).add_(shared @ normal(32, d, seed=1), alpha=d**0.5)
        for count, d in zip(case.layers, case.d, strict=True)
    )
    return [
        Method("cka", lambda: cka(x, y), rounds=9),
        Method("pytorch-cka 1.1.3", lambda: pytorch_cka(x, y), rounds=9),
        # It forms an old layer's Gram matrix once and goes through all the new ones.
        Method("torch-cka 0.21, 1 old layer", lambda: torch_cka(x[:1], y), lambda s: s[:1], len(x), rounds=3),
    ]


def attention_weights(shape: Shape, seed: int) -> list[Tensor]:
    H, G, h, d = shape.H, shape.G, shape.h, shape.d
    sizes = ((H * h, d), (G * h, d), (G * h, d), (d, H * h))
    return [normal(*size, seed=seed + i) for i, size in enumerate(sizes)]


def head_methods(case: Case) -> list[Method]:
    """Similarity of all pairs of heads of one layer, the old weights carried to the new width first."""
    heads, kv_heads = (case.old.H, case.new.H), (case.old.G, case.new.G)
    old, new = attention_weights(case.old, 0), attention_weights(case.new, 10)
    W_h = normal(case.old.d, case.new.d, seed=20)

    def carried() -> list[Tensor]:
        q, k, v, o = old
        return [q @ W_h, k @ W_h, v @ W_h, W_h.T @ o]

    return [
        Method("head_similarity", lambda: head_similarity(*carried(), *new, heads=heads, kv_heads=kv_heads)),
        Method("vectorised PyTorch", lambda: plain_heads(carried(), new, heads, kv_heads), rounds=3),
        Method(
            "published, 1 pair of heads",
            lambda: published_pair(old, new, case.old.h, W_h)[None, None],
            lambda s: s[:1, :1],
            heads[0] * heads[1],
        ),
    ]


@dataclass(frozen=True)
class Projection:
    """One adapter's factors for q, and what carries B: left = W_o W_h and right = W_n. Every old head is used."""

    left: Tensor
    right: Tensor
    b: Tensor
    a: Tensor
    match: Tensor
    weight: Tensor
    blocks: tuple[int, int]

    @classmethod
    def of(cls, case: Case) -> Projection:
        old, new = case.old, case.new
        left, right = normal(old.H * old.h, new.d, seed=0), normal(new.H * new.h, new.d, seed=1)
        b, a = normal(old.H * old.h, case.rank, seed=2), normal(case.rank, new.d, seed=3)
        return cls(left, right, b, a, torch.arange(new.H) % old.H, torch.ones(new.H), (old.H, new.H))

    def kernel(self) -> Tensor:
        return project_heads(self.left, self.right, self.b, self.match, self.weight, blocks=self.blocks)

    def vectorised(self) -> Tensor:
        return plain_projection(self.left, self.right, self.b, self.match, self.weight, self.blocks)

    def balanced(self) -> Tensor:
        b, a, _ = balance(self.kernel(), self.a)
        return b[:1] @ a

    def published(self) -> Tensor:
        """The dense update head by head, its full singular value decomposition, r singular values kept."""
        rank = self.a.shape[0]
        dense = self.b @ self.a
        update = torch.empty(self.right.shape[0], self.right.shape[1])
        (H_o, H_n), old = self.blocks, self.match.tolist()
        lefts, updates = self.left.chunk(H_o), dense.chunk(H_o)
        for head, (out, right) in enumerate(zip(update.chunk(H_n), self.right.chunk(H_n), strict=True)):
            torch.mm((lefts[old[head]] @ right.T).T, updates[old[head]], out=out)
        u, sigma, v = torch.linalg.svd(update)
        root = sigma[:rank].sqrt()
        b, a = u[:, :rank] * root, root[:, None] * v[:rank]
        return b[:1] @ a


def projection_methods(case: Case) -> list[Method]:
    """B of one projection carried through the matched heads."""
    q = Projection.of(case)
    return [
        Method("project_heads", q.kernel, rounds=25),
        Method("vectorised PyTorch", q.vectorised, rounds=25),
    ]


def factor_methods(case: Case) -> list[Method]:
    """Both factors of one projection, as a singular value decomposition of the update gives them."""
    q = Projection.of(case)
    return [
        Method("project_heads, balance", q.balanced, rounds=25),
        Method("published: dense update, full SVD", q.published, rounds=1),
    ]


OPERATIONS: dict[str, Callable[[Case], list[Method]]] = {
    "CKA of all pairs of layers": layer_methods,
    "Similarity of all pairs of heads": head_methods,
    "Projection of B": projection_methods,
    "Projection to balanced factors": factor_methods,
}
METHODS = [(operation, i) for operation, build in OPERATIONS.items() for i in range(len(build(SMALL)))]


@dataclass
class Measured:
    """One method's row of the report."""

    name: str
    seconds: float
    peak: float
    """MiB beyond the inputs."""
    difference: float
    """Largest difference from the first method of the operation."""
    scale: int


PRODUCTS = ((FULL.m, FULL.d[0], FULL.m), (FULL.m, FULL.d[1], FULL.m), (FULL.new.d,) * 3)
"""One layer's Gram matrix on each side, and a large product."""


@dataclass
class Run:
    """What one run measured: rows by operation, and torch.mm's best FLOP/s at the shapes of PRODUCTS."""

    rates: list[float] = field(default_factory=lambda: [0.0] * len(PRODUCTS))
    rows: dict[str, list[Measured]] = field(default_factory=dict)

    def measure_rates(self) -> None:
        """Once more: other processes may disturb a single measurement."""
        self.rates = [max(rate, product_rate(*shape)) for rate, shape in zip(self.rates, PRODUCTS, strict=True)]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Collects the rows; writes the report once all methods are measured at full size."""
    torch.set_num_threads(THREADS)
    measured = Run()
    yield measured
    if sum(map(len, measured.rows.values())) == len(METHODS):
        write_report("kernels_cpu", report(measured))


@pytest.fixture(scope="module")
def methods(request: pytest.FixtureRequest, run: Run) -> list[Method]:
    if request.config.getoption("benchmark_disable"):
        return OPERATIONS[request.param](SMALL)
    run.measure_rates()
    return OPERATIONS[request.param](FULL)


@pytest.mark.parametrize(("methods", "index"), METHODS, indirect=["methods"])
def test_all_ways_agree(
    benchmark: pytest.FixtureRequest, request: pytest.FixtureRequest, run: Run, methods: list[Method], index: int
) -> None:
    operation, method = request.node.callspec.params["methods"], methods[index]
    need_peers(method)
    result = benchmark.pedantic(method.run, rounds=method.rounds, warmup_rounds=method.rounds > 1)
    difference = float((result - method.part(methods[0].run())).abs().max())
    assert difference < 1e-4
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median * method.scale
        row = Measured(method.name, seconds, peak_in_own_process(operation, index), difference, method.scale)
        run.rows.setdefault(operation, []).append(row)
        benchmark.extra_info.update(peak_mib=row.peak, scale=method.scale)


def need_peers(method: Method) -> None:
    if "-cka" in method.name:
        if str(PEERS) not in sys.path:
            sys.path.insert(0, str(PEERS))
        pytest.importorskip("cka", reason=f"pytorch-cka and torch-cka are not in {PEERS}")
        pytest.importorskip("torch_cka", reason=f"pytorch-cka and torch-cka are not in {PEERS}")


def peak_in_own_process(operation: str, index: int) -> float:
    """MiB of resident memory a method takes at its peak, beyond its inputs, in a fresh process."""
    command = [sys.executable, __file__, operation, str(index)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(operation: str, index: int) -> None:
    sys.path.insert(0, str(PEERS))
    torch.set_num_threads(THREADS)
    # Imports and a library's own buffers are no part of the method's peak.
    OPERATIONS[operation](SMALL)[index].run()
    method = OPERATIONS[operation](FULL)[index]
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    method.run()
    print(json.dumps(max(0.0, resident("VmHWM") - before)))


def resident(name: str) -> float:
    """MiB, one line of the process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def report(run: Run) -> str:
    lines = [
        "# The kernels' twins on the CPU",
        "",
        f"`pytest bench/test_kernels_cpu.py`, {machine()}, float32, random data; medians. All methods of a table get "
        "the same tensors; the difference is the largest from the first one's result. What was timed on a part counts "
        "as often as it occurs. Peak memory is resident memory beyond the inputs, each method in a process of its own; "
        "of a method timed on a part, that of the part.",
    ]
    for operation, rows in run.rows.items():
        lines += [
            "",
            f"## {operation}",
            "",
            "| method | seconds | times the first | peak memory | difference |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in rows:
            name = row.name + (f", × {row.scale:,}" if row.scale > 1 else "")
            times = row.seconds / rows[0].seconds
            lines.append(f"| {name} | {row.seconds:.3f} | {times:,.1f} | {row.peak:,.0f} MiB | {row.difference:.0e} |")
        lines += ["", NOTES[operation](rows, run)]
    return "\n".join(lines) + "\n"


def layer_note(rows: list[Measured], run: Run) -> str:
    (L_x, L_y), m, d = FULL.layers, FULL.m, FULL.d
    ours, package, other = (row.seconds for row in rows)
    products = sum(
        2 * count * m * m * width / rate for count, width, rate in zip((L_x, L_y), d, run.rates[:2], strict=True)
    )
    return (
        f"{L_x} × {L_y} layers, m {m}, d {d[0]} and {d[1]}. At torch.mm's best rate for one layer "
        f"({run.rates[0] / 1e9:.0f} and {run.rates[1] / 1e9:.0f} GFLOP/s) the full Gram matrices alone take "
        f"{products:.3f} s, {products / package:.0%} of pytorch-cka's time. Their triangles take half of "
        f"that, {products / 2:.3f} s, {products / 2 / ours:.0%} of ours: with nothing else to do, an exact method "
        f"would be {package / (products / 2):.2f} times as fast as pytorch-cka. "
        "Wanted: 2 times as fast as pytorch-cka, 50 times as fast as torch-cka. "
        f"Reached: {package / ours:.2f} and {other / ours:.0f}."
    )


def head_note(rows: list[Measured], run: Run) -> str:
    flop = operations(FULL.old, FULL.new)
    share = flop / rows[0].seconds / run.rates[2]
    return (
        f"{shapes()}. Carrying the old weights is included. {flop / 1e9:.1f} GFLOP, at {share:.0%} of torch.mm's best "
        f"rate ({FULL.new.d} cubed, {run.rates[2] / 1e9:.0f} GFLOP/s). The published formulation carries a d × d "
        "matrix per pair of heads. Wanted, of the whole layer with its projections (bench/attention.py): 65 %, and 700 "
        "times as fast as published."
    )


def projection_note(rows: list[Measured], run: Run) -> str:
    old, new = FULL.old, FULL.new
    flop = 2 * new.H * old.h * new.h * (new.d + FULL.rank)
    share = flop / rows[0].seconds / run.rates[2]
    return f"q, rank {FULL.rank}, {shapes()}. {flop / 1e9:.2f} GFLOP, at {share:.0%} of torch.mm's best rate."


def factor_note(rows: list[Measured], run: Run) -> str:
    return (
        f"q, rank {FULL.rank}, {shapes()}; compared by the first row of their product. The published code assembles "
        f"the {FULL.new.d} × {FULL.new.d} update and decomposes it."
    )


def shapes() -> str:
    old, new = FULL.old, FULL.new
    return f"{old.H} heads / {old.G} kv -> {new.H} / {new.G}, h {old.h}, d {old.d} -> {new.d}"


NOTES = dict(zip(OPERATIONS, (layer_note, head_note, projection_note, factor_note), strict=True))


if __name__ == "__main__":
    print_peak(sys.argv[1], int(sys.argv[2]))
