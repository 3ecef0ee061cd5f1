"""Settings every test shares.

Nothing is fetched unless a test says so, and small products run on one thread. The Triton kernels are loaded for the
interpreter, before anything else imports Triton without it: Triton decides at its own import whether kernels are
interpreted. The variable is taken back at once; a test that wants CPU tensors to go through the kernels says so
(`kernel_paths.running`).
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator

# A shell has what it starts in the background ignore Ctrl-C, and processes inherit that; tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from hub_stub import Hub

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    from lorasuite_kernels import (  # noqa: F401
        cka_kernels,
        heads_kernels,
        shared_gram_kernels,
        target_kl_kernels,
    )

    del os.environ["TRITON_INTERPRET"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-width", action="store_true", help="test_pairs at the pairs' own widths (bench/widths.py)")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Products of a tiny model lose more to waiting for a second thread than they gain; real models use all."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("real") is None and not request.config.getoption("--full-width"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: stub)
    return stub


@pytest.fixture(autouse=True)
def unrefined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration refines by default where there is a GPU; here only where a test asks for it."""
    if torch.cuda.is_available():
        monkeypatch.setattr("lorasuite_fast.pipeline.migrate.default_refinement", lambda _: 0)
