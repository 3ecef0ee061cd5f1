"""The way a plan takes on a GPU, walked on the CPU: what is called how often, what is moved, and the plan.

The decisions that ask for a GPU are told there is one; everything they lead to runs as it does there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorasuite_fast.transfer.compare as compare
import lorasuite_fast.transfer.embeddings as transfer
from lorasuite_fast import PlanConfig, Runtime, TransferPlan
from lorasuite_fast.models.vocabulary import SharedTokens
from lorasuite_fast.transfer.embeddings import Stream, fit_transfer
from lorasuite_kernels import Gram, StreamingCKA

from planted import save_folder, tiny_model, tiny_tokenizer


class OnDevice(Tensor):
    """A tensor that refuses to leave its device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "numpy", "tolist", "item"):
            raise AssertionError(f"a Gram matrix was moved to the CPU by {name}")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root, tokenizer = tmp_path_factory.mktemp("pair"), tiny_tokenizer(320)
    old = save_folder(tiny_model("llama", 0, layers=2), tokenizer, root / "old")
    return old, save_folder(tiny_model("llama", 1, d=48, layers=3), tokenizer, root / "new")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the calls of a plan that believes its device is a GPU."""
    counts = {"gram": 0, "hsic": 0}
    real = compare.layer_gram

    def counted(measure: str, layers: Tensor) -> Gram:
        counts["gram"] += 1
        return Gram(*(tensor.as_subclass(OnDevice) for tensor in real(measure, layers)))

    def added(self: Any, gx: Gram, gy: Gram) -> None:
        counts["hsic"] += 1
        assert all(isinstance(tensor, OnDevice) for tensor in (*gx, *gy))
        update(self, Gram(*(t.as_subclass(Tensor) for t in gx)), Gram(*(t.as_subclass(Tensor) for t in gy)))

    update = StreamingCKA.update_grams
    monkeypatch.setattr(compare, "layer_gram", counted)
    monkeypatch.setattr(StreamingCKA, "update_grams", added)
    monkeypatch.setattr(compare, "_together", lambda options, ranks: True)
    monkeypatch.setattr(transfer, "elsewhere", lambda device: device is not None)
    return counts


def test_gpu_plan_takes_one_gram_per_model_and_one_hsic(models: tuple[Path, Path], on_gpu: dict[str, int]) -> None:
    TransferPlan.build(*models, config=PlanConfig(examples=16, method="lstsq"), runtime=Runtime(device="cpu"))
    assert on_gpu == {"gram": 2, "hsic": 1}


def test_gpu_plan_is_the_cpu_plan(models: tuple[Path, Path], request: pytest.FixtureRequest) -> None:
    plain = TransferPlan.build(*models, config=PlanConfig(examples=16, method="lstsq"), runtime=Runtime(device="cpu"))
    request.getfixturevalue("on_gpu")
    found = TransferPlan.build(*models, config=PlanConfig(examples=16, method="lstsq"), runtime=Runtime(device="cpu"))
    assert found.layers == plain.layers
    assert found.facts["rank"] == plain.facts["rank"]
    for name in ("W_h", "S", "cka"):
        torch.testing.assert_close(found.tensors[name], plain.tensors[name], rtol=1e-4, atol=1e-4)


def test_gpu_plan_goes_on_from_finished_layers(
    models: tuple[Path, Path], on_gpu: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TransferPlan.build(*models, config=PlanConfig(examples=16, method="lstsq"), runtime=Runtime(device="cpu"))
    work = tmp_path / "work"
    with monkeypatch.context() as broken:
        broken.setattr(compare, "_similarity", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            TransferPlan.build(
                *models, config=PlanConfig(examples=16, method="lstsq"), runtime=Runtime(device="cpu"), work=work
            )
    monkeypatch.setattr(compare, "_run_block", lambda *a: pytest.fail("a finished layer was run again"))
    resumed = TransferPlan.build(
        *models, config=PlanConfig(examples=16, method="lstsq"), runtime=Runtime(device="cpu"), work=work
    )
    for name in ("W_h", "S", "cka"):
        assert torch.equal(resumed.tensors[name], whole.tensors[name])


@pytest.mark.parametrize("normed", [False, True])
def test_transfer_on_a_device_gives_the_float64_solution(normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(300, 12, generator=generator), torch.randn(400, 16, generator=generator)
    norm = (torch.rand(12, generator=generator).double() + 0.5, torch.zeros(12).double(), 1e-5) if normed else None
    rows = torch.randperm(300, generator=generator)
    shared = SharedTokens(torch.arange(300), rows, False)
    monkeypatch.setattr(transfer, "elsewhere", lambda device: device is not None)
    found = fit_transfer(Stream(old, norm=norm), Stream(new), shared, chunk=64, device=torch.device("cpu"))
    x = Stream(old, norm=norm).rows(torch.arange(300)).double()
    wanted = torch.linalg.lstsq(x, new[rows].double()).solution
    torch.testing.assert_close(found.W_h.double(), wanted, rtol=1e-5, atol=1e-6)
    back = torch.linalg.lstsq(new[rows].double(), x).solution
    torch.testing.assert_close(found.S.double(), back, rtol=1e-5, atol=1e-6)


def test_transfer_stays_on_the_cpu_where_the_budget_is_too_small() -> None:
    class Side:
        class shape:
            d = 1000

    class Asked:
        device, memory = torch.device("cuda"), 10**9

    class Both:
        old = new = Side

    class Allowed:
        chunk_rows = 64

    assert compare._transfer_device(Both, Asked, Allowed) == torch.device("cuda")
    Asked.memory = 10**7
    assert compare._transfer_device(Both, Asked, Allowed) == torch.device("cpu")


def test_tf32_is_taken_on_a_gpu_for_auto_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasuite_fast.transfer.plan import make_options

    assert not make_options(PlanConfig(), Runtime(device="cpu")).tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert make_options(PlanConfig(), Runtime(device="cuda")).tf32
    assert not make_options(PlanConfig(), Runtime(device="cuda", dtype="float32")).tf32
    assert make_options(PlanConfig(), Runtime(device="cuda")).as_dict()["tf32"] is True


def test_tf32_is_given_back_after_an_error() -> None:
    from lorasuite_fast.models.products import tf32

    def failing() -> None:
        with tf32(True):
            inside.append(torch.get_float32_matmul_precision())
            raise ZeroDivisionError

    inside: list[str] = []
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError):
        failing()
    assert inside == ["high"]
    assert torch.get_float32_matmul_precision() == before
