"""shared_gram, neuron_candidates and balance against float64 loops."""

import kernel_oracles as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_paths import DTYPES, GPU, INTERPRETER, PATHS, TWIN, assert_no_worse, few, on, running
from torch import Tensor

from lorasuite_kernels import balance, neuron_candidates, shared_gram

CASES = [pytest.param(TWIN, d) for d in [*DTYPES, torch.float64]] + [
    pytest.param(p.values[0], d, marks=p.marks) for p in (INTERPRETER, GPU) for d in DTYPES
]
seeds = st.integers(0, 2**31)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("path", "dtype"), CASES)
@few
@given(
    shared=st.sampled_from([0, 1, 30, 75]), d_o=st.sampled_from([1, 20, 131]), d_n=st.sampled_from([9, 140]), seed=seeds
)
def test_shared_gram_sums_the_normal_equations_of_the_shared_rows(
    path: str, dtype: torch.dtype, shared: int, d_o: int, d_n: int, seed: int
) -> None:
    e_o, e_n = random(seed, 50, d_o, dtype=dtype), random(seed + 1, 90, d_n, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    idx_o, idx_n = (torch.randint(0, rows, (shared,), generator=generator) for rows in (50, 90))
    with running(path):
        result = shared_gram(*on(path, e_o, e_n, idx_o, idx_n), both=True)
    x, y = e_o[idx_o], e_n[idx_n]
    exact = oracle.shared_gram(e_o, e_n, idx_o, idx_n)
    plain = (x.T @ x, x.T @ y, y.T @ y)
    scales = oracle.shared_gram(e_o.abs(), e_n.abs(), idx_o, idx_n)
    assert result.nn is not None
    for actual, wanted, spare, scale in zip(result, exact, plain, scales, strict=True):
        assert actual.dtype == torch.float64
        assert_no_worse(actual, wanted, spare, float(scale.max()), dtype)
    assert torch.equal(result.oo, result.oo.T)
    assert torch.equal(result.nn, result.nn.T)


@pytest.mark.parametrize("path", PATHS)
def test_shared_gram_takes_any_strides_and_skips_what_was_not_asked(path: str) -> None:
    e_o, e_n = random(0, 12, 30).T, random(1, 40, 9)
    index = torch.arange(30)
    with running(path):
        result = shared_gram(*on(path, e_o, e_n, index, index))
    assert result.nn is None
    torch.testing.assert_close(result.on.cpu(), (e_o.double().T @ e_n[:30].double()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_shared_gram_refuses_an_index_past_the_table(path: str) -> None:
    with running(path), pytest.raises(IndexError, match=r"indices must be in 0 … 4; got 5 … 5"):
        shared_gram(*on(path, random(0, 5, 3), random(1, 5, 3), torch.tensor([5]), torch.tensor([0])))
    with running(path), pytest.raises(IndexError, match=r"indices must be in 0 … 4; got -1 … -1"):
        shared_gram(*on(path, random(0, 5, 3), random(1, 5, 3), torch.tensor([0]), torch.tensor([-1])))


@pytest.mark.parametrize("path", PATHS)
def test_tables_without_rows_or_columns_have_empty_or_zero_sums(path: str) -> None:
    none, pair = torch.tensor([], dtype=torch.int64), torch.tensor([0, 1])
    with running(path):
        empty = shared_gram(*on(path, random(0, 5, 1), random(1, 5, 3), none, none), both=True)
        narrow = shared_gram(*on(path, random(0, 5, 0), random(1, 5, 3), pair, pair), both=True)
    assert empty.nn is not None
    assert narrow.nn is not None
    assert [tuple(t.shape) for t in empty] == [(1, 1), (1, 3), (3, 3)]
    assert not any(t.any() for t in empty)
    assert [tuple(t.shape) for t in narrow] == [(0, 0), (0, 3), (3, 3)]
    assert narrow.nn.any()


def test_no_neurons_have_no_candidates() -> None:
    none, some = [random(0, 0, 2)] * 3, [random(1, 3, 2)] * 3
    assert neuron_candidates(*none, *some, k=2).indices.shape == (0, 2)
    assert neuron_candidates(*some, *none, k=2).indices.shape == (3, 0)
    assert not neuron_candidates(*(w[:, :0] for w in some), *(w[:, :0] for w in some), k=1).similarity.any()


def test_wrong_tables_are_named() -> None:
    e = random(0, 5, 3)
    with pytest.raises(ValueError, match=r"must pair rows; got \(2,\) and \(3,\)"):
        shared_gram(e, e, torch.arange(2), torch.arange(3))
    with pytest.raises(ValueError, match=r"both sides need gate weights"):
        neuron_candidates(e, e, e, None, e, e, k=1)
    with pytest.raises(ValueError, match=r"one width; got \[2, 3\]"):
        neuron_candidates(e, e, e, e, e, e[:, :2], k=1)
    with pytest.raises(ValueError, match=r"row neurons' weights must agree in their number"):
        neuron_candidates(e[:2], e, e, e, e, e, k=1)
    with pytest.raises(ValueError, match=r"weights must be \(neurons, width\) and k at least 0; got k = -1"):
        neuron_candidates(e, e, e, e, e, e, k=-1)
    with pytest.raises(ValueError, match=r"must be integer; got torch.float32"):
        shared_gram(e, e, torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"do not fit; got \(5, 3\) and \(5, 3\)"):
        balance(e, e)
    with pytest.raises(ValueError, match=r"do not fit; got \(3,\) and \(3,\)"):
        balance(e[0], e[0])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@few
@given(f_r=st.integers(1, 9), f_c=st.integers(1, 9), d=st.sampled_from([1, 5, 33]), k=st.integers(1, 4), seed=seeds)
def test_neuron_candidates_are_the_best_cosines(
    dtype: torch.dtype, gated: bool, f_r: int, f_c: int, d: int, k: int, seed: int
) -> None:
    rows = [None if i == 0 and not gated else random(seed + i, f_r, d, dtype=dtype) for i in range(3)]
    columns = [None if i == 0 and not gated else random(seed + 3 + i, f_c, d, dtype=dtype) for i in range(3)]
    with running(TWIN):
        result = neuron_candidates(*rows, *columns, k=k)
    exact = oracle.neuron_similarity(rows, columns)
    k = min(k, f_c)
    assert result.similarity.shape == result.indices.shape == (f_r, k)
    torch.testing.assert_close(result.similarity.double(), exact.topk(k).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.similarity.double(), exact.gather(1, result.indices), rtol=0, atol=1e-5)


def test_neurons_are_compared_a_part_of_the_rows_at_a_time_to_the_same_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = [random(seed, 9, 4) for seed in range(6)]
    whole = neuron_candidates(*weights, k=3)
    monkeypatch.setattr("lorasuite_kernels.neurons._CHUNK_ELEMENTS", 20)
    parts = neuron_candidates(*weights, k=3)
    assert torch.equal(parts.indices, whole.indices)
    torch.testing.assert_close(parts.similarity, whole.similarity)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("r", [1, 7, 64])
@few
@given(out=st.sampled_from([64, 90]), width=st.sampled_from([64, 101]), seed=seeds)
def test_balance_gives_the_factors_of_a_singular_value_decomposition(
    dtype: torch.dtype, r: int, out: int, width: int, seed: int
) -> None:
    b, a = random(seed, out, r, dtype=dtype), random(seed + 1, r, width, dtype=dtype)
    with running(TWIN):
        b_new, a_new, sigma = balance(b, a)
    product, singular, _ = oracle.balance(b, a)
    top = float(singular[0])
    tolerance = (4 if dtype in DTYPES[1:] else 200) * torch.finfo(dtype).eps
    assert b_new.dtype == a_new.dtype == sigma.dtype == dtype
    assert float((b_new.double() @ a_new.double() - product).abs().max()) <= tolerance * top
    assert float((sigma.double() - singular).abs().max()) <= tolerance * top
    for gram in (b_new.double().T @ b_new.double(), a_new.double() @ a_new.double().T):
        assert float((gram - torch.diag(singular)).abs().max()) <= tolerance * top


def test_balance_takes_batches_and_ranks_past_the_width() -> None:
    b, a = random(0, 2, 3, 5), random(1, 2, 5, 4)
    b_new, a_new, sigma = balance(b, a)
    assert (b_new.shape, a_new.shape, sigma.shape) == (b.shape, a.shape, (2, 5))
    torch.testing.assert_close(b_new @ a_new, b @ a)
    assert not sigma[:, 3:].any()
    assert balance(b[..., :0], a[:, :0])[2].shape == (2, 0)
    assert [tuple(t.shape) for t in balance(b[:, :0], a)] == [(2, 0, 5), (2, 5, 4), (2, 5)]
    assert [tuple(t.shape) for t in balance(b[:0], a[:0])] == [(0, 3, 5), (0, 5, 4), (0, 5)]
