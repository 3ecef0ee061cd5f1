"""What is written of the targets, and what is too little to learn from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasuite_fast.adapters.aligned_states import Head
from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.io.phases import PhaseClock
from lorasuite_fast.io.work import Work
from lorasuite_fast.training.teacher import TeacherFacts, _chunk_targets, _enough, write_targets

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def sides(tokens: int, positions: int = 3) -> list[tuple[Tensor, Head]]:
    """Bare new model, old one, old one with adapter; heads that choose from eight inputs."""
    rng = torch.Generator().manual_seed(tokens)
    heads = [Head(torch.randn(tokens, 8, generator=rng), None) for _ in range(2)]
    last = [torch.randn(positions, 8, generator=rng) for _ in range(3)]
    return [(last[0], heads[0]), (last[1], heads[1]), (last[2], heads[1])]


def wanted(given: list[tuple[Tensor, Head]]) -> Tensor:
    new, before, after = (head.logits(last).double().softmax(-1) for last, head in given)
    mass = new * after / before
    return mass / mass.sum(-1, keepdim=True)


@pytest.mark.parametrize("tokens", [32_767, 32_768, 70_000])
def test_kept_tokens_are_named_whatever_the_vocabulary(tokens: int) -> None:
    """32,767 tokens fit 16 bits, more do not."""
    given = sides(tokens)
    tensors, sums = _chunk_targets(given, 4, 0.0, CPU)
    p = wanted(given)
    values, index = p.topk(4, -1)
    assert torch.equal(tensors["index"].long(), index)
    assert tensors["index"].dtype == (torch.int16 if tokens < 32_768 else torch.int32)
    torch.testing.assert_close(tensors["log_probs"].double(), values.log(), rtol=2**-9, atol=1e-3)
    assert sums[0] == pytest.approx(float(1 - values.sum(-1).sum() / 3) * 3, rel=1e-3)
    bare = given[0][1].logits(given[0][0]).double().softmax(-1)
    assert sums[1] == pytest.approx(float((p * (p / bare).log()).sum()), rel=1e-3)


def test_positions_read_the_heads_a_part_at_a_time_to_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    given = sides(500, 7)
    whole = _chunk_targets(given, 4, 0.3, CPU)
    monkeypatch.setattr("lorasuite_fast.training.teacher._ELEMENTS", 1000)
    parts = _chunk_targets(given, 4, 0.3, CPU)
    assert torch.equal(whole[0]["index"], parts[0]["index"])
    for name in ("log_probs", "log_rest"):
        torch.testing.assert_close(whole[0][name].float(), parts[0][name].float(), rtol=2**-9, atol=1e-5)
    assert parts[1] == pytest.approx(whole[1])


def test_auto_keeps_all_tokens_where_half_of_them_are_fewer_than_the_least_choice() -> None:
    """Keeping 64 of 100 tokens saves nothing worth a loss."""
    assert _enough(sides(100), 0.0, CPU) == 100
    assert _enough(sides(128), 0.0, CPU) in (64, 128)


def merged_loss(given: list[tuple[Tensor, Head]], k: int) -> float:
    """Share of KL(target ‖ bare new model) lost where all but the k most probable tokens count as one."""
    p, q = wanted(given), given[0][1].logits(given[0][0]).double().softmax(-1)
    full = (p * (p / q).log()).sum()
    index = p.topk(k, -1).indices
    rest = [1 - d.gather(1, index).sum(1) for d in (p, q)]
    kept = (p * (p / q).log()).gather(1, index).sum() + (rest[0] * (rest[0] / rest[1]).log()).sum()
    return float(1 - kept / full)


def test_auto_keeps_the_fewest_tokens_that_lose_two_percent() -> None:
    given = [(0.6 * last, head) for last, head in sides(2100, 20)]
    losses = {k: merged_loss(given, k) for k in (64, 128, 256, 512, 1024)}
    assert losses[64] > 0.03
    assert 0.001 < losses[1024] < 0.02
    assert _enough(given, 0.0, CPU) == next(k for k, loss in losses.items() if loss <= 0.02)


def test_the_truncation_is_the_share_of_the_divergence_lost() -> None:
    facts = TeacherFacts(1, 1, 1, 1, 1, 1, 1, 0.0, 0.5, 0.4, 0.0)
    assert facts.as_dict()["truncation"] == pytest.approx(0.2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teacher")
    for name, seed in (("old", 1), ("new", 2)):
        save_folder(tiny_model("llama", seed), tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "adapter", targets=["q_proj"], rank=2, alpha=2, seed=0)
    return root


@pytest.mark.parametrize("texts", [["the rain on the other side"] * 7, ["a b c d"] * 8], ids=["texts", "positions"])
def test_too_few_texts_or_positions_are_refused(texts: list[str], models: Path, tmp_path: Path) -> None:
    work = Work(tmp_path / "work", {})
    with pytest.raises(LoraSuiteError, match="needs at least 8 texts with 64 such places"):
        write_targets(
            work, models / "old", models / "adapter", models / "new", texts, PhaseClock(), top_k=4, max_tokens=64,
            device=CPU, dtype=torch.float32,
        )  # fmt: skip
    work.close()


def test_the_facts_hold_the_mean_mass_that_is_not_kept(models: Path, tmp_path: Path) -> None:
    work, text = Work(tmp_path / "work", {}), "the rain on the other side, and the sea was not heard"
    found = write_targets(
        work, models / "old", models / "adapter", models / "new", [f"{text} {n}" for n in range(10)], PhaseClock(),
        top_k=4, max_tokens=64, device=CPU, dtype=torch.float32,
    )  # fmt: skip
    work.close()
    rest = torch.cat([found[n].log_rest.double().exp() for n in range(len(found))])
    assert len(rest) == found.facts.positions
    assert found.facts.rest == pytest.approx(float(rest.mean()), rel=1e-4)
    kept = torch.cat([found[n].log_probs.double().exp().sum(1) for n in range(len(found))])
    torch.testing.assert_close(kept + rest, torch.ones(len(rest), dtype=torch.float64), rtol=0, atol=2e-3)
