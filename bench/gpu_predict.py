"""Predicted seconds of the main job's phases on an H100, each from bytes, operations and launches.

Rates: 600 TFLOP/s for large bfloat16 products inside a model, 50 TFLOP/s for float64 products on tensor cores and
5 TFLOP/s for float64 factorisations, 3.0 TB/s of device memory, 10 GB/s from the page cache to the device, 20 µs for
one operation started from a PyTorch module. Nothing here is measured.
"""

from __future__ import annotations

from gpu_models import NEW, OLD, SHARED, parameters

from lorasuite_fast.models.families import Shape

HALF_PRODUCTS, DOUBLE_PRODUCTS, DOUBLE_SOLVES = 600e12, 50e12, 5e12
MEMORY, LOADING, LAUNCH = 3.0e12, 10e9, 20e-6
_LAYER_LAUNCHES = 25
"""Operations one transformer layer starts in transformers' own code."""
EXAMPLES, TOKENS = 64, 128


def forward(shape: Shape, tokens: int, passes: int) -> float:
    """A forward pass over `tokens` tokens in `passes` batches: operations, or launches where they take longer."""
    operations = 2 * parameters(shape) * tokens / HALF_PRODUCTS
    return max(operations, passes * shape.L * _LAYER_LAUNCHES * LAUNCH)


def loading(shape: Shape) -> float:
    """bfloat16 weights from the page cache to the device."""
    return 2 * parameters(shape) / LOADING


def transfer_matrix() -> float:
    """Normal equations and four solves in float64, on the device."""
    sums = 2 * SHARED * (OLD.d**2 + OLD.d * NEW.d + NEW.d**2)
    solves = sum(4 * (d**3 / 3 + 2 * d**3) for d in (OLD.d, NEW.d))
    tables = 2 * (OLD.V * OLD.d + NEW.V * NEW.d) / LOADING
    return sums / DOUBLE_PRODUCTS + solves / DOUBLE_SOLVES + tables


def heads() -> float:
    """Similarity of heads, and the blocks of q, k, v and o, for all layers: their weights are read from the host."""
    rows = (2 * OLD.H + 2 * OLD.G) * OLD.h + (2 * NEW.H + 2 * NEW.G) * NEW.h
    products = 2 * NEW.d * (2 * OLD.H * OLD.h * NEW.H * NEW.h) + 2 * rows * OLD.d * NEW.d
    return OLD.L * (products / (HALF_PRODUCTS / 4) + 2 * rows * OLD.d / LOADING + 200 * LAUNCH)


def writing(tokens: int) -> float:
    """Each written token of a batch reads all weights once and starts every layer once, with the adapter's own."""
    step = max(2 * parameters(OLD) / MEMORY, OLD.L * 2 * _LAYER_LAUNCHES * LAUNCH)
    return loading(OLD) + tokens * step


def training(steps: int, tokens: int) -> float:
    """Forward and backward passes through the frozen model: three products a weight less the weights' gradients."""
    one = max(2 * 2 * parameters(NEW) * tokens / HALF_PRODUCTS, NEW.L * 6 * _LAYER_LAUNCHES * LAUNCH)
    return loading(NEW) + steps * one


def predictions() -> dict[str, float]:
    """Seconds by phase, named as the job's rows are."""
    micro_batches = EXAMPLES // 16
    calibration = EXAMPLES * TOKENS
    return {
        "plan: transfer matrix": transfer_matrix(),
        "plan: old hidden states": loading(OLD) + forward(OLD, calibration, micro_batches),
        "plan: new hidden states": loading(NEW) + forward(NEW, calibration, micro_batches),
        "plan: heads and projections": heads(),
        "apply": 2.0 * OLD.L * 7 * LAUNCH * 10,
        "verify": 2 * (loading(OLD) + loading(NEW)) + 2 * (forward(OLD, calibration, 8) + forward(NEW, calibration, 8)),
        "write": writing(TOKENS),
        "refine": 2 * loading(OLD) + loading(NEW) + training(20, 1024),
    }
