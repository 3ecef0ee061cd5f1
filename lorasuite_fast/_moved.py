"""The modules of 0.1 under their old names, for one release; each use warns."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]

# Old module: new module, both below the package.
MOVED = {
    "adapter": "adapters.adapter",
    "aligned_states": "adapters.aligned_states",
    "alignment": "text.alignment",
    "base_fit": "evaluation.base_fit",
    "build": "transfer.build",
    "calibration": "text.calibration",
    "checkpoint": "models.checkpoint",
    "distilled_adapter": "distillation.distilled_adapter",
    "doctor": "cli.doctor",
    "effect": "evaluation.effect",
    "families": "models.families",
    "figures": "reporting.figures",
    "fill": "adapters.fill",
    "finetuning": "training.finetuning",
    "hidden_states": "models.hidden_states",
    "html_report": "reporting.html_report",
    "inspection": "reporting.inspection",
    "json_files": "io.json_files",
    "loader": "models.loader",
    "magnitude": "transfer.magnitude",
    "mapping": "transfer.mapping",
    "memory": "transfer.memory",
    "model_card": "reporting.model_card",
    "output": "io.output",
    "phases": "io.phases",
    "plan": "transfer.plan",
    "plan_check": "transfer.plan_check",
    "plan_folder": "reporting.plan_folder",
    "projection": "transfer.projection",
    "ranks": "io.ranks",
    "refinement": "training.refinement",
    "report_file": "reporting.html_report",
    "result": "results",
    "retention": "training.retention",
    "samples": "text.samples",
    "self_text": "text.self_text",
    "similarity": "transfer.similarity",
    "spectra": "reporting.spectra",
    "stored_tensors": "io.stored_tensors",
    "teacher": "training.teacher",
    "tensor_files": "io.tensor_files",
    "verification": "evaluation.verification",
    "verification_tables": "reporting.verification_tables",
    "vocabulary": "models.vocabulary",
    "work": "io.work",
}


class _Moved(MetaPathFinder, Loader):
    """Imports ``lorasuite_fast.plan`` as what it is now called, ``lorasuite_fast.transfer.plan``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{PACKAGE}.{MOVED[spec.name.rpartition('.')[2]]}"
        _warn(spec.name, new, 3)
        module = import_module(new)
        self._identity = (module, module.__spec__, module.__loader__)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing but give the module back the name and the loader that importing an alias takes from it."""
        _, module.__spec__, module.__loader__ = self._identity
        if module.__spec__ is not None:
            module.__package__ = module.__spec__.parent


def install() -> None:
    """Lets old module names be imported."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())


def moved_name(room: str, module: str, name: str) -> Any:
    """A name of an old module that a room is called as now.

    Args:
        room: The room, as ``__name__`` has it.
        module: The module within the room that the names are in now.
        name: The name.

    Returns:
        The object.

    Raises:
        AttributeError: The module has no such name.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {room!r} has no attribute {name!r}")
    home = import_module(f"{room}.{module}")
    if not hasattr(home, name):
        raise AttributeError(f"module {room!r} has no attribute {name!r}")
    _warn(f"{room}.{name}", f"{room}.{module}.{name}", 4)
    return getattr(home, name)


def _warn(old: str, new: str, level: int) -> None:
    warnings.warn(f"{old} is {new} now; the old name goes with the next release", DeprecationWarning, stacklevel=level)
