"""The kernels through the Kernel Hub's loader, in a process that has installed neither package of this repository.

    python examples/hub_kernel.py [FOLDER]

FOLDER is a built kernel, the folder that holds `build/`; without it one is assembled from the sources first. From the
hub it is `kernels.get_kernel("lorasuite-fast/lorasuite-kernels", version=1, trust_remote_code=True)` instead.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from kernels import get_local_kernel

SOURCES = Path(__file__).resolve().parents[1] / "kernels"


def load(folder: Path | None = None) -> Any:
    """The kernel as a module."""
    backend = "cuda" if torch.version.cuda and torch.cuda.is_available() else "cpu"
    if folder is not None:
        return get_local_kernel(folder, backend=backend)
    # A kernel's modules are imported when they are first needed.
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    command = [sys.executable, str(SOURCES / "build_variants.py"), "--output", f"{made.name}/build"]
    subprocess.run(command, check=True, capture_output=True)
    return get_local_kernel(Path(made.name), backend=backend)


def layer_similarity(kernel: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(L_x, L_y): CKA of hidden states x (L_x, m, d_x) and y (L_y, m, d_y), inside a compiled graph."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compared(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return kernel.cka(x, y).clamp(0, 1)

    return compared(x, y)


def main() -> None:
    kernel = load(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    torch.manual_seed(0)
    features = torch.randn(64, 24)
    x = torch.stack([features @ torch.randn(24, 96) for _ in range(3)])
    y = torch.stack([features @ torch.randn(24, 128) for _ in range(4)])
    print(f"loaded {kernel.__name__}; CKA of {len(x)} by {len(y)} layers:")
    print(layer_similarity(kernel, x, y))
    print(f"this repository's package is loaded: {'lorasuite_kernels' in sys.modules}")


if __name__ == "__main__":
    main()
