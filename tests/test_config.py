"""The configurations: one set of defaults and bounds for Python, the command line and a file."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, FrozenInstanceError, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from typer.testing import CliRunner

import lorasuite_fast
from lorasuite_fast import (
    ApplyConfig,
    DistillConfig,
    FinetuneConfig,
    LoraSuiteError,
    PlanConfig,
    RefineConfig,
    Runtime,
    VerifyConfig,
    cli,
)
from lorasuite_fast.cli import carrying, training, verification
from lorasuite_fast.cli.given import flags
from lorasuite_fast.config.fields import kinds, read_value, settings, words
from lorasuite_fast.config.flat import takes_flat_keywords
from lorasuite_fast.config.run_file import SECTIONS, read_run
from lorasuite_fast.pipeline.migrate import older_keywords
from lorasuite_fast.transfer.projection import METHODS

PAGE = Path(__file__).parents[1] / "docs/reference/options.md"
COMMANDS: dict[Callable[..., Any], tuple[type, ...]] = {
    carrying.migrate: (PlanConfig, ApplyConfig, DistillConfig, RefineConfig, FinetuneConfig, Runtime),
    carrying.plan: (PlanConfig, Runtime),
    carrying.apply: (ApplyConfig, DistillConfig, Runtime),
    training.refine: (RefineConfig, Runtime),
    training.finetune: (FinetuneConfig, Runtime),
    verification.verify: (VerifyConfig, Runtime),
}
ARGUMENTS = {
    "context",
    "old",
    "new",
    "adapter",
    "adapters",
    "out",
    "old_adapter",
    "model",
    "models",
    "data",
    "plan_file",
}
OF_THE_COMMAND = {"overwrite", "as_json", "run_file"}


def table() -> str:
    """The fields as the page shows them."""
    lines: list[str] = []
    for section, config in SECTIONS.items():
        lines += [f"### `{section}`: {config.__name__}", "", "| field | default | what it is |", "|---|---|---|"]
        for f in settings(config):
            default = "" if f.default is None or f.default is MISSING else f"`{f.default}`"
            lines.append(f"| `{f.name}` | {default} | {f.metadata['option'].help} |")
        lines.append("")
    return "\n".join(lines)


def test_the_page_of_options_shows_every_field() -> None:
    _, _, rest = PAGE.read_text("utf-8").partition("<!-- fields -->\n")
    assert rest.partition("<!-- end of fields -->")[0].strip() == table().strip()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_option_is_a_field_with_its_default(command: Callable[..., Any]) -> None:
    compared = 0
    for name, parameter in inspect.signature(command).parameters.items():
        if name in ARGUMENTS | OF_THE_COMMAND:
            continue
        simple = parameter.default is not None
        owners = [f for config in COMMANDS[command] for f in settings(config)]
        known = [f for f in owners if name.endswith(f.name) or f"--{name}" in f.metadata["option"].flags]
        known += [f for f in owners if (name, f.name) in {("refine", "steps"), ("finetune", "data"),
                                                           ("finetune_rate", "learning_rate"),
                                                           ("report_file", "report")}]  # fmt: skip
        assert known, name
        assert not simple or parameter.default in [f.default for f in known], name
        compared += simple
    assert compared >= 3


def test_the_methods_that_can_be_named_are_those_that_there_are() -> None:
    assert words(PlanConfig, "method") == ("auto", *METHODS)


@pytest.mark.parametrize("config", SECTIONS.values(), ids=lambda config: config.__name__)
def test_configurations_are_frozen_and_every_field_has_a_default(config: type) -> None:
    made = config()
    for f in fields(made):
        with pytest.raises(FrozenInstanceError):
            setattr(made, f.name, None)


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (PlanConfig, "method", "best", "method 'best' is not one of auto, copy, lstsq, paper, distill"),
        (PlanConfig, "examples", 3, "examples is 3; it must be at least 4"),
        (PlanConfig, "roles", ("q", "x"), "role 'x' is not one of q, k, v, o, gate, up, down"),
        (RefineConfig, "steps", 0, "steps is 0; it must be auto or at least 1"),
        (RefineConfig, "steps", "many", "steps is 'many'; it must be auto or a number of steps"),
        (RefineConfig, "imitation", 1.5, "imitation is 1.5; it must be from 0 to 1"),
        (RefineConfig, "kl_weight", 0.0, "kl_weight is 0.0, next_token_weight 0.0; one must be above 0"),
        (FinetuneConfig, "learning_rate", 0.0, "learning_rate is 0.0; it must be above 0"),
        (FinetuneConfig, "learning_rate", float("nan"), "learning_rate is nan; it must be above 0"),
        (FinetuneConfig, "dropout", 1.0, "dropout is 1.0; it must be at least 0 and below 1"),
        (Runtime, "memory", "much", "`memory=much`: expected a size"),
    ],
)
def test_a_value_out_of_bounds_is_refused(config: type, field: str, value: Any, message: str) -> None:
    with pytest.raises(LoraSuiteError) as refused:
        config(**{field: value})
    assert str(refused.value).startswith(message)


OTHER_TYPES = (True, None, 2.5, "x", b"x", [3], {"a": 1}, object, Path("x"), {3}, 10**400, float("inf"))


@pytest.mark.parametrize("config", SECTIONS.values(), ids=lambda config: config.__name__)
def test_a_value_of_another_type_is_one_error_and_never_kept(config: type) -> None:
    hints, refused = get_type_hints(config), []
    for f in settings(config):
        for value in OTHER_TYPES:
            try:
                kept = getattr(config(**{f.name: value}), f.name)
            except LoraSuiteError as error:
                refused.append(str(error))
            else:
                assert any(belongs(kept, kind) for kind in parts_of(hints[f.name])), (f.name, value)
    assert refused
    for said in refused:
        assert "; " in said or "is not one of" in said or "expected" in said
        assert "\n" not in said


def parts_of(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def belongs(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, read plainly: a bool is no number, an int is a float, words are texts."""
    origin = get_origin(kind) or kind
    if isinstance(value, bool) or origin is bool:
        return isinstance(value, bool) and origin is bool
    if origin in (Sequence, tuple):
        return isinstance(value, list | tuple | set)
    if origin is Literal:
        return value in get_args(kind)
    return isinstance(value, (int, float) if origin is float else origin)


