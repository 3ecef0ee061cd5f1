"""The kernel project as the Kernel Hub sees it."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from lorasuite_kernels import cka, project_heads

KERNELS = Path(__file__).resolve().parent.parent / "kernels"


def build(folder: Path) -> Path:
    command = [sys.executable, str(KERNELS / "build_variants.py"), "--output", str(folder / "build")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "build"


def run_beside_build(folder: Path, *arguments: str) -> str:
    """Output of Python in a process that can import the package `kernels`, but nothing of the repository."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        pytest.skip("the package `kernels` is not installed")
    site = str(Path(spec.origin).parent.parent)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": site}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_cannot_be_imported_in_place_of_the_hub_package() -> None:
    assert not (KERNELS / "__init__.py").exists()


def test_the_sources_import_only_torch_triton_and_the_standard_library() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in (KERNELS / "torch-ext" / "lorasuite_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] in allowed, path


def test_every_backend_of_build_toml_becomes_a_variant(tmp_path: Path) -> None:
    backends = tomllib.loads((KERNELS / "build.toml").read_text())["general"]["backends"]
    folders = sorted(path.name for path in build(tmp_path).iterdir())
    assert folders == sorted(f"torch-{backend}" for backend in backends)
    for folder in folders:
        assert (tmp_path / "build" / folder / "metadata.json").is_file()


def test_the_built_kernel_loads_through_the_hub_package_and_gives_the_same_numbers(tmp_path: Path) -> None:
    build(tmp_path)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 9, 5, generator=generator), torch.randn(3, 9, 4, generator=generator)
    heads = [torch.randn(8, 6, generator=generator), torch.randn(4, 6, generator=generator), x[0, :8]]
    match = [torch.tensor([1, 0]), torch.tensor([0.5, 0.5])]
    torch.save((x, y, heads, match), tmp_path / "inputs.pt")
    code = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
k = get_local_kernel(Path.cwd(), backend="cpu")
x, y, heads, match = torch.load("inputs.pt")
assert "lorasuite_kernels" not in sys.modules
torch.save((k.cka(x, y), k.project_heads(*heads, *match, blocks=(2, 1))), "outputs.pt")
print(k.__file__)
"""
    assert str(tmp_path) in run_beside_build(tmp_path, "-c", code)
    similarity, projected = torch.load(tmp_path / "outputs.pt")
    assert torch.equal(similarity, cka(x, y))
    assert torch.equal(projected, project_heads(*heads, *match, blocks=(2, 1)))


def test_the_example_runs_from_the_assembled_build(tmp_path: Path) -> None:
    build(tmp_path)
    shutil.copy(KERNELS / "example.py", tmp_path)
    printed = run_beside_build(tmp_path, "example.py")
    assert "CKA (6, 8)" in printed
    assert "projected factors (64, 8)" in printed
