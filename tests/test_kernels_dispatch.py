"""How the operators are offered: tracing, the choice of implementation, and what importing them costs."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from kernel_paths import INTERPRETER, TWIN, running
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lorasuite_kernels import (
    apply_head_blocks,
    backend,
    balance,
    cka,
    gram,
    head_blocks,
    head_similarity,
    hsic,
    linear_target_kl,
    neuron_candidates,
    project_heads,
    shared_gram,
)
from lorasuite_kernels._ops import ops
from lorasuite_kernels.forms import FORMS
from lorasuite_kernels.shared_gram import _twin as shared_gram_twin

x, y = torch.randn(2, 5, 6), torch.randn(3, 5, 4)
q, kv, o = torch.randn(8, 6), torch.randn(4, 6), torch.randn(6, 8)
match, weight = torch.tensor([1, -1]), torch.tensor([0.5, 0.0])
index = torch.tensor([0, 2, 2])
classes = torch.tensor([[0, 3]]).expand(8, 2).clone()
gx, gy = gram(x), gram(y)
attention = (q, kv, kv, o)

OPERATORS = {
    "cka": (x, y),
    "cka_terms": (x, y),
    "gram": (x,),
    "hsic_terms": (*gx, *gy),
    "head_similarity": (*attention, *attention, 2, 2, 1, 1),
    "head_blocks": (q, kv, match, 2, 1, 1),
    "apply_head_blocks": (torch.randn(2, 4, 4), q, match, weight, 2, 1, 1),
    "project_heads": (q, kv, q, match, weight, 2, 1, 1),
    "shared_gram": (q, kv, index, index, True, False, 2),
    "linear_target_kl": (q, kv, None, classes, -classes.float(), torch.zeros(8), None, 1.0, None, True),
    "neuron_candidates": (None, q, q, None, kv, kv, 2),
    "balance": (q, q.T),
}
CALLS: dict[str, Callable[[], object]] = {
    "cka": lambda: cka(x, y),
    "gram": lambda: gram(x),
    "hsic": lambda: hsic(gram(x), gram(y)),
    "head_similarity": lambda: head_similarity(*attention, *attention, heads=(2, 2), kv_heads=(1, 1)),
    "head_blocks": lambda: head_blocks(q, kv, match, blocks=(2, 1)),
    "apply_head_blocks": lambda: apply_head_blocks(torch.ones(2, 4, 4), q, match, weight, blocks=(2, 1)),
    "project_heads": lambda: project_heads(q, kv, q, match, weight, blocks=(2, 1)),
    "shared_gram": lambda: shared_gram(q, kv, index, index),
    "linear_target_kl": lambda: linear_target_kl(q, kv, classes, -classes.float(), torch.zeros(8)),
    "neuron_candidates": lambda: neuron_candidates(q, q, q, kv, kv, kv, k=2),
    "balance": lambda: balance(q, q.T),
}


@pytest.mark.parametrize("path", [TWIN, INTERPRETER])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_operators_pass_opcheck(name: str, path: str) -> None:
    with running(path):
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.library.opcheck(getattr(ops, name).default, OPERATORS[name])


# Of each operator calls with other sizes than OPERATORS has: all that can change, do.
q2, kv2, o2 = torch.randn(12, 9), torch.randn(6, 9), torch.randn(9, 12)
match2, weight2 = torch.tensor([1, -1, 0, 1]), torch.rand(4)
classes2 = torch.tensor([[4, 0, 2]]).expand(12, 3).clone()
x2, y2 = torch.randn(4, 150, 7), torch.randn(2, 150, 3)
attention2 = (q2, kv2, kv2, o2)
RESIZED = {
    "cka": (x2, y2),
    "cka_terms": (x2, y2),
    "gram": (x2,),
    "hsic_terms": (*gram(x2), *gram(y2)),
    "head_similarity": (*attention2, *attention2, 2, 2, 1, 1),
    "head_blocks": (q2, kv2, match2, 2, 1, 1),
    "apply_head_blocks": (torch.randn(4, 6, 5), q2, match2, weight2, 2, 1, 1),
    "project_heads": (q2, kv2, q2, match2, weight2, 2, 1, 1),
    "shared_gram": (q2, kv2, torch.tensor([1, 5]), torch.tensor([0, 3]), True, False, 2),
    "linear_target_kl": (q2, kv2, None, classes2, -classes2.float(), torch.zeros(12), None, 1.0, None, True),
    "neuron_candidates": (None, q2, q2, None, kv2, kv2, 2),
    "balance": (q2, q2.T),
}


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_trace_with_symbolic_sizes_holds_for_other_sizes(name: str, both: bool) -> None:
    given, other = (
        tuple(both if argument is True else argument for argument in calls[name]) for calls in (OPERATORS, RESIZED)
    )
    operator = getattr(ops, name).default
    tensors = [n for n, argument in enumerate(given) if isinstance(argument, torch.Tensor)]

    def call(*some: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments = list(given)
        for n, tensor in zip(tensors, some, strict=True):
            arguments[n] = tensor
        found = operator(*arguments)
        return found if isinstance(found, tuple) else (found,)

    traced = make_fx(call, tracing_mode="symbolic")(*(given[n].clone() for n in tensors))
    results = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    fakes = [node.meta["val"] for node in results if node is not None]
    # Heads are counted by numbers, which a trace holds fast.
    symbolic = any(isinstance(size, torch.SymInt) for fake in fakes for size in fake.shape)
    assert symbolic == (name != "head_similarity")
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False) as mode:
        of_other = call_fake(operator, mode, other)
    for arguments, found in ((given, fakes), (other, of_other)):
        real = operator(*arguments)
        for fake, tensor in zip(found, real if isinstance(real, tuple) else (real,), strict=True):
            assert (fake.ndim, fake.dtype) == (tensor.ndim, tensor.dtype)
            assert [int(size) for size in fake.shape] == list(tensor.shape)
    wanted = operator(*other)
    torch.testing.assert_close(
        traced(*(other[n] for n in tensors)), wanted if isinstance(wanted, tuple) else (wanted,), equal_nan=True
    )


def call_fake(operator: object, mode: FakeTensorMode, arguments: tuple[object, ...]) -> tuple[torch.Tensor, ...]:
    """The operator on fake tensors of symbolic sizes."""
    fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    found = operator(*fakes)  # type: ignore[operator]
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", list(CALLS))
def test_public_functions_compile_without_a_graph_break(name: str) -> None:
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), CALLS[name](), equal_nan=True)


def test_one_compilation_serves_all_sizes_of_shared_rows() -> None:
    compiled = torch.compile(
        lambda a, b, i: shared_gram(a, b, i, i, both=False)[:2], fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows, width in ((5, 6), (9, 4), (12, 11)):
        tables = torch.randn(rows, width), torch.randn(rows, width + 2)
        picked = torch.arange(rows)[::2]
        torch.testing.assert_close(compiled(*tables, picked), shared_gram(*tables, picked, picked, both=False)[:2])


def test_both_backends_give_the_same_numbers_without_asking_twice() -> None:
    with backend("torch"):
        outer = cka(x, y)
        with running(TWIN):
            inner = cka(x, y)
        assert torch.equal(outer, inner)
    assert torch.equal(cka(x, y), outer)


@pytest.mark.parametrize("maker", ["nvidia", "amd"])
def test_an_operation_takes_the_form_its_table_gives_the_vendor(maker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table prefers PyTorch the twin runs, unless the kernel is asked for by name."""
    pytest.importorskip("triton")
    from lorasuite_kernels import dispatch, shared_gram_kernels

    launched = []
    monkeypatch.setattr(shared_gram_kernels, "shared_gram", lambda *a: launched.append(a) or shared_gram_twin(*a))
    monkeypatch.setattr(dispatch, "vendor", lambda device: maker)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shared_gram(q, kv, index, index)
    assert len(launched) == (maker == "amd")
    assert dispatch.implementation(torch.device("cpu"), operator="shared_gram")[0] == (
        "torch" if maker == "nvidia" else "interpreter"
    )
    with backend("triton"):
        shared_gram(q, kv, index, index)
    assert len(launched) == 1 + (maker == "amd")