@pytest.mark.parametrize("roles", [(), ("q", "q"), "q", 3, ["attention"]])
def test_roles_are_a_list_of_different_ones(roles: Any) -> None:
    for config in (PlanConfig, DistillConfig, RefineConfig, FinetuneConfig):
        with pytest.raises(LoraSuiteError, match="role"):
            config(roles=roles)


def test_what_is_no_configuration_is_refused_by_its_parameter() -> None:
    for given in ({"plan": {"method": "lstsq"}}, {"plan": Runtime()}, {"refine": True}):
        with pytest.raises(LoraSuiteError, match=rf"{next(iter(given))}: is .*; pass \w+Config\("):
            lorasuite_fast.migrate("old", "new", "adapter", "out", **given)  # type: ignore[arg-type]


def test_values_at_their_bounds_are_taken() -> None:
    assert PlanConfig(examples=4, ridge=0.0).examples == 4
    assert RefineConfig(imitation=1.0, kl_weight=0.0, next_token_weight=1.0).imitation == 1.0
    assert FinetuneConfig(dropout=0.0).dropout == 0.0


@pytest.mark.parametrize(
    ("config", "field", "text", "value"),
    [
        (RefineConfig, "top_k", "all", None),
        (RefineConfig, "top_k", "64", 64),
        (RefineConfig, "patience", "0", None),
        (RefineConfig, "steps", "auto", "auto"),
        (PlanConfig, "roles", "attention", ("q", "k", "v", "o")),
        (PlanConfig, "roles", "q, v", ("q", "v")),
        (FinetuneConfig, "validation", "0.1", 0.1),
        (FinetuneConfig, "validation", "held.jsonl", "held.jsonl"),
        (FinetuneConfig, "learning_rate", "1e-3", 1e-3),
    ],
)
def test_a_text_is_read_as_the_field_takes_it(config: type, field: str, text: str, value: Any) -> None:
    assert read_value(config, field, text, field) == value


def test_a_text_that_is_no_value_is_refused() -> None:
    with pytest.raises(LoraSuiteError, match="--steps soon: expected auto or a number of steps"):
        read_value(RefineConfig, "steps", "soon", "--steps")


