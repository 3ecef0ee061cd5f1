"""Writes requirements-locked.txt: every pin of constraints.txt with the SHA-256 of the file this environment gets.

    .venv/bin/python .ci/lock.py

The hashes are those of the wheels for this Python on this machine; pip refuses anything else: `make test LOCKED=1`.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    asked = subprocess.run(
        [*command, "--report", "-", "-r", str(ROOT / "constraints.txt")], check=True, stdout=subprocess.PIPE, text=True
    )
    lines = [
        f"# {platform.system()} {platform.machine()}, {platform.python_implementation()} "
        f"{'.'.join(platform.python_version_tuple()[:2])}; written by .ci/lock.py from constraints.txt",
    ]
    for item in sorted(json.loads(asked.stdout)["install"], key=lambda item: item["metadata"]["name"].lower()):
        metadata, digest = item["metadata"], item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{metadata['name']}=={metadata['version']} --hash=sha256:{digest}")
    (ROOT / "requirements-locked.txt").write_text("\n".join(lines) + "\n")
    print(f"requirements-locked.txt: {len(lines) - 1} files")


if __name__ == "__main__":
    main()
