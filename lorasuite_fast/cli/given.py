"""Options of the command line from the fields of the configurations, and the configurations from what was given."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

import typer

from ..config import Option, option_of
from ..config.fields import OUTPUT, kinds, read_value
from ..config.run_file import read_run
from ..errors import LoraSuiteError
from .options import option
from .running import checks

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """One option of a command.

    Attributes:
        config: The configuration it is a field of.
        field: The field's name.
        name: The parameter's name, which names the option where the field names none.
        help: The help, where the command's differs from the field's.
    """

    config: type
    field: str
    name: str
    help: str | None = None

    @property
    def known(self) -> Option:
        return option_of(self.config, self.field)

    @property
    def shown(self) -> str:
        """The option as a person types it."""
        return self.known.flags[0].partition("/")[0] if self.known.flags else f"--{self.name.replace('_', '-')}"

    @property
    def parameter(self) -> Parameter:
        """As typer reads it. A text stands for what has more than one type, or a type that typer has not."""
        known, taken = self.known, kinds(self.config, self.field)
        plain = [kind for kind in taken if kind is not type(None)]
        settings: dict[str, Any] = {}
        default = next(f.default for f in fields(self.config) if f.name == self.field)
        if plain == [bool]:
            kind: Any = bool
        elif len(plain) == 1 and plain[0] in (int, float):
            kind = plain[0] if type(None) not in taken else plain[0] | None
            settings = {"min": known.least, "max": known.most}
            if plain[0] is int:
                settings = {"min": None if known.least is None else int(known.least)}
        elif len(plain) == 1 and get_origin(plain[0]) is Literal:
            kind = plain[0]
        elif os.PathLike[str] in plain and known.metavar in ("FILE", "DIR"):
            kind, default = Path | None, None
        else:
            kind, default = str | None, None
        if known.absent is not None:
            kind, default, settings = str | None, None, {}
        made = option(known.panel, known.metavar, self.help or known.help, *known.flags, **settings)
        return Parameter(self.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made])


def flags(config: type, *names: str, help: dict[str, str] | None = None, **renamed: str) -> list[Flag]:
    """The options for fields of a configuration.

    Args:
        config: The configuration.
        *names: Fields that name their parameter.
        help: Parameter -> help that differs from the field's.
        **renamed: Parameter -> field.

    Returns:
        One option each.
    """
    told = help or {}
    return [Flag(config, field, name, told.get(name)) for name, field in ({n: n for n in names} | renamed).items()]


class Given:
    """What was given to a command: fields of configurations, from a file and over it from the command line."""

    def __init__(self, file: Path | None, taken: list[Flag], values: dict[str, Any], typed: set[str]) -> None:
        """
        Args:
            file: YAML file of the run.
            taken: The command's options.
            values: Parameter -> value, of those given on the command line or in the environment.
            typed: Those of them on the command line.
        """
        self._flags = {flag.name: flag for flag in taken}
        self._values, self._typed = values, typed
        self._file = {} if file is None else read_run(file)

    def make(self, config: type[T], **further: Any) -> T:
        """The configuration; `further` fields are for what neither the file nor the command line says."""
        return config(**(further | self.values(config)))

    def values(self, config: type) -> dict[str, Any]:
        """The fields given."""
        values = dict(self._file.get(config, {}))
        for name, value in self._values.items():
            flag = self._flags[name]
            if flag.config is config:
                text = isinstance(value, str)
                values[flag.field] = read_value(config, flag.field, value, flag.shown) if text else value
        return values

    def has(self, config: type) -> bool:
        """Whether the file has the section, or the command line one of its options."""
        return self.in_file(config) or any(self._flags[name].config is config for name in self._values)

    def in_file(self, config: type) -> bool:
        """Whether the file has the section."""
        return config in self._file

    def only_for(self, fits: bool, purpose: str, *names: str) -> None:
        """Refuses options that were given and would be left unused."""
        for name in names:
            flag = self._flags[name]
            if not fits and (name in self._typed or flag.field in self._file.get(flag.config, {})):
                raise LoraSuiteError(f"{self._flags[name].shown} is for {purpose}")


def options_of(*groups: list[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `flags`; what was given comes as its first argument, a `Given`."""
    taken = [flag for group in groups for flag in group]
    file = Parameter(
        "run_file",
        Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None, option(OUTPUT, "FILE", "YAML with sections such as plan, runtime; options win", "--config")
        ],
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in list(signature(command).parameters.values())[1:]]
        made = [flag.parameter for flag in taken]

        @wraps(command)
        def run(context: typer.Context, **values: Any) -> None:
            named = {p.name for p in made}
            sources = {name: context.get_parameter_source(name) for name in named}
            typed = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
            told = typed | {name for name, source in sources.items() if source is not None and "ENV" in source.name}
            with checks():
                given = Given(values["run_file"], taken, {name: values[name] for name in told}, typed)
            command(given, **{p.name: values[p.name] for p in own})

        context = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in [context, *own, *made, file]]
        run.__dict__["__signature__"] = signature(command).replace(parameters=parameters, return_annotation=None)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__dict__.pop("__wrapped__", None)
        return run

    return decorate
