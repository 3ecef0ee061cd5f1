"""What a run is asked for: one frozen dataclass a step, made once for Python, the command line and a YAML file."""

from .choices import ATTENTION, MEASURES, MLP, ROLES
from .fields import Option, option_of, setting
from .machine import Machine, check_choice, finite_hint, parse_memory, pick_device, pick_dtype
from .sections import (
    ApplyConfig,
    Data,
    DistillConfig,
    FinetuneConfig,
    PlanConfig,
    RefineConfig,
    Runtime,
    VerifyConfig,
)

__all__ = [
    "ATTENTION",
    "MEASURES",
    "MLP",
    "ROLES",
    "ApplyConfig",
    "Data",
    "DistillConfig",
    "FinetuneConfig",
    "Machine",
    "Option",
    "PlanConfig",
    "RefineConfig",
    "Runtime",
    "VerifyConfig",
    "check_choice",
    "finite_hint",
    "option_of",
    "parse_memory",
    "pick_device",
    "pick_dtype",
    "setting",
]
