"""Refinement: the teacher's targets, the losses, and a training that resumes, repeats and never ends worse."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flat_options import given
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from lorasuite_fast import LoraSuiteError, RefineConfig, Runtime, refine
from lorasuite_fast.adapters.aligned_states import LoadedModel, load_tokenizer
from lorasuite_fast.cli.app import app
from lorasuite_fast.errors import WriteError
from lorasuite_fast.io.phases import PhaseClock
from lorasuite_fast.io.work import Work
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.pipeline import refine as verb
from lorasuite_fast.text.alignment import Alignment
from lorasuite_fast.text.samples import load_samples
from lorasuite_fast.training import refinement, teacher
from lorasuite_fast.training.batches import step_batches
from lorasuite_fast.training.refinement import step_budget
from lorasuite_fast.training.target_loss import RefinementBatches
from lorasuite_fast.training.teacher import Target, Targets, divergence, target, write_targets

from planted import plant, random_adapter, save_folder, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
WORDS = ("the", "sea", "and", "rest", "heard", "in", "on", "her", "not", "one", "tree", "seen", "was", "a")


def texts(count: int, seed: int = 0) -> list[str]:
    rng = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (count, 30), generator=rng)
    return [" ".join(WORDS[i] for i in row) for row in picks.tolist()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its adapter, a planted upgrade of it and an unrelated model."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("refine")
    old, tokenizer = tiny_model("llama", 1), tiny_tokenizer(320, seed=1)
    save_folder(old, tokenizer, root / "old")
    random_adapter(root / "old", root / "adapter", targets=["q_proj", "v_proj", "o_proj"], rank=4, alpha=8, seed=0,
                   size=0.6)  # fmt: skip
    plant(old, tokenizer, d_new=48, layers_new=3, heads_new=6, intermediate_new=64, added_tokens=20, seed=3).save(
        root / "new"
    )
    save_folder(tiny_model("llama", 5, layers=3, vocab=330, tied=True), tiny_tokenizer(330, seed=2), root / "other")
    return root


def taught(
    root: Path, folder: Path, new: str, top_k: int | str | None, shuffled: bool = False, imitation: float = 0.0
) -> Targets:
    work = Work(folder, {"k": top_k})
    result = write_targets(
        work, root / "old", root / "adapter", root / new, texts(80), PhaseClock(), top_k=top_k, max_tokens=64,
        device=CPU, dtype=torch.float32, shuffled=shuffled, imitation=imitation,
    )  # fmt: skip
    work.close()
    return result


def run(root: Path, out: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "text": texts(80), "steps": 12, "eval_every": 4, "batch_bytes": 500, "max_tokens": 64, "patience": None,
        "device": "cpu",
    }  # fmt: skip
    return refine(root / "old", root / "adapter", root / "new", None, out, **given(refine, **defaults | options))


def exact(folder: Path) -> Any:
    return LoadedModel(folder, "M", device=CPU, dtype=torch.float64).model


def dense_targets(root: Path, new: str, some: list[str]) -> list[tuple[Tensor, Tensor]]:
    """Target (positions, shared) and the bare new model's distribution for each text, float64, position by position."""
    alignment = Alignment(load_tokenizer(root / "old", "OLD"), load_tokenizer(root / new, "NEW"))
    shared = alignment.ordinary
    o, n, adapted = (LoadedModel(root / f, "M", device=CPU, dtype=torch.float64) for f in ("old", new, "old"))
    adapted.attach(root / "adapter")

    def at(model: Any, ids: list[int], positions: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].softmax(-1)
        chosen = torch.stack([rows[p][tokens] for p in positions])
        return chosen / chosen.sum(1, keepdim=True)

    result = []
    for text in some:
        aligned = alignment.align(text, 64)
        assert aligned is not None
        before = at(o.model, aligned.ids_o, aligned.positions_o, shared.old)
        after = at(adapted.peft, aligned.ids_o, aligned.positions_o, shared.old)
        bare = at(n.model, aligned.ids_n, aligned.positions_n, shared.new)
        weight = bare * after / before
        result.append((weight / weight.sum(1, keepdim=True), bare))
    return result


