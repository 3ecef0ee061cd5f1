"""The package's rooms: which looks at which, and how large anything may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lorasuite_fast"
FLOORS = [
    {"_version", "_moved", "errors", "interrupts"},
    {"io"},
    {"config"},
    {"models"},
    {"adapters"},
    {"text"},
    {"transfer"},
    {"evaluation", "training"},
    {"distillation"},
    {"results"},
    {"reporting"},
    {"pipeline"},
    {"cli"},
]
"""The lowest first. A room looks at the floors below it, never at another room of its own floor."""
DOORS = {"__init__", "__main__"}
"""Modules that lead to every room."""
MOST_MODULES, MOST_LINES, MOST_FUNCTION, MOST_PARAMETERS = 14, 450, 80, 10
LONG = {
    "distillation.distill.distill",
    "training.teacher.write_targets",
}
"""Functions still too long; the list may only become shorter."""
WIDE = {
    "distillation.distill.distill",
    "distillation.distilled_adapter.distil_adapter",
    "models.hidden_states.LayerStream.__init__",
    "training.teacher._new_pass",
    "training.teacher.write_targets",
}
"""Functions still with too many parameters; the list may only become shorter."""


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> its tree."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = name.split(".")[: -node.level]
            found = ".".join([*base, *([node.module] if node.module else [])])
            yield from ([found] if node.module else [".".join([*base, alias.name]) for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorasuite_fast."):
            yield str(node.module).removeprefix("lorasuite_fast.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lorasuite_fast."):
                    yield alias.name.removeprefix("lorasuite_fast.")


def floor(name: str) -> int:
    room = name.partition(".")[0]
    return next(n for n, rooms in enumerate(FLOORS) if room in rooms)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    def inside(node: ast.AST, where: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{where}.{child.name}", child
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from inside(child, f"{where}.{child.name}")
            elif isinstance(child, ast.If | ast.With | ast.Try):
                yield from inside(child, where)

    for name, tree in modules().items():
        yield from inside(tree, name)


def test_every_module_has_a_room() -> None:
    known = DOORS.union(*FLOORS)
    assert {name.partition(".")[0] for name in modules()} <= known


def test_imports_look_down_alone() -> None:
    upward = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        if name.partition(".")[0] not in DOORS
        for target in imports(name, tree)
        if floor(target) > floor(name)
        or (floor(target) == floor(name) and target.partition(".")[0] != name.partition(".")[0])
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: set(imports(name, tree)) for name, tree in modules().items() if name not in DOORS}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for target in graph.get(name, ()):
            visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_rooms_are_small() -> None:
    folders = [PACKAGE, *(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists())]
    sizes = {folder.name: len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) for folder in folders}
    assert {name: size for name, size in sizes.items() if size > MOST_MODULES} == {}


def test_modules_are_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_functions_are_short() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    long = {name for name, length in lengths.items() if length > MOST_FUNCTION}
    assert long == LONG


def test_functions_take_few_parameters() -> None:
    def count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return len([a for a in taken if a.arg not in ("self", "cls")])

    assert {name for name, node in functions() if count(node) > MOST_PARAMETERS} == WIDE


@pytest.mark.parametrize("name", ["plan", "refinement", "figures", "samples"])
def test_old_module_names_warn_and_lead_to_the_new_ones(name: str) -> None:
    import sys
    from importlib import import_module

    from lorasuite_fast._moved import MOVED

    sys.modules.pop(f"lorasuite_fast.{name}", None)
    with pytest.warns(DeprecationWarning, match=f"lorasuite_fast.{name} is lorasuite_fast.{MOVED[name]} now"):
        old = import_module(f"lorasuite_fast.{name}")
    assert old is import_module(f"lorasuite_fast.{MOVED[name]}")


@pytest.mark.parametrize(("room", "name"), [("transfer", "build_transfer"), ("distillation", "Settings")])
def test_names_of_old_modules_called_as_rooms_warn(room: str, name: str) -> None:
    from importlib import import_module

    module = import_module(f"lorasuite_fast.{room}")
    with pytest.warns(DeprecationWarning, match=f"lorasuite_fast.{room}.{name} is"):
        assert callable(getattr(module, name))
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018
