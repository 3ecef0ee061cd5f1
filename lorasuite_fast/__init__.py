"""Carry a LoRA adapter from the base model it was trained on to that model's successor.

>>> import lorasuite_fast
>>> lorasuite_fast.migrate("old-model", "new-model", "adapter", "migrated-adapter")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._moved import install
from ._version import __version__
from .errors import LoraSuiteError

if TYPE_CHECKING:
    from .adapters.readers import AdapterCheck
    from .config import (
        ApplyConfig,
        DistillConfig,
        FinetuneConfig,
        PlanConfig,
        RefineConfig,
        Runtime,
        VerifyConfig,
    )
    from .evaluation.verification import Verification
    from .pipeline.check import check
    from .pipeline.finetune import finetune
    from .pipeline.migrate import migrate
    from .pipeline.plan import TransferPlan
    from .pipeline.refine import refine
    from .pipeline.verify import verify
    from .reporting.model_card import push_to_hub
    from .results import Migration
    from .training.finetuning import Finetuning
    from .training.refinement import Refinement
    from .transfer.projection import LayerResult

__all__ = [
    "AdapterCheck",
    "ApplyConfig",
    "DistillConfig",
    "FinetuneConfig",
    "Finetuning",
    "LayerResult",
    "LoraSuiteError",
    "Migration",
    "PlanConfig",
    "RefineConfig",
    "Refinement",
    "Runtime",
    "TransferPlan",
    "Verification",
    "VerifyConfig",
    "__version__",
    "check",
    "finetune",
    "migrate",
    "push_to_hub",
    "refine",
    "verify",
]

_HOMES = {
    "ApplyConfig": "config",
    "DistillConfig": "config",
    "FinetuneConfig": "config",
    "PlanConfig": "config",
    "RefineConfig": "config",
    "Runtime": "config",
    "VerifyConfig": "config",
    "AdapterCheck": "adapters.readers",
    "check": "pipeline.check",
    "Finetuning": "training.finetuning",
    "finetune": "pipeline.finetune",
    "push_to_hub": "reporting.model_card",
    "TransferPlan": "pipeline.plan",
    "migrate": "pipeline.migrate",
    "Migration": "results",
    "LayerResult": "transfer.projection",
    "Refinement": "training.refinement",
    "refine": "pipeline.refine",
    "Verification": "evaluation.verification",
    "verify": "pipeline.verify",
}

install()


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