@pytest.mark.parametrize("new", ["new", "other"])
def test_targets_are_the_new_predictions_changed_as_the_old_ones_were(root: Path, tmp_path: Path, new: str) -> None:
    targets = taught(root, tmp_path / "work", new, None)
    for n in (0, 65):
        [(wanted, _)] = dense_targets(root, new, [texts(80)[n]])
        found = targets[n]
        assert found.index is None
        assert found.log_probs.shape == wanted.shape
        torch.testing.assert_close(found.log_probs.double(), wanted.log(), atol=2e-4, rtol=2**-10)


def test_the_facts_are_those_of_the_dense_divergence(root: Path, tmp_path: Path) -> None:
    targets = taught(root, tmp_path / "work", "new", 16)
    total, count = 0.0, 0
    for wanted, bare in dense_targets(root, "new", texts(80)):
        total += float((wanted * (wanted / bare).log()).sum())
        count += len(wanted)
    facts = targets.facts
    assert facts.positions == count
    assert facts.kl == pytest.approx(total / count, rel=1e-3)
    assert 0 < facts.kl_kept < facts.kl
    assert facts.k == 16
    assert facts.shared > 200


def test_auto_keeps_as_many_tokens_as_two_percent_of_the_divergence_asks_for(root: Path, tmp_path: Path) -> None:
    facts = taught(root, tmp_path / "auto", "new", "auto").facts
    assert facts.as_dict()["truncation"] <= 0.025
    fewer = {64: 32, 128: 64}.get(facts.k, 128)
    assert taught(root, tmp_path / "fewer", "new", fewer).facts.as_dict()["truncation"] > 0.015


def test_the_heads_of_the_old_model_are_written_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    save = Work.save
    monkeypatch.setattr(Work, "save", lambda self, name, *a, **k: saved.append(name) or save(self, name, *a, **k))
    taught(root, tmp_path / "work", "new", 16)
    assert len([name for name in saved if name.startswith("target-")]) == 2
    assert sorted(name for name in saved if name.endswith("head")) == ["old-after-head", "old-before-head"]


def test_auto_keeps_no_more_than_fits(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "_LOST", 0)
    whole = taught(root, tmp_path / "whole", "new", "auto").facts
    assert whole.k == whole.shared
    monkeypatch.setattr(teacher, "_MOST_AUTO", whole.positions * (2 * whole.shared + 4) - 1)
    monkeypatch.setattr(teacher, "_KEPT", (32, 64))
    assert taught(root, tmp_path / "bounded", "new", "auto").facts.k == 64


@pytest.mark.parametrize("top_k", [16, None, "auto"])
def test_targets_that_find_no_room_are_not_begun(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: int | str | None
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda path: free)
    with pytest.raises(LoraSuiteError, match=r"the targets take [\d,]+ bytes, and 10,000 are free; lower top_k"):
        run(root, tmp_path / "out", top_k=top_k)
    assert not any(tmp_path.iterdir())


def test_what_is_there_stays_where_the_targets_chosen_find_no_room(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(teacher, "_LOST", 0)
    monkeypatch.setattr(teacher, "_KEPT", (1,))
    whole = taught(root, tmp_path / "whole", "new", None).facts
    size = whole.positions * (2 * whole.shared + 4)
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda path: free._replace(free=size - 1))
    with pytest.raises(WriteError, match=rf"the targets take {size:,} bytes, and {size - 1:,} are free; lower top_k"):
        run(root, tmp_path / "out", top_k="auto")
    monkeypatch.undo()
    assert list(tmp_path.glob(".out.refine/targets-*/old-after-00001.safetensors"))
    assert run(root, tmp_path / "out", top_k="auto").teacher.positions == whole.positions


