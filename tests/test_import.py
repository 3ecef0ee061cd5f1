"""Heavy packages wait until they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROBE = """
import sys, torch, lorasuite_fast
assert not {"transformers", "triton", "peft", "scipy", "safetensors"} & set(sys.modules), sorted(sys.modules)
"""


def python(code: str, cwd: Path | None = None) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd).stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    python(PROBE)


def test_public_names_resolve() -> None:
    import lorasuite_fast

    for name in lorasuite_fast.__all__:
        assert getattr(lorasuite_fast, name) is not None


def test_nothing_of_ours_shadows_the_kernels_package() -> None:
    root = Path(__file__).parents[1]
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s and s.origin else None)"
    assert not (root / "kernels/__init__.py").exists()
    assert str(root / "kernels") not in python(code, cwd=root)


def test_the_kernels_know_nothing_of_models() -> None:
    code = (
        "import sys, lorasuite_kernels; print({'transformers', 'peft', 'lorasuite_fast', 'scipy'} & set(sys.modules))"
    )
    assert python(code).strip() == "set()"
