"""Assembles build/torch-cpu, build/torch-cuda and build/torch-rocm, as kernel-builder does for Python kernels.

    python kernels/build_variants.py [--output FOLDER]

kernel-builder needs Nix; a kernel without compiled code needs neither.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent

OPS = '''import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """Prefix op by namespace."""
    return f"{namespace}::{{op_name}}"
'''


def build(output: Path) -> list[Path]:
    """Writes one variant per backend of build.toml under `output`, replacing what is there; returns their folders."""
    general = tomllib.loads((ROOT / "build.toml").read_text())["general"]
    package = general["name"].replace("-", "_")
    sources = sorted((ROOT / "torch-ext" / package).glob("*.py"))
    digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()[:7]
    variants = []
    for backend in general["backends"]:
        # Two versions of a kernel may be loaded side by side: modules and operators are named after their source.
        name = f"_{package}_{backend}_{digest}"
        variant = output / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        variant.mkdir(parents=True)
        for path in sources:
            shutil.copy(path, variant / path.name)
        (variant / "_ops.py").write_text(OPS.format(namespace=name))
        metadata = {
            "id": name,
            "name": general["name"],
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    return variants


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="where the variants go (kernels/build)")
    for folder in build(parser.parse_args().output):
        print(folder)
