"""How long a function takes on a GPU: by CUDA events, and by replaying it as a CUDA graph, without Python's share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

SECONDS_EACH = 1.0
"""Measuring stops for one function once it has taken this long."""
_FLUSHED = 64 * 2**20  # 4-byte elements: more than any L2 cache holds


def _medians(work: Callable[[], object], budget: float) -> float:
    flush = torch.empty(_FLUSHED, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 30 and time.perf_counter() - started < budget):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def seconds(work: Callable[[], object], device: str, budget: float = SECONDS_EACH) -> float:
    """Median seconds of one call after a warm-up, the L2 cache flushed between runs, within a time budget."""
    work()
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    return _medians(work, budget)


def graph_seconds(work: Callable[[], object], device: str, budget: float = SECONDS_EACH) -> float | None:
    """Median seconds of one replay of `work` captured as a CUDA graph; None on a CPU.

    Raises:
        RuntimeError: `work` cannot be captured, as where it reads a value back.
    """
    if device == "cpu":
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return _medians(graph.replay, budget)


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


def launches(work: Callable[[], object], device: str) -> int | None:
    """Kernels one call starts, as the profiler sees them; None on a CPU."""
    if device == "cpu":
        return None
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(
        event.count
        for event in profiler.key_averages()
        if event.device_type != torch.autograd.DeviceType.CPU and not event.key.startswith(("Memcpy", "Memset"))
    )
