"""Inputs on which a formula has no value: each has a documented answer or a refusal, and no NaN reaches a file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flat_options import given
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasuite_fast import LoraSuiteError, Migration, PlanConfig, TransferPlan, VerifyConfig, migrate, verify
from lorasuite_fast.adapters.adapter import adapter_files
from lorasuite_fast.transfer.mapping import map_layers, match_heads, match_neurons

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

EMBEDDING = "model.embed_tokens.weight"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("degenerate")
    tokenizer = tiny_tokenizer(320)
    old = save_folder(tiny_model("llama", 0, layers=3), tokenizer, root / "old")
    return old, save_folder(tiny_model("llama", 1, d=48, layers=4), tokenizer, root / "new")


def edited(source: Path, target: Path, edit: Edit) -> Path:
    shutil.copytree(source, target)
    file = next(target.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def adapter_of(model: Path, folder: Path) -> Path:
    return random_adapter(model, folder, targets=TARGETS, rank=2, alpha=4, seed=0)


def carried(old: Path, new: Path, adapter: Path, out: Path, method: str = "lstsq", **options: object) -> Migration:
    """A migration whose files are checked to hold finite numbers."""
    result = migrate(old, new, adapter, out, **given(migrate, method=method, examples=8, **options))  # type: ignore[arg-type]
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(torch.isfinite(tensor).all() for tensor in dict(result.plan.tensors.items()).values())
    return result


def layer_zero(tensors: dict[str, Tensor], names: tuple[str, ...], layer: int = 1) -> None:
    for name, tensor in tensors.items():
        if f".layers.{layer}." in name and any(part in name for part in names):
            tensor.zero_()


def head_zero(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if ".layers.0.self_attn." in name:
            (tensor[:, :8] if "o_proj" in name else tensor[:8]).zero_()


def one_column_twice(tensors: dict[str, Tensor]) -> None:
    tensors[EMBEDDING][:, 1] = tensors[EMBEDDING][:, 0]


def layers_alike(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if ".layers.1." in name:
            tensor.copy_(tensors[name.replace(".1.", ".0.")])


EDITS: dict[str, Edit] = {
    "a rank-deficient embedding": one_column_twice,
    "a zero head": head_zero,
    "a layer of zeros": lambda t: layer_zero(t, ("self_attn", "mlp")),
    "a norm whose gains are zero": lambda t: layer_zero(t, ("input_layernorm",)),
    "two identical layers": layers_alike,
}


@pytest.mark.parametrize("method", ["lstsq", "paper", "distill"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("side", ["old", "new"])
def test_degenerate_weights_give_finite_adapters(
    side: str, edit: str, method: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = pair
    changed = edited(pair[side == "new"], tmp_path / "changed", EDITS[edit])
    old, new = (changed, new) if side == "old" else (old, changed)
    carried(old, new, adapter_of(old, tmp_path / "adapter"), tmp_path / "out", method)


def test_a_zero_head_is_similar_to_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    old = edited(pair[0], tmp_path / "changed", head_zero)
    plan = TransferPlan.build(old, pair[1], config=PlanConfig(examples=8, method="lstsq", layers="first"))
    similarity = plan.tensors["layers.0.heads.similarity"]
    assert not similarity[0].any()
    assert similarity.any()


def test_equally_similar_layers_are_mapped_in_order() -> None:
    similarity = torch.full((3, 5), 0.5)
    assert map_layers(similarity, "cka") == {0: 0, 1: 1, 2: 2}
    assert map_layers(torch.zeros(5, 3), "cka") == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize("method", ["lstsq", "paper", "distill"])
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_a_zero_adapter_stays_one(method: str, which: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if which in name:
                tensor.zero_()

    adapter = edited(adapter_of(pair[0], tmp_path / "adapter"), tmp_path / "zero", edit)
    result = carried(*pair, adapter, tmp_path / "out", method)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    for name in tensors:
        if name.endswith("lora_B.weight"):
            update = tensors[name] @ tensors[name.replace("lora_B", "lora_A")]
            assert not update.any()
    if method == "distill":
        assert result.warning is not None
        assert "does not change the old model" in result.warning
        assert result.distilled is not None
        assert {figure for figures in result.distilled.agreement.values() for figure in figures} == {0.0}


def zero(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def test_verify_says_that_a_zero_adapter_had_nothing_to_carry(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = edited(
        adapter_of(pair[0], tmp_path / "adapter"),
        tmp_path / "zero",
        zero,
    )
    out = tmp_path / "out"
    carried(*pair, adapter, out)
    found = verify(pair[0], adapter, pair[1], out, config=VerifyConfig(examples=8))
    assert found.kind == "nothing to carry"
    assert "NaN" not in json.dumps(found.as_dict())


def keep_shared(count: int) -> Edit:
    """Leaves trained rows for `count` tokens alone."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[EMBEDDING][count:] = tensors[EMBEDDING][-1].clone()

    return edit


