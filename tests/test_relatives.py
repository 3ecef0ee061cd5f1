"""Relatives: an adapter is copied, given back or chosen among candidates, and the kind of relatives is told."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorasuite_fast import ApplyConfig, LoraSuiteError, PlanConfig, Runtime, TransferPlan, VerifyConfig, migrate, verify
from lorasuite_fast.cli.app import app
from lorasuite_fast.distillation import distill as distillation
from lorasuite_fast.distillation.choice import MARGIN, TIE, Choice, choose
from lorasuite_fast.distillation.distilled_adapter import TEXTS
from lorasuite_fast.distillation.settings import Settings
from lorasuite_fast.evaluation.identical import same_tensors
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.text.calibration import load_examples
from lorasuite_fast.transfer import kinship
from lorasuite_fast.transfer.kinship import weight_distance

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

VOCABULARY = 420
QUICK = Settings(max_tokens=32)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An old model with an adapter of all attention projections."""
    folder = tmp_path_factory.mktemp("relatives")
    save_folder(old_model(), tiny_tokenizer(VOCABULARY), folder / "old")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    random_adapter(folder / "old", folder / "adapter", targets=targets, rank=4, alpha=8, seed=0, size=0.3)
    return folder


def old_model(**shape: Any) -> Any:
    return tiny_model("llama", 0, **{"d": 32, "layers": 3, "vocab": VOCABULARY} | shape)


def moved(folder: Path, share: float, *, layers: list[int] | None = None, everywhere: bool = False) -> Path:
    """The old model with noise of a share of its norm on every projection (and the embedding), or fewer layers."""
    model = old_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name or ("embed" in name and everywhere):
                noise = torch.randn(weight.shape, generator=generator)
                weight += share * weight.norm() / noise.norm() * noise
    if layers is not None:
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
        model.config.num_hidden_layers = len(layers)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[: len(layers)]
    return save_folder(model, tiny_tokenizer(VOCABULARY), folder)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def test_a_copy_has_the_tensors_of_the_adapter(root: Path, tmp_path: Path) -> None:
    result = migrate(
        root / "old",
        moved(tmp_path / "new", 0.3),
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(method="copy", examples=8),
    )
    before, after = tensors(root / "adapter"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.plan.options["method"] == "copy"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), tmp_path / "out")


def test_a_copy_may_have_another_vocabulary_and_depth(root: Path, tmp_path: Path) -> None:
    new = moved(tmp_path / "new", 0.05, layers=[0, 2])
    result = migrate(
        root / "old", new, root / "adapter", tmp_path / "out", plan=PlanConfig(method="copy", layers="last", examples=8)
    )
    assert result.plan.layers == {0: 1, 1: 2}
    before, after = tensors(root / "adapter"), tensors(tmp_path / "out")
    for name, tensor in after.items():
        old = name.replace("layers.1.", "layers.2.") if "layers.1." in name else name.replace("layers.0.", "layers.1.")
        assert torch.equal(tensor, before[old])


@pytest.mark.parametrize(
    ("shape", "named"),
    [({"d": 48}, "width 32 and 48"), ({"kv_heads": 4}, "key/value heads 2 and 4")],
    ids=["width", "key/value heads"],
)
def test_a_copy_between_other_shapes_is_refused_with_them(
    shape: dict[str, int], named: str, root: Path, tmp_path: Path
) -> None:
    save_folder(old_model(**shape), tiny_tokenizer(VOCABULARY), tmp_path / "new")
    with pytest.raises(LoraSuiteError, match=f"method copy: .*{named}.*; use method auto"):
        migrate(
            root / "old",
            tmp_path / "new",
            root / "adapter",
            tmp_path / "out",
            plan=PlanConfig(method="copy", examples=8),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_saved_plan_of_method_copy_is_applied(root: Path, tmp_path: Path) -> None:
    new = moved(tmp_path / "new", 0.3)
    TransferPlan.build(root / "old", new, config=PlanConfig(method="copy", examples=8)).save(tmp_path / "plan")
    TransferPlan.load(tmp_path / "plan").apply(root / "adapter", tmp_path / "out")
    before, after = tensors(root / "adapter"), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["itself", "a copy", "another dtype"])
