"""gram, hsic, cka and StreamingCKA against float64 loops, on both implementations."""

from collections.abc import Callable

import kernel_oracles as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_paths import DTYPES, GPU, INTERPRETER, PATHS, TWIN, assert_no_worse, few, on, running
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorasuite_kernels import StreamingCKA, cka, full_gram, gram, hsic
from lorasuite_kernels.configs import PACKED_TILE

CASES = [pytest.param(TWIN, d) for d in [*DTYPES, torch.float64]] + [
    pytest.param(p.values[0], d, marks=p.marks) for p in (INTERPRETER, GPU) for d in DTYPES
]

shapes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 3),
        "m": st.sampled_from([4, 5, 33, 131]),
        "d": st.sampled_from([1, 7, 32, 77]),
        "seed": st.integers(0, 2**31),
    }
)


def stack(layers: int, m: int, d: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(layers, m, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unpack(packed: Tensor, m: int) -> Tensor:
    """(L, m, m) symmetric matrices from packed strict upper triangles."""
    blocks = -(-m // PACKED_TILE)
    full = packed.new_full((packed.shape[0], blocks * PACKED_TILE, blocks * PACKED_TILE), 0)
    for column in range(blocks):
        for row in range(column + 1):
            tile = packed[:, column * (column + 1) // 2 + row]
            rows, columns = row * PACKED_TILE, column * PACKED_TILE
            full[:, rows : rows + PACKED_TILE, columns : columns + PACKED_TILE] = tile
    assert not full.tril().any()
    assert not full[:, m:].any()
    assert not full[:, :, m:].any()
    return (full + full.mT)[:, :m, :m]


def plain_gram(x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    k = centred @ centred.mT
    return k * (1 - torch.eye(x.shape[1], dtype=x.dtype))


def plain_hsic(x: Tensor, y: Tensor) -> Tensor:
    k, l, m = plain_gram(x), plain_gram(y), x.shape[1]
    trace = k.flatten(1) @ l.flatten(1).T
    rows_k, rows_l = k.sum(2), l.sum(2)
    totals = rows_k.sum(1)[:, None] * rows_l.sum(1) / ((m - 1) * (m - 2))
    return (trace + totals - 2 / (m - 2) * (rows_k @ rows_l.T)) / (m * (m - 3))


def plain_cka(x: Tensor, y: Tensor) -> Tensor:
    own_x = torch.stack([plain_hsic(layer[None], layer[None])[0, 0] for layer in x])
    own_y = torch.stack([plain_hsic(layer[None], layer[None])[0, 0] for layer in y])
    return plain_hsic(x, y) / (own_x[:, None] * own_y).sqrt()


@pytest.mark.parametrize(("path", "dtype"), CASES)
@few
@given(shape=shapes)
def test_gram_holds_the_centred_upper_triangles_and_their_sums(path: str, dtype: torch.dtype, shape: dict) -> None:
    x = stack(**shape, dtype=dtype)
    with running(path):
        result = gram(*on(path, x))
    exact = torch.stack([oracle.centred_gram(layer) for layer in x])
    scale = float((x.double() - x.double().mean(1, keepdim=True)).square().sum(2).max())
    plain, m = plain_gram(x), x.shape[1]
    assert result.packed.dtype == (dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32)
    assert_no_worse(unpack(result.packed.cpu(), m), exact, plain, scale, dtype, roundings=3)
    assert_no_worse(result.rows, exact.sum(2), plain.sum(2), scale * m**0.5, dtype, roundings=3)
    assert_no_worse(result.totals, exact.sum((1, 2)), plain.sum((1, 2)), scale * m, dtype, roundings=3)


@pytest.mark.parametrize(("path", "dtype"), CASES)
@few
@given(shape=shapes, d_y=st.sampled_from([3, 40]), layers_y=st.integers(1, 3))
def test_hsic_is_the_unbiased_estimator_of_all_pairs(
    path: str, dtype: torch.dtype, shape: dict, d_y: int, layers_y: int
) -> None:
    x = stack(**shape, dtype=dtype)
    y = stack(**shape | {"d": d_y, "layers": layers_y, "seed": shape["seed"] + 1}, dtype=dtype)
    with running(path):
        result = hsic(*(gram(side) for side in on(path, x, y)))
    exact = oracle.hsic(x, y)
    # The estimator's three terms may cancel: each is at most the product of the two matrices' norms.
    size = [max(float(oracle.centred_gram(layer).norm()) for layer in side) for side in (x, y)]
    m = x.shape[1]
    assert_no_worse(result, exact, plain_hsic(x, y), 4 * size[0] * size[1] / (m * (m - 3)), dtype, roundings=3)


@pytest.mark.parametrize(("path", "dtype"), CASES)
@few
@given(shape=shapes, d_y=st.sampled_from([3, 40]), layers_y=st.integers(1, 3))
def test_cka_is_the_normalised_hsic(path: str, dtype: torch.dtype, shape: dict, d_y: int, layers_y: int) -> None:
    shape = shape | {"m": max(shape["m"], 33), "d": max(shape["d"], 7)}
    x = stack(**shape, dtype=dtype)
    y = stack(**shape | {"d": d_y, "layers": layers_y, "seed": shape["seed"] + 1}, dtype=dtype)
    y = (y.float() + x[:1, :, :1].float()).to(dtype)
    with running(path):
        result = cka(*on(path, x, y))
    assert result.dtype == torch.float32
    floor = torch.float32 if dtype == torch.float64 else dtype
    assert_no_worse(result, oracle.cka([(x, y)]), plain_cka(x, y), 1.0, floor, roundings=3)


@pytest.mark.parametrize("offset", [0, 100, 300, 1_000, 20_000])
@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_cka_survives_massive_activations(path: str, dtype: torch.dtype, offset: int) -> None:
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    shared = torch.randn(48, 16, generator=generator)
    x = torch.cat([shared, torch.randn(48, 24, generator=generator)], 1).repeat(2, 1, 1)
    y = torch.cat([shared, torch.randn(48, 16, generator=generator)], 1)[None].clone()
    x[1] += torch.randn(48, 40, generator=generator)
    x[..., [3, 17]] += offset
    y[..., [5]] += offset
    x, y = x.to(dtype), y.to(dtype)
    with running(path):
        result = cka(*on(path, x, y)).cpu().double()
    assert float((result - oracle.cka([(x, y)])).abs().max()) <= 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_hsic_does_not_see_a_constant_vector(path: str) -> None:
    x, y = stack(2, 40, 24, 1, torch.float32), stack(1, 40, 30, 2, torch.float32)
    with running(path):
        near, far = (hsic(*(gram(side) for side in on(path, x + shift, y))) for shift in (0.0, 64.0))
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_streaming_averages_terms_before_the_ratio(path: str) -> None:
    seeds = range(3)
    batches = [(stack(2, 20, 9, s, torch.float32), stack(3, 20, 13, s + 9, torch.float32)) for s in seeds]
    stream = StreamingCKA(2, 3)
    with running(path):
        for x, y in batches:
            stream.update(*on(path, x, y))
    torch.testing.assert_close(stream.compute().cpu().double(), oracle.cka(batches), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_merged_shards_equal_one_stream(path: str) -> None:
    batches = [(stack(2, 12, 9, s, torch.float32), stack(1, 12, 9, s + 9, torch.float32)) for s in range(4)]
    whole, left, right = StreamingCKA(2, 1), StreamingCKA(2, 1), StreamingCKA(2, 1)
    with running(path):
        for index, (x, y) in enumerate(batches):
            for stream in (whole, left if index % 2 else right):
                stream.update(*on(path, x, y))
    left.merge(right)
    assert left.minibatches == 4
    torch.testing.assert_close(left.compute(), whole.compute())


@pytest.mark.parametrize("path", PATHS)
def test_cka_takes_any_strides(path: str) -> None:
    x, y = stack(9, 2, 20, 3, torch.float32).transpose(0, 1), stack(2, 9, 40, 4, torch.float32)[:, :, ::2]
    with running(path):
        strided, packed = cka(*on(path, x, y)), cka(*on(path, x.contiguous(), y.contiguous()))
    torch.testing.assert_close(strided, packed)


@pytest.mark.parametrize("path", PATHS)
def test_cka_of_mixed_dtypes_reads_each_as_it_is(path: str) -> None:
    x, y = stack(2, 30, 20, 3, torch.bfloat16), stack(2, 30, 11, 4, torch.float32)
    with running(path):
        result = cka(*on(path, x, y))
    assert float((result.cpu().double() - oracle.cka([(x, y)])).abs().max()) <= 5e-3


@pytest.mark.parametrize("path", PATHS)
def test_empty_and_single_dimensions_are_defined(path: str) -> None:
    x = stack(2, 5, 3, 0, torch.float32)
    with running(path):
        assert cka(*on(path, x, x[:0])).shape == (2, 0)
        assert cka(*on(path, x[:0], x)).shape == (0, 2)
        assert hsic(gram(*on(path, x[:0])), gram(*on(path, x))).shape == (0, 2)
        assert not cka(*on(path, x[:, :, :0], x)).any()
        assert gram(*on(path, x[:, :1])).totals.tolist() == [0.0, 0.0]
        assert gram(*on(path, x[:0])).packed.shape == (0, 1, PACKED_TILE, PACKED_TILE)
        same = torch.full((2, 4, 3), 2.0)
        assert not cka(*on(path, same, x[:, :4])).any()


@pytest.mark.parametrize("m", [300, 700])
def test_triangles_of_many_tiles_unpack_to_the_whole_matrix_and_give_its_hsic(m: int) -> None:
    """Three rows of tiles, and more tiles than are read at a time."""
    x, y = stack(2, m, 3, 5, torch.float64), stack(1, m, 4, 6, torch.float64)
    packed = gram(x), gram(y)
    centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(full_gram(packed[0]), centred @ centred.mT)
    torch.testing.assert_close(hsic(*packed), plain_hsic(x, y))


def test_streamed_grams_give_the_cka_of_streamed_layers() -> None:
    batches = [(stack(2, 20, 9, s, torch.float32), stack(3, 20, 13, s + 9, torch.float32)) for s in range(2)]
    stream = StreamingCKA(2, 3)
    with running(TWIN):
        for x, y in batches:
            stream.update_grams(gram(x), gram(y))
    torch.testing.assert_close(stream.compute().double(), oracle.cka(batches), rtol=0, atol=1e-5)


class _Starts(TorchDispatchMode):
    """Counts what would start a kernel on a GPU: every PyTorch operation but views and allocations."""

    FREE = (
        "empty",
        "new_empty",
        "view",
        "_unsafe_view",
        "slice",
        "select",
        "transpose",
        "unsqueeze",
        "detach",
        "expand",
    )

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().removeprefix("aten::").split(".")[0]
        if name not in self.FREE and not name.startswith("empty"):
            self.started.append(name)
        return func(*args, **(kwargs or {}))


class _Launched:
    """A kernel that counts its launches and does nothing."""

    def __init__(self, name: str, starts: _Starts) -> None:
        self.name, self.starts = name, starts

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.starts.started.append(self.name)


@pytest.mark.parametrize(("operator", "most"), [("gram", 4), ("hsic_terms", 2), ("cka", 7)])
def test_an_operator_starts_few_kernels(operator: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a kernel takes longer on a GPU than the work of most of these."""
    cka_kernels = pytest.importorskip("lorasuite_kernels.cka_kernels")
    starts = _Starts()
    for name in ("gram_kernel", "hsic_kernel", "hsic_finish_kernel", "ratio_kernel"):
        monkeypatch.setattr(cka_kernels, name, _Launched(name, starts))
    x, y = stack(3, 300, 8, 0, torch.bfloat16), stack(2, 300, 8, 1, torch.bfloat16)
    arguments = {"gram": (x,), "hsic_terms": (*gram(x), *gram(y)), "cka": (x, y)}[operator]
    with starts:
        getattr(cka_kernels, operator)(*arguments)
    assert len(starts.started) == most, starts.started


@pytest.mark.parametrize("path", [INTERPRETER])
def test_cka_of_many_tiles_is_the_same_a_stretch_at_a_time(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cka_kernels = pytest.importorskip("lorasuite_kernels.cka_kernels")
    x, y = stack(2, 300, 8, 0, torch.float32), stack(1, 300, 9, 1, torch.float32)
    with running(path):
        whole = cka(x, y)
        monkeypatch.setattr(cka_kernels, "_PACKED_BYTES", 0)
        parts = cka(x, y)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts.double(), oracle.cka([(x, y)]), rtol=0, atol=1e-5)


def test_wrong_shapes_are_named() -> None:
    x = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match=r"at least 4 examples; got m = 3"):
        cka(x[:, :3], x[:, :3])
    with pytest.raises(ValueError, match=r"same examples; got m = 5 and 4"):
        cka(x, x[:, :4])
    with pytest.raises(ValueError, match=r"\(layers, examples, width\)"):
        cka(x[0], x)
    with pytest.raises(ValueError, match=r"floating"):
        gram(x.long())
    with pytest.raises(ValueError, match=r"same examples"):
        hsic(gram(x), gram(x[:, :4]))
    with pytest.raises(ValueError, match=r"at least 4 examples; got m = 3"):
        hsic(gram(x[:, :3]), gram(x[:, :3]))
    with pytest.raises(ValueError, match=r"expected 1 and 2 layers"):
        StreamingCKA(1, 2).update(x, x)
    with pytest.raises(ValueError, match=r"cannot merge"):
        StreamingCKA(1, 2).merge(StreamingCKA(2, 2))
    with pytest.raises(RuntimeError, match=r"before any update"):
        StreamingCKA(1, 2).compute()