def random_rows(seed: int, n: int = 40, s: int = 90) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(n, s, generator=rng) for _ in range(4))


def dense_divergence(p: Tensor, q: Tensor) -> Tensor:
    return torch.stack([sum((a * (a / b).log() for a, b in zip(x, y, strict=True)), torch.zeros(())) for x, y in
                        zip(p.double(), q.double(), strict=True)])  # fmt: skip


def test_keeping_all_tokens_gives_the_full_divergence() -> None:
    new, before, after, student = random_rows(0)
    p = (new + after.log_softmax(-1) - before.log_softmax(-1)).softmax(-1)
    expected = dense_divergence(p, student.softmax(-1)).float()
    for k in (None, 90, 200):
        torch.testing.assert_close(divergence(target(new, before, after, k), student), expected, atol=1e-5, rtol=1e-5)


def test_merging_the_rest_gives_the_divergence_of_the_merged_distributions() -> None:
    new, before, after, student = random_rows(1)
    p, q = target(new, before, after).log_probs.double().exp(), student.double().softmax(-1)
    last = torch.zeros(len(p), dtype=torch.float64)
    for k in (1, 8, 89):
        index = p.topk(k, -1).indices
        merged = [torch.cat([d.gather(1, index), d.scatter(1, index, 0).sum(1, True)], dim=1) for d in (p, q)]
        found = divergence(target(new, before, after, k), student)
        torch.testing.assert_close(found.double(), dense_divergence(*merged), atol=1e-4, rtol=1e-4)
        assert (found.double() >= last - 1e-5).all()
        last = found.double()
    assert (last <= dense_divergence(p, q) + 1e-5).all()


@pytest.mark.parametrize("imitation", [0.0, 0.3, 1.0])
def test_a_mixed_target_has_both_parts_in_their_shares(imitation: float) -> None:
    new, before, after, student = (rows.double() for rows in random_rows(2))
    changed = new.softmax(-1) * after.softmax(-1) / before.softmax(-1)
    changed /= changed.sum(-1, keepdim=True)
    copied = after.softmax(-1)
    found = target(new, before, after, imitation=imitation)
    mixture = (1 - imitation) * changed + imitation * copied
    torch.testing.assert_close(found.log_probs.exp(), mixture)
    # What the mixture asks of a model is what both parts ask of it, in their shares: the gradients are the same.
    student.requires_grad_(True)
    divergence(found, student).sum().backward()
    gradient = student.grad
    student.grad = None
    parts = (dense_log_loss(p, student) * share for p, share in ((changed, 1 - imitation), (copied, imitation)))
    sum(parts, torch.zeros(())).backward()
    torch.testing.assert_close(gradient, student.grad)


def dense_log_loss(p: Tensor, student: Tensor) -> Tensor:
    return -(p * (student - student.exp().sum(-1, keepdim=True).log())).sum()


def test_imitation_alone_teaches_what_the_adapted_old_model_says(root: Path, tmp_path: Path) -> None:
    # Of a model unlike the old one: for one that computes the same, the changed prediction is that of the old one.
    targets = taught(root, tmp_path / "work", "other", None, imitation=1.0)
    model = LoadedModel(root / "old", "OLD", device=CPU, dtype=torch.float64)
    model.attach(root / "adapter")
    aligned = targets.aligned[3]
    alignment = Alignment(load_tokenizer(root / "old", "OLD"), load_tokenizer(root / "other", "NEW"))
    with torch.no_grad():
        rows = model.peft(torch.tensor([aligned.ids_o])).logits[0][aligned.positions_o][:, alignment.ordinary.old]
    torch.testing.assert_close(targets[3].log_probs.double(), rows.log_softmax(-1), atol=2e-4, rtol=2**-10)


