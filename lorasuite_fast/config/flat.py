"""Keywords of 0.1 that are fields of a configuration now: for one release they are moved there, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from ..errors import LoraSuiteError

P = ParamSpec("P")
R = TypeVar("R")
Older = Callable[[dict[str, Any]], Iterator[str]]
"""Changes keywords of 0.1 in place, and tells of each what it is now."""


def takes_flat_keywords(older: Older | None = None, **homes: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a verb take the fields of its configurations as keywords, each with a DeprecationWarning.

    Args:
        older: For what no rule covers.
        **homes: Parameter of the verb -> the configuration it takes; the first that has a field gets it.

    Returns:
        A decorator that leaves the verb's signature as it is.
    """

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        known = signature(verb).parameters

        @wraps(verb)
        def call(*args: P.args, **given: P.kwargs) -> R:
            moved, told = gathered(given, known, homes, older)
            for name, config in homes.items():
                if not isinstance(moved.get(name), config | None):
                    got = type(moved[name]).__name__
                    raise LoraSuiteError(f"{name}: is a {got}; pass {config.__name__}(…)")
            for sentence in told:
                warnings.warn(
                    f"{verb.__name__}: {sentence}; the keyword goes with the next release",
                    DeprecationWarning,
                    stacklevel=2,
                )
            return verb(*args, **moved)

        call.__dict__["gather"] = lambda given: gathered(given, known, homes, older)[0]
        return call

    return decorate


def gathered(
    given: Mapping[str, Any], known: Mapping[str, Any], homes: Mapping[str, type], older: Older | None
) -> tuple[dict[str, Any], list[str]]:
    """The keywords with their configurations, and a sentence for each that was moved there."""
    found = dict(given)
    told = [] if older is None else list(older(found))
    for parameter, config in homes.items():
        names = [f.name for f in fields(config) if f.name in found and f.name not in known]
        if names:
            moved = {name: found.pop(name) for name in names}
            begun: Any = found.get(parameter)
            if not isinstance(begun, config | None):
                continue
            started: Any = config() if begun is None else begun
            found[parameter] = replace(started, **moved)
            told += [
                f"{name} is {config.__name__}.{name} now, pass {parameter}={config.__name__}({name}=…)"
                for name in names
            ]
    return found, told
