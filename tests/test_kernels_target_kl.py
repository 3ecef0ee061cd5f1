"""linear_target_kl and linear_cross_entropy against a literal float64 sum over tokens."""

import math
from typing import Any

import kernel_oracles as oracle
import pytest
import torch
from kernel_paths import DTYPES, GPU, INTERPRETER, PATHS, TWIN, assert_no_worse, on, running
from torch import Tensor

from lorasuite_kernels import linear_cross_entropy, linear_target_kl, target_kl

CASES = [pytest.param(TWIN, d) for d in [*DTYPES, torch.float64]] + [
    pytest.param(p.values[0], d, marks=p.marks) for p in (INTERPRETER, GPU) for d in DTYPES
]
ENDS: dict[str, dict[str, Any]] = {"plain": {}, "scaled": {"scale": 0.4}, "capped": {"cap": 3.0, "scale": 1.5}}


def problem(
    n: int, vocabulary: int, d: int, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, index, log_p, log_rest; the tokens named are among the even ones."""
    generator = torch.Generator().manual_seed(n + vocabulary)
    x = torch.randn(n, d, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, d, generator=generator).to(dtype)
    index = torch.stack([torch.randperm((vocabulary + 1) // 2, generator=generator)[:k] * 2 for _ in range(n)])
    log_p = torch.log_softmax(torch.randn(n, k + 1, generator=generator), -1)
    return x, weight, index, log_p[:, :k], log_p[:, k].clone()


def plain(x: Tensor, weight: Tensor, index: Tensor, log_p: Tensor, log_rest: Tensor, ends: dict[str, Any]) -> Tensor:
    """The dense expression in the dtype of x."""
    logits = x @ weight.T
    if ends.get("bias") is not None:
        logits = logits + ends["bias"]
    logits = logits * ends.get("scale", 1.0)
    if "cap" in ends:
        logits = ends["cap"] * torch.tanh(logits / ends["cap"])
    if ends.get("shared") is not None:
        logits = logits.masked_fill(~ends["shared"], -math.inf)
    found = torch.log_softmax(logits, -1)
    kept = (log_p.exp() * (log_p - found.gather(1, index))).sum(-1)
    rest = found.scatter(1, index, -math.inf).logsumexp(-1)
    return kept + log_rest.exp() * (log_rest - rest)


@pytest.mark.parametrize("ends", list(ENDS))
@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_loss_and_gradient_are_no_worse_than_the_dense_ones(path: str, dtype: torch.dtype, ends: str) -> None:
    x, weight, index, log_p, log_rest = problem(9, 150, 40, 5, dtype)
    options = dict(ENDS[ends])
    if ends != "plain":
        options |= {"bias": torch.linspace(-1, 1, 150).to(dtype), "shared": torch.arange(150) % 2 == 0}
    weights = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    exact_x, plain_x = x.double().clone().requires_grad_(), x.clone().requires_grad_()
    exact = oracle.target_kl(exact_x, weight, index, log_p, log_rest, **options)
    (exact * weights).sum().backward()
    dense = plain(plain_x, weight, index, log_p.to(dtype), log_rest.to(dtype), options)
    (dense * weights.to(dtype)).sum().backward()
    (own_x,) = on(path, x.clone())
    own_x.requires_grad_()
    moved = {name: on(path, o)[0] if isinstance(o, Tensor) else o for name, o in options.items()}
    with running(path):
        loss = linear_target_kl(own_x, *on(path, weight, index, log_p, log_rest), **moved)
        (loss * weights.to(loss)).sum().backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert exact_x.grad is not None
    assert plain_x.grad is not None
    assert own_x.grad is not None
    assert own_x.grad.dtype == dtype
    scale = float((x.double() @ weight.double().T).abs().max())
    assert_no_worse(loss.detach(), exact.detach(), dense.detach(), scale, dtype)
    size = float(exact_x.grad.abs().max()) + float(weights.max() * weight.double().abs().max())
    assert_no_worse(own_x.grad, exact_x.grad, plain_x.grad, size, dtype, roundings=2)


@pytest.mark.parametrize("path", PATHS)
def test_many_slices_of_rows_and_tokens_change_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, index, log_p, log_rest = problem(70, 200, 16, 3, torch.float32)

    def both() -> tuple[Tensor, Tensor]:
        (own,) = on(path, x.clone())
        own.requires_grad_()
        with running(path):
            loss = linear_target_kl(own, *on(path, weight, index, log_p, log_rest))
            loss.sum().backward()
        assert own.grad is not None
        return loss.detach(), own.grad

    whole = both()
    if path == TWIN:
        monkeypatch.setattr(target_kl, "_ELEMENTS", 1400)
    else:
        from lorasuite_kernels import target_kl_kernels

        monkeypatch.setattr(target_kl_kernels, "_SLICE", 128)
        monkeypatch.setattr(target_kl_kernels, "_GATHERED", 100)
    for one, other in zip(whole, both(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_targets_without_a_rest_and_with_all_tokens_named(path: str) -> None:
    x, weight, _, _, _ = problem(4, 6, 8, 2, torch.float32)
    index = torch.arange(6).expand(4, 6)
    log_p = torch.log_softmax(torch.randn(4, 6, generator=torch.Generator().manual_seed(3)), -1)
    log_p[0, 2] = -math.inf
    nothing = torch.full((4,), -math.inf)
    (own,) = on(path, x.clone())
    own.requires_grad_()
    with running(path):
        loss = linear_target_kl(own, *on(path, weight, index, log_p, nothing))
        loss.sum().backward()
    exact_x = x.double().requires_grad_()
    exact = oracle.target_kl(exact_x, weight, index, log_p, nothing)
    exact.sum().backward()
    assert own.grad is not None
    assert exact_x.grad is not None
    torch.testing.assert_close(loss.detach().cpu().double(), exact.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad.cpu().double(), exact_x.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_cross_entropy_is_that_of_pytorch(path: str) -> None:
    x, weight, _, _, _ = problem(7, 33, 12, 2, torch.float32)
    labels = torch.tensor([0, 32, 5, 5, 8, 31, 1])
    bias = torch.linspace(-2, 2, 33)
    (own,) = on(path, x.clone())
    own.requires_grad_()
    with running(path):
        loss = linear_cross_entropy(own, *on(path, weight, labels), bias=on(path, bias)[0])
        loss.sum().backward()
    other = x.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(other @ weight.double().T + bias, labels, reduction="none")
    wanted.sum().backward()
    assert own.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(loss.detach().cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad.cpu().double(), other.grad, rtol=1e-5, atol=1e-5)


def test_a_rest_of_little_mass_keeps_its_digits() -> None:
    # The other tokens have 1e-13 of the mass: 1 minus the kept mass would be 0 in float32.
    x, weight = torch.tensor([[1.0]]), torch.tensor([[30.0], [0.0], [0.0]])
    index, log_p, log_rest = torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]), torch.tensor([math.log(0.5)])
    loss = linear_target_kl(x, weight, index, log_p, log_rest)
    assert float(loss) == pytest.approx(math.log(0.5) + 0.5 * (30 - math.log(2)), rel=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, index, log_p, log_rest = problem(4, 10, 3, 2, torch.float32)
    for message, arguments, options in [
        (r"x and weight must be", (x[:, :2], weight, index, log_p, log_rest), {}),
        (r"index and log_p must be \(4, k\)", (x, weight, index[:3], log_p, log_rest), {}),
        (r"log_rest must be \(4,\)", (x, weight, index, log_p, log_rest[:1]), {}),
        (r"bias must be \(10,\)", (x, weight, index, log_p, log_rest), {"bias": torch.ones(3)}),
        (r"cap must be above 0", (x, weight, index, log_p, log_rest), {"cap": 0.0}),
        (r"must be frozen", (x, weight.clone().requires_grad_(), index, log_p, log_rest), {}),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_target_kl(*arguments, **options)
