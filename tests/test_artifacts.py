"""`--overwrite` takes the place of what this program or PEFT wrote; of everything else not a byte is lost."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flat_options import given
from typer.testing import CliRunner

from lorasuite_fast import LoraSuiteError, Runtime, TransferPlan, finetune, migrate, refine, verify
from lorasuite_fast.cli.app import app
from lorasuite_fast.io import output
from lorasuite_fast.io.artifacts import REPORT_MARK, STEPS_MARK
from lorasuite_fast.io.work import Work, clean_up, work_folder

PEFT_CARD = "---\nbase_model: some/model\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n"
OUR_CARD = f"# LoRA adapter\n\n{STEPS_MARK}\n"


def adapter(folder: Path, card: str | None = PEFT_CARD) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def plan_bytes(header: object) -> bytes:
    text = json.dumps({"__metadata__": {"plan": json.dumps(header)}}).encode()
    return len(text).to_bytes(8, "little") + text


PLAN = plan_bytes({"format": "lorasuite-fast plan", "version": 1})


def model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(name)
    return folder


def git_checkout(folder: Path) -> None:
    (folder / ".git/objects").mkdir(parents=True)
    (folder / ".git/HEAD").write_text("ref: refs/heads/main")
    adapter(folder)


def home(folder: Path) -> None:
    (folder / "Documents").mkdir(parents=True)
    (folder / "Documents/letter.txt").write_text("dear")
    (folder / ".bashrc").write_text("export A=1")


def trainer_output(folder: Path) -> None:
    adapter(folder)
    (adapter(folder / "checkpoint-5") / "optimizer.pt").write_bytes(b"state")


def trainer_checkpoint(folder: Path) -> None:
    adapter(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
        (folder / name).write_bytes(b"state")


def with_file(name: str, text: str = "mine") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        adapter(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(text)

    return make


def without_config(folder: Path) -> None:
    adapter(folder)
    (folder / "adapter_config.json").unlink()


def sub_folder(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (adapter(folder) / name).mkdir()

    return make


def with_link(folder: Path) -> None:
    (adapter(folder) / "adapter_model.safetensors").unlink()
    elsewhere = folder.with_name("blob")
    elsewhere.write_bytes(b"the only copy")
    (folder / "adapter_model.safetensors").symlink_to(elsewhere)


def with_socket(folder: Path) -> None:
    adapter(folder)
    here = Path.cwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("s")
    finally:
        os.chdir(here)


# What OUT is -> (how it is made, what the refusal names)
FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one thesis": (lambda f: (f.mkdir(), (f / "thesis.txt").write_text("years")), "thesis.txt"),
    "a model": (model, "config.json"),
    "a model with an adapter in it": (lambda f: (model(f), adapter(f)), "config.json"),
    "a git checkout": (git_checkout, ".git"),
    "a home": (home, ".bashrc"),
    "a parent of folders": (lambda f: adapter(f / "adapter"), "adapter"),
    "an adapter and a thesis": (with_file("thesis.txt"), "thesis.txt"),
    "an adapter and a hidden file": (with_file(".env"), ".env"),
    "an adapter and a tokenizer": (with_file("tokenizer.json"), "tokenizer.json"),
    "an adapter and a page": (with_file("notes.html", "<html>"), "notes.html"),
    "an adapter and foreign provenance": (with_file("lorasuite.json", '{"mine": 1}'), "lorasuite.json"),
    "an adapter with a written README": (with_file("README.md", "# My work\n\nlibrary_name: peft\n"), "README.md"),
    "an adapter and an empty sub-folder": (sub_folder("notes"), "notes"),
    "an adapter and a sub-folder of a known name": (sub_folder("lorasuite.json"), "lorasuite.json"),
    "a trainer's folder": (trainer_output, "checkpoint-5"),
    "a trainer's checkpoint": (trainer_checkpoint, "optimizer.pt"),
    "weights without a configuration": (without_config, "README.md"),
    "weights alone": (
        lambda f: (f.mkdir(), (f / "adapter_model.safetensors").write_bytes(b"the only copy")),
        "adapter_model.safetensors",
    ),
    "a configuration of something else": (with_file("adapter_config.json", '{"adapter": "wifi"}'), "README.md"),
    "a configuration that cannot be read": (with_file("adapter_config.json", '{"peft_type"'), "README.md"),
    "weights that are a link": (with_link, "adapter_model.safetensors"),
    "an adapter and a socket": (with_socket, "s"),
    "a plan's name for something else": (
        lambda f: (f.mkdir(), (f / "transfer_plan.safetensors").write_bytes(plan_bytes({"format": "a floor plan"}))),
        "transfer_plan.safetensors",
    ),
}


def everything(folder: Path) -> dict[str, object]:
    """All there is below a folder, byte by byte."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else path.lstat().st_mode
    return found


