"""What is installed is what is pinned, and every pin has the hash of its file."""

from __future__ import annotations

import re
from importlib.metadata import distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return {canonical(name): version for name, version in found.items()}


def test_every_pin_has_the_hash_of_its_file() -> None:
    locked = {}
    for line in (ROOT / "requirements-locked.txt").read_text().splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
            assert match, line
            # A local version, as torch's for CPUs, is a build of the pinned one.
            locked[canonical(match[1])] = match[2].partition("+")[0]
    assert locked == pins()


def test_everything_installed_is_pinned_at_its_version() -> None:
    wanted = pins()
    reached, queue = set(), ["lorasuite-fast"]
    installed = {canonical(found.name): found.version.partition("+")[0] for found in distributions()}
    while queue:
        name = queue.pop()
        extras = ("test", "triton", "plot") if name == "lorasuite-fast" else ("",)
        for text in requires(name) or ():
            requirement = Requirement(text)
            wants = [requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in extras]
            needed = canonical(requirement.name)
            if any(wants) and needed in installed and needed not in reached:
                reached.add(needed)
                queue.append(needed)
    assert len(reached) > 30
    differing = {name: (installed[name], wanted.get(name)) for name in reached if installed[name] != wanted.get(name)}
    assert not differing


def test_every_dependency_is_declared_and_pinned() -> None:
    declared = {canonical(Requirement(text).name) for text in requires("lorasuite-fast") or ()}
    assert declared <= set(pins())
