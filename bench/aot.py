"""Compiles every kernel for every target and configuration it is offered on, without a GPU, and reads the results.

    python bench/aot.py                     # the whole matrix, written to bench/reports/aot.md
    python bench/aot.py --kernels gram      # a part of it, printed

Each batch of compilations runs in a process of its own: what Triton cannot compile may abort the process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels" / "torch-ext"))

from lorasuite_kernels.configs import PACKED_TILE, SPLIT_TARGETS, TABLES, TARGETS, Config  # noqa: E402

REPORT = ROOT / "bench" / "reports" / "aot.md"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
MATRIX_INSTRUCTION = {
    "sm_80": r"\bHMMA\.",
    "sm_90": r"\bHGMMA\.",
    "sm_100": r"\bUTC\w*MMA\b|\bHMMA\.",
    "gfx942": r"\bv_mfma_",
}
WIDE_LOAD = {"cuda": r"\bLDG\.E(?:\.\w+)*\.128|\bLDGSTS\.E(?:\.\w+)*\.128", "hip": r"\b(?:global|buffer)_load_dwordx4"}


@dataclass(frozen=True)
class Kernel:
    """How a kernel is launched: dtypes of its pointers ("io": the tested one), constants, integers of any value."""

    module: str
    function: str
    table: str
    pointers: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)
    """Those it is launched with."""
    tf32: bool = True
    """Whether it may take TF32 for float32 operands."""


_PAIR = dict.fromkeys(("heads_o", "heads_n", "groups_o", "groups_n"), "*io") | {"out": "*fp32"}
_PAIR_ONES = {f"{name}_column_stride": 1 for name in ("heads_o", "heads_n", "groups_o", "groups_n")}
_PAIR_PLAIN = ("count_groups_n", "share_o", "share_n")
_SUMS = {"left": "*io", "right": "*io", "left_index": "*i64", "right_index": "*i64", "total": "*fp64"}
_SUMS_ONES = {"left_column_stride": 1, "right_column_stride": 1}
_HEAD = dict.fromkeys(("x", "weight", "bias"), "*io") | {"passed": "*u8", "scale": "fp32", "cap": "fp32"}
_HEAD_ONES = {"x_column_stride": 1, "weight_column_stride": 1, "BIASED": True, "CAPPED": True}


def _half_gram(dtype: str, **constants: Any) -> Kernel:
    """Layers in half precision whose triangles are stored in float32."""
    pointers = {"x": "*io", "mean": "*fp32", "packed": "*fp32", "row_parts": "*fp32"}
    constants |= {"width_stride": 1, "TILE": PACKED_TILE}
    return Kernel("cka_kernels", "gram_kernel", "gram", pointers, constants, ("first_tile", "blocks"), (dtype,))


KERNELS = {
    "gram": Kernel(
        "cka_kernels",
        "gram_kernel",
        "gram",
        {"x": "*io", "mean": "*fp32", "packed": "*io", "row_parts": "*fp32"},
        {"width_stride": 1, "SCALE": 1.0, "TILE": PACKED_TILE},
        ("first_tile", "blocks"),
        ("bfloat16", "float32"),
    ),
    "gram_float16": _half_gram("float16", SCALE=0.5),
    "gram_mixed": _half_gram("bfloat16", SCALE=1.0),
    "hsic": Kernel(
        "cka_kernels",
        "hsic_kernel",
        "hsic",
        {"packed_x": "*io", "packed_y": "*io", "part_xy": "*fp32", "part_xx": "*fp32", "part_yy": "*fp32"},
        {},
        ("layers_x", "layers_y"),
        # Packed triangles are never float16: entries would overflow.
        ("bfloat16", "float32"),
    ),
    "hsic_finish": Kernel(
        "cka_kernels",
        "hsic_finish_kernel",
        "hsic_finish",
        dict.fromkeys(("part_xy", "part_xx", "part_yy", "rows_x", "rows_y"), "*fp32")
        | dict.fromkeys(("xy", "xx", "yy"), "*fp64"),
        {},
        ("layers_x", "layers_y", "splits", "parts"),
        ("float32",),
        tf32=False,
    ),
    "ratio": Kernel(
        "cka_kernels",
        "ratio_kernel",
        "ratio",
        dict.fromkeys(("xy", "xx", "yy"), "*fp64") | {"out": "*fp32"},
        {},
        (),
        ("float32",),
        tf32=False,
    ),
    "heads": Kernel("heads_kernels", "pair_sums_kernel", "heads", _PAIR, _PAIR_ONES | {"PAIRED": False}, _PAIR_PLAIN),
    "heads_norms": Kernel(
        "heads_kernels", "pair_sums_kernel", "heads", _PAIR, _PAIR_ONES | {"PAIRED": True}, _PAIR_PLAIN
    ),
    "shared_gram": Kernel(
        "shared_gram_kernels", "shared_gram_kernel", "shared_gram", _SUMS, _SUMS_ONES | {"SYMMETRIC": False}
    ),
    "shared_gram_symmetric": Kernel(
        "shared_gram_kernels", "shared_gram_kernel", "shared_gram", _SUMS, _SUMS_ONES | {"SYMMETRIC": True}
    ),
    "target_kl_rest": Kernel(
        "target_kl_kernels",
        "rest_sums_kernel",
        "target_kl",
        _HEAD | dict.fromkeys(("most", "total"), "*fp32"),
        _HEAD_ONES,
        ("count", "vocabulary", "scale", "cap"),
    ),
    "target_kl_gradient": Kernel(
        "target_kl_kernels",
        "gradient_kernel",
        "target_kl",
        _HEAD | dict.fromkeys(("rest", "factor"), "*fp32") | {"out": "*io"},
        _HEAD_ONES,
        ("count", "stop", "scale", "cap"),
    ),
}


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel, a target, a dtype with its precision, and the index of the target's configuration."""

    kernel: str
    target: str
    dtype: str
    precision: str
    index: int


