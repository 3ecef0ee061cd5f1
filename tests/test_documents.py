"""Every command and every snippet of the README and the documentation runs.

A page's blocks run one after the other in a folder that holds what the pages speak of: tiny models under the names
`old-model` and `new-model`, adapters, texts. Options a page leaves at defaults that take minutes are made cheap through
the environment, as click offers it (`CHEAP`); what a page writes is run as it is written. What cannot run here is named
in `NOT_RUN`, with the reason.
"""

from __future__ import annotations

import ast
import glob
import importlib.util
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import RepoUrl
from typer.testing import CliRunner

import lorasuite_fast
from lorasuite_fast.cli.app import app

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "lorasuite_fast/demo"
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PREFIX = "LORASUITE_FAST"

NOT_RUN = {
    "make demo": "takes minutes; its steps have tests of their own",
    "make test": "is what runs this",
    "make docs": "needs the extra `docs`",
    "pip install .": "tests/test_release.py builds what it installs",
    "lorasuite-fast verify meta-llama": "needs models of the hub; the same command runs with tiny models",
    "lorasuite-fast migrate meta-llama": "needs models of the hub; the same command runs with tiny models",
    "python examples/checkpoint_cka.py": "tests/test_examples.py runs it",
    "torchrun": "tests/test_ranks.py runs several processes",
}
"""Commands that are not run here, by their beginning, and why."""

CHEAP = {
    "MIGRATE_EXAMPLES": "16",
    "MIGRATE_DISTILL_LAYERS": "1",
    "MIGRATE_FINETUNE_EPOCHS": "1",
    "PLAN_EXAMPLES": "16",
    "VERIFY_EXAMPLES": "12",
    "VERIFY_MAX_TOKENS": "96",
    "REFINE_TEXT_BYTES": "12000",
    "REFINE_STEPS": "2",
    "REFINE_EVAL_EVERY": "1",
    "FINETUNE_STEPS": "2",
    "FINETUNE_MAX_TOKENS": "256",
} | {f"{command}_OVERWRITE": "1" for command in ("MIGRATE", "PLAN", "APPLY", "REFINE", "FINETUNE")}
"""A page may show several ways to write one folder, hence the last ones."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line it begins on."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(m[1].strip(), m[2], m.string[: m.start(2)].count("\n") + 1) for m in found]


def commands(block: Block) -> list[str]:
    """One command a line; a backslash joins lines, and what follows a # is a remark."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := shlex.join(shlex.split(line, comments=True)).replace("'", ""))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Hub:
    """Stands for the hub: what is uploaded can be fetched again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, **_: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> SimpleNamespace:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    def download(self, repo_id: str, filename: str, **_: Any) -> str:
        return str(self.folder / repo_id / filename)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything the pages name."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    for folder, seed, layers in (("old-model", 1, 2), ("new-model", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / folder)
    for n, folder in enumerate(("my-adapter", "adapters/first", "adapters/second")):
        targets = ["q_proj", "v_proj", "o_proj"]
        random_adapter(root / "old-model", root / folder, targets=targets, rank=2, alpha=4, seed=n, size=0.5)
    shutil.copy(DEMO / "domain_test.txt", root / "my-domain.txt")
    records = [{"instruction": f"Say {n}.", "output": f"{n}, as you wish."} for n in range(12)]
    (root / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    # In the place of the demo models, which the tutorial and the notebook use.
    demo = root / "lorasuite_fast/demo"
    for folder, source in (("old", "old-model"), ("new", "new-model"), ("adapter", "my-adapter")):
        shutil.copytree(root / source, demo / folder)
    (demo / "domain_train.txt").write_text((DEMO / "domain_train.txt").read_text("utf-8")[:2000])
    return root


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty, with no network and the hub replaced."""
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run_command(command: str) -> None:
    words = shlex.split(command)
    assert words[0] == "lorasuite-fast", f"{command}: is neither one of our commands nor named in NOT_RUN"
    arguments = [path for word in words[1:] for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    environment = {f"{PREFIX}_{key}": value for key, value in CHEAP.items()}
    result = CliRunner(env=environment | {"COLUMNS": "100"}).invoke(app, arguments, auto_envvar_prefix=PREFIX)
    assert result.exit_code == 0, f"{command}: {result.output}"


def run_python(code: str, where: str, namespace: dict[str, Any]) -> None:
    if "trl" in imported(code) and importlib.util.find_spec("trl") is None:
        return  # tests/test_ecosystem.py trains with it where it is installed.
    exec(compile(code, where, "exec"), namespace)


def imported(code: str) -> set[str]:
    return {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name)
def test_everything_a_page_says_to_run_runs(page: Path, world: Path, here: Path) -> None:
    if page.name != "tutorial.md":  # which begins with an empty folder
        shutil.copytree(world, here, dirs_exist_ok=True)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            run_python(block.text, f"{name(page)}, line {block.line}", namespace)
        elif block.language == "console":
            for command in commands(block):
                if not command.startswith(tuple(NOT_RUN)):
                    run_command(command)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_marked_as_something_that_runs_or_as_text(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= {"python", "console", "text"}
    assert page.read_text("utf-8").count("```") == 2 * len(blocks(page))


def test_what_is_not_run_still_stands_on_a_page() -> None:
    written = [c for page in PAGES for b in blocks(page) if b.language == "console" for c in commands(b)]
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in written), beginning


def test_a_command_that_fails_or_is_unknown_is_noticed(world: Path, here: Path) -> None:
    shutil.copytree(world, here, dirs_exist_ok=True)
    with pytest.raises(AssertionError, match="OLD model no-model"):
        run_command("lorasuite-fast migrate no-model new-model my-adapter out")
    with pytest.raises(AssertionError, match="NOT_RUN"):
        run_command("rm -rf something")


def test_the_environment_makes_commands_cheap(world: Path, here: Path) -> None:
    shutil.copytree(world, here, dirs_exist_ok=True)
    run_command("lorasuite-fast plan old-model new-model p --roles q")
    assert lorasuite_fast.TransferPlan.load("p").options["examples"] <= int(CHEAP["PLAN_EXAMPLES"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_runs_from_top_to_bottom(path: Path, here: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for n, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            run_python("".join(cell["source"]), f"{path.name}, cell {n}", namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_is_valid_and_holds_no_output(path: Path) -> None:
    book = json.loads(path.read_text("utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert {"kernelspec", "language_info"} <= book["metadata"].keys()
    identifiers = [cell["id"] for cell in book["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in book["cells"]:
        wanted = {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"outputs", "execution_count"}
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        assert cell.keys() == wanted
        assert all(isinstance(line, str) for line in cell["source"])


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def test_the_picture_is_what_the_reports_say() -> None:
    import picture

    assert picture.PICTURE.read_text("utf-8") == picture.svg()
