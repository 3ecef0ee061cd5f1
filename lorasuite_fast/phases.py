"""What each phase of a run took: seconds, and the peak of the memory the process itself allocated."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total) as a phase advances."""

_STATUS = Path("/proc/self/status")
_INTERVAL = 0.02


def anonymous_memory() -> int:
    """Bytes the process allocated itself, without memory-mapped files (elsewhere than on Linux: peak resident set)."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Gives freed memory back to the system: glibc keeps gigabytes of freed weights in its heap otherwise."""
    # Elsewhere than on glibc there is no such function, and nothing to do.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Phase:
    """One phase of a run. Memory in bytes: peak anonymous memory of the process, and of the device's allocator."""

    name: str
    seconds: float
    peak_memory: int
    peak_device_memory: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class PhaseClock:
    """Times named phases and samples memory while they run."""

    def __init__(self, progress: Progress | None = None, device: torch.device | None = None) -> None:
        self.phases: list[Phase] = []
        self._progress = progress
        self._device = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function that reports how many of `total` steps are done."""
        release_memory()
        done = threading.Event()
        peak = [anonymous_memory()]

        def sample() -> None:
            while not done.wait(_INTERVAL):
                peak[0] = max(peak[0], anonymous_memory())

        def report(steps: int) -> None:
            if self._progress:
                self._progress(name, steps, total)

        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        start = time.perf_counter()
        report(0)
        try:
            yield report
        finally:
            seconds = time.perf_counter() - start
            done.set()
            sampler.join()
            device = torch.cuda.max_memory_allocated(self._device) if self._device is not None else None
            self.phases.append(Phase(name, seconds, max(peak[0], anonymous_memory()), device))
