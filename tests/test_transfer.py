"""W_h and S from the streamed normal equations, against dense float64 solutions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted_families import config_of, random_model
from torch import Tensor

from lorasuite_fast import LoraSuiteError
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.vocabulary import SharedTokens
from lorasuite_fast.transfer.embeddings import (
    FLOAT32_CONDITION,
    Stream,
    _r2,
    fit_transfer,
    normal_equations,
    solve_normal,
)
from lorasuite_kernels import shared_gram

from planted import save_folder, tiny_tokenizer


def tables(
    seed: int, tokens: int, d_o: int, d_n: int, condition: float, noise: float = 0.1
) -> tuple[Tensor, Tensor, SharedTokens]:
    """Tables whose old side has singular values spanning `condition`, and a shuffled pairing of their rows."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -float(torch.log10(torch.tensor(condition))), d_o)
    e_o = torch.randn(tokens, d_o, generator=generator) * spectrum
    e_n = e_o @ torch.randn(d_o, d_n, generator=generator) + noise * torch.randn(tokens, d_n, generator=generator)
    place = torch.randperm(tokens, generator=generator)
    shuffled = torch.empty_like(e_n)
    shuffled[place] = e_n
    return e_o, shuffled, SharedTokens(torch.arange(tokens), place, identical=False)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_directions_solve_the_least_squares_problem(dtype: torch.dtype, condition: float) -> None:
    e_o, e_n, shared = tables(0, 5000, 24, 36, condition)
    e_o, e_n = e_o.to(dtype), e_n.to(dtype)
    found = fit_transfer(Stream(e_o), Stream(e_n), shared)
    x, y = e_o[shared.old].double(), e_n[shared.new].double()
    assert relative(found.W_h, torch.linalg.lstsq(x, y).solution) < 1e-5
    assert relative(found.S, torch.linalg.lstsq(y, x).solution) < 1e-5
    assert found.rank == 24


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tables_keep_their_accuracy_whatever_the_products_are_taken_in(
    dtype: torch.dtype, condition: float
) -> None:
    e_o, e_n, shared = tables(6, 40_000, 8, 12, condition)
    e_o, e_n = e_o.to(dtype), e_n.to(dtype)
    x, y = e_o[shared.old].double(), e_n[shared.new].double()
    gram = normal_equations(e_o, e_n, shared.old, shared.new)
    exact = x.T @ x
    # Tables beyond FLOAT32_CONDITION are multiplied in float64.
    assert relative(gram.oo, exact) < (1e-6 if condition < FLOAT32_CONDITION**0.5 else 1e-13)
    assert relative(fit_transfer(Stream(e_o), Stream(e_n), shared).W_h, torch.linalg.lstsq(x, y).solution) < 1e-5


def test_well_conditioned_tables_are_multiplied_in_float32_and_every_row_counts() -> None:
    e_o, e_n, shared = tables(6, 20_000, 8, 12, 1.0, noise=5.0)
    found = normal_equations(e_o, e_n, shared.old, shared.new)
    x, y = e_o[shared.old].double(), e_n[shared.new].double()
    for gram, exact in zip(found, (x.T @ x, x.T @ y, y.T @ y), strict=True):
        assert gram is not None
        assert 1e-12 < relative(gram, exact) < 1e-6


def test_rows_that_are_all_alike_have_no_r2() -> None:
    rows, alike = torch.arange(5), Stream(torch.ones(5, 3))
    assert _r2(Stream(torch.randn(5, 2)), rows, alike, rows, torch.zeros(2, 3, dtype=torch.float64)) is None


def test_r2_is_measured_on_tokens_the_fit_did_not_see() -> None:
    e_o, e_n, shared = tables(1, 60, 24, 36, 1.0, noise=0.0)
    e_n = torch.randn(e_n.shape, generator=torch.Generator().manual_seed(5))
    found = fit_transfer(Stream(e_o), Stream(e_n), shared)
    x, y = e_o[shared.old].double(), e_n[shared.new].double()
    seen = float(1 - (y - x @ found.W_h.double()).square().sum() / (y - y.mean(0)).square().sum())
    assert seen > 0.2
    assert found.r2 is not None
    assert found.r2 < 0


def test_a_singular_gram_gives_the_solution_of_least_norm() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(100, 5, generator=generator, dtype=torch.float64) @ torch.randn(
        5, 8, generator=generator, dtype=torch.float64
    )
    y = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    found, rank = solve_normal(x.T @ x, x.T @ y)
    assert rank == 5
    assert torch.allclose(found, torch.linalg.pinv(x, rtol=1e-8) @ y, atol=1e-9)


def test_directions_a_thousand_times_smaller_count_and_those_of_rounding_do_not() -> None:
    generator = torch.Generator().manual_seed(3)
    directions = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    rows = torch.linalg.qr(torch.randn(60, 5, generator=generator, dtype=torch.float64)).Q
    x = rows * torch.tensor([1.0, 0.3, 1e-3, 1e-7, 0.0], dtype=torch.float64) @ directions
    y = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    found, rank = solve_normal(x.T @ x, x.T @ y)
    assert rank == 3
    torch.testing.assert_close(found, torch.linalg.pinv(x, rtol=1e-5) @ y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "enough"), [(14, False), (15, True), (16, True)])
