"""CKA against a literal float64 double loop, with and without massive activations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorasuite_kernels import StreamingCKA, cka

import dense_oracle as oracle


def layers(seed: int, count: int, m: int, d: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(m, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(count, m, d, generator=generator, dtype=torch.float64)
    x += shared @ torch.randn(count, 4, d, generator=generator, dtype=torch.float64)
    x[:, :, :3] += offset
    return x


def literal(x: Tensor, y: Tensor) -> Tensor:
    return oracle.cka_minibatch([list(x.double())], [list(y.double())])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [0, 100, 300, 1_000, 20_000])
def test_offsets_in_a_few_channels_do_not_disturb_cka(offset: float, dtype: torch.dtype) -> None:
    x, y = layers(1, 3, 24, 40, offset).to(dtype), layers(1, 2, 24, 56, -2 * offset).to(dtype)
    found = cka(x, y)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    # The oracle sees the values as stored: what bfloat16 cannot hold is lost before, not in, the computation.
    assert (found - literal(x, y)).abs().max() < 1e-3


@pytest.mark.parametrize("m", [4, 5, 127, 128, 129, 300])
def test_tile_borders_do_not_matter(m: int) -> None:
    x, y = layers(2, 2, m, 7), layers(3, 3, m, 5)
    k, l = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    k, l = k @ k.mT, l @ l.mT
    k, l = (g - torch.diag_embed(g.diagonal(dim1=1, dim2=2)) for g in (k, l))

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        ones = torch.ones(m, dtype=torch.float64)
        trace = torch.trace(a @ b)
        return (
            trace + (ones @ a @ ones) * (ones @ b @ ones) / ((m - 1) * (m - 2)) - 2 / (m - 2) * (ones @ a @ b @ ones)
        ) / (m * (m - 3))

    expected = torch.tensor(
        [[float(hsic(a, b)) / math.sqrt(float(hsic(a, a)) * float(hsic(b, b))) for b in l] for a in k]
    )
    assert (cka(x, y) - expected).abs().max() < 1e-6


def test_minibatches_average_hsic_before_the_ratio() -> None:
    batches = [(layers(seed, 2, m, 9), layers(seed, 3, m, 6)) for seed, m in ((4, 12), (5, 12), (6, 7))]
    stream, first, second = StreamingCKA(2, 3), StreamingCKA(2, 3), StreamingCKA(2, 3)
    for x, y in batches:
        stream.update(x, y)
    first.update(*batches[0])
    second.update(*batches[1])
    second.update(*batches[2])
    first.merge(second)
    expected = oracle.cka_minibatch([list(x) for x, _ in batches], [list(y) for _, y in batches])
    assert (stream.compute() - expected).abs().max() < 1e-6
    assert torch.equal(first.compute(), stream.compute())


def test_a_layer_is_most_similar_to_itself_and_to_its_rotation() -> None:
    x = layers(7, 3, 32, 12)
    q, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(8)))
    assert torch.allclose(cka(x, 3 * x @ q + 5).diagonal(), torch.ones(3), atol=1e-6)


def test_all_equal_activations_have_similarity_zero() -> None:
    x = layers(9, 2, 16, 8)
    x[1] = x[1, :1]
    found = cka(x.float(), x.float())
    assert found[1].tolist() == [0, 0]
    assert found[:, 1].tolist() == [0, 0]
    assert found[0, 0] == pytest.approx(1, abs=1e-6)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="at least 4 examples; got m = 3"):
        cka(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="same examples; got m = 5 and 6"):
        cka(torch.zeros(1, 5, 2), torch.zeros(1, 6, 2))
    with pytest.raises(ValueError, match=r"\(layers, examples, width\)"):
        cka(torch.zeros(5, 2), torch.zeros(1, 5, 2))
    with pytest.raises(RuntimeError, match="before any update"):
        StreamingCKA(1, 1).compute()
