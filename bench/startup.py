"""What `import lorasuite_fast` costs over `import torch`, in fresh processes.

python bench/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from measure import machine, write_report

CODE = "import time, torch; t = time.perf_counter(); import lorasuite_fast; print(time.perf_counter() - t)"
RUNS = 9


def main() -> None:
    times = [float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(RUNS)]
    write_report(
        "startup",
        f"# Import time\n\n`python bench/startup.py`, {machine()}: `import lorasuite_fast` takes "
        f"{statistics.median(times) * 1000:.1f} ms\nover `import torch`, median of {RUNS} fresh processes. "
        "Target: under 100 ms.\n",
    )


if __name__ == "__main__":
    main()
