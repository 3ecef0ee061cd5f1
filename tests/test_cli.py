"""The command line prints what it did, and finds models in the hub's cache when offline."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lorasuite_fast
from lorasuite_fast import __version__
from lorasuite_fast.cli.app import app
from lorasuite_fast.cli.running import with_flags

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("cli")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "adapter", targets=["q_proj", "down_proj"], rank=2, alpha=4, seed=0)
    return root


def invoke(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_migrate_prints_every_new_layer_and_phase(root: Path, tmp_path: Path) -> None:
    arguments = (root / "old", root / "new", root / "adapter", tmp_path / "out", "--method", "lstsq", "--examples", 8)
    text = invoke("migrate", *arguments)
    assert "no partner, no update" in text
    assert text.count("down\u00a0") == 2
    for phase in (
        "open",
        "transfer matrix",
        "old hidden states",
        "new hidden states",
        "heads and projections",
        "apply",
    ):
        assert phase in text
    assert "No linear map carries one embedding onto the other" in text
    assert "MiB" in text


def test_json_is_one_object_with_the_same_facts(root: Path, tmp_path: Path) -> None:
    arguments = (root / "old", root / "new", root / "adapter", tmp_path / "out", "--examples", 8, "--json")
    result = json.loads(invoke("migrate", *arguments, "--method", "lstsq"))
    assert len(result["layers"]) == 2
    assert len(result["unpartnered_new_layers"]) == 1
    for layer in result["layers"]:
        assert set(layer["update"]) == {"q", "down"}
        assert layer["head_similarity"] is not None
        assert layer["neuron_similarity"] is not None
    assert result["options"]["method"] == "lstsq"
    assert result["facts"]["shared_tokens"] >= 256
    assert {"name", "seconds", "peak_memory", "peak_resident", "peak_device_memory", "predicted"} == set(
        result["phases"][0]
    )
    assert result["new"]["shape"]["L"] == 3


def test_a_rank_makes_auto_a_distillation_that_says_what_arrived(root: Path, tmp_path: Path) -> None:
    arguments = (root / "old", root / "new", root / "adapter", tmp_path / "out", "--rank", 3)
    text = " ".join(invoke("migrate", *arguments).split())
    assert "method: distill, asked for" in text
    assert "agreement with the old adapter on held-out text" in text
    assert "│ 0 │ 0 │" in text.replace("┃", "│")
    assert "not fitted, no update" in text
    assert "explained" in text
    assert "WARNING: " in text
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 3


def test_plan_then_apply_gives_what_migrate_gives(root: Path, tmp_path: Path) -> None:
    options = ("--examples", 8, "--seed", 3)
    invoke("migrate", root / "old", root / "new", root / "adapter", tmp_path / "direct", *options)
    planned = json.loads(invoke("plan", root / "old", root / "new", tmp_path / "plan", *options, "--json"))
    assert planned["options"]["roles"] == ["q", "k", "v", "o", "gate", "up", "down"]
    invoke("apply", tmp_path / "plan", root / "adapter", tmp_path / "applied", "--old", root / "old")
    direct, applied = (tmp_path / n / "adapter_model.safetensors" for n in ("direct", "applied"))
    assert direct.read_bytes() == applied.read_bytes()


def test_plan_covers_the_roles_it_is_asked_for(root: Path, tmp_path: Path) -> None:
    planned = json.loads(
        invoke("plan", root / "old", root / "new", tmp_path / "plan", "--roles", "q,v", "--examples", 8, "--json")
    )
    assert planned["options"]["roles"] == ["q", "v"]


def test_a_text_file_calibrates(root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a longer text\n" * 30 for i in range(12)))
    arguments = (root / "old", root / "new", root / "adapter", tmp_path / "out")
    result = json.loads(invoke("migrate", *arguments, "--calibration", tmp_path / "text.txt", "--json"))
    assert result["options"]["calibration"] == str(tmp_path / "text.txt")
    assert 8 <= result["options"]["examples"] <= 12


def test_version() -> None:
    assert invoke("--version").strip() == f"lorasuite-fast {__version__}"


def test_a_hub_id_is_found_in_the_offline_cache(root: Path, tmp_path: Path) -> None:
    for name in ("old", "new"):
        repo = tmp_path / f"hub/models--someone--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs/main").write_text("0" * 40)
        shutil.copytree(root / name, repo / "snapshots" / ("0" * 40))
    command = [sys.executable, "-m", "lorasuite_fast", "migrate", "someone/old", "someone/new"]
    done = subprocess.run(
        [*command, str(root / "adapter"), str(tmp_path / "out"), "--examples", "8", "--json"],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new"]["name"] == "someone/new"
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/new"


def test_the_core_names_parameters_and_the_command_line_flags() -> None:
    package = Path(lorasuite_fast.__file__).parent
    flags = {
        (file.relative_to(package).as_posix(), node.lineno): node.value
        for file in sorted(package.rglob("*.py"))
        # The fields of a configuration say how the command line spells them.
        if file.relative_to(package).parts[0] not in ("cli", "reporting")
        if file.relative_to(package).as_posix() != "config/sections.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"(?<![\w-])--[a-z]", node.value)
    }
    # A docstring may say which flag prints what it returns; --max-lora-rank is vLLM's.
    assert [text for text in flags.values() if "`--json` prints" not in text and "--max-lora" not in text] == []
    told = "OUT `x`: exists already; pass `overwrite=True`, `memory=12MiB`, `distill.layers` or `refine_text`"
    assert with_flags(told) == (
        "OUT `x`: exists already; pass --overwrite, --memory 12MiB, --distill-layers or --refine-text"
    )