def test_the_gradient_is_finite_where_the_target_rules_a_token_out() -> None:
    log_probs = torch.tensor([[0.0, -math.inf]])
    student = torch.tensor([[0.5, 0.2]], requires_grad=True)
    loss = divergence(Target(log_probs, None, torch.tensor([-math.inf])), student).sum()
    loss.backward()
    assert student.grad is not None
    assert loss.item() == pytest.approx(-math.log(math.exp(0.5) / (math.exp(0.5) + math.exp(0.2))))
    assert torch.isfinite(student.grad).all()


def test_shuffled_targets_hold_the_change_of_other_positions(root: Path, tmp_path: Path) -> None:
    true, shuffled = taught(root, tmp_path / "a", "new", None), taught(root, tmp_path / "b", "new", None, True)
    close = torch.isclose(true[0].log_probs, shuffled[0].log_probs, atol=1e-3).float().mean()
    assert close < 0.5


def test_steps_read_every_text_before_any_comes_again() -> None:
    batches = step_batches([30] * 10, 100, 5, seed=0)
    order = [i for batch in batches for i in batch]
    assert all(len(batch) == 4 for batch in batches)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert step_batches([30] * 10, 100, 5, seed=1) != batches


def test_the_step_budget_reads_the_text_once_within_bounds() -> None:
    assert [step_budget(size) for size in (1000, 600_000, 10**9)] == [150, 300, 600]


@pytest.fixture(scope="module")
def refined(root: Path) -> Any:
    return run(root, root / "refined", steps=60, eval_every=10, learning_rate=1e-2, imitation=0.0)


def test_the_imitation_asked_for_is_in_the_targets(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"text": texts(80), "steps": 1, "eval_every": 1, "batch_bytes": 500, "max_tokens": 64}
    found = {
        m: refine(
            root / "old",
            root / "adapter",
            root / "other",
            None,
            tmp_path / str(m),
            **given(refine, device="cpu", imitation=m, **options),
        ).teacher
        for m in (0.0, 1.0)
    }
    # Of a model unlike the old one, so that to change as it changed and to copy it are different things.
    model = LoadedModel(root / "old", "OLD", device=CPU, dtype=torch.float64)
    model.attach(root / "adapter")
    alignment = Alignment(load_tokenizer(root / "old", "OLD"), load_tokenizer(root / "other", "NEW"))
    total, count = {0.0: 0.0, 1.0: 0.0}, 0
    for text, (changed, bare) in zip(texts(80), dense_targets(root, "other", texts(80)), strict=True):
        aligned = alignment.align(text, 64)
        assert aligned is not None
        with torch.no_grad():
            rows = model.peft(torch.tensor([aligned.ids_o])).logits[0][aligned.positions_o]
        for m, p in ((0.0, changed), (1.0, rows[:, alignment.ordinary.old].softmax(-1))):
            total[m] += float((p * (p / bare).log()).sum())
        count += len(bare)
    assert total[1.0] > 1.2 * total[0.0]
    for m, facts in found.items():
        assert facts.imitation == m
        assert facts.kl == pytest.approx(total[m] / count, rel=1e-3)


def test_refining_raises_the_agreement_on_held_out_text(refined: Any, root: Path) -> None:
    assert refined.start_agreement == 0.0
    assert refined.agreement > 0.3
    assert not refined.kept_start
    assert refined.chosen_step == max(refined.evaluations, key=lambda e: e.agreement).step
    assert refined.stopped == "budget"
    assert not (root / ".refined.refine").exists()
    assert {"align", "old states", "targets", "train"} <= set(refined.as_dict()["costs"])
    json.dumps(refined.as_dict())


def test_the_agreement_reported_is_that_of_the_adapter_written(refined: Any, root: Path) -> None:
    model = LoadedModel(root / "new", "NEW", device=CPU, dtype=torch.float32)
    alignment = Alignment(load_tokenizer(root / "old", "OLD"), load_tokenizer(root / "new", "NEW"))
    model.attach(root / "refined")
    kl = before = 0.0
    for text, (wanted, bare) in zip(texts(80), dense_targets(root, "new", texts(80)), strict=True):
        aligned = alignment.align(text, 64)
        assert aligned is not None
        with torch.no_grad():
            logits = model.peft(torch.tensor([aligned.ids_n])).logits[0][aligned.positions_n][:, alignment.ordinary.new]
        kl += float((wanted * (wanted.log() - logits.double().log_softmax(-1))).sum())
        before += float((wanted * (wanted / bare).log()).sum())
    # Over all texts, of which a tenth was held out: the training texts agree a little better.
    assert 1 - kl / before == pytest.approx(refined.agreement, abs=0.12)


