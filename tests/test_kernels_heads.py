"""head_similarity, project_heads and their parts against float64 loops, on both implementations."""

import kernel_oracles as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_paths import DTYPES, GPU, INTERPRETER, PATHS, TWIN, assert_no_worse, few, on, running
from torch import Tensor

from lorasuite_kernels import apply_head_blocks, head_blocks, head_similarity, project_heads

CASES = [pytest.param(TWIN, d) for d in [*DTYPES, torch.float64]] + [
    pytest.param(p.values[0], d, marks=p.marks) for p in (INTERPRETER, GPU) for d in DTYPES
]
side = st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 3]), st.sampled_from([1, 6, 16, 70]))
"""(key/value heads, query heads per key/value head, head size)"""
seeds = st.integers(0, 2**31)
widths = st.sampled_from([1, 24, 67, 140])


def attention(groups: int, share: int, size: int, d: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = (groups * share * size, groups * size, groups * size)
    q, k, v = (torch.randn(n, d, generator=generator).to(dtype) for n in rows)
    return [q, k, v, torch.randn(d, rows[0], generator=generator).to(dtype)]


def plain_products(heads_o: Tensor, heads_n: Tensor, kv_o: Tensor, kv_n: Tensor, H: tuple, G: tuple) -> Tensor:
    """(H_o, H_n) of blockwise Hadamard sums with repeated key/value heads, every intermediate in the input's dtype."""
    kv_o, kv_n = (
        kv.view(g, -1, kv.shape[1]).repeat_interleave(h // g, 0).flatten(0, 1)
        for kv, h, g in zip((kv_o, kv_n), H, G, strict=True)
    )
    product = (heads_o @ heads_n.T) * (kv_o @ kv_n.T)
    return product.view(H[0], -1, H[1], product.shape[1] // H[1]).sum((1, 3))


def plain_similarity(old: list[Tensor], new: list[Tensor], H: tuple, G: tuple) -> Tensor:
    def both(a: list[Tensor], b: list[Tensor], heads: tuple, groups: tuple) -> Tensor:
        queries = plain_products(a[0], b[0], a[1], b[1], heads, groups)
        return queries + plain_products(a[3].T, b[3].T, a[2], b[2], heads, groups)

    norms = [both(w, w, (h, h), (g, g)).diagonal() for w, h, g in zip((old, new), H, G, strict=True)]
    return both(old, new, H, G) / (norms[0][:, None] * norms[1]).sqrt()


@pytest.mark.parametrize(("path", "dtype"), CASES)
@few
@given(old=side, new=side, d=widths, seed=seeds)
def test_head_similarity_is_the_cosine_of_the_interaction_matrices(
    path: str, dtype: torch.dtype, old: tuple, new: tuple, d: int, seed: int
) -> None:
    heads, kv_heads = (old[0] * old[1], new[0] * new[1]), (old[0], new[0])
    weights_o, weights_n = attention(*old, d, seed, dtype), attention(*new, d, seed + 1, dtype)
    with running(path):
        result = head_similarity(*on(path, *weights_o, *weights_n), heads=heads, kv_heads=kv_heads)
    exact = oracle.head_similarity(weights_o, weights_n, heads, kv_heads)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_no_worse(result, exact, plain_similarity(weights_o, weights_n, heads, kv_heads), 1.0, dtype)


def drawn_projection(old: tuple, new: tuple, d: int, r: int, seed: int, dtype: torch.dtype) -> tuple[list, dict]:
    """left, right, x, match, weight with GQA on both sides and some new heads without a partner."""
    generator = torch.Generator().manual_seed(seed)
    (G_o, share_o, h_o), (G_n, share_n, h_n) = old, new
    left, right, x = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((G_o * h_o, d), (G_n * h_n, d), (G_o * h_o, r))
    )
    match = torch.randint(-1, G_o * share_o, (G_n * share_n,), generator=generator)
    weight = torch.rand(match.shape, generator=generator) * (match >= 0)
    return [left, right, x, match, weight], {"blocks": (G_o, G_n), "old_share": share_o}


def plain_projection(inputs: list, blocks: tuple, old_share: int) -> Tensor:
    left, right, x, match, weight = inputs
    share = match.shape[0] // blocks[1]
    out = []
    for b, a in enumerate(match.tolist()):
        c = left.view(blocks[0], -1, left.shape[1])[max(a, 0) // old_share]
        c = c @ right.view(blocks[1], -1, right.shape[1])[b // share].T
        out.append(c.T @ x.view(blocks[0], -1, x.shape[1])[max(a, 0) // old_share] * weight[b].to(x.dtype))
    return torch.stack(out).view(blocks[1], share, -1, x.shape[1]).sum(1).flatten(0, 1)


@pytest.mark.parametrize("r", [1, 7, 64])
@pytest.mark.parametrize(("path", "dtype"), CASES)
@few
@given(old=side, new=side, d=widths, seed=seeds)
def test_project_heads_carries_the_factor_through_the_matched_blocks(
    path: str, dtype: torch.dtype, r: int, old: tuple, new: tuple, d: int, seed: int
) -> None:
    inputs, shape = drawn_projection(old, new, d, r, seed, dtype)
    left, right, x, match, weight = inputs
    with running(path):
        result = project_heads(*on(path, *inputs), **shape)
        halves = apply_head_blocks(head_blocks(left, right, match, **shape), x, match, weight, **shape)
    exact = oracle.project_heads(*inputs, **shape)
    scale = oracle.project_heads(left.abs(), right.abs(), x.abs(), match, weight, **shape)
    plain = plain_projection(inputs, **shape)
    assert result.dtype == halves.dtype == dtype
    assert_no_worse(result, exact, plain, float(scale.max()), dtype, roundings=3)
    assert_no_worse(halves, exact, plain, float(scale.max()), dtype, roundings=3)


@pytest.mark.parametrize("path", PATHS)
def test_adapters_side_by_side_are_projected_as_if_alone(path: str) -> None:
    (left, right, x, match, weight), shape = drawn_projection((2, 1, 10), (1, 4, 12), 40, 150, 0, torch.float32)
    with running(path):
        left, right, x = on(path, left, right, x)
        together = project_heads(left, right, x, match, weight, **shape)
        alone = [project_heads(left, right, part, match, weight, **shape) for part in x.split(50, 1)]
    torch.testing.assert_close(together, torch.cat(alone, 1))


@pytest.mark.parametrize("path", PATHS)
def test_a_wide_model_is_summed_over_splits_of_its_width(path: str) -> None:
    inputs, shape = drawn_projection((1, 1, 4), (1, 1, 4), 1500, 3, 0, torch.float32)
    with running(path):
        result = project_heads(*on(path, *inputs), **shape)
    torch.testing.assert_close(result.cpu().double(), oracle.project_heads(*inputs, **shape), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_project_heads_is_its_two_halves(path: str) -> None:
    inputs, shape = drawn_projection((2, 2, 6), (2, 2, 8), 30, 5, 3, torch.float32)
    with running(path):
        left, right, x, match, weight = on(path, *inputs)
        c = head_blocks(left, right, match, **shape)
        halves = apply_head_blocks(c, x, match, weight, **shape)
        torch.testing.assert_close(project_heads(left, right, x, match, weight, **shape), halves)


@pytest.mark.parametrize("path", PATHS)
def test_heads_take_any_strides(path: str) -> None:
    old, new = attention(1, 2, 6, 20, 0, torch.float32), attention(2, 1, 6, 20, 1, torch.float32)
    shape = {"heads": (2, 2), "kv_heads": (1, 2)}
    transposed = [w.T.contiguous().T for w in (*old, *new)]
    inputs, projection = drawn_projection((2, 1, 6), (2, 1, 8), 30, 6, 3, torch.float32)
    strided = [w.T.contiguous().T for w in inputs[:3]] + inputs[3:]
    with running(path):
        torch.testing.assert_close(
            head_similarity(*on(path, *transposed), **shape), head_similarity(*on(path, *old, *new), **shape)
        )
        torch.testing.assert_close(
            project_heads(*on(path, *strided), **projection), project_heads(*on(path, *inputs), **projection)
        )


@pytest.mark.parametrize("path", PATHS)
def test_empty_dimensions_are_defined(path: str) -> None:
    (left, right, x, match, weight), shape = drawn_projection((1, 1, 4), (2, 1, 4), 8, 3, 0, torch.float32)
    zero = attention(1, 1, 4, 8, 0, torch.float32)
    with running(path):
        left, right, x, match, weight, *zero = on(path, left, right, x, match, weight, *zero)
        assert project_heads(left, right, x[:, :0], match, weight, **shape).shape == (8, 0)
        assert not project_heads(left[:, :0], right[:, :0], x, match, weight, **shape).any()
        assert not project_heads(left, right, x, torch.full_like(match, -1), weight, **shape).any()
        assert project_heads(left, right, x, match[:0], weight[:0], **shape).tolist() == [[0.0] * 3] * 8
        assert head_blocks(left, right, match[:0], **shape).shape == (0, 4, 4)
        assert head_similarity(*(w[:0] for w in zero[:3]), zero[3][:, :0], *zero, heads=(1, 1), kv_heads=(1, 1)) == 0
        nothing = [torch.zeros_like(w) for w in zero]
        assert not head_similarity(*zero, *nothing, heads=(1, 1), kv_heads=(1, 1)).any()


def test_heads_wider_than_the_model_are_compared_without_cancellation() -> None:
    """q and k of a head are nearly orthogonal: what is left of their products is far below the products themselves."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for _ in range(2):
        q = torch.randn(1, 64, generator=generator).double()
        k = torch.randn(1, 64, generator=generator).double()
        k = k - q * (q @ k.T) / (q @ q.T) + 1e-5 * q
        v, o = 1e-6 * torch.randn(64, 1, generator=generator), 1e-6 * torch.randn(1, 64, generator=generator)
        sides.append([q.T.float(), k.T.float(), v, o])
    shape = {"heads": (1, 1), "kv_heads": (1, 1)}
    exact = oracle.head_similarity(*sides, (1, 1), (1, 1))
    torch.testing.assert_close(head_similarity(*sides[0], *sides[1], **shape).double(), exact, rtol=0, atol=1e-4)


def test_wrong_shapes_are_named() -> None:
    old = attention(2, 1, 4, 8, 0, torch.float32)
    shape = {"heads": (2, 2), "kv_heads": (2, 2)}
    with pytest.raises(ValueError, match=r"old and new weights must have one width; got 8 and 6"):
        head_similarity(*old, *attention(2, 1, 4, 6, 0, torch.float32), **shape)
    with pytest.raises(ValueError, match=r"old: 2 query heads cannot share 3 key/value heads"):
        head_similarity(*old, *old, heads=(2, 2), kv_heads=(3, 2))
    with pytest.raises(ValueError, match=r"head sizes do not fit"):
        head_similarity(old[0][:5], *old[1:], *old, **shape)
    (left, right, x, match, weight), projection = drawn_projection((2, 1, 4), (2, 1, 4), 8, 3, 0, torch.float32)
    with pytest.raises(ValueError, match=r"share their width; got \(8, 7\) and \(8, 8\)"):
        project_heads(left[:, :7], right, x, match, weight, **projection)
    with pytest.raises(ValueError, match=r"left and right must be floating; got torch.int64"):
        project_heads(left.long(), right, x, match, weight, **projection)
    with pytest.raises(ValueError, match=r"x must be \(2·4, r\)"):
        project_heads(left, right, x[:5], match, weight, **projection)
    with pytest.raises(ValueError, match=r"one entry per query head"):
        project_heads(left, right, x, match, weight[:1], **projection)
    with pytest.raises(ValueError, match=r"match must be integer and old_share at least 1; got torch.float32 and 1"):
        project_heads(left, right, x, match.float(), weight, **projection)


@pytest.mark.parametrize("path", PATHS)
def test_a_match_past_the_old_heads_is_refused(path: str) -> None:
    (left, right, x, match, weight), shape = drawn_projection((2, 1, 4), (2, 1, 4), 8, 3, 0, torch.float32)
    if path == "gpu":
        left, right, x = left.cuda(), right.cuda(), x.cuda()
    match = torch.full_like(match, 2)
    with running(path), pytest.raises(IndexError, match=r"query head 2 of 2"):
        project_heads(left, right, x, match, weight, **shape)
    with pytest.raises(IndexError, match=r"query head 2 of 2"):
        head_blocks(left, right, match, **shape)