@dataclass
class Result:
    """What came out of one compilation; `error` is set where nothing did."""

    kernel: str
    target: str
    dtype: str
    precision: str
    config: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    matrix_instructions: int = 0
    wide_loads: int = 0
    error: str = ""

    @property
    def problems(self) -> list[str]:
        """What keeps this configuration from being offered."""
        if self.error:
            return [self.error]
        found = []
        if self.spilled_bytes:
            found.append(f"{self.spilled_bytes} bytes spilled")
        if self.shared_bytes > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if self.dtype != "float32" and not self.matrix_instructions:
            found.append("no matrix instruction")
        if not self.wide_loads:
            found.append("no 16-byte global load")
        return found


def jobs(kernels: list[str], targets: list[str]) -> list[Job]:
    """Every configuration of these kernels offered on these targets, float32 in each precision it may run in."""
    every = []
    for name in kernels:
        kernel = KERNELS[name]
        for target in targets:
            for dtype in kernel.dtypes:
                entries = _entries(kernel, target, dtype)
                precisions = precisions_of(kernel, target, dtype)
                every += [Job(name, target, dtype, p, i) for i in range(len(entries)) for p in precisions]
    return every


def precisions_of(kernel: Kernel, target: str, dtype: str) -> tuple[str, ...]:
    """The precisions of its products a kernel may run in: the first without TF32 allowed, the second with it."""
    if dtype != "float32" or not kernel.tf32:
        return ("ieee",)
    return ("tf32x3" if target in SPLIT_TARGETS else "ieee"), "tf32"


def config_of(job: Job) -> Config:
    """The configuration a job compiles."""
    return _entries(KERNELS[job.kernel], job.target, job.dtype)[job.index]


def _entries(kernel: Kernel, target: str, dtype: str) -> tuple[Config, ...]:
    return TABLES[kernel.table][target]["float32" if dtype == "float32" else "half"]


def describe(config: Config) -> str:
    """A configuration in words."""
    blocks = ", ".join(f"{name} {value}" for name, value in config.blocks.items())
    return f"{blocks}; {config.num_warps} warps, {config.num_stages} stages"