def test_the_result_names_both_models_by_their_fingerprints(refined: Any, root: Path) -> None:
    assert refined.fingerprints == {name: Checkpoint(root / name).fingerprint() for name in ("old", "new")}


def test_the_result_is_a_peft_adapter_of_the_new_model(refined: Any, root: Path) -> None:
    config = json.loads((root / "refined/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((root / "new").resolve())
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert config["inference_mode"]


def test_a_seed_makes_it_repeatable(root: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(root, tmp_path / name, steps=4, seed=seed)
    a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_the_course_is_that_of_an_established_trainer(root: Path, tmp_path: Path) -> None:
    """Recorded from transformers' Trainer: AdamW, a linear schedule, clipping at norm 1."""
    recorded = [(4, 0.553423, 0.4457), (8, 0.615548, 0.27202), (12, 0.642327, 0.22206)]
    result = run(root, tmp_path / "out")
    for e, (step, agreement, kl) in zip(result.evaluations[1:], recorded, strict=True):
        assert e.step == step
        assert e.agreement == pytest.approx(agreement, abs=1e-4)
        assert e.kl == pytest.approx(kl, rel=1e-4)


def general_text(folder: Path) -> Path:
    path = folder / "general.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(110)[80:]))
    return path


def shift(root: Path, adapter: Path, rows: list[list[int]]) -> float:
    """Mean KL(bare ‖ adapted) over the positions of some rows, all but the last of each."""
    bare, adapted = (LoadedModel(root / "new", "NEW", device=CPU, dtype=torch.float64) for _ in range(2))
    adapted.attach(adapter)
    total, count = 0.0, 0
    for ids in rows:
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0, :-1].softmax(-1) for m in (bare.model, adapted.peft))
        total += float((p * (p / q).log()).sum())
        count += len(p)
    return total / count


def test_the_retained_divergence_is_that_of_a_dense_recount(root: Path, tmp_path: Path, refined: Any) -> None:
    options: dict[str, Any] = {"text": texts(80), "steps": 1, "eval_every": 1, "batch_bytes": 500, "max_tokens": 64}
    result = refine(
        root / "old",
        root / "adapter",
        root / "new",
        root / "refined",
        tmp_path / "out",
        **given(refine, device="cpu", learning_rate=1e-9, retain=general_text(tmp_path), seed=3, **options),
    )
    tokenizer = load_tokenizer(root / "new", "NEW")
    kept = load_samples([{"text": text} for text in texts(110)[80:]], tokenizer, max_tokens=64).samples
    # The first step reads as many tokens of it as of the text refined on.
    (batch,) = step_batches([len(sample.ids) for sample in kept], result.trained_tokens, 1, 3)
    assert 1 < len(batch) < len(kept)
    found = result.evaluations[-1].retained_kl
    assert found == pytest.approx(shift(root, root / "refined", [kept[i].ids for i in batch]), rel=1e-4)
    assert found > 0.01


def test_what_is_retained_moves_less(root: Path, tmp_path: Path, refined: Any) -> None:
    held = run(root, tmp_path / "held", steps=60, eval_every=10, learning_rate=1e-2, imitation=0.0,
               retain=general_text(tmp_path), retain_weight=1)  # fmt: skip
    tokenizer = load_tokenizer(root / "new", "NEW")
    rows = [tokenizer(text)["input_ids"] for text in texts(110)[80:]]
    free, kept = (shift(root, folder, rows) for folder in (root / "refined", tmp_path / "held"))
    assert kept < 0.6 * free
    assert 0.1 < held.agreement < refined.agreement
    assert "general.jsonl, weight 1" in (tmp_path / "held/README.md").read_text()
    with pytest.raises(LoraSuiteError, match="retain_weight is 0"):
        run(root, tmp_path / "out", retain="shipped", retain_weight=0)


def test_an_interrupted_run_goes_on_with_the_text_to_retain(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"retain": general_text(tmp_path)}
    run(root, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", progress=interrupt("train", 7), **options)
    with pytest.raises(LoraSuiteError, match="retain"):
        run(root, tmp_path / "cut")
    cut = run(root, tmp_path / "cut", **options)
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert all(e.retained_kl is not None for e in cut.evaluations[1:])


def interrupt(phase: str, at: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if name == phase and done >= at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("phase", "at"), [("train", 7), ("targets", 64), ("old states, adapted", 64)])
def test_an_interrupted_run_goes_on_to_the_same_adapter(root: Path, tmp_path: Path, phase: str, at: int) -> None:
    run(root, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", progress=interrupt(phase, at))
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / ".cut.refine").exists()
    seen: list[int] = []
    resumed = run(root, tmp_path / "cut", progress=lambda name, done, _: seen.append(done) if name == "train" else None)
    if phase == "train":
        assert 1 not in seen
    assert [e.step for e in resumed.evaluations] == [0, 4, 8, 12]
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_a_diverging_run_keeps_the_start_and_says_so(root: Path, tmp_path: Path, refined: Any) -> None:
    result = refine(
        root / "old",
        root / "adapter",
        root / "new",
        root / "refined",
        tmp_path / "out",
        config=RefineConfig(text=texts(80), steps=8, eval_every=4, batch_bytes=500, max_tokens=64, learning_rate=1e4),
        runtime=Runtime(device="cpu"),
    )
    assert result.kept_start
    assert result.chosen_step == 0
    assert result.stopped == "diverged"
    assert "diverged" in result.summary
    assert "Infinity" not in json.dumps(result.as_dict())
    assert "NaN" not in json.dumps(result.as_dict())
    assert result.agreement == result.start_agreement > 0.3
    start, out = (load_file(f / "adapter_model.safetensors") for f in (root / "refined", tmp_path / "out"))
    assert all(torch.equal(start[k], out[k]) for k in start)


def test_a_run_cut_off_behind_its_early_stop_only_writes_its_result(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Falls too slowly to gain anything after a while.
    options: dict[str, Any] = {"steps": 60, "patience": 1, "eval_every": 2, "learning_rate": 0.1}
    whole = run(root, tmp_path / "whole", **options)
    assert whole.stopped == "patience"
    assert whole.steps < 60
    assert whole.steps == whole.chosen_step + 2
    with monkeypatch.context() as patch:
        patch.setattr(verb, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "cut", **options)
    cut = run(root, tmp_path / "cut", **options)
    assert (cut.steps, cut.chosen_step, cut.stopped) == (whole.steps, whole.chosen_step, "patience")
    assert cut.evaluations == whole.evaluations
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_the_next_token_loss_is_that_of_a_plain_recount(root: Path, tmp_path: Path) -> None:
    """Of the first step, whose adapter does nothing yet: the bare model's on the batch's texts."""
    some = texts(8)
    result = run(root, tmp_path / "out", text=some, steps=1, eval_every=1, kl_weight=0.0, next_token_weight=1.0,
                 batch_bytes=10**6)  # fmt: skip
    model, tokenizer = exact(root / "new"), load_tokenizer(root / "new", "NEW")
    alignment = Alignment(load_tokenizer(root / "old", "OLD"), tokenizer)
    aligned = [alignment.align(text, 64) for text in some]
    held, _ = refinement._split(SimpleNamespace(aligned=aligned), 0)  # type: ignore[arg-type]
    nats: list[float] = []
    for n, row in enumerate(aligned):
        assert row is not None
        if n not in held:
            with torch.no_grad():
                log_probs = model(torch.tensor([row.ids_n])).logits[0].log_softmax(-1)
            nats += [-float(log_probs[p, token]) for p, token in enumerate(row.ids_n[1:])]
    assert result.evaluations[1].next_token == pytest.approx(sum(nats) / len(nats), abs=1e-5)
    assert result.evaluations[1].kl is None


def test_recomputed_activations_change_nothing(root: Path, tmp_path: Path) -> None:
    for name, recomputed in (("plain", False), ("recomputed", True)):
        run(root, tmp_path / name, steps=3, gradient_checkpointing=recomputed)
    plain, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "recomputed"))
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_shuffled_teacher_agrees_less(root: Path, tmp_path: Path, refined: Any) -> None:
    shuffled = run(root, tmp_path / "out", control="shuffled")
    assert shuffled.agreement < refined.agreement / 2


def test_no_text_stands_on_both_sides_of_the_split(root: Path, tmp_path: Path) -> None:
    result = run(root, tmp_path / "out", text=[*texts(40), *texts(40)], steps=1)
    assert result.teacher.texts == 40
    # Nor is everything held out where one text is most of it.
    sizes = [torch.tensor([10])] * 9 + [torch.tensor([10_000])]
    for seed in range(20):
        held, others = refinement._split(SimpleNamespace(aligned=[SimpleNamespace(ends=e) for e in sizes]), seed)  # type: ignore[arg-type]
        assert len(others) >= 5
        assert sorted(held + others) == list(range(10))


def test_a_start_in_the_name_of_another_model_is_trained_without_its_embeddings(root: Path, tmp_path: Path) -> None:
    start = random_adapter(root / "new", tmp_path / "start", targets=["o_proj"], rank=2, alpha=6, seed=4)
    config = json.loads((start / "adapter_config.json").read_text())
    (start / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(root / "old")}))
    refine(
        root / "old",
        root / "adapter",
        root / "new",
        start,
        tmp_path / "out",
        config=RefineConfig(text=texts(80), steps=1),
        runtime=Runtime(device="cpu"),
    )
    assert all("lora_" in name for name in load_file(tmp_path / "out/adapter_model.safetensors"))