def test_every_form_names_an_operator_with_a_kernel_and_a_reason() -> None:
    for (operator, maker, dtype), chosen in FORMS.items():
        assert operator in OPERATORS
        assert maker in ("nvidia", "amd")
        assert dtype in (torch.float32, torch.bfloat16, torch.float16)
        assert chosen.name == "torch"
        assert len(chosen.reason.split()) > 5


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'triton' or 'torch'; got 'cuda'"), backend("cuda"):
        pass


def test_a_kernel_asked_for_by_name_says_why_it_cannot_run() -> None:
    pytest.importorskip("triton")
    with backend("triton"):
        with pytest.raises(RuntimeError, match=r"CPU tensors reach a kernel only with TRITON_INTERPRET=1"):
            cka(x, y)
        with pytest.raises(RuntimeError, match=r"float32, bfloat16 and float16, not torch\.float64"):
            cka(x.double(), y)
        balance(q, q.T)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_and_using_the_twins_imports_neither_triton_nor_the_compiler() -> None:
    code = """
import sys, torch
import lorasuite_kernels as k
k.cka(torch.randn(2, 5, 3), torch.randn(2, 5, 3))
k.balance(torch.randn(4, 2), torch.randn(2, 4))
print([m for m in ("triton", "torch._dynamo", "torch._inductor") if m in sys.modules])
"""
    assert run_python(code).strip() == "[]"


def test_without_triton_the_twins_work_and_only_a_kernel_by_name_complains() -> None:
    code = """
import importlib.util, os, sys
os.environ["TRITON_INTERPRET"] = "1"
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
sys.modules["triton"] = None
import torch, lorasuite_kernels as k
k.cka(torch.randn(2, 5, 3), torch.randn(2, 5, 3))
try:
    with k.backend("triton"):
        pass
except RuntimeError as error:
    print(error)
"""
    assert run_python(code).strip() == "backend 'triton' needs the package triton, which is not installed"
