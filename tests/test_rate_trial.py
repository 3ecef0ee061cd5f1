"""The search for a refinement's learning rate."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_refine import interrupt, root, run  # noqa: F401

from lorasuite_fast.training.rate_trial import FIRST, LEAST_STEPS, RATES, TRIAL_STEPS, best_rate

STEPS = LEAST_STEPS
BAD = -math.inf


def search(scores: list[float]) -> tuple[float, list[float]]:
    """The rate chosen and those tried, by their places."""
    best, tried = best_rate(dict(zip(RATES, scores, strict=True)).__getitem__)
    return RATES.index(best), [RATES.index(rate) for rate in tried]


@pytest.mark.parametrize(
    ("scores", "best", "tried"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 5, [4, 5]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.4], 4, [4, 5, 3]),
        ([0.1, 0.2, 0.3, 0.6, 0.5, 0.4], 3, [4, 5, 3, 2]),
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], 0, [4, 5, 3, 2, 1, 0]),
        ([0.9, 0.2, 0.3, 0.6, 0.5, 0.4], 3, [4, 5, 3, 2]),  # climbs no further than the first that is worse
        ([0.1, 0.2, 0.3, 0.5, 0.5, 0.4], 4, [4, 5, 3]),  # of equal ones the higher
        ([0.1, 0.2, 0.3, BAD, BAD, BAD], 2, [4, 5, 3, 2, 1]),
        ([0.1, 0.2, 0.3, 0.4, BAD, 0.5], 5, [4, 5]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, BAD], 4, [4, 5, 3]),
        ([-0.3, -0.2, -0.1, -0.2, -0.3, -0.4], 2, [4, 5, 3, 2, 1]),
        ([BAD] * 6, 0, [4, 5, 3, 2, 1, 0]),
    ],
)
def test_the_climb_finds_the_best_rate(scores: list[float], best: int, tried: list[int]) -> None:
    assert search(scores) == (best, tried)


def adapter(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, other = adapter(a), adapter(b)
    return one.keys() == other.keys() and all(bool((one[key] == other[key]).all()) for key in one)


@pytest.fixture(scope="module")
def searched(root: Path) -> Any:  # noqa: F811
    return run(root, root / "searched", steps=STEPS, eval_every=25)


def test_each_trial_is_that_of_the_rate_alone(root: Path, tmp_path: Path, searched: Any) -> None:  # noqa: F811
    tried = searched.options["rates_tried"]
    assert len(tried) >= 2
    assert f"{RATES[FIRST]:g}" in tried
    for rate, agreement in tried.items():
        alone = run(root, tmp_path / rate, steps=TRIAL_STEPS, eval_every=TRIAL_STEPS, learning_rate=float(rate))
        assert alone.evaluations[-1].agreement == agreement


def test_the_best_rate_is_trained_with_as_if_it_had_been_asked_for(
    root: Path,  # noqa: F811
    tmp_path: Path,
    searched: Any,
) -> None:
    tried = {float(rate): agreement for rate, agreement in searched.options["rates_tried"].items()}
    best = max(tried, key=tried.__getitem__)
    assert searched.options["learning_rate"] == best
    told = run(root, tmp_path / "told", steps=STEPS, eval_every=25, learning_rate=best)
    assert same(root / "searched", tmp_path / "told")
    assert told.evaluations == searched.evaluations
    assert told.options["rates_tried"] == {}
    card = (root / "searched/README.md").read_text()
    assert f"{tried[best]:.3f} at {best:g}" in card
    assert f"{best:g}, found by trials (agreement " in card


@pytest.mark.parametrize(("phase", "at"), [("learning rate", 7), ("learning rate", 20), ("train", 7)])
def test_an_interrupted_search_goes_on_to_the_same_adapter(
    root: Path,  # noqa: F811
    tmp_path: Path,
    searched: Any,
    phase: str,
    at: int,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", steps=STEPS, eval_every=25, progress=interrupt(phase, at))
    seen: list[int] = []
    again = run(root, tmp_path / "cut", steps=STEPS, eval_every=25,
                progress=lambda name, done, _: seen.append(done) if name == "learning rate" else None)  # fmt: skip
    assert again.options["rates_tried"] == searched.options["rates_tried"]
    assert same(root / "searched", tmp_path / "cut")
    assert (phase == "train") == (not any(seen))
    if at > TRIAL_STEPS:
        assert 1 not in seen


def test_a_short_training_is_not_worth_a_search(root: Path, tmp_path: Path) -> None:  # noqa: F811
    new = run(root, tmp_path / "new", steps=2, eval_every=2)
    assert (new.options["learning_rate"], new.options["rates_tried"]) == (1e-2, {})
    told = run(root, tmp_path / "told", steps=2, eval_every=2, learning_rate=1e-2)
    assert same(tmp_path / "new", tmp_path / "told")
    assert json.loads(json.dumps(told.as_dict()))["options"]["learning_rate"] == 1e-2