def test_a_start_that_is_missing_or_broken_is_refused_and_nothing_is_left(root: Path, tmp_path: Path) -> None:
    broken = random_adapter(root / "new", tmp_path / "broken", targets=["o_proj"], rank=2, alpha=6, seed=4)
    tensors = {n: torch.full_like(t, math.nan) for n, t in load_file(broken / "adapter_model.safetensors").items()}
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    phases: list[str] = []
    for start, words in ((tmp_path / "none", "none: no such folder"), (broken, "NaN or infinity")):
        with pytest.raises(LoraSuiteError, match=words):
            refine(
                root / "old",
                root / "adapter",
                root / "new",
                start,
                tmp_path / "out",
                config=RefineConfig(text=texts(80), steps=1),
                runtime=Runtime(device="cpu", progress=lambda name, *_: phases.append(name)),
            )
        assert phases == []
    with pytest.raises(LoraSuiteError):
        run(root, tmp_path / "out", text=["the sea"] * 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_start_among_further_modules_computes_the_same_function(root: Path, tmp_path: Path) -> None:
    random_adapter(root / "new", tmp_path / "start", targets=["o_proj"], rank=2, alpha=6, seed=4, layers=[2])
    agreements = []
    for name, options in (("as-it-is", {}), ("wider", {"roles": ["q", "down"], "rank": 4})):
        result = refine(
            root / "old",
            root / "adapter",
            root / "new",
            tmp_path / "start",
            tmp_path / name,
            **given(
                refine, text=texts(80), steps=2, eval_every=2, batch_bytes=500, max_tokens=64, device="cpu", **options
            ),
        )
        agreements.append(result.start_agreement)
    assert agreements[0] == pytest.approx(agreements[1], abs=1e-5)
    assert agreements[0] != 0
    config = json.loads((tmp_path / "wider/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down_proj", "o_proj", "q_proj"]
    assert config["r"] == 4


def test_targets_in_a_cache_serve_another_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(root, tmp_path / "a", steps=2, cache=tmp_path / "cache")
    monkeypatch.setattr("lorasuite_fast.training.teacher._old_passes", None)
    result = run(root, tmp_path / "b", steps=2, kl_weight=0.5, cache=tmp_path / "cache")
    assert result.steps == 2


def test_the_old_model_writes_the_text_unless_some_is_given(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    result = run(root, tmp_path / "out", text=None, text_bytes=3000, steps="auto", max_tokens=32, eval_every=75,
                 batch_bytes=60, say=said.append)  # fmt: skip
    assert result.text == "self"
    assert result.budget == 150
    assert "150 steps" in said[0]
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"imitation": 1.5}, "imitation is 1.5"),
        ({"kl_weight": 0.0, "next_token_weight": 0.0}, "one must be above 0"),
        ({"roles": ["query"]}, "role 'query'"),
        ({"control": "flipped"}, "control 'flipped'"),
        ({"text": ["too little"]}, "at least 8 texts"),
        ({"memory": "1MB"}, "`memory=1MB`"),
        ({"retain": "no-such.txt", "text": None}, "no-such.txt: no such file"),
    ],
)
def test_bad_input_is_one_clear_error(root: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LoraSuiteError, match=words):
        run(root, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_work_folder_of_other_options_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "out", progress=interrupt("train", 5))
    with pytest.raises(LoraSuiteError, match="learning_rate"):
        run(root, tmp_path / "out", learning_rate=1e-3)


