"""Carry a LoRA adapter from the base model it was trained on to that model's successor.

>>> import lorasuite_fast
>>> lorasuite_fast.migrate("old-model", "new-model", "adapter", "migrated-adapter")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import LoraSuiteError

if TYPE_CHECKING:
    from .finetuning import Finetuning, finetune
    from .plan import TransferPlan, migrate
    from .refinement import Refinement, refine
    from .result import LayerResult, Migration
    from .verification import Verification, verify

__all__ = [
    "Finetuning",
    "LayerResult",
    "LoraSuiteError",
    "Migration",
    "Refinement",
    "TransferPlan",
    "Verification",
    "__version__",
    "finetune",
    "migrate",
    "refine",
    "verify",
]

_HOMES = {
    "Finetuning": "finetuning",
    "finetune": "finetuning",
    "TransferPlan": "plan",
    "migrate": "plan",
    "Migration": "result",
    "LayerResult": "result",
    "Refinement": "refinement",
    "refine": "refinement",
    "Verification": "verification",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