def test_one_shared_token_fewer_than_the_old_width_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    # Rows that are all equal count as one token.
    width = load_file(pair[0] / "model.safetensors")[EMBEDDING].shape[1]
    for count in (width - 2, width - 1):
        old = edited(pair[0], tmp_path / f"old-{count}", keep_shared(count))
        adapter = adapter_of(old, tmp_path / f"adapter-{count}")
        if count == width - 2:
            with pytest.raises(
                LoraSuiteError, match=rf"share {width - 1} trained tokens, fewer than the old width {width}"
            ):
                carried(old, pair[1], adapter, tmp_path / f"out-{count}")
        else:
            carried(old, pair[1], adapter, tmp_path / f"out-{count}")


def test_repeats_of_one_calibration_example_count_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(f"{json.dumps({'text': 'the same words again'})}\n" * 40)
    with pytest.raises(LoraSuiteError, match="holds 40 examples, 1 of them different; at least 4 different"):
        TransferPlan.build(*pair, config=PlanConfig(calibration=text, examples=8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_writer_refuses_what_is_not_finite_and_names_it(
    value: float, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(pair[0], tmp_path / "adapter")
    plan = TransferPlan.build(*pair, config=PlanConfig(examples=8, method="lstsq"))

    def broken(updates: dict, *rest: object) -> dict[str, bytes]:  # type: ignore[type-arg]
        key = sorted(updates)[0]
        updates[key].factors.b[0, 0] = value
        return adapter_files(updates, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("lorasuite_fast.pipeline.plan.adapter_files", broken)
    with pytest.raises(LoraSuiteError, match=r"the migrated base_model\..*lora_B\.weight: the numbers leave the range"):
        plan.apply(adapter, tmp_path / "out")
    plan.tensors["W_h"][0, 0] = value
    with pytest.raises(LoraSuiteError, match="the plan's tensor W_h: the numbers leave the range"):
        plan.save(tmp_path / "plan")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def times(part: str, factor: float) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if part in name:
                tensor.mul_(factor)

    return edit


def filled(part: str, value: float) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if part in name:
                tensor.fill_(value)

    return edit


# name -> (adapter, new model)
EXTREMES: dict[str, tuple[Edit | None, Edit | None]] = {
    "B near the largest float": (filled("lora_B", 3e38), None),
    "A near the largest float": (filled("lora_A", 3e38), None),
    "a product beyond any float": (times("lora_", 1e25), None),
    "gains near the smallest float": (None, filled("norm", 1e-38)),
    "gains below the smallest float": (None, filled("norm", 1e-45)),
    "tiny embeddings": (None, times("embed", 1e-30)),
    "huge embeddings": (None, times("embed", 1e30)),
    "tiny weights": (None, times("_proj", 1e-30)),
    "huge weights": (None, times("_proj", 1e30)),
    "a huge head": (None, times("lm_head", 1e38)),
}


@pytest.mark.parametrize("method", ["lstsq", "paper", "distill"])
@pytest.mark.parametrize("name", EXTREMES, ids=lambda name: name.replace(" ", "-"))
def test_finite_extremes_give_a_finite_adapter_or_one_error_and_leave_nothing(
    name: str, method: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, new = adapter_of(pair[0], tmp_path / "adapter"), pair[1]
    of_adapter, of_model = EXTREMES[name]
    if of_adapter is not None:
        adapter = edited(adapter, tmp_path / "changed", of_adapter)
    if of_model is not None:
        new = edited(new, tmp_path / "changed", of_model)
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    try:
        result = carried(pair[0], new, adapter, out, method)
    except LoraSuiteError as error:
        assert re.search("; (look for|check|try) ", str(error))  # noqa: PT017
        assert not any(out.parent.iterdir())
    else:
        json.dumps([result.as_dict(), result.plan.facts], allow_nan=False)
        assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("ratio", [1e300, 1e-300])
def test_a_plan_with_an_extreme_ratio_is_one_error(ratio: float, pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = edited(adapter_of(pair[0], tmp_path / "given"), tmp_path / "adapter", lambda t: None)
    plan = TransferPlan.build(*pair, config=PlanConfig(examples=8, method="lstsq"))
    plan.facts["rms_ratio"] = ratio
    if ratio > 1:
        with pytest.raises(LoraSuiteError, match=r"adapter or the plan, layer 0, q: the numbers leave the range of"):
            plan.apply(adapter, tmp_path / "out")
    else:
        plan.apply(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "given"] + ["out"] * (ratio < 1)


def test_similarities_without_a_value_are_no_mapping() -> None:
    nothing = torch.full((3, 3), float("nan"))
    for how in (map_layers, match_heads):
        with pytest.raises(LoraSuiteError, match=r"the similarity of the models' .*: the numbers leave the range of"):
            how(nothing)
    with pytest.raises(LoraSuiteError, match="the similarity of the models' neurons"):
        match_neurons((None, nothing, nothing), (None, nothing, nothing))


def test_a_base_pair_of_rows_of_zeros_is_verified_or_one_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for n, edit in enumerate((filled("norm", 1e-45), times("embed", 0), times("embed", 1e-30), times("lm_head", 0))):
        new = edited(pair[1], tmp_path / str(n), edit)
        try:
            found = verify(pair[0], None, new, None, config=VerifyConfig(examples=8))
        except LoraSuiteError:
            continue
        json.dumps(found.as_dict(), allow_nan=False)