def test_the_same_model_gives_the_adapter_back(kind: str, root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    new = root / "old" if kind == "itself" else tmp_path / "new"
    if kind == "a copy":
        shutil.copytree(root / "old", new)
    elif kind == "another dtype":
        save_folder(old_model(), tiny_tokenizer(VOCABULARY), new, torch.bfloat16)
    monkeypatch.setattr(TransferPlan, "build", lambda *_, **__: pytest.fail("more than the weights was compared"))
    result = migrate(root / "old", new, root / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (root / "adapter" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(new)
    assert result.plan.exact
    assert "weights are the old one's" in result.plan.facts["method_reason"]
    result.plan.save(tmp_path / "plan")
    TransferPlan.load(tmp_path / "plan").apply(root / "adapter", tmp_path / "again")
    before, after = tensors(root / "adapter"), tensors(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_changed_weight_is_not_the_same_model(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "old", tmp_path / "new")
    stored = load_file(tmp_path / "new/model.safetensors")
    stored["model.layers.2.mlp.down_proj.weight"][-1, -1] += 1e-3
    save_file(stored, tmp_path / "new/model.safetensors", metadata={"format": "pt"})
    result = migrate(root / "old", tmp_path / "new", root / "adapter", tmp_path / "out", plan=PlanConfig(examples=8))
    assert "differ by at most" in result.plan.facts["method_reason"]


def test_equal_weights_that_compute_something_else_are_not_the_same_model(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "old", tmp_path / "new")
    config = json.loads((tmp_path / "new/config.json").read_text())
    (tmp_path / "new/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    found = weight_distance(Checkpoint(root / "old"), Checkpoint(tmp_path / "new"))
    assert not any(found.distances.values())
    assert not found.near
    result = migrate(
        root / "old",
        tmp_path / "new",
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(examples=8),
        apply=ApplyConfig(distill=QUICK),
    )
    assert "weights are the old one's" not in result.plan.facts["method_reason"]


@pytest.mark.parametrize(
    ("theta", "same"), [(10000.0, True), (500000.0, False)], ids=["the same rotation", "another rotation"]
)
def test_one_rotation_in_two_spellings_is_the_same_computation(
    theta: float, same: bool, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "old", tmp_path / "new")
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config.pop("rope_parameters") == {"rope_theta": 10000.0, "rope_type": "default"}
    config |= {"rope_theta": theta, "rope_scaling": None}
    (tmp_path / "new/config.json").write_text(json.dumps(config))
    assert same_tensors(Checkpoint(root / "old"), Checkpoint(tmp_path / "new")) == same


def test_the_same_weights_under_another_tokenizer_are_not_the_same_model(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "old", tmp_path / "new")
    file = tmp_path / "new/tokenizer.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored))
    assert same_tensors(Checkpoint(root / "old"), Checkpoint(tmp_path / "new"))
    ids = stored["model"]["vocab"]
    (first, one), (second, other) = sorted(ids.items(), key=lambda item: item[1])[100:102]
    ids |= {first: other, second: one}
    file.write_text(json.dumps(stored))
    assert not same_tensors(Checkpoint(root / "old"), Checkpoint(tmp_path / "new"))
    result = migrate(
        root / "old",
        tmp_path / "new",
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(examples=8),
        apply=ApplyConfig(distill=QUICK),
    )
    assert result.plan.facts["kinship"]["kind"] != kinship.SAME
    assert "weights are the old one's" not in result.plan.facts["method_reason"]


def test_near_relatives_are_copied_without_a_distillation(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(TransferPlan, "_distil", lambda *_, **__: pytest.fail("distilled"))
    result = migrate(
        root / "old", moved(tmp_path / "new", 0.005), root / "adapter", tmp_path / "out", plan=PlanConfig(examples=8)
    )
    assert result.plan.options["method"] == "copy"
    assert result.plan.facts["kinship"]["kind"] == kinship.TRAINED


def test_auto_writes_the_candidate_that_agrees_best(root: Path, tmp_path: Path) -> None:
    new = moved(tmp_path / "new", 0.05, everywhere=True)
    result = migrate(
        root / "old",
        new,
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(examples=16),
        apply=ApplyConfig(distill=QUICK),
    )
    choice = result.choice
    assert choice is not None
    assert list(choice.agreement)[:4] == ["copy", "lstsq", "paper", "distill"]
    assert result.plan.options["method"] == choice.chosen == "copy"
    figures = {name: found["content_imitated_share"][0] for name, found in choice.agreement.items()}
    rest = figures.pop("copy + rest", 0.0)
    assert figures["copy"] >= max(figures.values()) - TIE
    assert rest < figures["copy"] + MARGIN
    before, after = tensors(root / "adapter"), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.warning is None
    for text in ((tmp_path / "out/README.md").read_text(), json.dumps(result.as_dict(), ensure_ascii=False)):
        assert choice.table in text


def held_out(file: Path) -> Path:
    """The texts a distillation with default options holds out, as a file."""
    texts = load_examples(None, TEXTS, 0)
    random.Random(0).shuffle(texts)
    chosen = [texts[n] for n in sorted(distillation._held_texts(len(texts)))]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    return file


def test_auto_judges_what_is_written_as_verify_does(root: Path, tmp_path: Path) -> None:
    """`verify` reads both models whole, through transformers and PEFT."""
    new, text = moved(tmp_path / "new", 0.2), held_out(tmp_path / "text.jsonl")
    result = migrate(
        root / "old",
        new,
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(examples=16),
        apply=ApplyConfig(distill=QUICK),
    )
    assert result.choice is not None
    for name in ("copy", "lstsq", "paper"):
        migrate(root / "old", new, root / "adapter", tmp_path / name, plan=PlanConfig(method=name, examples=16))
        found = verify(
            root / "old",
            root / "adapter",
            new,
            tmp_path / name,
            config=VerifyConfig(text=text, max_tokens=32, examples=TEXTS, bootstrap=1),
        )
        assert found.effect is not None
        assert found.effect.carried.kl_share.value == pytest.approx(
            result.choice.agreement[name]["kl_share"][0], abs=1e-4
        )


def with_copy_and_rest(patch: pytest.MonkeyPatch) -> None:
    """Writes the copied adapter with its rest, whatever the figures, and every text judged with a gain of 1."""
    patch.setattr("lorasuite_fast.distillation.correction.best_gain", lambda _: 1.0)
    patch.setattr("lorasuite_fast.distillation.correction.gains_by_others", lambda found: torch.ones(len(found[0.0])))
    patch.setattr(
        "lorasuite_fast.pipeline.plan.choose", lambda judged, out: Choice(dict(judged), dict(out), "copy + rest")
    )


def test_a_rest_is_fitted_beside_a_copy_and_judged_as_verify_does(root: Path, tmp_path: Path) -> None:
    new, text = moved(tmp_path / "new", 0.1), held_out(tmp_path / "text.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        with_copy_and_rest(patch)
        result = migrate(
            root / "old",
            new,
            root / "adapter",
            tmp_path / "out",
            plan=PlanConfig(examples=16),
            apply=ApplyConfig(distill=QUICK),
        )
    assert result.choice is not None
    before, after = tensors(root / "adapter"), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    added = {name.split("layers.")[1].split(".lora")[0] for name in after.keys() - before.keys()}
    assert added == {"2.mlp.down_proj"}
    found = verify(
        *(root / "old", root / "adapter", new, tmp_path / "out"),
        config=VerifyConfig(text=text, max_tokens=32, examples=TEXTS, bootstrap=1),
    )
    assert found.effect is not None
    share = result.choice.agreement["copy + rest"]["kl_share"][0]
    assert found.effect.carried.kl_share.value == pytest.approx(share, abs=1e-4)
    assert share != pytest.approx(result.choice.agreement["copy"]["kl_share"][0], abs=1e-3)


def test_a_plan_that_chose_a_rest_can_be_saved_and_applied(root: Path, tmp_path: Path) -> None:
    new = moved(tmp_path / "new", 0.1)
    with pytest.MonkeyPatch.context() as patch:
        with_copy_and_rest(patch)
        result = migrate(
            root / "old",
            new,
            root / "adapter",
            tmp_path / "out",
            plan=PlanConfig(examples=16),
            apply=ApplyConfig(distill=QUICK),
        )
        result.plan.save(tmp_path / "plan")
        TransferPlan.load(tmp_path / "plan").apply(
            root / "adapter", tmp_path / "again", config=ApplyConfig(distill=QUICK)
        )
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_a_saved_plan_of_auto_chooses_for_each_adapter(root: Path, tmp_path: Path) -> None:
    new = moved(tmp_path / "new", 0.05, everywhere=True)
    TransferPlan.build(root / "old", new, config=PlanConfig(examples=16)).save(tmp_path / "plan")
    plan = TransferPlan.load(tmp_path / "plan")
    assert "apply chooses among copy, lstsq, paper, distill" in plan.method
    result = plan.apply(root / "adapter", tmp_path / "out", config=ApplyConfig(distill=QUICK))
    assert result.plan.options["method"] == "copy"
    migrate(
        root / "old",
        new,
        root / "adapter",
        tmp_path / "whole",
        plan=PlanConfig(examples=16),
        apply=ApplyConfig(distill=QUICK),
    )
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


class Stop(Exception):
    pass


def test_a_choice_interrupted_at_its_end_goes_on_to_the_same_bits(root: Path, tmp_path: Path) -> None:
    new = moved(tmp_path / "new", 0.05, everywhere=True)

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "candidates' agreement" and done == 2:
            raise Stop

    arguments = root / "old", new, root / "adapter"
    with pytest.raises(Stop):
        migrate(
            *arguments,
            tmp_path / "out",
            plan=PlanConfig(examples=16),
            apply=ApplyConfig(distill=QUICK),
            runtime=Runtime(progress=interrupt),
        )
    assert not (tmp_path / "out").exists()
    migrate(*arguments, tmp_path / "out", plan=PlanConfig(examples=16), apply=ApplyConfig(distill=QUICK))
    migrate(*arguments, tmp_path / "whole", plan=PlanConfig(examples=16), apply=ApplyConfig(distill=QUICK))
    for name in (WEIGHTS, "adapter_config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out", "whole"]


def test_a_plan_of_the_chosen_method_can_be_saved_and_applied(root: Path, tmp_path: Path) -> None:
    new = moved(tmp_path / "new", 0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lorasuite_fast.pipeline.plan.choose", lambda judged, out: choose({"lstsq": judged["lstsq"]}, out)
        )
        result = migrate(
            root / "old",
            new,
            root / "adapter",
            tmp_path / "out",
            plan=PlanConfig(examples=16),
            apply=ApplyConfig(distill=QUICK),
        )
    assert result.plan.options["method"] == "lstsq"
    result.plan.save(tmp_path / "plan")
    TransferPlan.load(tmp_path / "plan").apply(root / "adapter", tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_a_rank_asked_for_leaves_only_distill(root: Path, tmp_path: Path) -> None:
    new = moved(tmp_path / "new", 0.2)
    settings = Settings(rank=2, max_tokens=32)
    result = migrate(
        root / "old",
        new,
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(examples=16),
        apply=ApplyConfig(distill=settings),
    )
    assert result.choice is None
    assert result.plan.options["method"] == "distill"


def figures(
    content: float, whole: float | None = None, spread: float = 0.01, direction: float | None = None
) -> dict[str, tuple[float, float, float]]:
    whole, direction = (content if value is None else value for value in (whole, direction))
    return {
        name: (value, value - spread, value + spread)
        for name, value in (("content_imitated_share", content), ("content_cosine", direction), ("kl_share", whole))
    }


@pytest.mark.parametrize(
    ("judged", "chosen"),
    [
        ({"copy": figures(0.5), "lstsq": figures(0.6), "distill": figures(0.4)}, "lstsq"),
        ({"copy": figures(0.598), "lstsq": figures(0.6), "distill": figures(0.6)}, "copy"),
        ({"copy": figures(0.002), "distill": figures(0.0, spread=0.0)}, "distill"),
        ({"copy": figures(0.02), "distill": figures(0.0, spread=0.0)}, "copy"),
        ({"copy": figures(-0.1, 0.2), "paper": figures(-0.2, 0.1), "distill": figures(0.0, spread=0.0)}, "copy"),
        ({"copy": figures(-0.1), "paper": figures(-0.2), "distill": figures(-0.001)}, "distill"),
        ({"copy": figures(0.5), "copy + rest": figures(0.52), "distill": figures(0.4)}, "copy"),
        ({"lstsq": figures(0.4), "lstsq + rest": figures(0.54), "distill": figures(0.5)}, "lstsq + rest"),
        ({"lstsq": figures(0.4), "lstsq + rest": figures(0.52), "distill": figures(0.5)}, "distill"),
        ({"lstsq": figures(0.2, -0.1, direction=0.0), "distill": figures(0.1)}, "distill"),
        ({"copy": figures(0.6, -0.1), "distill": figures(0.5)}, "copy"),
        ({"copy": figures(0.5), "copy + rest": figures(0.7, direction=0.0), "distill": figures(0.4)}, "copy"),
    ],
    ids=[
        "best",
        "tie",
        "chance",
        "nothing beside something",
        "constant",
        "all harm",
        "little rest",
        "rest",
        "rest beside distill",
        "flattened",
        "too large",
        "a rest without direction",
    ],
)
def test_the_choice_is_the_best_then_the_simplest(judged: Any, chosen: str) -> None:
    assert choose(judged, {}).chosen == chosen


def test_an_adapter_that_does_nothing_is_not_written_beside_one_that_agrees() -> None:
    nothing = figures(0.0, spread=0.0)
    for content, whole in ((0.02, 0.02), (0.7, 0.8), (-0.1, 0.05)):
        for method in ("copy", "lstsq", "paper"):
            assert choose({method: figures(content, whole), "distill": nothing}, {}).chosen == method


def test_a_choice_that_only_shifts_by_a_constant_is_warned_of() -> None:
    choice = choose({"copy": figures(-0.1, 0.2), "distill": figures(0.0, spread=0.0)}, {})
    assert choice.warning is not None
    assert "constant" in choice.warning
    assert choose({"copy": figures(0.2)}, {}).warning is None
    assert choose({"copy": figures(0.2, -0.1)}, {}).warning is None
    harmful = choose({"copy": figures(0.2, -0.1, direction=0.0), "distill": figures(0.0, spread=0.0)}, {})
    assert harmful.chosen == "distill"
    assert "no better than no adapter" in str(harmful.warning)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5])
def test_the_distance_of_weights_is_the_share_they_moved_by(share: float, root: Path, tmp_path: Path) -> None:
    found = weight_distance(Checkpoint(root / "old"), Checkpoint(moved(tmp_path / "new", share)))
    assert set(found.distances) >= {"q", "k", "v", "o", "gate", "up", "down", "other", "embedding"}
    for role in ("q", "k", "v", "o", "gate", "up", "down"):
        assert found.distances[role] == pytest.approx(share, rel=1e-4)
    assert found.distances["embedding"] == found.distances["other"] == 0
    assert found.near == (share < 0.01)


def test_the_layers_of_a_pruned_model_are_found_by_their_weights(root: Path, tmp_path: Path) -> None:
    found = weight_distance(Checkpoint(root / "old"), Checkpoint(moved(tmp_path / "new", 0.05, layers=[0, 2])))
    assert found.layers == {0: 0, 1: 2}
    assert kinship.kinship(found, same_depth=False).kind == kinship.DEPTH


def test_unlike_weights_of_one_shape_are_strangers(root: Path, tmp_path: Path) -> None:
    save_folder(tiny_model("llama", 1, d=32, layers=3, vocab=VOCABULARY), tiny_tokenizer(VOCABULARY), tmp_path / "new")
    found = weight_distance(Checkpoint(root / "old"), Checkpoint(tmp_path / "new"))
    assert abs(found.cosine) < kinship.RELATED
    assert kinship.kinship(found, (0.2, 0.3)).kind == kinship.STRANGERS
    assert kinship.kinship(None, (0.2, 0.3)).kind == kinship.STRANGERS
    assert kinship.kinship(None, (0.8, 0.9)).kind == kinship.RESIZED
    assert kinship.kinship(None, (0.9995, 0.9999)).kind == kinship.REWRITTEN


@pytest.mark.parametrize(("share", "kind"), [(None, kinship.SAME), (0.2, kinship.TRAINED)])
def test_verify_tells_the_kind_of_relatives(share: float | None, kind: str, root: Path, tmp_path: Path) -> None:
    new = root / "old" if share is None else moved(tmp_path / "new", share)
    report = tmp_path / "report.html"
    result = verify(
        root / "old", None, new, None, config=VerifyConfig(examples=8, max_tokens=32), runtime=Runtime(report=report)
    )
    assert result.relatives is not None
    assert result.relatives["kind"] == kind
    assert result.relatives["sentence"] in report.read_text().replace("&#x27;", "'")
    printed = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["verify", str(root / "old"), str(new), "--examples", "8"])
    assert result.relatives["sentence"].split(":")[0] in printed.stdout


def test_a_plans_summary_tells_the_kind_of_relatives(root: Path, tmp_path: Path) -> None:
    plan = TransferPlan.build(root / "old", moved(tmp_path / "new", 0.2), config=PlanConfig(method="copy", examples=8))
    assert plan.summary()["relatives"].startswith("One model trained on from the other (projections up to 20.0% apart")
    plan.save(tmp_path / "plan")
    printed = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["inspect", str(tmp_path / "plan")])
    assert plan.summary()["relatives"] in printed.stdout


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda h: h["options"].update(candidates=["magic", "distill"]), "candidates"),
        (lambda h: h["options"].update(candidates=["copy", "distill"], method="copy"), "candidates"),
        (lambda h: h["options"].update(candidates="copy"), "candidates"),
        (lambda h: h["facts"].update(kinship={"kind": "cousins"}), "kinship"),
        (lambda h: h["facts"]["kinship"]["distances"].update(q=-1.0), "kinship"),
        (lambda h: h["facts"]["kinship"].update(same_config=1), "kinship"),
    ],
)
def test_a_plan_with_unknown_candidates_or_relatives_is_refused(
    change: Any, named: str, root: Path, tmp_path: Path, plan_header: Any
) -> None:
    stored, header = plan_header
    changed = copy.deepcopy(header)
    change(changed)
    save_file(stored, tmp_path / "plan", metadata={"plan": json.dumps(changed)})
    with pytest.raises(LoraSuiteError, match=named):
        TransferPlan.load(tmp_path / "plan")


@pytest.fixture(scope="module")
def plan_header(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Any]:
    folder = tmp_path_factory.mktemp("plan")
    TransferPlan.build(root / "old", moved(folder / "new", 0.2), config=PlanConfig(examples=8)).save(folder / "plan")
    plan = TransferPlan.load(folder / "plan")
    from safetensors import safe_open

    with safe_open(folder / "plan", framework="pt") as file:
        header = json.loads(file.metadata()["plan"])
    return dict(plan.tensors.items()), header
