"""A plan as a folder and on the hub: what is written, what may leave this machine, what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_stub import Hub
from huggingface_hub import ModelCard, errors
from markdown_it import MarkdownIt
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorasuite_fast import ApplyConfig, LoraSuiteError, PlanConfig, TransferPlan
from lorasuite_fast.cli.app import app
from lorasuite_fast.cli.tables import print_transfer
from lorasuite_fast.reporting.html_report import report_html
from lorasuite_fast.reporting.inspection import print_plan
from lorasuite_fast.reporting.plan_folder import plan_card

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

FILES = ["README.md", "transfer_plan.safetensors"]
NAMES = {"old_model": "someone/old", "new_model": "someone/new"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("secret-place")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "adapter", targets=["q_proj", "o_proj"], rank=2, alpha=4, seed=0)
    text = root / "text.jsonl"
    text.write_text("".join(f'{{"text": "the red fox number {n} sat on the mat in the rain"}}\n' for n in range(12)))
    plan = TransferPlan.build(
        root / "old", root / "new", config=PlanConfig(method="lstsq", examples=8, calibration=text)
    )
    return SimpleNamespace(root=root, plan=plan)


def test_a_saved_folder_opens_as_the_same_plan(made: Any, tmp_path: Path) -> None:
    assert made.plan.save_pretrained(tmp_path / "plan") is None
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == FILES
    found = TransferPlan.from_pretrained(tmp_path / "plan")
    of_the_run = {"device", "dtype", "calibration"}
    kept = {k: v for k, v in made.plan.options.items() if k not in of_the_run} | {"calibration": "text.jsonl"}
    assert (found.old, found.new, found.options, found.layers) == (
        made.plan.old,
        made.plan.new,
        kept,
        made.plan.layers,
    )
    before, after = dict(made.plan.tensors.items()), dict(found.tensors.items())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_file_in_the_folder_is_the_file_save_writes(made: Any, tmp_path: Path) -> None:
    made.plan.save(tmp_path / "file")
    made.plan.save_pretrained(tmp_path / "folder")
    assert (tmp_path / "folder" / FILES[1]).read_bytes() == (tmp_path / "file").read_bytes()
    assert TransferPlan.from_pretrained(tmp_path / "file").old == made.plan.old


def edited(source: Path, target: Path, **options: object) -> Path:
    """A plan's file with options as an earlier release, or somebody, would have written them."""
    with safe_open(source, framework="pt") as file:
        header = json.loads(file.metadata()["plan"])
    header["options"] |= options
    save_file(load_file(source), target, metadata={"plan": json.dumps(header)})
    return target


def test_a_plan_says_nothing_of_the_machine_it_was_built_on(made: Any, tmp_path: Path) -> None:
    made.plan.save(tmp_path / "plan")
    with safe_open(tmp_path / "plan", framework="pt") as file:
        options = json.loads(file.metadata()["plan"])["options"]
    assert not {"device", "dtype"} & options.keys()
    assert options["calibration"] == "text.jsonl"