def text_file(folder: Path) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60)))
    return path


def invoke(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_shuffled_labels_are_the_same_tokens_in_another_order(root: Path, tmp_path: Path) -> None:
    targets = taught(root, tmp_path / "work", "new", 8, shuffled=True)
    plain, shuffled = (RefinementBatches(targets, [[0, 1, 2], [3, 4]], seed)[0]["labels"] for seed in (None, 5))
    assert torch.equal(plain == -100, shuffled == -100)
    assert torch.equal(plain.flatten().sort().values, shuffled.flatten().sort().values)
    assert (plain != shuffled).float().mean() > 0.3
    batch = RefinementBatches(targets, [[0, 1, 2]])[0]
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert torch.equal(batch["labels"], ids[:, 1:])


def test_migrate_refines_what_it_carried(root: Path, tmp_path: Path) -> None:
    arguments = (root / "old", root / "other", root / "adapter", tmp_path / "out", "--examples", 8)
    result = json.loads(invoke("migrate", *arguments, "--refine", 6, "--refine-text", text_file(tmp_path), "--json"))
    assert result["refinement"]["budget"] == 6
    assert result["out"] == str(tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((root / "other").resolve())
    assert {"q_proj", "v_proj", "o_proj"} <= set(config["target_modules"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.jsonl"]


def test_migrate_does_not_refine_automatically_what_is_exact(root: Path, tmp_path: Path) -> None:
    arguments = (root / "old", root / "new", root / "adapter", tmp_path / "out", "--examples", 8)
    result = json.loads(invoke("migrate", *arguments, "--refine", "auto", "--json"))
    assert result["options"]["method"] == "lstsq"
    assert result["refinement"] is None


def test_the_command_prints_every_evaluation(root: Path, tmp_path: Path) -> None:
    arguments = (root / "old", root / "adapter", root / "new", "none", tmp_path / "out")
    printed = invoke(
        "refine", *arguments, "--text", text_file(tmp_path), "--steps", 6, "--eval-every", 3, "--learning-rate", 1e-3
    )
    assert "agreement" in printed
    assert "shared tokens kept" in printed
    assert f"written: {tmp_path / 'out'}" in printed
