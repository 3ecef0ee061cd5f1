"""A run's configurations from a YAML file, one section for each."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from .fields import read_value, settings
from .sections import ApplyConfig, DistillConfig, FinetuneConfig, PlanConfig, RefineConfig, Runtime, VerifyConfig

SECTIONS: dict[str, type] = {
    "plan": PlanConfig,
    "apply": ApplyConfig,
    "distill": DistillConfig,
    "refine": RefineConfig,
    "finetune": FinetuneConfig,
    "verify": VerifyConfig,
    "runtime": Runtime,
}
_MOST_BYTES = 1 << 20


def read_run(file: Path) -> dict[type, dict[str, Any]]:
    """The sections of a file.

    Args:
        file: A YAML file: section -> field -> value.

    Returns:
        The fields given, by configuration, each of a type that the field takes.

    Raises:
        LoraSuiteError: A file that is no such YAML, a section or field that there is not, a text that is no value.
    """
    import yaml

    from ..io.text_files import read_text

    try:
        found = yaml.safe_load(read_text(file.expanduser(), most=_MOST_BYTES))
    except (yaml.YAMLError, RecursionError) as error:
        fact = " ".join(str(error).split())
        raise LoraSuiteError(f"{file}: is not YAML ({fact}); write sections such as plan and runtime") from None
    return {
        SECTIONS[_known(file, "the file", "section", section, list(SECTIONS))]: _fields(file, section, given)
        for section, given in _mapping(file, "the file", found).items()
    }


def _fields(file: Path, section: str, given: object) -> dict[str, Any]:
    config = SECTIONS[section]
    names = [f.name for f in settings(config)]
    values: dict[str, Any] = {}
    for name, value in _mapping(file, section, given).items():
        _known(file, section, "field", name, names)
        values[name] = read_value(config, name, value, f"{file}: {section}.{name}") if isinstance(value, str) else value
        if isinstance(value, list) and name == "roles":
            values[name] = tuple(value)
    return values


def _mapping(file: Path, where: str, found: object) -> dict[Any, Any]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise LoraSuiteError(f"{file}: {where} holds no names with values; write them as `name: value`")
    return found


def _known(file: Path, where: str, what: str, name: object, names: list[str]) -> str:
    if name in names:
        return str(name)
    close = get_close_matches(str(name), names, 1)
    action = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    raise LoraSuiteError(f"{file}: {where} has no {what} {name!r}; {action}")