def test_rows_must_span_three_quarters_of_the_old_width(rank: int, enough: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    e_o = torch.randn(300, rank, generator=generator) @ torch.randn(rank, 20, generator=generator)
    e_n, ids = torch.randn(300, 24, generator=generator), torch.arange(300)
    shared = SharedTokens(ids, ids, identical=True)
    if enough:
        assert fit_transfer(Stream(e_o), Stream(e_n), shared).rank == rank
        return
    with pytest.raises(LoraSuiteError, match=f"span {rank} of 20 old dimensions, less than 75%"):
        fit_transfer(Stream(e_o), Stream(e_n), shared)


def test_both_maps_and_the_ratio_are_those_of_the_streams_with_their_factors() -> None:
    e_o, e_n, shared = tables(7, 400, 6, 9, 3.0)
    found = fit_transfer(Stream(e_o, 2.0), Stream(e_n, 5.0), shared)
    x, y = 2 * e_o[shared.old].double(), 5 * e_n[shared.new].double()
    assert relative(found.W_h, torch.linalg.lstsq(x, y).solution) < 1e-5
    assert relative(found.S, torch.linalg.lstsq(y, x).solution) < 1e-5
    assert found.factor == 2.5
    sizes = [rows.square().sum(1).mean().sqrt() / rows.shape[1] ** 0.5 for rows in (x, y)]
    assert found.rms_ratio == pytest.approx(float(sizes[1] / sizes[0]))


def test_held_out_r2_is_that_of_ridge_maps_in_both_directions() -> None:
    e_o, e_n, shared = tables(8, 200, 6, 9, 3.0, noise=2.0)
    x, y = e_o[shared.old].double(), e_n[shared.new].double()
    held = torch.zeros(200, dtype=torch.bool)
    held[19::20] = True

    def r2(a: Tensor, b: Tensor) -> float:
        size = 0.5 * a[~held].square().sum(0).mean()
        gram = a[~held].T @ a[~held] + size * torch.eye(a.shape[1], dtype=torch.float64)
        error = b[held] - a[held] @ torch.linalg.inv(gram) @ a[~held].T @ b[~held]
        return float(1 - error.square().sum() / (b[held] - b[held].mean(0)).square().sum())

    found = fit_transfer(Stream(e_o), Stream(e_n), shared, ridge=0.5)
    assert found.r2 == pytest.approx(r2(x, y))
    assert found.r2_back == pytest.approx(r2(y, x))


def test_one_shared_token_carries_nothing_whatever_the_ridge() -> None:
    e_o, e_n, shared = tables(3, 24, 24, 36, 1.0)
    one = SharedTokens(shared.old[:1], shared.new[:1], identical=False)
    with pytest.raises(LoraSuiteError, match="share no trained tokens"):
        fit_transfer(Stream(e_o), Stream(e_n), one, ridge=1e-3)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_ridge_is_a_share_of_the_rows_mean_square(size: float) -> None:
    """The same tables at another size have the same solution."""
    generator = torch.Generator().manual_seed(4)
    x, y = (size * torch.randn(60, d, generator=generator, dtype=torch.float64) for d in (6, 4))
    ridge = 0.3 * x.square().sum(0).mean()
    stacked = torch.cat([x, ridge.sqrt() * torch.eye(6, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(6, 4, dtype=torch.float64)])).solution
    torch.testing.assert_close(solve_normal(x.T @ x, x.T @ y, 0.3)[0], wanted)


def test_fewer_shared_tokens_than_the_old_width_are_refused() -> None:
    e_o, e_n, shared = tables(3, 24, 24, 36, 1.0)
    fit_transfer(Stream(e_o), Stream(e_n), shared)
    short = SharedTokens(shared.old[:23], shared.new[:23], identical=False)
    with pytest.raises(LoraSuiteError, match="share 23 trained tokens, fewer than the old width 24"):
        fit_transfer(Stream(e_o), Stream(e_n), short)
    assert torch.isfinite(fit_transfer(Stream(e_o), Stream(e_n), short, ridge=1e-3).W_h).all()


@pytest.mark.parametrize("products", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 65])
def test_gram_sums_do_not_depend_on_the_chunks(rows: int, products: torch.dtype) -> None:
    e_o, e_n, shared = tables(4, 65, 6, 9, 1.0)
    old, new = shared.old[:rows], shared.new[:rows]
    found = shared_gram(e_o, e_n, old, new, both=True, products=products, chunk=16)
    x, y = e_o[old].double(), e_n[new].double()
    tolerance = 1e-12 if products == torch.float64 else 1e-4
    for gram, expected in zip(found, (x.T @ x, x.T @ y, y.T @ y), strict=True):
        assert gram is not None
        assert gram.dtype == torch.float64
        assert torch.allclose(gram, expected, atol=tolerance)


@pytest.mark.parametrize("kind", ["gemma", "phi3"])
def test_the_embedding_factor_is_what_transformers_multiplies_by(kind: str, tmp_path: Path) -> None:
    sizes = {"d": 32, "layers": 1, "heads": 4, "kv_heads": 4, "head_dim": 8, "f": 48, "vocab": 320}
    model = random_model(config_of(kind, **sizes, tied=kind == "gemma"), 0)
    save_folder(model, tiny_tokenizer(320), tmp_path / "model")
    with torch.no_grad():
        first = model(torch.tensor([[5]]), output_hidden_states=True).hidden_states[0][0, 0]
    factor = Checkpoint(tmp_path / "model", "model").embedding_factor
    torch.testing.assert_close(first, model.get_input_embeddings().weight[5].detach() * factor)
