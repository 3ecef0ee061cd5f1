"""The similarities of layers against dense float64 oracles written from the papers' definitions on X and Y."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flat_options import given
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group
from torch import Tensor
from typer.testing import CliRunner

from lorasuite_fast import PlanConfig, TransferPlan
from lorasuite_fast.cli.app import app
from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.transfer.compare import _minibatches
from lorasuite_fast.transfer.similarity import (
    MEASURES,
    Components,
    StreamingSimilarity,
    kept_for_cca,
    layer_gram,
    layer_similarity,
    streaming,
)
from lorasuite_kernels import StreamingCKA, full_gram, gram

from planted import Planted, plant, random_adapter, save_folder, tiny_model, tiny_tokenizer

CCA = ["mean-cca", "squared-cca", "pwcca"]
OTHERS = [*CCA, "procrustes"]


def kept_scores(x: np.ndarray) -> np.ndarray:
    """What CCA compares of centred x (m, d): its principal component scores, cut off where m <= 2 d.

    SVCCA's 99 % of the variance, and no more than half of the dimensions centring leaves.
    """
    _, s, directions = np.linalg.svd(x, full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    half = (len(x) - 1) // 2
    if rank > half:
        rank = next(k for k in range(1, rank + 1) if k == half or (s[:k] ** 2).sum() >= 0.99 * (s**2).sum())
    return x @ directions[:rank].T


def regressed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(x, y, rcond=None)[0]


def oracle(measure: str, x: Tensor, y: Tensor) -> float:
    """One pair of layers, (m, d_x) and (m, d_y)."""
    x, y = (z.double().numpy() - z.double().numpy().mean(0) for z in (x, y))
    if measure == "procrustes":
        width = max(x.shape[1], y.shape[1])
        x, y = (np.pad(z / np.linalg.norm(z), ((0, 0), (0, width - z.shape[1]))) for z in (x, y))
        q, _ = orthogonal_procrustes(y, x)
        return 1 - float(np.linalg.norm(x - y @ q) ** 2) / 2
    x, y = kept_scores(x), kept_scores(y)
    k = min(x.shape[1], y.shape[1])
    # Σxx^-1 Σxy Σyy^-1 Σyx: eigenvalues ρ², eigenvectors the canonical variables' coefficients.
    squares, coefficients = np.linalg.eig(regressed(x, y) @ regressed(y, x))
    best = np.argsort(-squares.real)[:k]
    rho = np.sqrt(squares.real[best].clip(0))
    if measure == "mean-cca":
        return float(rho.mean())
    if measure == "squared-cca":
        return float((rho**2).mean())
    h = x @ coefficients.real[:, best]
    alpha = np.abs((h / np.linalg.norm(h, axis=0)).T @ x).sum(1)
    return float(alpha @ rho / alpha.sum())


def activations(seed: int, count: int, m: int, d: int, decay: float = 0.5) -> Tensor:
    """(count, m, d) float64 around a common signal, channels of falling variance: as hidden states are."""
    rng = torch.Generator().manual_seed(seed)
    signal = torch.randn(m, 6, generator=torch.Generator().manual_seed(99 + m), dtype=torch.float64)
    x = torch.randn(count, m, d, generator=rng, dtype=torch.float64)
    x += signal @ torch.randn(count, 6, d, generator=rng, dtype=torch.float64)
    return x * torch.arange(1, d + 1) ** -decay


def rotated(x: Tensor, seed: int) -> Tensor:
    return x @ torch.from_numpy(ortho_group.rvs(x.shape[-1], random_state=seed))


@pytest.mark.parametrize("measure", OTHERS)
@pytest.mark.parametrize(
    ("m", "d_x", "d_y", "decay"),
    [(60, 12, 20, 0.5), (60, 20, 12, 0.5), (40, 12, 60, 0.5), (24, 40, 56, 0.2), (24, 40, 56, 2.0), (130, 9, 9, 0.5)],
)
def test_every_pair_agrees_with_the_papers_definition(measure: str, m: int, d_x: int, d_y: int, decay: float) -> None:
    x, y = activations(1, 3, m, d_x, decay), activations(2, 2, m, d_y, decay)
    found = layer_similarity(measure, x, y)
    expected = torch.tensor([[oracle(measure, a, b) for b in y] for a in x])
    assert found.dtype == torch.float32
    assert found.shape == (3, 2)
    assert (found - expected).abs().max() < 2e-6
    # The table tells pairs apart, so that a transposed or constant one would not pass.
    assert expected.max() - expected.min() > 1e-3


@pytest.mark.parametrize("measure", OTHERS)
@pytest.mark.parametrize("offset", [100, 20_000])
def test_massive_activations_do_not_disturb_the_measures(measure: str, offset: float) -> None:
    x, y = activations(3, 2, 60, 12), activations(4, 2, 60, 16)
    x[:, :, :2] += offset
    y[:, :, 5] -= 3 * offset
    x, y = x.float(), y.float()
    expected = torch.tensor([[oracle(measure, a, b) for b in y] for a in x])
    assert (layer_similarity(measure, x, y) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("m", "d"), [(60, 12), (24, 40)])
def test_rotation_scale_and_offset_of_a_layer_do_not_matter(measure: str, m: int, d: int) -> None:
    x, y = activations(5, 2, m, d), activations(6, 3, m, d + 3)
    plain = layer_similarity(measure, x, y)
    moved = layer_similarity(measure, 7 * rotated(x, 0) + 3, 0.02 * rotated(y, 1) - 5)
    assert torch.allclose(moved, plain, atol=1e-5)


@pytest.mark.parametrize("measure", ["mean-cca", "squared-cca"])
def test_cca_of_enough_examples_is_invariant_to_every_invertible_map(measure: str) -> None:
    rng = torch.Generator().manual_seed(7)
    x, y = activations(8, 2, 60, 12), activations(9, 3, 60, 20)
    maps = [torch.randn(d, d, generator=rng, dtype=torch.float64) for d in (12, 20)]
    plain = layer_similarity(measure, x, y)
    assert torch.allclose(layer_similarity(measure, x @ maps[0], y @ maps[1]), plain, atol=1e-6)
    assert not torch.allclose(
        layer_similarity("cka", x @ maps[0], y @ maps[1]), layer_similarity("cka", x, y), atol=1e-2
    )


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("m", "d"), [(60, 12), (24, 40)])
def test_a_layer_is_most_similar_to_itself_and_its_rotation(measure: str, m: int, d: int) -> None:
    x = activations(10, 4, m, d)
    table = layer_similarity(measure, x, 3 * rotated(x, 2) + 5)
    assert torch.allclose(table.diagonal(), torch.ones(4), atol=1e-5)
    assert (table - 2 * torch.eye(4)).max() < 0.95


@pytest.mark.parametrize("measure", MEASURES)
def test_unrelated_layers_are_far_less_similar(measure: str) -> None:
    rng = torch.Generator().manual_seed(11)
    x, y = torch.randn(2, 200, 10, generator=rng), torch.randn(3, 200, 10, generator=rng)
    assert layer_similarity(measure, x, y).max() < 0.3


def test_with_fewer_examples_than_dimensions_correlations_are_not_one_by_necessity() -> None:
    # All centred components of both would span the same 23 dimensions: every correlation would be 1.
    rng = torch.Generator().manual_seed(12)
    x, y = torch.randn(1, 24, 80, generator=rng), torch.randn(1, 24, 80, generator=rng)
    assert layer_similarity("squared-cca", x, y) == pytest.approx(11 / 23, abs=0.15)
    assert layer_similarity("mean-cca", x, y) < 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_layer_that_is_the_same_for_all_examples_has_similarity_zero(measure: str, dtype: torch.dtype) -> None:
    x = activations(13, 3, 24, 8).to(dtype)
    x[1] = x[1, :1]
    x[2] = 0
    table = layer_similarity(measure, x, x)
    assert torch.isfinite(table).all()
    assert table[1:].tolist() == [[0, 0, 0]] * 2
    assert table[:, 1:].tolist() == [[0, 0]] * 3
    assert table[0, 0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("measure", OTHERS)
def test_examples_that_repeat_leave_fewer_components(measure: str) -> None:
    x = activations(14, 1, 4, 30).repeat(1, 10, 1)
    y = activations(15, 2, 40, 30)
    found = layer_similarity(measure, x, y)
    assert (found[0] - torch.tensor([oracle(measure, x[0], layer) for layer in y])).abs().max() < 2e-6


@pytest.mark.parametrize("measure", OTHERS)
def test_minibatches_are_averaged(measure: str) -> None:
    batches = [(activations(16 + m, 2, m, 9), activations(17 + m, 3, m, 6)) for m in (12, 40)]
    stream = StreamingSimilarity(measure, 2, 3)
    for x, y in batches:
        stream.update_grams(layer_gram(measure, x), layer_gram(measure, y))
    tables = [layer_similarity(measure, x, y) for x, y in batches]
    assert torch.allclose(stream.compute(), (tables[0] + tables[1]) / 2, atol=1e-6)
    assert not torch.allclose(tables[0], tables[1], atol=1e-2)


@pytest.mark.parametrize("m", [4, 128, 129, 300])
def test_unpacked_gram_matrices_have_their_diagonals(m: int) -> None:
    x = activations(18, 2, m, 7)
    centred = x - x.mean(1, keepdim=True)
    assert torch.allclose(full_gram(gram(x)), centred @ centred.mT, atol=1e-9)


@pytest.mark.parametrize(("m", "kept"), [(9, 4), (8, 1)])
def test_cca_keeps_every_component_up_to_half_the_examples(m: int, kept: int) -> None:
    """Of nine examples four components cannot meet by necessity; of eight they can, and the first explains 99 %."""
    directions = torch.linalg.qr(torch.randn(m, 4, dtype=torch.float64)).Q
    found = kept_for_cca(Components(directions, torch.tensor([1.0, 0.05, 0.04, 0.03], dtype=torch.float64)))
    assert len(found.sizes) == found.directions.shape[1] == kept


def test_input_that_does_not_fit_is_named() -> None:
    x = torch.zeros(1, 5, 2)
    with pytest.raises(LoraSuiteError, match="'rbf' is not one of cka, mean-cca, squared-cca, pwcca, procrustes"):
        layer_similarity("rbf", x, x)
    with pytest.raises(ValueError, match="at least 4 examples; got m = 3"):
        layer_similarity("pwcca", x[:, :3], x[:, :3])
    with pytest.raises(ValueError, match="same examples; got m = 5 and 4"):
        layer_similarity("pwcca", x, x[:, :4])
    with pytest.raises(ValueError, match="layer 0 hold NaN"):
        layer_similarity("procrustes", x / 0, x)
    with pytest.raises(RuntimeError, match="before any update"):
        StreamingSimilarity("pwcca", 1, 1).compute()


@pytest.fixture(scope="module")
def upgrade(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Planted]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("upgrade")
    model, tokenizer = tiny_model("llama", 3, d=32, layers=4, vocab=420), tiny_tokenizer(420, seed=3)
    planted = plant(model, tokenizer, d_new=48, layers_new=7, heads_new=6, intermediate_new=80, added_tokens=30, seed=3)
    save_folder(model, tokenizer, root / "old")
    planted.save(root / "new")
    # As wide as the old one, which the identity transfer needs.
    save_folder(tiny_model("llama", 4, d=32, layers=7, heads=8, vocab=420), tokenizer, root / "narrow")
    random_adapter(root / "old", root / "adapter", targets=["q_proj"], rank=2, alpha=4, seed=3)
    return root, planted


@pytest.mark.parametrize("examples", [24, 72])
@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_finds_the_layers_of_a_planted_upgrade(
    measure: str, examples: int, upgrade: tuple[Path, Planted], tmp_path: Path
) -> None:
    root, planted = upgrade
    plan = TransferPlan.build(
        root / "old", root / "new", config=PlanConfig(examples=examples, roles=("q",), similarity=measure)
    )
    assert planted.layer_map != list(range(4))
    assert plan.layers == {j: i for i, j in enumerate(planted.layer_map)}
    table = plan.tensors["cka"]
    assert torch.allclose(torch.stack([table[i, j] for j, i in plan.layers.items()]), torch.ones(4), atol=1e-4)
    assert plan.options["similarity"] == measure
    plan.save(tmp_path / "plan")
    loaded = TransferPlan.load(tmp_path / "plan")
    assert loaded.options == {k: v for k, v in plan.options.items() if k not in ("device", "dtype")}
    assert torch.equal(loaded.tensors["cka"], table)


def test_several_minibatches_of_a_build_are_averaged(
    upgrade: tuple[Path, Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, planted = upgrade
    monkeypatch.setattr("lorasuite_fast.transfer.compare._MINIBATCH", 10)
    assert len(_minibatches(24)) == 3
    plan = TransferPlan.build(
        root / "old", root / "new", config=PlanConfig(examples=24, roles=("q",), similarity="procrustes")
    )
    assert plan.layers == {j: i for i, j in enumerate(planted.layer_map)}


def test_cka_is_that_of_the_kernels_to_the_bit() -> None:
    x, y = activations(19, 3, 24, 40).float(), activations(20, 2, 24, 56).float()
    stream, ours = StreamingCKA(3, 2), streaming("cka", 3, 2)
    stream.update_grams(gram(x), gram(y))
    ours.update_grams(layer_gram("cka", x), layer_gram("cka", y))
    assert torch.equal(ours.compute(), stream.compute())


def test_work_of_another_measure_is_not_taken_up(upgrade: tuple[Path, Planted], tmp_path: Path) -> None:
    root, _ = upgrade
    options = {"examples": 8, "roles": ("q",), "work": tmp_path / "work"}
    TransferPlan.build(root / "old", root / "new", **given(TransferPlan.build, similarity="pwcca", **options))
    again = TransferPlan.build(root / "old", root / "new", **given(TransferPlan.build, similarity="pwcca", **options))
    with pytest.raises(LoraSuiteError, match="with option similarity"):
        TransferPlan.build(root / "old", root / "new", **given(TransferPlan.build, **options))
    fresh = TransferPlan.build(
        root / "old",
        root / "new",
        **given(TransferPlan.build, similarity="pwcca", **options | {"work": tmp_path / "other"}),
    )
    assert torch.equal(again.tensors["cka"], fresh.tensors["cka"])


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.output


def commands(root: Path, out: Path) -> dict[str, tuple[object, ...]]:
    models = (root / "old", root / "narrow")
    common = ("--examples", 8, "--method", "lstsq")
    return {
        "plan": ("plan", *models, out, "--roles", "q", *common),
        "migrate": ("migrate", *models, root / "adapter", out, *common),
    }


@pytest.mark.parametrize("command", ["plan", "migrate"])
def test_every_ablation_is_an_option_of_the_command(
    command: str, upgrade: tuple[Path, Planted], tmp_path: Path
) -> None:
    ablations = {"layers": "medium", "similarity": "pwcca", "heads": "identity", "transfer": "identity"}
    options = [part for name, value in ablations.items() for part in (f"--{name}", value)]
    code, output = run(*commands(upgrade[0], tmp_path / "out")[command], *options, "--json")
    assert code == 0, output
    result = json.loads(output)
    assert {name: result["options"][name] for name in ablations} == ablations
    layers = {layer.get("new", layer.get("new_layer")): layer.get("old", layer.get("old_layer"))
              for layer in result["layers"]}  # fmt: skip
    assert layers == {1: 0, 2: 1, 3: 2, 4: 3}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("command", ["plan", "migrate"])
def test_the_table_of_layers_is_headed_by_its_measure(
    command: str, measure: str, upgrade: tuple[Path, Planted], tmp_path: Path
) -> None:
    code, output = run(*commands(upgrade[0], tmp_path / "out")[command], "--similarity", measure)
    assert code == 0, output
    heading = next(line for line in output.splitlines() if "new" in line and "old" in line and "┃" in line)
    assert ("CKA" if measure == "cka" else measure) in heading


@pytest.mark.parametrize("option", ["layers", "similarity", "heads", "transfer"])
@pytest.mark.parametrize("command", ["plan", "migrate"])
def test_an_unknown_ablation_is_refused_with_the_known_ones(
    command: str, option: str, upgrade: tuple[Path, Planted], tmp_path: Path
) -> None:
    code, output = run(*commands(upgrade[0], tmp_path / "out")[command], f"--{option}", "nonsense")
    assert code == 2
    assert f"--{option}" in output
    assert "nonsense" in output
    assert {"layers": "medium", "similarity": "pwcca", "heads": "hungarian", "transfer": "embedding"}[option] in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["layers", "similarity", "heads", "transfer"])
def test_python_refuses_an_unknown_ablation(option: str, upgrade: tuple[Path, Planted]) -> None:
    root, _ = upgrade
    with pytest.raises(LoraSuiteError, match="'nonsense' is not one of"):
        TransferPlan.build(root / "old", root / "new", **given(TransferPlan.build, **{option: "nonsense"}))


def test_identity_heads_and_identity_transfer_leave_their_traces_in_the_plan(upgrade: tuple[Path, Planted]) -> None:
    root, _ = upgrade
    plan = TransferPlan.build(
        root / "old",
        root / "narrow",
        config=PlanConfig(examples=8, roles=("q",), heads="identity", transfer="identity", method="lstsq"),
    )
    assert torch.equal(plan.tensors["W_h"], torch.eye(32))
    for j in plan.layers:
        assert plan.tensors[f"layers.{j}.heads.match"].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