def run_file(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


def test_a_file_holds_sections_of_fields(tmp_path: Path) -> None:
    text = "plan:\n  method: lstsq\n  ridge: 1e-3\nrefine:\n  steps: 30\n  roles: [q, v]\n  patience: 0\nruntime:\n"
    found = read_run(run_file(tmp_path, text))
    assert found == {
        PlanConfig: {"method": "lstsq", "ridge": 1e-3},
        RefineConfig: {"steps": 30, "roles": ("q", "v"), "patience": None},
        Runtime: {},
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plans:\n  method: lstsq\n", "has no section 'plans'; did you mean plan?"),
        ("plan:\n  metod: lstsq\n", "plan has no field 'metod'; did you mean method?"),
        ("plan: lstsq\n", "plan holds no names with values"),
        ("plan: [\n", "is not YAML"),
        ("refine:\n  steps: soon\n", "refine.steps soon: expected auto or a number of steps"),
        ("!!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("plan:\n  calibration: 2001-99-99\n", "is not YAML"),
        (f"plan:\n  seed: {'9' * 6000}\n", "is not YAML"),
        ("plan:\n  examples: 8\n  examples: 9\n", "examples stands twice"),
        ("plan: {}\nrefine: {}\nplan: {}\n", "plan stands twice"),
        ('runtime:\n  trust_remote_code: "false"\n', "runtime.trust_remote_code 'false': expected true or false"),
        ("finetune:\n  completion_only: 1\n", "run.yaml: finetune: completion_only is 1; it must be true or false"),
        ("plan:\n  examples: 8.5\n", "run.yaml: plan: examples is 8.5; it must be a whole number"),
        ("plan:\n  calibration: 2020-01-01\n", "it must be a text"),
        ("plan:\n  roles: []\n", "roles is []; name one or more of"),
    ],
)
def test_what_a_file_must_not_hold_is_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError) as refused:
        read_run(run_file(tmp_path, text))
    assert words in str(refused.value)


def test_no_steps_of_refinement_in_a_file_are_none(tmp_path: Path) -> None:
    assert read_run(run_file(tmp_path, "refine:\n  steps: 0\n")) == {RefineConfig: {"steps": 0}}
    with pytest.raises(LoraSuiteError, match=r"run\.yaml: refine: steps is -1"):
        read_run(run_file(tmp_path, "refine:\n  steps: -1\n"))


def test_the_command_line_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}

    def stop(*_: Any, **options: Any) -> None:
        taken.update(options)
        raise LoraSuiteError("stop")

    monkeypatch.setattr("lorasuite_fast.pipeline.migrate.migrate", stop)
    paths = [tmp_path / name for name in ("old", "new", "adapter", "out")]
    for folder in paths[:3]:
        folder.mkdir()
    file = run_file(tmp_path, "plan:\n  method: lstsq\n  examples: 9\ndistill:\n  seed: 3\nrefine:\n  steps: 7\n")
    given = ["migrate", *map(str, paths), "--config", str(file), "--examples", "8"]
    result = CliRunner().invoke(cli.app, given)
    assert "error: stop" in result.output
    assert taken["plan"] == PlanConfig(method="lstsq", examples=8)
    assert taken["apply"] == ApplyConfig(distill=DistillConfig(seed=3))
    assert taken["refine"] == RefineConfig(steps=7)
    assert taken["finetune"] is None
    result = CliRunner().invoke(cli.app, [*given, "--refine", "0"])
    assert taken["refine"] is False


def test_a_flag_is_typed_from_its_field() -> None:
    made = {flag.name: flag for flag in flags(PlanConfig, "examples", "method", "calibration", "roles")}
    assert made["examples"].parameter.default == 64
    assert made["calibration"].parameter.default is None
    assert kinds(PlanConfig, "examples") == (int,)


def test_keywords_of_old_are_moved_with_a_warning() -> None:
    @takes_flat_keywords(older_keywords, plan=PlanConfig, apply=ApplyConfig, runtime=Runtime)
    def migrate(**given: Any) -> dict[str, Any]:
        return given

    with pytest.warns(DeprecationWarning, match="goes with the next release") as told:
        found = migrate(
            method="lstsq", device="cpu", settings=DistillConfig(rank=2), refine=5, refine_text="a.txt",
            finetune="samples.jsonl", finetune_options={"epochs": 1}, plan=PlanConfig(examples=8),
        )  # fmt: skip
    assert found == {
        "plan": PlanConfig(method="lstsq", examples=8),
        "apply": ApplyConfig(distill=DistillConfig(rank=2)),
        "runtime": Runtime(device="cpu"),
        "refine": RefineConfig(steps=5, text="a.txt"),
        "finetune": FinetuneConfig("samples.jsonl", epochs=1),
    }
    assert len(told) == 6
    assert "method is PlanConfig.method now, pass plan=PlanConfig(method=…)" in str(told[-2].message)


@pytest.mark.parametrize(("old", "new"), [(0, False), ("auto", RefineConfig()), (3, RefineConfig(steps=3))])
def test_a_number_as_refine_is_a_configuration(old: int | str, new: Any) -> None:
    given: dict[str, Any] = {"refine": old}
    assert len(list(older_keywords(given))) == 1
    assert given["refine"] == new


def test_a_keyword_that_was_never_there_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="no_such"):
        lorasuite_fast.verify("a", None, "b", None, no_such=1)  # type: ignore[call-arg]
