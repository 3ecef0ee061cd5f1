"""W_h and S from the streamed normal equations, against dense float64 solutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorasuite_fast import LoraSuiteError
from lorasuite_fast.transfer import FLOAT32_CONDITION, Stream, fit_transfer, normal_equations, solve_normal
from lorasuite_fast.vocabulary import SharedTokens
from lorasuite_kernels import shared_gram


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
