"""A field of a configuration: its default, help and bounds, and the one place that checks them."""

from __future__ import annotations

import math
import numbers
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import LoraSuiteError
from .choices import ATTENTION, MLP, ROLES

METHOD, TEXT, TRAINING, MACHINE, OUTPUT = "Method", "Text", "Training", "Machine", "Output"
"""Panels of the help."""
_MOST = 2**63
"""What no whole number may reach: seeds and sizes are 64-bit integers."""
_GROUPS = {"all": ROLES, "attention": ATTENTION, "mlp": MLP}


@dataclass(frozen=True)
class Option:
    """What is known of a field besides its name, type and default.

    Attributes:
        help: One line, as the command line shows it.
        panel: Of the help.
        metavar: What stands for the value in the help; None for a flag.
        least: Smallest number allowed.
        most: Largest number allowed.
        above: Number that the value must exceed.
        below: Number that the value must stay under.
        title: The field's name in messages, where that is another.
        absent: The word that stands for None on the command line and in a file.
        expects: What a text has to be, for the message about one that is not.
        flags: Names of the command-line option, where they are not the field's.
    """

    help: str
    panel: str
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    title: str = ""
    absent: str | None = None
    expects: str = "a number"
    flags: tuple[str, ...] = ()


def setting(default: Any, panel: str, metavar: str | None, help: str, *flags: str, **known: Any) -> Any:
    """A field of a configuration, with its `Option`."""
    return field(default=default, metadata={"option": Option(help, panel, metavar, flags=flags, **known)})


def option_of(config: type, name: str) -> Option:
    """The `Option` of a field."""
    option: Option = next(f for f in fields(config) if f.name == name).metadata["option"]
    return option


def settings(config: type) -> Iterator[Field[Any]]:
    """The fields that a command line or a file can give."""
    return (f for f in fields(config) if "option" in f.metadata)


@cache
def kinds(config: type, name: str) -> tuple[Any, ...]:
    """The types a field takes, each of a union."""
    hint = get_type_hints(config)[name]
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def words(config: type, name: str) -> tuple[str, ...]:
    """The words a field takes; none where it takes any text, or no text."""
    return tuple(word for kind in kinds(config, name) if get_origin(kind) is Literal for word in get_args(kind))


def check(config: Any) -> None:
    """Checks every field of a configuration.

    Raises:
        LoraSuiteError: A value of another type, a word that is no choice, or a number out of bounds.
    """
    of: Any = type(config)
    for f in settings(of):
        value, option = getattr(config, f.name), f.metadata["option"]
        allowed, taken = words(of, f.name), kinds(of, f.name)
        if not _fits(value, allowed, taken):
            raise LoraSuiteError(f"{f.name} is {value!r:.60}; it must be {_expected(option, allowed, taken)}")
        if value is None or isinstance(value, bool):
            continue
        if f.name == "roles":
            _check_roles(value)
        elif isinstance(value, str) and allowed and str not in taken:
            if value not in allowed and int in taken:
                raise LoraSuiteError(f"{f.name} is {value!r}; it must be {option.expects}")
            if value not in allowed:
                raise LoraSuiteError(f"{option.title or f.name} {value!r} is not one of {', '.join(allowed)}")
        elif isinstance(value, numbers.Real):
            _check_number(f.name, value, option, allowed)  # type: ignore[arg-type]
        elif taken[0] in (int, float) and str not in taken and isinstance(value, str):
            raise LoraSuiteError(f"{f.name} is {value!r}; it must be {option.expects}")


def _fits(value: object, allowed: tuple[str, ...], taken: tuple[Any, ...]) -> bool:
    """Whether a value has one of the types of a field; texts for choices and numbers are judged by what they say."""
    origins = {get_origin(kind) or kind for kind in taken}
    if value is None:
        return types.NoneType in origins
    if isinstance(value, bool):
        return bool in origins
    if isinstance(value, str):
        return bool(allowed) or bool(origins & {str, int, float})
    if isinstance(value, numbers.Integral):
        return bool(origins & {int, float})
    if isinstance(value, numbers.Real):
        return float in origins
    if isinstance(value, os.PathLike):
        return os.PathLike in origins
    listed = isinstance(value, Sized) and isinstance(value, Iterable) and not isinstance(value, bytes | Mapping)
    return listed and bool(origins & {Sequence, tuple})


def _expected(option: Option, allowed: tuple[str, ...], taken: tuple[Any, ...]) -> str:
    """What a field takes, in words."""
    if option.expects != Option.expects:
        return option.expects
    origins = {get_origin(kind) or kind for kind in taken}
    parts = [
        *(["true or false"] if bool in origins else []),
        *(["a number"] if float in origins else ["a whole number"] if int in origins else []),
        *(["a text"] if origins & {str, os.PathLike} else []),
        *(["a list"] if origins & {Sequence, tuple} else []),
    ]
    return " or ".join([*allowed, *parts])


def _check_roles(roles: Any) -> None:
    for role in roles:
        if role not in ROLES:
            raise LoraSuiteError(f"role {role!r} is not one of {', '.join(ROLES)}")
    if not roles or len(set(roles)) < len(roles):
        raise LoraSuiteError(f"roles is {list(roles)}; name one or more of {', '.join(ROLES)}, each once")


def _check_number(name: str, value: float, option: Option, allowed: tuple[str, ...]) -> None:
    least, most, above, below = option.least, option.most, option.above, option.below
    if isinstance(value, int) and abs(value) >= _MOST:
        raise LoraSuiteError(
            f"{name} is a number of {len(hex(abs(value))) - 2} hexadecimal digits; it must be below 2^63"
        )
    fine = (
        math.isfinite(value)
        and (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if fine:
        return
    if math.isinf(value):
        bounds = "finite"
    elif least is not None and most is not None:
        bounds = f"from {least:g} to {most:g}"
    else:
        parts = [(least, "at least"), (above, "above"), (below, "below"), (most, "at most")]
        bounds = " and ".join(f"{words} {bound:g}" for bound, words in parts if bound is not None) or "finite"
    raise LoraSuiteError(f"{name} is {value}; it must be {' or '.join([*allowed, bounds])}")


def read_value(config: type, name: str, text: str, shown: str) -> Any:
    """The value of a field, from a text of a command line or a file.

    Args:
        config: The configuration.
        name: The field.
        text: What was given.
        shown: What to call the field in a message.

    Returns:
        The value, of a type that the field takes.

    Raises:
        LoraSuiteError: The text is no such value.
    """
    option, taken = option_of(config, name), kinds(config, name)
    if text == option.absent:
        return None
    if name == "roles":
        return _GROUPS.get(text) or tuple(role.strip() for role in text.split(","))
    if text in words(config, name):
        return text
    if bool in taken:
        raise LoraSuiteError(f"{shown} {text!r}: expected true or false, without quotation marks")
    for kind in (int, float):
        if kind in taken:
            try:
                return kind(text)
            except ValueError:
                if str not in taken and kind is (float if float in taken else int):
                    raise LoraSuiteError(f"{shown} {text}: expected {option.expects}") from None
    return text
