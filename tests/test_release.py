"""What is published: the wheel holds all of it, the source distribution builds the same wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lorasuite_fast

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".git", ".venv", ".cache", "build", "dist", "demo-out", "__pycache__", "*.egg-info", ".*_cache")


def python(folder: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def wheel_of(source: Path, out: Path) -> Path:
    python(out.parent, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(source))
    [wheel] = out.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A wheel from the sources, the source distribution, and a wheel from that."""
    root = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT, root / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    python(root / "source", "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(root / 'sdist')!r})")
    [sdist] = (root / "sdist").iterdir()
    return SimpleNamespace(
        wheel=contents(wheel_of(root / "source", root / "first")),
        again=contents(wheel_of(sdist, root / "second")),
        sdist=sdist,
    )


def test_the_wheel_holds_both_packages_the_demo_models_the_text_and_the_types(built: Any) -> None:
    packages = {
        "lorasuite_fast": ROOT / "lorasuite_fast",
        "lorasuite_kernels": ROOT / "kernels/torch-ext/lorasuite_kernels",
    }
    for package, folder in packages.items():
        files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert len(files) > 10
        for path in files:
            assert built.wheel[f"{package}/{path.relative_to(folder).as_posix()}"] == path.read_bytes()
    for name in (
        "lorasuite_fast/py.typed",
        "lorasuite_kernels/py.typed",
        "lorasuite_fast/data/calibration.jsonl",
        "lorasuite_fast/demo/new/model.safetensors",
        "lorasuite_fast/demo/adapter/adapter_model.safetensors",
        "lorasuite_kernels/cka_kernels.py",
    ):
        assert name in built.wheel


def test_the_wheel_holds_nothing_else(built: Any) -> None:
    top = {name.partition("/")[0] for name in built.wheel}
    assert top == {"lorasuite_fast", "lorasuite_kernels", f"lorasuite_fast-{lorasuite_fast.__version__}.dist-info"}
    assert not [name for name in built.wheel if "__pycache__" in name or name.endswith(".pyc")]


def test_the_version_comes_from_one_place(built: Any) -> None:
    info = f"lorasuite_fast-{lorasuite_fast.__version__}.dist-info"
    assert message_from_bytes(built.wheel[f"{info}/METADATA"])["Version"] == lorasuite_fast.__version__
    assert built.sdist.name == f"lorasuite_fast-{lorasuite_fast.__version__}.tar.gz"
    assert b"lorasuite-fast = lorasuite_fast.__main__:main" in built.wheel[f"{info}/entry_points.txt"]


def test_the_source_distribution_builds_the_same_wheel(built: Any) -> None:
    assert built.again == built.wheel


def test_the_source_distribution_holds_tests_documentation_and_the_kernel_project(built: Any) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for part in ("tests", "bench", "docs", "examples", "kernels"):
        files = [p for p in (ROOT / part).rglob("*") if p.is_file()]
        kept = [p.relative_to(ROOT).as_posix() for p in files if not {"__pycache__", "build"} & set(p.parts)]
        assert kept
        assert [name for name in kept if name not in names] == []
    assert {"CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "mkdocs.yml", "setup.py"} <= names
