"""The verdict at its thresholds, and the small parts of verify."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorasuite_fast import VerifyConfig
from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.evaluation.labelled import load_labelled
from lorasuite_fast.evaluation.measures import Interval
from lorasuite_fast.evaluation.verification import _interval, _relative, bits_per_byte, layer_effects, verdict
from lorasuite_fast.pipeline.verify import verify


def at(value: float | None, spread: float = 0.05) -> Interval:
    return Interval(None, None, None) if value is None else Interval(value, value - spread, value + spread)


def outcome(**figures: Any) -> tuple[str, str]:
    """The verdict on a change that carries nothing, but for the figures given."""
    given = {
        "old_kl": 0.1, "new_kl": 0.1, "share": -0.02, "cosine": 0.1, "content": 0.1, "constant": 0.0, "size": 1.0,
        "gain": 1.0, "gain_share": 0.5, "cosine_spread": 0.05, "content_spread": 0.05,
    } | figures  # fmt: skip
    effect = SimpleNamespace(
        old_kl=at(given["old_kl"]),
        new_kl=at(given["new_kl"]),
        size_ratio=at(given["size"]),
        best_gain=at(given["gain"]),
        content_cosine=at(given["content"], given["content_spread"]),
        constant=SimpleNamespace(explained_share=at(given["constant"])),
        carried=SimpleNamespace(
            explained_share=at(given["share"]),
            cosine=at(given["cosine"], given["cosine_spread"]),
            gain_share=at(given["gain_share"]),
        ),
    )
    return verdict(effect)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("figures", "kind"),
    [
        ({"old_kl": 0.0, "share": 1.0}, "nothing to carry"),
        ({"new_kl": 0.0, "share": 1.0, "cosine": 1.0}, "nothing carried"),
        ({"share": 0.81, "cosine": 0.95}, "carried"),
        ({"share": 0.79, "cosine": 0.7, "content": 0.7}, "partly carried"),
        ({"share": 0.5, "cosine": 0.78, "content": 0.91}, "carried at another size"),
        ({"share": 0.5, "cosine": 0.76, "content": 0.91}, "partly carried"),
        ({"share": 0.5, "cosine": 0.78, "content": 0.89}, "partly carried"),
        ({"share": 0.1, "content": 0.21}, "partly carried"),
        ({"share": 0.1, "content": 0.19}, "nothing carried"),
        ({"share": 0.1, "content": 0.5, "content_spread": 0.6}, "nothing carried"),
        ({"constant": 0.041}, "constant shift only"),
        ({"constant": 0.039}, "nothing carried"),
        ({"cosine": -0.21}, "reversed"),
        ({"cosine": -0.19}, "nothing carried"),
        ({"cosine": -0.3, "cosine_spread": 0.4}, "nothing carried"),
        ({"cosine": None}, "nothing carried"),
    ],
)
def test_kinds_change_at_the_documented_thresholds(figures: dict[str, Any], kind: str) -> None:
    assert outcome(**figures)[0] == kind


def test_the_sentence_says_when_no_adapter_would_be_closer() -> None:
    assert "further from it than no adapter" in outcome(share=-0.06)[1]
    assert "further from it than no adapter" not in outcome(share=-0.04)[1]
    said = outcome(share=-0.5, content=0.5, cosine=0.3)[1]
    assert "no closer to the old one than no adapter" in said
    assert "it would do 9% of it" in said
    assert "does 10% of what" in outcome(share=0.1, content=0.5)[1]


def test_an_interval_holds_95_percent_of_the_resamples_that_are_defined() -> None:
    draws = torch.cat([torch.arange(1001, dtype=torch.float64), torch.tensor([math.nan, math.inf]).double()])
    assert _interval(torch.tensor(7.0), draws) == Interval(7.0, 25.0, 975.0)
    assert _interval(torch.tensor(math.nan), draws) == Interval(None, None, None)
    assert _interval(torch.tensor(7.0), torch.tensor([math.nan])) == Interval(7.0, None, None)


def test_a_change_is_measured_against_the_stream_without_its_mean() -> None:
    stream = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
    change = 0.1 * (stream - stream.mean(1, keepdim=True))
    assert _relative(change, stream + 100) == pytest.approx([0.1], rel=1e-3)


def test_a_layer_that_does_not_change_is_like_no_other() -> None:
    """Its similarity has no value; 0 would say that it is unlike."""
    rng = torch.Generator().manual_seed(0)
    before, change = (torch.randn(3, 30, 6, generator=rng) for _ in range(2))
    change[0] = 0
    old, new = (
        SimpleNamespace(
            before=SimpleNamespace(layers=before),
            after=SimpleNamespace(layers=before + size * change),
            updates={1: 0.5},
        )
        for size in (1.0, 2.0)
    )
    table = layer_effects(old, new)  # type: ignore[arg-type]
    assert [row.old_layer for row in table] == [0, 1, 2]
    assert table[0].cka is None
    assert table[0].new_change == 0
    assert [row.cka for row in table[1:]] == pytest.approx([1, 1], abs=1e-5)
    for row in table[1:]:
        assert row.new_change == pytest.approx(2 * (row.old_change or 0), rel=1e-5)
    assert (table[1].new_update, table[2].new_update) == (0.5, None)


def side(*nats: list[float]) -> Any:
    return SimpleNamespace(nats=[torch.tensor(n).double() for n in nats], counted=torch.tensor([10.0, 20.0]).double())


def test_bits_per_byte_count_examples_together_and_a_gain_is_what_the_adapter_saves() -> None:
    draws = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]).double()
    found = bits_per_byte(side([7.0, 8.0], [4.0, 5.0]), side([9.0, 9.0], [8.0, 8.0]), draws)
    assert found.old.value == pytest.approx(15 / 30 / math.log(2))
    assert found.old_gain is not None
    assert found.new_gain is not None
    assert found.gain_share is not None
    assert found.old_gain.value == pytest.approx(6 / 30 / math.log(2))
    assert found.new_gain.value == pytest.approx(2 / 30 / math.log(2))
    assert found.gain_share.value == pytest.approx(2 / 6)
    worse = bits_per_byte(side([4.0, 5.0], [7.0, 8.0]), side([9.0, 9.0], [8.0, 8.0]), draws)
    assert worse.gain_share is None


def lines(path: Path, *records: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_labelled_text_is_prompts_with_completions_and_those_without_are_left_out(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "a.jsonl",
        {"prompt": "p", "completion": "c"},
        {"text": "t", "prompt": "ignored"},
        {"prompt": "p", "completion": ""},
    )
    assert load_labelled(file, 9, 0) == [("p", "c"), ("", "t")]


def test_a_sample_of_labelled_text_is_seeded_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", *({"text": str(n)} for n in range(50)))
    found = [[int(text) for _, text in load_labelled(file, 5, seed)] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert all(sample == sorted(sample) and len(set(sample)) == 5 for sample in found)
    assert found[0] != list(range(5))


def test_one_token_predicts_nothing() -> None:
    with pytest.raises(LoraSuiteError, match="max_tokens is 1; it must be at least 2"):
        verify("old", None, "new", None, config=VerifyConfig(max_tokens=1))
