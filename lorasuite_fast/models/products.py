"""How exact float32 matrix products are on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, float32 products on a GPU may round their operands to TF32 (a relative error of about 1e-3), or not.

    Sums and everything between the products stay float32. A CPU multiplies exactly either way.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
