"""The card beside an adapter: what the hub reads, the figures, the way it came about, and nothing of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_stub import Hub
from huggingface_hub import ModelCard

from lorasuite_fast import FinetuneConfig, LoraSuiteError, PlanConfig, TransferPlan, finetune, migrate, push_to_hub
from lorasuite_fast.io.hub_ids import hub_id, shown
from lorasuite_fast.reporting.model_card import model_card, section
from lorasuite_fast.reporting.provenance import Step, provenance, read_steps

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One adapter migrated by least squares, distilled from its plan, and fine-tuned."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("secret-place")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "adapter", targets=["q_proj", "down_proj"], rank=2, alpha=4, seed=0)
    lstsq = migrate(
        root / "old", root / "new", root / "adapter", root / "lstsq", plan=PlanConfig(method="lstsq", examples=8)
    )
    distil = migrate(
        root / "old", root / "new", root / "adapter", root / "distilled", plan=PlanConfig(method="distill", examples=8)
    )
    data = [{"prompt": f"question {n}?", "completion": f" answer {n}"} for n in range(8)]
    tuned = finetune(root / "new", root / "lstsq", data, root / "tuned", config=FinetuneConfig(steps=2, batch=4))
    return SimpleNamespace(root=root, lstsq=lstsq, distilled=distil, tuned=tuned)


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("name", ["lstsq", "distilled", "tuned"])
def test_the_hub_reads_library_and_tags_from_every_card(made: Any, name: str) -> None:
    data = card(made.root / name).data
    assert data.library_name == "peft"
    assert {"lora", "peft", "lorasuite-fast"} <= set(data.tags)


@pytest.mark.parametrize("name", ["lstsq", "distilled", "tuned"])
def test_no_card_names_a_local_path(made: Any, name: str) -> None:
    text = (made.root / name / "README.md").read_text()
    for part in (str(made.root), "secret-place", str(Path.home()), str(Path.cwd())):
        assert part not in text


def test_a_local_base_is_left_out_of_the_metadata_with_a_note(made: Any) -> None:
    found = card(made.root / "lstsq")
    assert found.data.base_model is None
    assert "`base_model` is missing" in found.text


def test_a_hub_base_is_named_in_the_metadata() -> None:
    found = ModelCard(model_card("someone/new-model", [Step("migration", "done")]).decode())
    assert found.data.base_model == "someone/new-model"
    assert "is missing" not in found.text
    assert 'from_pretrained("someone/new-model")' in found.text


def test_a_card_tells_method_reason_fit_and_every_layer(made: Any) -> None:
    text = (made.root / "lstsq/README.md").read_text()
    facts = made.lstsq.plan.facts
    assert "| method | lstsq, asked for |" in text
    assert f"{facts['r2']:.4f} old to new" in text
    for layer in made.lstsq.layers:
        assert f"| {layer.new_layer} | {layer.old_layer} | {layer.cka:.3f} |" in text
    assert "What arrived was not measured" in text


def test_a_distilled_card_tells_agreement_and_warning(made: Any) -> None:
    text = (made.root / "distilled/README.md").read_text()
    assert f"{made.distilled.distilled.agreement['kl_share'][0]:.3f}, 95 % interval" in text
    assert (made.distilled.warning is None) == ("**Warning:**" not in text)


def test_a_fine_tuned_card_keeps_how_its_start_came_about(made: Any) -> None:
    text = (made.root / "tuned/README.md").read_text()
    assert text.index("## Migration") < text.index("## Fine-tuning on labelled data")
    assert made.tuned.summary in text
    first, second = read_steps(made.root / "tuned")
    assert [first] == read_steps(made.root / "lstsq")
    assert (first.step, second.step, second.outcome) == ("migration", "fine-tuning", made.tuned.summary)


def test_provenance_is_data_and_names_no_machine(made: Any) -> None:
    for name in ("lstsq", "distilled", "tuned"):
        text = (made.root / name / "lorasuite.json").read_text()
        for step in json.loads(text)["steps"]:
            assert {"step", "config", "versions", "fingerprints", "figures"} <= step.keys()
            assert not {"device", "dtype", "memory"} & step["config"].keys()
            assert step["versions"]["torch"] == torch.__version__
        for part in (str(made.root), "secret-place", str(Path.home()), str(Path.cwd())):
            assert part not in text
    (step,) = json.loads((made.root / "lstsq/lorasuite.json").read_text())["steps"]
    plan = made.lstsq.plan
    assert step["fingerprints"] == {"old": plan.old.fingerprint, "new": plan.new.fingerprint}


def test_a_foreign_card_is_not_taken_over(made: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text((made.root / "lstsq/README.md").read_text() + "secret words\n")
    assert read_steps(tmp_path) == read_steps(None) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r | {"format": "other"},
        lambda r: r | {"version": 2},
        lambda r: r | {"steps": "all"},
        lambda r: r | {"steps": ["one"]},
        lambda r: r | {"steps": [{}]},
        lambda r: r | {"steps": [r["steps"][0] | {"figures": {"a": ["b"]}}]},
        lambda r: r | {"steps": [r["steps"][0] | {"outcome": "x" * 10_000}]},
        lambda r: r | {"steps": [r["steps"][0] | {"config": {"a": {"b": 1}}}]},
        lambda r: r | {"steps": [r["steps"][0] | {"config": {"a": [[[1]]]}}]},
        lambda r: r | {"steps": [r["steps"][0] | {"layers": [1]}]},
        lambda r: r | {"steps": [r["steps"][0] | {"warning": "yes"}]},
    ],
)
def test_provenance_no_release_wrote_counts_as_none(change: Any, made: Any, tmp_path: Path) -> None:
    record = json.loads((made.root / "lstsq/lorasuite.json").read_text())
    assert provenance(read_steps(made.root / "lstsq")) == (made.root / "lstsq/lorasuite.json").read_bytes()
    (tmp_path / "lorasuite.json").write_text(json.dumps(change(record)))
    assert read_steps(tmp_path) == []


def test_the_same_migration_writes_the_same_card(made: Any, tmp_path: Path) -> None:
    plan = TransferPlan.build(
        made.root / "old", made.root / "new", config=PlanConfig(method="lstsq", examples=8, roles=("q", "down"))
    )
    plan.apply(made.root / "adapter", tmp_path / "again")
    assert (tmp_path / "again/README.md").read_bytes() == (made.root / "lstsq/README.md").read_bytes()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B"),
        ("/cache/hub/models--Qwen--Qwen2.5-3B/snapshots/0123abc", "Qwen/Qwen2.5-3B"),
        ("/models/qwen", None),
        ("./qwen/new", None),
        ("qwen", None),
    ],
)
def test_hub_ids_are_told_from_folders(name: str, found: str | None) -> None:
    assert hub_id(name) == found


def test_a_relative_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/name") is None
    assert shown("owner/name") == "name"


def test_a_pipe_in_a_name_does_not_break_the_table() -> None:
    assert "| from | a\\|b |" in section("S", "done", {"from": "a|b"})


def test_push_uploads_weights_config_and_card_in_the_name_of_the_hub_model(made: Any, hub: Hub) -> None:
    folder = made.root / "tuned"
    address = push_to_hub(folder, "me/mine", base_model="someone/new", private=True, token="t", create_pr=True)
    assert address == "https://hub/me/mine/commit/1"
    assert hub.created == {"repo_id": "me/mine", "private": True, "token": "t", "exist_ok": True}
    assert hub.uploaded["create_pr"] is True
    assert hub.files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "someone/new"
    found = ModelCard(hub.files["README.md"].decode())
    assert found.data.base_model == "someone/new"
    assert "## Migration" in found.text
    assert "## Fine-tuning" in found.text
    assert all(str(made.root).encode() not in data for data in hub.files.values())


def test_push_leaves_the_folder_as_it_was(made: Any, hub: Hub) -> None:
    before = {path.name: path.read_bytes() for path in (made.root / "tuned").iterdir()}
    push_to_hub(made.root / "tuned", "me/mine", base_model="someone/new")
    assert {path.name: path.read_bytes() for path in (made.root / "tuned").iterdir()} == before


def test_push_keeps_a_card_a_person_wrote(made: Any, hub: Hub, tmp_path: Path) -> None:
    for path in (made.root / "lstsq").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "README.md").write_text("# mine\n")
    push_to_hub(tmp_path, "me/mine", base_model="someone/new")
    assert hub.files["README.md"] == b"# mine\n"


def test_push_refuses_a_local_base_and_says_what_to_pass(made: Any, hub: Hub) -> None:
    with pytest.raises(LoraSuiteError, match="pass base_model"):
        push_to_hub(made.root / "lstsq", "me/mine")
    with pytest.raises(LoraSuiteError, match="owner/name"):
        push_to_hub(made.root / "lstsq", "me/mine", base_model=str(made.root / "new"))
    assert hub.created == {}


def test_push_refuses_a_folder_that_is_no_adapter(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(LoraSuiteError, match="is not an adapter folder"):
        push_to_hub(tmp_path, "me/mine", base_model="someone/new")