def compile_job(job: Job) -> Result:
    """Compiles one job in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, config = KERNELS[job.kernel], config_of(job)
    function = getattr(importlib.import_module(f"lorasuite_kernels.{kernel.module}"), kernel.function)
    constants = kernel.constants | config.blocks | {"PRECISION": job.precision}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = kernel.pointers.get(name, "i32").replace("io", DTYPES[job.dtype])
            if name not in kernel.plain:
                attributes[(position,)] = [["tt.divisibility", 16]]
    target = (
        GPUTarget("hip", job.target, 64) if job.target.startswith("gfx") else GPUTarget("cuda", int(job.target[3:]), 32)
    )
    compiled = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=target,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    result = Result(
        job.kernel,
        job.target,
        job.dtype,
        job.precision,
        describe(config),
        shared_bytes=compiled.metadata.shared,
    )
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        result.registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        result.spilled_bytes = 4 * (
            _number(r"\.vgpr_spill_count:\s+(\d+)", text) + _number(r"\.sgpr_spill_count:\s+(\d+)", text)
        )
    else:
        text, usage = _disassemble(compiled.asm["cubin"])
        result.registers = _number(r"REG:(\d+)", usage)
        # Nothing in these kernels lives on a stack but what did not fit into registers.
        result.spilled_bytes = _number(r"STACK:(\d+)", usage) + 4 * len(re.findall(r"\bSTL\b", text))
    result.matrix_instructions = len(re.findall(MATRIX_INSTRUCTION[job.target], text))
    result.wide_loads = len(re.findall(WIDE_LOAD[target.backend], text))
    return result


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in the compiler's output")
    return int(found.group(1))


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(SASS, resource usage) of a cubin, through the tools in the Triton wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass = subprocess.run([tools / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    return sass, usage


def _worker() -> None:
    for line in sys.stdin:
        job = Job(**json.loads(line))
        try:
            result = compile_job(job)
        except Exception as error:  # reported per configuration, whatever it is
            result = Result(
                **_failed(job), error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
            )
        print("RESULT " + json.dumps(asdict(result)), flush=True)


def _failed(job: Job) -> dict[str, Any]:
    return {
        "kernel": job.kernel,
        "target": job.target,
        "dtype": job.dtype,
        "precision": job.precision,
        "config": f"#{job.index}",
    }


def _run_batch(batch: list[Job]) -> list[Result]:
    """One process per batch; where it dies, the job it died in is marked and a new process takes the rest."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
        while len(results) < len(batch):
            lines = "\n".join(json.dumps(asdict(job)) for job in batch[len(results) :])
            command = [sys.executable, __file__, "--worker"]
            done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment)
            for line in done.stdout.splitlines():
                if line.startswith("RESULT "):
                    results.append(Result(**json.loads(line.removeprefix("RESULT "))))
            if len(results) < len(batch):
                results.append(Result(**_failed(batch[len(results)]), error=f"the compiler died ({done.returncode})"))
    return results


def run(wanted: list[Job], processes: int = 2) -> list[Result]:
    """Compiles all jobs, a process per target and kernel, a few at a time."""
    batches: dict[tuple[str, str], list[Job]] = {}
    for job in wanted:
        batches.setdefault((job.target, job.kernel), []).append(job)
    with ThreadPoolExecutor(processes) as pool:
        return [result for batch in pool.map(_run_batch, batches.values()) for result in batch]


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| kernel | target | dtype | configuration | registers | spilled bytes | shared bytes | matrix instr. "
        "| 16-byte loads | |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for r in results:
        dtype = f"{r.dtype} ({r.precision})" if r.dtype == "float32" else r.dtype
        verdict = "; ".join(r.problems) or "ok"
        lines.append(
            f"| {r.kernel} | {r.target} | {dtype} | {r.config} | {r.registers} | {r.spilled_bytes} | {r.shared_bytes} "
            f"| {r.matrix_instructions} | {r.wide_loads} | {verdict} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="*", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return _worker()
    results = run(jobs(arguments.kernels, arguments.targets), arguments.processes)
    whole = len(arguments.kernels) == len(KERNELS) and len(arguments.targets) == len(TARGETS)
    if whole:
        import triton

        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(_preamble(results, triton.__version__) + table(results) + "\n")
    else:
        print(table(results))
    bad = [r for r in results if r.problems]
    print(f"{len(results)} compilations, {len(bad)} with problems" + (f"; {REPORT.relative_to(ROOT)}" if whole else ""))
    sys.exit(bool(bad))


def _preamble(results: list[Result], version: str) -> str:
    return f"""# Ahead-of-time compilation of the kernels

Written by `python bench/aot.py` with Triton {version}, on a machine without a GPU. Every kernel, for every target it
is offered on, in every configuration of `lorasuite_kernels/configs.py`: {len(results)} compilations. The columns are
registers per thread (VGPRs of both files on gfx942), spilled bytes per thread, shared memory per program (limits:
{_limits()}), the number of matrix instructions in the disassembly (HMMA on sm_80, HGMMA = wgmma on sm_90, UTC…MMA =
tcgen05 or HMMA on sm_100, v_mfma on gfx942) and of 16-byte global loads (LDG or LDGSTS .128; global_load_dwordx4 or
buffer_load_dwordx4). Pointers and extents are assumed to be multiples of 16, as PyTorch allocates them and models size
them; others take the same code with narrower loads. `mixed` is gram for bfloat16 layers compared with float32
ones. hsic sees no float16: triangles of float16 layers are float32.

float32 runs twice: at PyTorch's default precision as `tf32x3`, three TF32 products with the error of float32 (`ieee` on
other targets, and in kernels without a large product); as `tf32` where `torch.set_float32_matmul_precision` permits
it.

"""


def _limits() -> str:
    return ", ".join(f"{target} {limit // 1024} KiB" for target, limit in SHARED_LIMIT.items())


if __name__ == "__main__":
    main()
