"""A run's configurations from a YAML file, one section for each."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from .fields import option_of, read_value, settings
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

    class Once(yaml.SafeLoader):  # type: ignore[misc]
        """Takes no key twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", node.start_mark)
                seen.add(key)
            return super().construct_mapping(node, deep)

    text = read_text(file.expanduser(), most=_MOST_BYTES)
    try:
        found = yaml.load(text, Loader=Once)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
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
        shown, absent = f"{file}: {section}.{name}", option_of(config, name).absent
        if isinstance(value, str):
            values[name] = read_value(config, name, value, shown)
        elif isinstance(value, int) and not isinstance(value, bool) and str(value) == absent:
            values[name] = None
        else:
            values[name] = tuple(value) if isinstance(value, list) and name == "roles" else value
    try:
        # No steps of refinement are what `--refine 0` is: none.
        config(**{name: value for name, value in values.items() if (config, name, value) != (RefineConfig, "steps", 0)})
    except LoraSuiteError as error:
        raise LoraSuiteError(f"{file}: {section}: {error}") from None
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
