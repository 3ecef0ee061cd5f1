"""The ways an operator can run, and the yardstick for its error."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from lorasuite_kernels import backend

_GPU = torch.cuda.is_available()
_TRITON = importlib.util.find_spec("triton") is not None

TWIN = "twin"
INTERPRETER = pytest.param(
    "interpreter",
    marks=pytest.mark.skipif(_GPU or not _TRITON, reason="needs Triton, and kernels not compiled for a GPU"),
)
GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not _GPU, reason="needs a CUDA or ROCm device")])
PATHS = [TWIN, INTERPRETER, GPU]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

few = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
"""For a test that goes through the interpreter, where one launch may take a second."""


@contextmanager
def running(path: str) -> Iterator[None]:
    """Forces one path, and fills every tensor allocated uninitialised inside with NaN: what is not written shows."""
    environment = {"TRITON_INTERPRET": "1"} if path == "interpreter" else {}
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with mock.patch.dict(os.environ, environment), backend("torch" if path == TWIN else "triton"):
            assert torch.empty(2).isnan().all()
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def on(path: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors where the path runs."""
    return [t.cuda() if path == "gpu" else t for t in tensors]


def assert_no_worse(
    actual: Tensor, oracle: Tensor, plain: Tensor, scale: float, dtype: torch.dtype, roundings: int = 1
) -> None:
    """Largest error against the float64 oracle at most twice that of the plain PyTorch expression in the same dtype.

    The plain expression runs on the CPU, every intermediate in `dtype`. With a handful of elements it may be right by
    luck, so half a unit in the last place of `dtype` at `scale` (the size of the sums before cancellation) is always
    allowed for each of the `roundings` on the way (operands of a product, result); for float32 and float64 four units,
    since sums may be taken in another order.
    """
    assert actual.shape == oracle.shape
    assert bool(actual.isfinite().all())
    if actual.numel() == 0:
        return
    error = float((actual.cpu().double() - oracle).abs().max())
    plain_error = float((plain.double() - oracle).abs().nan_to_num(nan=torch.inf).max())
    units = 4 if dtype in (torch.float32, torch.float64) else roundings / 2
    assert error <= 2 * plain_error + units * torch.finfo(dtype).eps * scale, (error, plain_error, scale)