@pytest.mark.parametrize("name", FOREIGN)
def test_not_a_byte_of_a_foreign_folder_is_lost(name: str, tmp_path: Path) -> None:
    make, part = FOREIGN[name]
    make(tmp_path / "out")
    before = everything(tmp_path)
    with pytest.raises(LoraSuiteError, match=rf"holds {part}, which neither lorasuite-fast nor PEFT wrote"):
        output.check_output(tmp_path / "out", overwrite=True)
    with pytest.raises(LoraSuiteError, match="stays as it is"):
        output.write_folder(tmp_path / "out", {"a": b"new"}, overwrite=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("make", [adapter, lambda f: adapter(f, OUR_CARD), lambda f: adapter(f, None)])
def test_an_adapter_of_this_program_or_of_peft_is_replaced(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    (folder / "report.html").write_text(f"<html>{REPORT_MARK}")
    with pytest.raises(LoraSuiteError, match="exists already"):
        output.write_folder(folder, {"a": b"new"}, overwrite=False)
    output.write_folder(folder, {"a": b"new"}, overwrite=True)
    assert everything(tmp_path).keys() == {"out", "out/a"}


def test_what_peft_saves_may_be_replaced(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from planted import tiny_model

    wrapped = get_peft_model(tiny_model("llama", 1, layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "out")
    output.check_output(tmp_path / "out", overwrite=True)


def test_a_plan_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/transfer_plan.safetensors").write_bytes(PLAN)
    (tmp_path / "out/README.md").write_text("---\nlibrary_name: lorasuite-fast\n---\n")
    output.write_folder(tmp_path / "out", {"a": b"new"}, overwrite=True)
    assert everything(tmp_path).keys() == {"out", "out/a"}


def test_an_empty_out_is_used_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert output.check_output(tmp_path / "out", overwrite=False) == tmp_path / "out"
    output.write_folder(tmp_path / "out", {"a": b"new"}, overwrite=False)
    assert everything(tmp_path).keys() == {"out", "out/a"}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_comes_into_out_at_the_last_moment_stays(
    exchange: bool, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at OUT and its replacement another program writes there."""
    out = tmp_path / "out"
    out.mkdir()
    checked = output.check_replaceable

    def look(path: Path, *rest: Any, **options: Any) -> None:
        checked(path, *rest, **options)
        (out / "thesis.txt").write_text("years")

    monkeypatch.setattr(output, "check_replaceable", look)
    if not exchange:
        monkeypatch.setattr(output, "_renameat2", lambda *_: False)
    with pytest.raises(LoraSuiteError):
        output.write_folder(out, {"a": b"new"}, overwrite=overwrite)
    assert everything(tmp_path).keys() == {"out", "out/thesis.txt"}


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("kind", ["plan", "report", "folder"])
@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("a letter"),
        lambda path: path.write_bytes(b"\xff" * 200),
        lambda path: path.write_bytes(plan_bytes({"format": "a floor plan"})),
        pipe,
        lambda path: path.symlink_to(path.with_name("target")),
        lambda path: path.symlink_to(adapter(path.with_name("target"))),
    ],
)
def test_a_file_is_replaced_only_by_its_own_kind(kind: Any, make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "out")
    mode = (tmp_path / "out").lstat().st_mode
    with pytest.raises(LoraSuiteError):
        output.check_output(tmp_path / "out", overwrite=True, kind=kind)
    write = (
        (lambda: output.write_folder(tmp_path / "out", {"a": b"new"}, overwrite=True))
        if kind == "folder"
        else (lambda: output.write_file(tmp_path / "out", lambda f: f.write_text("new"), overwrite=True, kind=kind))
    )
    with pytest.raises(LoraSuiteError):
        write()
    assert (tmp_path / "out").lstat().st_mode == mode


def test_a_plan_replaces_a_plan_and_a_report_a_report(tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(PLAN)
    (tmp_path / "report").write_text(f"<html>{REPORT_MARK}")
    for kind, other in (("plan", "report"), ("report", "plan")):
        output.check_output(tmp_path / kind, overwrite=True, kind=kind)  # type: ignore[arg-type]
        with pytest.raises(LoraSuiteError, match=f"is no {kind} of lorasuite-fast"):
            output.check_output(tmp_path / other, overwrite=True, kind=kind)  # type: ignore[arg-type]


def test_a_link_is_refused_by_what_it_leads_to(tmp_path: Path) -> None:
    adapter(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(LoraSuiteError, match=f"is a link to {tmp_path / 'real'}; name that path itself"):
        output.check_output(tmp_path / "out", overwrite=True)


def test_a_mount_point_is_refused() -> None:
    mount = next(Path(p) for p in ("/proc", "/sys", "/") if os.path.ismount(p))
    with pytest.raises(LoraSuiteError, match="is a mount point"):
        output.check_output(mount, overwrite=True)


def test_an_input_is_never_replaced_by_whatever_name(tmp_path: Path) -> None:
    given = adapter(tmp_path / "runs/given")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    (tmp_path / "of-links").mkdir()
    (tmp_path / "of-links/weights").symlink_to(given / "adapter_model.safetensors")
    inner = adapter(given / "inner")
    for out, name, words in (
        (given, given, "is ADAPTER"),
        (tmp_path / "link/given", given, "is ADAPTER"),
        (given, tmp_path / "link/given", "is ADAPTER"),
        (tmp_path / "runs/../runs/given", given, "is ADAPTER"),
        (inner, given, "lies in ADAPTER"),
        (tmp_path / "link/given/inner", given, "lies in ADAPTER"),
        (tmp_path / "runs", given, "contains ADAPTER"),
        (given, inner, "contains ADAPTER"),
        (given, given / "adapter_model.safetensors", "contains ADAPTER"),
        (given, tmp_path / "of-links", "contains ADAPTER"),
    ):
        with pytest.raises(LoraSuiteError, match=words):
            output.check_output(out, overwrite=True, inputs={"ADAPTER": name})
    shutil.rmtree(inner)
    output.check_output(given, overwrite=True, inputs={"ADAPTER": "some/hub-id", "text": None, "texts": ["a"]})


def verbs(root: Path, out: Path) -> dict[str, Callable[[], object]]:
    old, new, start = root / "old", root / "new", root / "adapter"
    data = root / "data.jsonl"
    shared: dict[str, Any] = {"overwrite": True}
    return {
        "migrate": lambda: migrate(old, new, start, out, **given(migrate, **shared)),
        "migrate and refine": lambda: migrate(old, new, start, out, **given(migrate, refine=5, **shared)),
        "migrate and finetune": lambda: migrate(old, new, start, out, **given(migrate, finetune=data, **shared)),
        "migrate's report": lambda: migrate(old, new, start, root / "free", runtime=Runtime(report=out)),
        "a plan's report": lambda: TransferPlan.build(old, new, runtime=Runtime(report=out)),
        "refine": lambda: refine(old, start, new, None, out, **given(refine, **shared)),
        "refine's report": lambda: refine(old, start, new, None, root / "free", runtime=Runtime(report=out)),
        "finetune": lambda: finetune(new, start, data, out, **given(finetune, **shared)),
        "finetune's report": lambda: finetune(new, start, data, root / "free", runtime=Runtime(report=out)),
        "verify's report": lambda: verify(old, start, new, start, runtime=Runtime(report=out)),
    }


@pytest.mark.parametrize("name", verbs(Path(), Path()))
@pytest.mark.parametrize("kind", ["old", "new", "adapter", "data.jsonl", "parent", "thesis", "link"])
def test_every_call_refuses_foreign_places_before_any_work(name: str, kind: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for folder in ("old", "new"):
        model(root / folder)
    adapter(root / "adapter")
    (root / "data.jsonl").write_text('{"text": "a"}\n')
    (root / "thesis").mkdir()
    (root / "thesis/thesis.txt").write_text("years")
    (root / "link").symlink_to(root / "adapter")
    before = everything(tmp_path)
    with pytest.raises(LoraSuiteError, match=r"^(OUT|`report`) "):
        verbs(root, root if kind == "parent" else root / kind)[name]()
    assert everything(tmp_path) == before


@pytest.mark.parametrize("command", ["plan", "migrate", "refine", "finetune"])
@pytest.mark.parametrize("kind", ["new", "thesis"])
def test_every_command_refuses_foreign_places_before_any_work(command: str, kind: str, tmp_path: Path) -> None:
    model(tmp_path / "old"), model(tmp_path / "new"), adapter(tmp_path / "adapter")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").write_text("years")
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    before = everything(tmp_path)
    old, new, start, out = (str(tmp_path / name) for name in ("old", "new", "adapter", kind))
    given = {
        "plan": [old, new, out],
        "migrate": [old, new, start, out],
        "refine": [old, start, new, "none", out],
        "finetune": [new, "none", str(tmp_path / "data.jsonl"), out],
    }[command]
    result = CliRunner().invoke(app, [command, *given, "--overwrite"])
    assert result.exit_code == 2
    assert "error: OUT " in result.output
    assert everything(tmp_path) == before


def test_a_report_is_not_written_over_the_output(tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="is OUT as well"):
        migrate("old", "new", "adapter", tmp_path / "out", runtime=Runtime(report=tmp_path / "out"))


def test_a_folder_that_only_looks_like_work_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    work_folder(out).mkdir()
    (work_folder(out) / "thesis.txt").write_text("years")
    (work_folder(out) / "complete").touch()
    adapter(out)
    (tmp_path / ".out.abcd_123.tmp").mkdir()
    (tmp_path / ".out.abcd_123.tmp/thesis.txt").write_text("years")
    before = everything(tmp_path)
    output.sweep(out)
    with pytest.raises(LoraSuiteError, match=r"holds thesis\.txt, which is no work of lorasuite-fast"):
        clean_up(out)
    with pytest.raises(LoraSuiteError, match=r"holds thesis\.txt"):
        Work(work_folder(out), {"a": 1})
    assert everything(tmp_path) == before


def test_work_in_which_something_else_was_put_stays(tmp_path: Path) -> None:
    work = Work(tmp_path / "work", {"a": 1})
    work.start()
    (tmp_path / "work/thesis.txt").write_text("years")
    work.discard()
    assert (tmp_path / "work/thesis.txt").read_text() == "years"
