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


def memory() -> tuple[int, int]:
    """Bytes the process allocated itself, and its resident set, memory-mapped files included.

    Elsewhere than on Linux both are the peak of the resident set.
    """
    try:
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]
    except (OSError, KeyError):
        pass
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024
    return peak, peak


def anonymous_memory() -> int:
    """Bytes the process allocated itself, without memory-mapped files."""
    return memory()[0]


def release_memory() -> None:
    """Gives freed memory back to the system: glibc keeps gigabytes of freed weights in its heap otherwise."""
    # Elsewhere than on glibc there is no such function, and nothing to do.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Phase:
    """One phase of a run. Memory in bytes.

    Attributes:
        peak_memory: anonymous memory of the process. peak_resident: its resident set, mapped weights included.
        peak_device_memory: of the GPU's allocator. predicted: what was expected of the device (on a CPU, of the
            resident set) before the work started.
    """

    name: str
    seconds: float
    peak_memory: int
    peak_resident: int
    peak_device_memory: int | None
    predicted: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class PhaseClock:
    """Times named phases and samples memory while they run."""

    def __init__(self, progress: Progress | None = None, device: torch.device | None = None) -> None:
        self.phases: list[Phase] = []
        self._progress = progress
        self._device = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def phase(self, name: str, total: int, predicted: int | None = None) -> Iterator[Callable[[int], None]]:
        """Yields a function that reports how many of `total` steps are done."""
        release_memory()
        done = threading.Event()
        peak = memory()

        def sample() -> None:
            nonlocal peak
            # Where memory runs out the work itself says so.
            with suppress(MemoryError, OSError):
                while not done.wait(_INTERVAL):
                    anonymous, resident = memory()
                    peak = max(peak[0], anonymous), max(peak[1], resident)

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
            if self._device is not None:
                # What the phase started is its own time, not the next one's.
                with suppress(RuntimeError):
                    torch.cuda.synchronize(self._device)
            seconds = time.perf_counter() - start
            done.set()
            sampler.join()
            device = torch.cuda.max_memory_allocated(self._device) if self._device is not None else None
            anonymous, resident = memory()
            self.phases.append(Phase(name, seconds, max(peak[0], anonymous), max(peak[1], resident), device, predicted))