@pytest.fixture(scope="module")
def distilling(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distilling") / "plan"
    text = made.root / "long.txt"
    text.write_text("".join(f"the red fox number {n} sat on the mat in the rain for {n} days.\n" for n in range(400)))
    TransferPlan.build(
        made.root / "old", made.root / "new", config=PlanConfig(method="distill", examples=8, calibration=text)
    ).save(path)
    return path


def test_a_plan_of_an_earlier_release_runs_on_this_machine(made: Any, distilling: Path, tmp_path: Path) -> None:
    path = edited(distilling, tmp_path / "plan", device="cuda", dtype="bfloat16", calibration="shipped")
    plan = TransferPlan.load(path)
    assert plan.device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert plan.dtype == torch.float32
    plan.save(tmp_path / "again")
    assert not {"device", "dtype"} & TransferPlan.load(tmp_path / "again").options.keys()
    plan.apply(made.root / "adapter", tmp_path / "out", config=ApplyConfig(text=made.root / "long.txt"))
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_a_text_that_only_a_plan_names_is_not_opened(made: Any, distilling: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    path = edited(distilling, tmp_path / "plan", calibration=str(tmp_path / "pipe.txt"))
    with pytest.raises(LoraSuiteError, match=r"built with the text pipe\.txt.*`text`"):
        TransferPlan.load(path).apply(made.root / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_stays_as_it_is_unless_it_may_be_replaced(made: Any, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    folder.mkdir()
    (folder / "mine").write_text("x")
    with pytest.raises(LoraSuiteError, match="exists already"):
        made.plan.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["mine"]
    (folder / "mine").unlink()
    for overwrite in (False, True):
        made.plan.save_pretrained(folder, overwrite=overwrite)
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_hub_names_take_the_place_of_local_folders(made: Any, tmp_path: Path) -> None:
    made.plan.save_pretrained(tmp_path / "plan", **NAMES)
    found = TransferPlan.from_pretrained(tmp_path / "plan")
    assert (found.old.name, found.new.name) == ("someone/old", "someone/new")
    assert found.old.fingerprint == made.plan.old.fingerprint
    found.apply(made.root / "adapter", tmp_path / "out", old=made.root / "old", new=made.root / "new")
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_the_card_names_both_models_and_no_local_path(made: Any, tmp_path: Path) -> None:
    made.plan.save_pretrained(tmp_path / "local")
    made.plan.save_pretrained(tmp_path / "named", **NAMES)
    local, named = (ModelCard.load(tmp_path / name / "README.md") for name in ("local", "named"))
    assert local.data.base_model is None
    assert named.data.base_model == ["someone/old", "someone/new"]
    assert {"lorasuite-fast", "transfer-plan"} <= set(named.data.tags)
    for card in (local, named):
        assert "secret-place" not in str(card)
        assert f"{made.plan.facts['r2']:.4f} old to new" in card.text
        assert made.plan.new.fingerprint in card.text
        assert "| text | text.jsonl |" in card.text


def test_a_pushed_plan_holds_no_local_path(made: Any, hub: Hub, tmp_path: Path) -> None:
    address = made.plan.save_pretrained(
        tmp_path / "plan", **NAMES, push_to_hub=True, repo_id="me/plan", private=True, token="t", create_pr=True
    )
    assert address == "https://hub/me/plan/commit/1"
    assert hub.created == {"repo_id": "me/plan", "private": True, "token": "t", "exist_ok": True}
    assert hub.uploaded["folder_path"] == str(tmp_path / "plan")
    assert hub.uploaded["allow_patterns"] == FILES[::-1]
    assert hub.uploaded["create_pr"] is True
    for path in (tmp_path / "plan").iterdir():
        assert b"secret-place" not in path.read_bytes()
    assert TransferPlan.from_pretrained(tmp_path / "plan").options["calibration"] == "text.jsonl"


def test_a_repository_without_a_name_is_called_as_the_folder_and_found_under_its_owner(
    made: Any, hub: Hub, tmp_path: Path
) -> None:
    made.plan.save_pretrained(tmp_path / "old-to-new", **NAMES, push_to_hub=True)
    assert hub.created["repo_id"] == "old-to-new"
    assert hub.uploaded["repo_id"] == "me/old-to-new"


def test_a_plan_of_local_folders_is_not_pushed_and_nothing_is_written(made: Any, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="pass new_model"):
        made.plan.save_pretrained(tmp_path / "plan", old_model="someone/old", push_to_hub=True)
    with pytest.raises(LoraSuiteError, match="old_model '/models/old' is not a hub id"):
        made.plan.save_pretrained(tmp_path / "plan", old_model="/models/old")
    assert hub.created == {}
    assert not (tmp_path / "plan").exists()


def test_a_plan_that_is_not_finite_is_not_written(made: Any, tmp_path: Path) -> None:
    made.plan.save_pretrained(tmp_path / "plan")
    found = TransferPlan.from_pretrained(tmp_path / "plan")
    tensors = dict(found.tensors.items())
    tensors["W_h"][0, 0] = float("nan")
    broken = TransferPlan(found.old, found.new, found.options, found.layers, tensors, found.facts)
    with pytest.raises(LoraSuiteError, match="W_h: the numbers leave the range"):
        broken.save_pretrained(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_hub_plan_is_opened_from_the_file_the_hub_gives(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.plan.save_pretrained(tmp_path / "cached")
    asked: list[Any] = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename, options))
        return str(tmp_path / "cached" / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert TransferPlan.from_pretrained("me/plan", revision="v1", token="t").old == made.plan.old
    options = {"revision": "v1", "token": "t", "cache_dir": None, "local_files_only": False}
    assert asked == [("me/plan", FILES[1], options)]


def test_offline_a_plan_is_found_in_the_cache_and_nowhere_else(made: Any, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--plan/snapshots/0123"
    made.plan.save_pretrained(tmp_path / "saved")
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "saved", snapshot)
    refs = tmp_path / "models--me--plan/refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    assert TransferPlan.from_pretrained("me/plan", cache_dir=tmp_path).new == made.plan.new
    with pytest.raises(LoraSuiteError, match=r"PLAN me/other: .*not in the local hub cache"):
        TransferPlan.from_pretrained("me/other", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.EntryNotFoundError("none"), "the hub's me/plan holds no transfer_plan.safetensors"),
        (errors.HFValidationError("bad"), "not a hub id of the form owner/name"),
        (OSError("disk full"), "the hub answers: disk full"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(LoraSuiteError, match=message) as raised:
        TransferPlan.from_pretrained("me/plan")
    assert "\n" not in str(raised.value)


def test_other_folders_and_missing_ones_are_refused(made: Any, tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="the folder holds no transfer_plan"):
        TransferPlan.from_pretrained(made.root / "old")
    with pytest.raises(LoraSuiteError, match="no such file"):
        TransferPlan.from_pretrained(tmp_path / "none")


def test_the_command_line_takes_a_saved_folder(made: Any, tmp_path: Path) -> None:
    made.plan.save_pretrained(tmp_path / "plan")
    applied = CliRunner().invoke(
        app, ["apply", str(tmp_path / "plan"), str(made.root / "adapter"), str(tmp_path / "o")]
    )
    assert applied.exit_code == 0, applied.output
    assert (tmp_path / "o/adapter_config.json").is_file()


EVIL = '<script>x</script> | `a` ```\n[l](javascript:1) **b** [red]r[/red] [/] \x1b[31m\u202e "); import os'


def test_a_strangers_reason_does_nothing_in_card_report_and_terminal(made: Any) -> None:
    plan = replace(
        made.plan,
        facts=made.plan.facts | {"method_reason": EVIL},
        old=replace(made.plan.old, name=EVIL),
        options=made.plan.options | {"calibration": EVIL},
    )
    card = plan_card(plan).decode()
    blocks = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card[4:].partition("\n---\n")[2])
    kinds = {token.type for block in blocks for token in (block, *(block.children or []))}
    assert not {"html_block", "html_inline", "link_open", "strong_open", "code_inline"} & kinds
    assert sum(block.type == "fence" for block in blocks) == 1
    page = report_html(plan)
    assert "<script" not in page
    for text in (card, page):
        assert all(line.isprintable() for line in text.splitlines())
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=400)
    print_plan(console, plan, "CKA")
    print_transfer(console, plan)
    shown = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    assert shown.count("[red]r[/red]") == 3
    assert all(line.isprintable() for line in shown.splitlines())
    assert "\x1b[31mr" not in out.getvalue()
