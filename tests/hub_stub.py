"""Stands for the hub where something is uploaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import RepoUrl


class Hub:
    """huggingface_hub's API as far as it is used here; keeps what it was asked for."""

    def __init__(self) -> None:
        self.created: dict[str, Any] = {}
        self.uploaded: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **options: Any) -> RepoUrl:
        self.created = {"repo_id": repo_id, **options}
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        self.uploaded = options
        self.files = {path.name: path.read_bytes() for path in Path(options["folder_path"]).iterdir()}
        return SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}/commit/1")
