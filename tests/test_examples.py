"""The examples run, and what they return is right by oracles of their own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import checkpoint_cka
import cka_package_loop
import head_matching
import kernel_oracles as oracles
import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name: str) -> str:
    """What an example prints in a process of its own, outside the repository's folder."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "checkpoint_cka",
        "cka_package_loop",
        "head_matching",
        "hub_kernel",
    }


@pytest.mark.parametrize("made", [checkpoint_cka.vision, checkpoint_cka.language])
def test_checkpoint_cka_is_that_of_the_outputs_of_the_named_layers(made: object) -> None:
    torch.manual_seed(1)
    model, layers, batches, labels, pool = made()
    trained = copy.deepcopy(model)
    checkpoint_cka.train(trained, batches[:2], labels[:2], epochs=2)
    found = checkpoint_cka.compare(model, trained, layers, batches[:2], pool)

    def outputs(network: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
        """Means over whatever lies between the examples and the channels, from a forward pass in float64."""
        kept: dict[str, torch.Tensor] = {}
        wide = copy.deepcopy(network).double()
        for name in layers:
            wide.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: kept.__setitem__(name, o))
        with torch.no_grad():
            wide(batch.double() if batch.is_floating_point() else batch)
        axes = {2: (), 3: (1,), 4: (2, 3)}
        return [kept[n].mean(axes[kept[n].ndim]) if kept[n].ndim > 2 else kept[n] for n in layers]

    expected = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    features = [(outputs(model, batch), outputs(trained, batch)) for batch in batches[:2]]
    for i in range(len(layers)):
        for j in range(len(layers)):
            expected[i, j] = oracles.cka([(x[i][None], y[j][None]) for x, y in features])[0, 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_checkpoint_cka_leaves_no_hook_behind() -> None:
    model, layers, batches, _, pool = checkpoint_cka.vision()
    checkpoint_cka.layer_grams(model, layers, batches[0], pool)
    assert not any(module._forward_hooks for module in model.modules())


def test_training_moves_the_last_layer_of_both_models_most() -> None:
    lines = printed("checkpoint_cka").splitlines()
    blocks = [i for i, line in enumerate(lines) if "CKA of each layer" in line]
    assert len(blocks) == 2
    for start, stop in zip(blocks, [*blocks[1:], len(lines)], strict=True):
        values = [float(line.split()[-1]) for line in lines[start + 1 : stop]]
        assert min(values) == values[-1]
        assert values[-1] < 0.9


def test_the_replaced_loop_agrees_with_float64_on_all_pairs_whatever_the_offset() -> None:
    for offset in (0.0, 30.0, 1000.0):
        batches = cka_package_loop.example_batches(offset)
        found = cka_package_loop.run(cka_package_loop.KernelCKA(5, 4), batches)
        for i in range(5):
            for j in range(4):
                pair = [(x[f"x{i}"][None], y[f"y{j}"][None]) for x, y in batches]
                assert abs(float(found[i, j] - oracles.cka(pair)[0, 0])) < 1e-5


def test_the_loop_it_replaces_is_right_where_nothing_cancels() -> None:
    batches = cka_package_loop.example_batches(0.0)
    found = cka_package_loop.run(cka_package_loop.LoopCKA(5, 4), batches)
    for i in range(5):
        for j in range(4):
            pair = [(x[f"x{i}"][None], y[f"y{j}"][None]) for x, y in batches]
            assert abs(float(found[i, j] - oracles.cka(pair)[0, 0])) < 1e-5


def test_the_loop_example_prints_errors_of_rounding_for_the_kernels() -> None:
    lines = [line for line in printed("cka_package_loop").splitlines() if "offset" in line]
    assert len(lines) == 3
    assert all(float(line.rpartition(" ")[2]) < 1e-5 for line in lines)


def test_pytorch_cka_with_the_kernels_gives_its_own_numbers() -> None:
    package = pytest.importorskip("cka", reason="pytorch-cka is not installed")
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(2)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 20)), batch_size=16)
    found = []
    for kind in (package.CKA, cka_package_loop.kernel_methods(package.CKA)):
        with kind(*models, layers=["0", "2"], device="cpu") as compared:
            found.append(compared._compare(loader, progress=False))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_head_similarity_is_the_cosine_of_the_dense_interaction_matrices() -> None:
    torch.manual_seed(0)
    model, other = head_matching.small_model(), head_matching.small_model()
    weights = [head_matching.attention(m, 1) for m in (model, other)]
    expected = oracles.head_similarity(*weights, (8, 8), (8, 8))
    torch.testing.assert_close(head_matching.similarity(model, other, 1).double(), expected, rtol=0, atol=1e-6)


def test_reordering_heads_changes_nothing_and_merging_undoes_it() -> None:
    torch.manual_seed(0)
    model = head_matching.small_model()
    other = copy.deepcopy(model)
    for layer in range(2):
        head_matching.reorder_heads(other, layer, torch.randperm(8))
    assert not torch.equal(head_matching.attention(other, 0)[0], head_matching.attention(model, 0)[0])
    assert head_matching.change(model, other) < 1e-6
    merged = head_matching.merge(model, other)
    for weight, expected in zip(merged.parameters(), model.parameters(), strict=True):
        assert torch.equal(weight, expected)


def test_folding_an_exact_double_into_its_original_changes_nothing() -> None:
    torch.manual_seed(0)
    model = head_matching.small_model()
    q, k, v, o = head_matching.attention(model, 0)
    with torch.no_grad():
        for weight in (q, k, v):
            weight[16:32] = weight[48:64]
        o[:, 16:32] = 0.5 * o[:, 48:64]
    assert head_matching.most_alike(model, 0) == (1, 3)
    assert head_matching.change(model, head_matching.fold(model, 0, keep=3, drop=1)) < 1e-6
    assert head_matching.change(model, head_matching.fold(model, 0, keep=0, drop=1)) > 1e-4


def test_the_head_example_finds_the_double_and_merges_better_with_matched_heads() -> None:
    lines = printed("head_matching").splitlines()
    assert "heads 2 and 6 of layer 1 are alike" in lines[0]
    values = [float(part.rpartition(" ")[2].rstrip(";")) for line in lines[1:] for part in line.split(";")]
    folded, strange, matched, blind = values
    assert folded < strange / 10
    assert matched < blind / 10


def test_the_hub_kernel_gives_the_oracle_s_numbers() -> None:
    pytest.importorskip("kernels", reason="the package `kernels` is not installed")
    import hub_kernel

    torch.manual_seed(0)
    x, y = torch.randn(2, 12, 6), torch.randn(3, 12, 5)
    y[0, :, :3] += x[0, :, :3]
    found = hub_kernel.layer_similarity(hub_kernel.load(), x, y)
    torch.testing.assert_close(found.double(), oracles.cka([(x, y)]).clamp(0, 1), rtol=0, atol=1e-5)


def test_the_hub_example_runs_without_this_repository_s_package() -> None:
    pytest.importorskip("kernels", reason="the package `kernels` is not installed")
    assert "this repository's package is loaded: False" in printed("hub_kernel")
