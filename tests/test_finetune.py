"""Light fine-tuning: the samples, the training against a plain loop, resuming, diverging, and what comes out."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flat_options import given
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lorasuite_fast import (
    ApplyConfig,
    FinetuneConfig,
    LoraSuiteError,
    PlanConfig,
    RefineConfig,
    Runtime,
    finetune,
    migrate,
)
from lorasuite_fast.adapters.adapter import trained_config
from lorasuite_fast.adapters.aligned_states import LoadedModel
from lorasuite_fast.cli.app import app
from lorasuite_fast.pipeline import finetune as verb
from lorasuite_fast.text.samples import SampleMaker, _reaching_into, load_samples, prompt, read_records
from lorasuite_fast.training import finetuning as finetuning_module
from lorasuite_fast.training.batches import sample_batches, step_batches

from planted import plant, random_adapter, save_folder, tiny_model, tiny_tokenizer

WORDS = ("the", "sea", "and", "rest", "heard", "in", "on", "her", "not", "one", "tree", "seen", "was", "a")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
)


def records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts of random words, each answered by its first word three times."""
    rng = random.Random(seed)
    rows = [[rng.choice(WORDS) for _ in range(rng.randint(3, 9))] for _ in range(count)]
    return [{"prompt": " ".join(row), "completion": f" {row[0]}" * 3} for row in rows]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two random adapters of it (one with dropout), one that was trained, and a planted upgrade."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("finetune")
    model, tokenizer = tiny_model("llama", 1), tiny_tokenizer(320, seed=1)
    save_folder(model, tokenizer, root / "model")
    random_adapter(root / "model", root / "adapter", targets=["q_proj", "v_proj", "down_proj"], rank=4, alpha=8, seed=0,
                   rank_pattern={"layers.1.self_attn.v_proj": 2}, size=0.3)  # fmt: skip
    random_adapter(root / "model", root / "dropped", targets=["q_proj", "o_proj"], rank=4, alpha=8, seed=3,
                   lora_dropout=0.2)  # fmt: skip
    plant(model, tokenizer, d_new=48, layers_new=3, heads_new=6, intermediate_new=64, added_tokens=20, seed=3).save(
        root / "new"
    )
    run(root, root / "trained", adapter=None, rank=8, roles=["q", "v", "down"], steps=30, learning_rate=1e-2)
    return root


def run(root: Path, out: Path, adapter: str | Path | None = "adapter", **options: Any) -> Any:
    defaults: dict[str, Any] = {"data": records(20), "batch": 8, "max_tokens": 48, "device": "cpu"}
    settings = defaults | options
    return finetune(
        root / "model",
        None if adapter is None else root / adapter,
        settings.pop("data"),
        out,
        **given(finetune, **settings),
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def maker(root: Path, chat_template: str | None = None, **options: Any) -> tuple[SampleMaker, Any]:
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.chat_template = chat_template
    defaults: dict[str, Any] = {"template": "alpaca", "max_tokens": 999, "completion_only": False}
    return SampleMaker(tokenizer, **(defaults | options)), tokenizer


def counted_text(sample: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode([i for i, c in zip(sample.ids, sample.counted, strict=True) if c]))


# The training itself


def plain_loop(
    root: Path,
    adapter: str,
    rows: list[Any],
    batches: list[list[int]],
    rate: float,
    kept: tuple[list[list[int]], list[list[int]], float] = ([], [], 0.0),
) -> Any:
    """Losses and final factors of a loop in float64, one sample at a time, AdamW written out.

    Args:
        kept: token ids of the texts to retain, which of them each step reads, and their weight. With them the shifts of
            every step are returned too.
    """
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, root / adapter, is_trainable=True, autocast_adapter_dtype=False).double()
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in trained.items()}
    bare = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64)
    texts, kept_batches, weight = kept
    losses, shifts = [], []
    for step, batch in enumerate(batches):
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for i in batch:
            log_probs = model(torch.tensor([rows[i].ids])).logits[0].log_softmax(-1)
            for p in range(1, len(rows[i].ids)):
                if rows[i].counted[p]:
                    total = total - log_probs[p - 1, rows[i].ids[p]]
        loss = total / sum(sum(rows[i].counted) for i in batch)
        loss.backward()
        losses.append(loss.item())
        if texts:
            shift, count = torch.zeros((), dtype=torch.float64), 0
            for i in kept_batches[step]:
                ids = torch.tensor([texts[i]])
                p, q = (m(ids).logits[0, :-1].softmax(-1) for m in (bare, model))
                shift = shift + (p.detach() * (p.detach() / q).log()).sum()
                count += len(texts[i]) - 1
            shifts.append(float(shift.detach()) / count)
            (weight * shift / count).backward()
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        lr = rate * (1 - step / len(batches))
        with torch.no_grad():
            for name, g in gradients.items():
                g = g * min(1.0, 1 / (norm + 1e-6))
                m, v = moments[name]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                trained[name] -= lr * m_hat / (v_hat.sqrt() + 1e-8)
    return losses, {name.replace(".default", ""): p.detach() for name, p in trained.items()}, shifts


@pytest.mark.parametrize("completion_only", [False, True])
def test_training_is_that_of_a_plain_loop_in_float64(root: Path, tmp_path: Path, completion_only: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    rows = load_samples(records(20), tokenizer, max_tokens=48, completion_only=completion_only).samples
    result = run(root, tmp_path / "out", dtype="float64", seed=5, completion_only=completion_only)
    losses, factors, _ = plain_loop(root, "adapter", rows, sample_batches(20, 8, 9, 5), 1e-3)
    assert result.steps == 9
    # The total is summed in float32; the linear schedule and AdamW are float64 on both sides.
    assert result.losses == pytest.approx(losses, rel=1e-6)
    out, start = weights(tmp_path / "out"), weights(root / "adapter")
    assert out.keys() == factors.keys()
    for name, factor in factors.items():
        torch.testing.assert_close(out[name].double(), factor, rtol=0, atol=1e-9)
        assert not torch.equal(out[name].float(), start[name])


def test_the_losses_are_those_of_an_established_trainer(root: Path, tmp_path: Path) -> None:
    """Recorded from transformers' Trainer: AdamW, a linear schedule, clipping at norm 1."""
    recorded = [6.334885, 6.403264, 6.252563, 6.2307, 6.326977, 6.333562, 6.307246, 6.23458, 6.245046]
    assert run(root, tmp_path / "out").losses == pytest.approx(recorded, rel=1e-5)


GENERAL = [f"{WORDS[n]} and {WORDS[n + k]} of the {WORDS[n + 5]} it was" for k in (3, 4, 6) for n in range(8)]


def general_text(folder: Path) -> Path:
    path = folder / "general.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in GENERAL))
    return path


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_retaining_is_that_of_a_plain_loop_in_float64(root: Path, tmp_path: Path, micro_batch: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    rows = load_samples(records(20), tokenizer, max_tokens=48).samples
    texts = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in GENERAL]
    result = run(root, tmp_path / "out", dtype="float64", seed=5, steps=4, retain=general_text(tmp_path),
                 retain_weight=0.7, micro_batch=micro_batch)  # fmt: skip
    budget = 8 * sum(len(row.ids) for row in rows) // 20
    kept = texts, step_batches([len(ids) for ids in texts], budget, 4, 5), 0.7
    losses, factors, shifts = plain_loop(root, "adapter", rows, sample_batches(20, 8, 4, 5), 1e-3, kept)
    assert all(1 < len(batch) < len(texts) for batch in kept[1])
    assert result.losses == pytest.approx(losses, rel=1e-6)
    # The last third of four steps is the last one.
    assert result.retained_kl == pytest.approx(shifts[3], rel=1e-5)
    for name, factor in factors.items():
        torch.testing.assert_close(weights(tmp_path / "out")[name].double(), factor, rtol=0, atol=1e-8)


def test_what_is_retained_moves_less_and_the_result_says_how_much(root: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"adapter": None, "rank": 8, "roles": ["q", "v", "down"], "steps": 30,
                                "learning_rate": 1e-2}  # fmt: skip
    held = run(root, tmp_path / "held", **settings, retain=general_text(tmp_path), retain_weight=3)
    assert held.start_retained_kl == pytest.approx(0, abs=1e-6)
    assert held.retained_kl < 0.5 * shift_of(root, root / "trained")
    assert shift_of(root, tmp_path / "held") == pytest.approx(held.retained_kl, rel=0.3)
    # And the samples are learned all the same.
    assert held.end_loss < 0.8 * held.start_loss
    assert f"{held.retained_kl:.3f} in the last third" in held.summary
    assert held.as_dict()["retained_kl"] == held.retained_kl
    assert "general.jsonl, weight 3" in (tmp_path / "held/README.md").read_text()


def shift_of(root: Path, adapter: Path) -> float:
    """Mean KL(bare ‖ adapted) over the general texts."""
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    bare = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64), adapter
    ).double()
    total, count = 0.0, 0
    for text in GENERAL:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (m(ids).logits[0].softmax(-1) for m in (bare, model))
        total += float((p * (p / q).log()).sum())
        count += len(p)
    return total / count


def test_every_epoch_reads_every_sample_once() -> None:
    batches = sample_batches(10, 4, 7, seed=0)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4]
    epochs = [[i for batch in batches[n : n + 3] for i in batch] for n in (0, 3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert sample_batches(10, 4, 7, seed=1) != batches


@pytest.mark.parametrize("options", [{"micro_batch": 3}, {"gradient_checkpointing": True}])
def test_micro_batches_and_recomputation_change_no_result(root: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = run(root, tmp_path / "whole", dtype="float64")
    parts = run(root, tmp_path / "parts", dtype="float64", **options)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-9)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[LoadedModel]:
    """The models fine-tuning loads, as they are when it is done."""
    found: list[LoadedModel] = []

    class Kept(LoadedModel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(verb, "LoadedModel", Kept)
    return found


def test_the_base_model_is_frozen_and_has_no_gradients(root: Path, tmp_path: Path, loaded: list[LoadedModel]) -> None:
    gradients: set[str] = set()

    def progress(name: str, done: int, total: int) -> None:
        if name == "train" and done == 0:
            for parameter, p in loaded[0].peft.named_parameters():
                if p.requires_grad:
                    p.register_hook(lambda _, parameter=parameter: gradients.add(parameter))

    result = run(root, tmp_path / "out", steps=3, progress=progress)
    names = {name for name, p in loaded[0].peft.named_parameters() if p.requires_grad}
    assert gradients == names
    assert all("lora_" in name for name in names)
    assert all(p.grad is None for name, p in loaded[0].peft.named_parameters() if "lora_" not in name)
    before = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).state_dict()
    after = {name.replace("base_model.model.", "").replace(".base_layer", ""): p
             for name, p in loaded[0].peft.state_dict().items() if "lora_" not in name}  # fmt: skip
    assert same(before, after)
    assert result.trainable_parameters == sum(tensor.numel() for tensor in weights(root / "adapter").values())


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_computes_each_layer_again(
    root: Path, tmp_path: Path, loaded: list[LoadedModel], checkpointing: bool, passes: int
) -> None:
    calls: list[int] = []

    def progress(name: str, done: int, total: int) -> None:
        if name == "train" and done == 0:
            loaded[0].layers[1].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))

    run(root, tmp_path / "out", steps=2, gradient_checkpointing=checkpointing, progress=progress)
    assert len(calls) == 2 * passes


def test_dropout_is_on_in_training_as_the_adapter_has_it(root: Path, tmp_path: Path) -> None:
    config = json.loads((root / "dropped/adapter_config.json").read_text())
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.0}))
    (plain / "adapter_model.safetensors").write_bytes((root / "dropped/adapter_model.safetensors").read_bytes())
    dropped, without = (run(root, tmp_path / f"out-{f.name}", adapter=f, steps=2) for f in (root / "dropped", plain))
    assert dropped.losses[0] != pytest.approx(without.losses[0], rel=1e-4)
    assert json.loads((tmp_path / "out-dropped/adapter_config.json").read_text())["lora_dropout"] == 0.2


def test_bfloat16_keeps_the_adapter_in_float32(root: Path, tmp_path: Path, loaded: list[LoadedModel]) -> None:
    result = run(root, tmp_path / "out", dtype="bfloat16", steps=1, learning_rate=1e-12)
    assert loaded[0].model.dtype == torch.bfloat16
    assert result.losses[0] == pytest.approx(run(root, tmp_path / "exact", steps=1).losses[0], rel=0.02)
    out, start = weights(tmp_path / "out"), weights(root / "adapter")
    for name in start:
        torch.testing.assert_close(out[name], start[name], rtol=0, atol=1e-9)


# Samples


def test_a_token_across_the_border_counts_to_the_completion(root: Path) -> None:
    make, tokenizer = maker(root, completion_only=True)
    known = tokenizer.get_vocab()
    merged = next(t for t in sorted(known) if len(t) == 2 and t.isascii() and t.isalpha())
    sample, _ = make({"prompt": f"x {merged[0]}", "completion": f"{merged[1]} y"}, "here")
    tokens = tokenizer.convert_ids_to_tokens(sample.ids)
    across = next((n for n, token in enumerate(tokens) if token.endswith(merged)), None)
    assert across is not None
    assert sample.counted == [n >= across for n in range(len(tokens))]
    assert tokens[-1] == "</s>"


def test_labels_of_a_prompt_and_its_completion_are_those_written_by_hand(root: Path) -> None:
    for only in (False, True):
        make, tokenizer = maker(root, completion_only=only)
        sample, cut = make({"prompt": "é1", "completion": "2?"}, "here")
        assert tokenizer.convert_ids_to_tokens(sample.ids) == ["Ã", "©", "1", "2", "?", "</s>"]
        # The tokenizer puts nothing in front, so that nothing predicts the first token.
        assert sample.counted == ([False] * 3 + [True] * 3 if only else [False] + [True] * 5)
        assert not cut


def test_the_special_token_in_front_stays_and_is_not_counted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(400, "sentencepiece")
    for only in (False, True):
        make = SampleMaker(tokenizer, template="alpaca", max_tokens=99, completion_only=only)
        sample, _ = make({"text": "7?"}, "here")
        assert tokenizer.convert_ids_to_tokens(sample.ids) == ["<s>", "▁", "<0x37>", "?", "</s>"]
        assert sample.counted == [False, True, True, True, True]


def test_instructions_are_put_in_the_form_of_the_paper(root: Path) -> None:
    make, tokenizer = maker(root, completion_only=True)
    sample, _ = make({"instruction": "Add {input}.", "input": "1 2", "output": "3", "answer": "3"}, "here")
    assert tokenizer.decode(sample.ids, skip_special_tokens=True) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {input}.\n\n### Input:\n1 2\n\n"
        "### Response:\n3"
    )
    assert counted_text(sample, tokenizer) == "3</s>"
    sample, _ = make({"instruction": "Go.", "input": "", "output": "Yes"}, "here")
    assert tokenizer.decode(sample.ids, skip_special_tokens=True) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGo.\n\n### Response:\nYes"
    )
    assert prompt("Go.") + "Yes</s>" == tokenizer.decode(sample.ids)


def test_a_template_of_ones_own_is_filled_in(root: Path) -> None:
    assert prompt("{input}?", "x", template="Q: {instruction} [{input}]\nA:") == "Q: {input}? [x]\nA:"
    make, tokenizer = maker(root, template="{instruction} =", completion_only=True)
    sample, _ = make({"instruction": "1", "output": " 2"}, "here")
    assert tokenizer.decode(sample.ids) == "1 = 2</s>"
    with pytest.raises(LoraSuiteError, match=r"here: the template .* has no \{input\}"):
        make({"instruction": "1", "input": "2", "output": " 2"}, "here")


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_of_messages_the_turns_of_the_assistant_count(root: Path, template: str) -> None:
    make, tokenizer = maker(root, template, completion_only=True)
    turns = [("system", "s"), ("user", "1"), ("assistant", "2é"), ("user", "3"), ("assistant", "4")]
    sample, _ = make({"messages": [{"role": r, "content": c} for r, c in turns]}, "here")
    assert tokenizer.decode(sample.ids) == (
        "<|system|>s<|end|>\n<|user|>1<|end|>\n<|assistant|>2é<|end|>\n<|user|>3<|end|>\n<|assistant|>4<|end|>\n"
    )
    ends = "" if template == MARKED_CHAT else "\n"
    assert counted_text(sample, tokenizer) == f"2é<|end|>{ends}4<|end|>{ends}"
    whole, _ = maker(root, template)[0]({"messages": [{"role": r, "content": c} for r, c in turns]}, "here")
    assert whole.ids == sample.ids
    assert whole.counted == [False] + [True] * (len(whole.ids) - 1)


def test_turns_behind_the_cut_off_are_not_written_again(root: Path) -> None:
    turns = [{"role": r, "content": str(n)} for n in range(300) for r in ("user", "assistant")]
    make, tokenizer = maker(root, CHAT, completion_only=True, max_tokens=100)
    written: list[int] = []
    plain = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda messages, **more: written.append(len(messages)) or plain(messages, **more)
    sample, cut = make({"messages": turns}, "here")
    long, _ = maker(root, CHAT, completion_only=True, max_tokens=10**6)[0]({"messages": turns}, "here")
    assert cut
    assert (sample.ids, sample.counted) == (long.ids[:100], long.counted[:100])
    assert sorted(written)[-1] == 600
    assert sum(written) < 600 + 2 * 40 * 40


@pytest.mark.parametrize("seed", range(20))
def test_tokens_reach_into_spans_as_all_pairs_say(seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.choices(range(12), k=8))
    spans = list(zip(cuts[::2], cuts[1::2], strict=True))
    ends = sorted(rng.choices(range(14), k=9))
    starts = [0, *ends[:-1]]
    wanted = [any(s < last and e > first for first, last in spans) for s, e in zip(starts, ends, strict=True)]
    assert _reaching_into(spans, ends) == wanted


def test_half_a_surrogate_pair_in_any_part_of_a_turn_is_read(root: Path) -> None:
    named = "{% for m in messages %}<{{ m.role }} {{ m.name }} {{ m.calls[0].id }}>{{ m.content }}\ud800{% endfor %}"
    for only in (False, True):
        make, tokenizer = maker(root, named, completion_only=only)
        turn = {"role": "assistant", "content": "c\udfff", "name": "n\ud8ff", "calls": [{"id": "i\udc00"}]}
        sample, _ = make({"messages": [turn]}, "here")
        assert tokenizer.decode(sample.ids) == "<assistant n\ufffd i\ufffd>c\ufffd\ufffd"


def test_the_chat_template_can_word_instructions(root: Path) -> None:
    make, tokenizer = maker(root, CHAT, template="chat", completion_only=True)
    sample, _ = make({"instruction": "Add.", "input": "1 2", "output": "3"}, "here")
    assert tokenizer.decode(sample.ids) == "<|user|>Add.\n\n1 2<|end|>\n<|assistant|>3<|end|>\n"
    assert counted_text(sample, tokenizer) == "3<|end|>\n"


def test_a_template_that_rewrites_earlier_turns_is_refused(root: Path) -> None:
    last_only = "{% for m in messages %}{{ m.role }}:{% if loop.last %}{{ m.content }}{% endif %};{% endfor %}"
    make, _ = maker(root, last_only, completion_only=True)
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(LoraSuiteError, match=r"here: .* writes turn 2 differently"):
        make({"messages": turns}, "here")


def test_what_is_cut_off_is_reported_and_what_has_nothing_left_is_left_out(root: Path, tmp_path: Path) -> None:
    data = [{"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": "2" * 9}, {"prompt": "1" * 9,
            "completion": "2"}]  # fmt: skip
    result = run(root, tmp_path / "out", data=data, max_tokens=5, completion_only=True, epochs=2)
    assert (result.samples, result.truncated, result.left_out) == (2, 2, 1)
    # "2" and the end of the first, four times "2" of the second, twice.
    assert result.trained_tokens == 2 * (2 + 4)
    with pytest.raises(LoraSuiteError, match="none of its 1 records has anything to learn"):
        run(root, tmp_path / "none", data=data[2:], max_tokens=5, completion_only=True)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_every_kind_of_file_gives_the_same_samples(root: Path, tmp_path: Path) -> None:
    data = [{"text": "the sea"}, {"text": "one tree\nand one"}]
    files = [
        written(tmp_path, "a.json", json.dumps(data)),
        written(tmp_path, "b.jsonl", "\n".join(map(json.dumps, data)) + "\n\n"),
        written(tmp_path, "c.txt", "the sea\n \n\none tree\nand one\n"),
    ]
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    expected = load_samples(["the sea", "one tree\nand one"], tokenizer)
    assert len(expected.samples) == 2
    for file in files:
        assert load_samples(file, tokenizer) == expected


def test_a_long_paragraph_is_cut_as_calibration_text_is(tmp_path: Path) -> None:
    lines = [f"{n} " + "x" * 400 + "\n" for n in range(5)]
    found = read_records(written(tmp_path, "a.txt", "short\n\n" + "".join(lines)))
    assert [fields["text"] for _, fields in found] == ["short", "".join(lines[:2]), "".join(lines[2:4]), lines[4][:-1]]


def test_a_folder_saved_by_datasets_is_read_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LoraSuiteError, match="saved: is a folder needs the package `datasets`: pip install datasets"):
        read_records(tmp_path / "saved")
    with pytest.raises(LoraSuiteError, match=r"owner/name: .* pip install datasets"):
        read_records("owner/name")
    asked: list[object] = []

    def load(source: object) -> dict[str, list[dict[str, str]]]:
        asked.append(source)
        return {"train": [{"text": "a"}]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=load, load_dataset=load))
    assert read_records(tmp_path / "saved") == [(f"{tmp_path}/saved: record 1", {"text": "a"})]
    assert read_records("owner/name") == [("owner/name: record 1", {"text": "a"})]
    assert asked == [tmp_path / "saved", "owner/name"]


@pytest.mark.parametrize("splits", [False, True])
def test_what_datasets_itself_has_saved_is_read(tmp_path: Path, splits: bool) -> None:
    datasets = pytest.importorskip("datasets")
    records = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    saved = datasets.Dataset.from_list(records)
    (datasets.DatasetDict({"train": saved}) if splits else saved).save_to_disk(str(tmp_path / "saved"))
    assert [dict(fields) for _, fields in read_records(tmp_path / "saved")] == records


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{"text": "a"}', "a.json: expected a list of records, found dict"),
        ("a.json", "[{]", "a.json: is not JSON"),
        ("a.json", "[]", "a.json: holds no records"),
        ("a.json", '["a", 3]', "a.json: record 2 is int"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl: line 2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"prompt": "a"}', "a.jsonl: line 3 has the fields prompt; expected one of"),
        ("a.jsonl", '{"prompt": "a", "completion": 3}', "a.jsonl: line 1: its completion is int, not a string"),
        ("a.jsonl", '{"instruction": "a", "output": " "}', "a.jsonl: line 1 has an empty output"),
        ("a.json", '[{"text": ""}]', "a.json: record 1 has an empty text"),
        ("a.json", '[{"messages": [{"role": "user"}]}]', "a.json: record 1: turn 1 of its messages has no role and"),
        ("a.json", '[{"messages": [{"role": "user", "content": "a"}]}]', "a.json: record 1: .* has no chat template"),
        ("a.csv", "text", "a.csv: data must be a .json, .jsonl, .txt file"),
    ],
)
def test_a_bad_record_is_one_error_that_names_it(root: Path, tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(LoraSuiteError, match=words):
        run(root, tmp_path / "out", data=written(tmp_path, name, text))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"retain_weight": 0.0}, "retain_weight is 0"),
        ({"retain": "no-such.jsonl"}, "no-such.jsonl: no such file"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"template": "chat"}, "no chat template"),
        ({"template": "Answer:"}, r"has no \{instruction\}"),
        ({"validation": 1.5}, "validation is 1.5"),
        ({"rank": 4}, "ADAPTER has its own"),
        ({"adapter": None, "roles": ["query"]}, "role 'query'"),
        ({"adapter": None, "dropout": 1.0}, "dropout is 1.0"),
        ({"adapter": "model"}, "adapter_config.json"),
    ],
)
def test_bad_input_is_one_clear_error(root: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LoraSuiteError, match=words):
        run(root, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


# What comes out


def test_the_result_is_the_adapter_with_the_configuration_it_had(root: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (root / "adapter").iterdir()}
    said: list[str] = []
    result = run(root, tmp_path / "out", learning_rate=5e-3, say=said.append)
    was, now = (json.loads((f / "adapter_config.json").read_text()) for f in (root / "adapter", tmp_path / "out"))
    # The same modules; PEFT, which made the start, writes them in an order of chance.
    named = {"base_model_name_or_path": str((root / "model").resolve()), "inference_mode": True}
    assert now == was | named | {"target_modules": sorted(was["target_modules"])}
    assert {name: t.shape for name, t in weights(tmp_path / "out").items()} == {
        name: t.shape for name, t in weights(root / "adapter").items()
    }
    assert {path.name: path.read_bytes() for path in (root / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert result.chosen_step == result.steps == result.budget == len(result.losses) == 9
    assert not result.diverged
    assert result.end_loss < result.start_loss
    assert result.summary.startswith("Fine-tuned: 9 steps over 20 samples; loss ")
    tokens = result.trained_tokens // 3
    assert said == [f"fine-tuning: 9 steps of 8 samples, from 20 samples with {tokens} tokens to learn"]
    assert {"read data", "load", "start's loss", "train"} == set(json.loads(json.dumps(result.as_dict()))["costs"])


def test_layers_filled_on_the_way_are_trained_too(root: Path, tmp_path: Path) -> None:
    migrate(
        root / "model",
        root / "new",
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(examples=8),
        runtime=Runtime(device="cpu"),
        apply=ApplyConfig(fill="zero"),
        finetune=FinetuneConfig(records(8), steps=2),
    )
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {int(name.split("layers.")[1].split(".")[0]) for name in stored} == {0, 1, 2}
    assert all(bool(tensor.any()) for name, tensor in stored.items() if "lora_A" in name)


def test_a_migrated_tuned_and_merged_adapter_writes_what_it_learnt(root: Path, tmp_path: Path) -> None:
    data = [{"prompt": "the sea", "completion": " was not a tree"}] * 4
    migrate(
        root / "model",
        root / "new",
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(examples=8),
        runtime=Runtime(device="cpu"),
        finetune=FinetuneConfig(data, steps=25, learning_rate=3e-2, completion_only=True),
    )
    base = AutoModelForCausalLM.from_pretrained(root / "new")
    tokenizer = AutoTokenizer.from_pretrained(root / "new")
    ids = tokenizer("the sea", return_tensors="pt")
    before = tokenizer.decode(base.generate(**ids, max_new_tokens=20, do_sample=False)[0])
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    after = tokenizer.decode(merged.generate(**ids, max_new_tokens=20, do_sample=False)[0])
    assert after == "the sea was not a tree</s>" != before


def test_an_adapter_from_zero_starts_as_the_base_model(root: Path, tmp_path: Path) -> None:
    result = run(root, tmp_path / "out", adapter=None, rank=2, roles=["down", "q"], steps=4, dtype="float64", seed=2)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    rows = load_samples(records(20), tokenizer, max_tokens=48).samples
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64)
    total = count = 0.0
    for i in sample_batches(20, 8, 4, 2)[0]:
        ids = torch.tensor([rows[i].ids])
        with torch.no_grad():
            total += functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += len(rows[i].ids) - 1
    assert result.losses[0] == pytest.approx(total / count, rel=1e-6)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 2, 0.0)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    assert result.adapter is None


def test_the_checkpoint_best_on_the_validation_samples_is_written(root: Path, tmp_path: Path) -> None:
    apart = ["quick brown fox jumps %$#!"]
    result = run(root, tmp_path / "out", validation=apart, learning_rate=0.05, steps=8, save_every=1)
    assert [e.step for e in result.evaluations] == list(range(9))
    best = min(result.evaluations, key=lambda e: e.loss)
    assert 0 < best.step < 7, "the best has to be older than the checkpoints that are kept anyway"
    assert result.chosen_step == best.step
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "model"), tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(root / "model")(apart[0] + "</s>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item()
    assert best.loss == pytest.approx(loss, rel=1e-5)


def test_where_nothing_is_better_on_the_validation_samples_the_start_is_kept(root: Path, tmp_path: Path) -> None:
    result = run(root, tmp_path / "out", validation=["#$%@^&*()!", "{}[]<>?/"], learning_rate=0.05, steps=4)
    assert result.kept_start
    assert not result.diverged
    assert result.summary.startswith("Nothing gained: ")
    assert same(weights(tmp_path / "out"), weights(root / "adapter"))


def test_a_share_of_the_samples_is_held_out(root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    wording = {"template": "alpaca", "max_tokens": 48, "completion_only": False}
    training, held_out = finetuning_module.split_samples(records(20), 0.25, tokenizer, wording, 0)
    assert (len(training.samples), len(held_out.samples)) == (15, 5)
    both = sorted(sample.ids for part in (training, held_out) for sample in part.samples)
    assert both == sorted(sample.ids for sample in load_samples(records(20), tokenizer, max_tokens=48).samples)


@pytest.mark.parametrize(("rate", "words"), [(10.0, "above the start's"), (1e30, "NaN or infin")])
def test_a_diverging_run_writes_the_start_unchanged_and_says_so(
    root: Path, tmp_path: Path, rate: float, words: str
) -> None:
    result = run(root, tmp_path / "out", adapter="trained", learning_rate=rate)
    assert result.diverged
    assert result.kept_start
    assert result.chosen_step == 0
    assert words in result.summary
    assert "written unchanged" in result.summary
    start, out = (folder / "adapter_model.safetensors" for folder in (root / "trained", tmp_path / "out"))
    assert out.read_bytes() == start.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    json.dumps(result.as_dict(), allow_nan=False)


def test_a_run_that_learns_next_to_nothing_has_not_diverged(root: Path, tmp_path: Path) -> None:
    for adapter in ("adapter", "dropped"):
        result = run(root, tmp_path / adapter, adapter=adapter, learning_rate=1e-12)
        assert not result.diverged
        assert result.end_loss == pytest.approx(result.start_loss, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_the_draws_of_dropout_are_no_divergence(root: Path, tmp_path: Path, seed: int) -> None:
    result = run(root, tmp_path / "out", adapter="dropped", learning_rate=1e-12, steps=1, seed=seed)
    assert not result.diverged
    # Nothing has been learned before the only loss: what differs was drawn.
    assert result.end_loss != result.start_loss


def test_loss_traded_for_closeness_is_no_divergence(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"retain": general_text(tmp_path), "adapter": "trained", "steps": 12}
    result = run(root, tmp_path / "out", retain_weight=30.0, learning_rate=2e-3, **options)
    assert result.end_loss > result.start_loss * 1.001
    assert result.retained_kl < result.start_retained_kl
    assert not result.diverged


@pytest.mark.parametrize("count", [4, 20])
def test_a_batch_larger_than_the_data_retains_no_more_than_it_reads(root: Path, tmp_path: Path, count: int) -> None:
    made: list[int] = []

    class Spy(finetuning_module.FinetuningBatches):
        def __init__(self, samples: Any, batches: Any, kept: Any = None) -> None:
            super().__init__(samples, batches, kept)
            if kept is not None:
                rows, steps = kept
                made.append(sum(len(rows[i].ids) for i in steps[0]))

    data = records(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning_module, "FinetuningBatches", Spy)
        run(root, tmp_path / "out", data=data, batch=64, steps=1, retain=general_text(tmp_path))
    samples = load_samples(data, AutoTokenizer.from_pretrained(root / "model"), max_tokens=48).samples
    assert made[0] <= sum(len(sample.ids) for sample in samples) + 48


def test_what_peft_holds_as_sets_is_written_in_order(root: Path, tmp_path: Path) -> None:
    """Python draws the order of a set of strings anew for every process."""
    run(root, tmp_path / "out", adapter=None, steps=1, roles=["q", "k", "v", "o", "gate"])
    wanted = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
    assert wanted == sorted(wanted)
    config = {"target_modules": ["v_proj", "k_proj"], "modules_to_save": None, "exclude_modules": ["b", "a"]}
    found = json.loads(trained_config(config, "base"))
    assert (found["target_modules"], found["exclude_modules"]) == (["k_proj", "v_proj"], ["a", "b"])
    assert found["base_model_name_or_path"] == "base"
    assert json.loads(trained_config({"target_modules": "all-linear"}, "base"))["target_modules"] == "all-linear"


def test_a_template_that_marks_answers_and_refuses_a_turn_is_one_error(root: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + MARKED_CHAT
    make, _ = maker(root, template, template="chat", completion_only=True)
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    with pytest.raises(LoraSuiteError, match=r"here: the tokenizer's chat template cannot write it \(no system turn\)"):
        make({"messages": turns}, "here")


def test_a_start_that_gives_nan_is_refused_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    tensors = {name: torch.full_like(tensor, math.nan) for name, tensor in weights(root / "adapter").items()}
    save_file(tensors, tmp_path / "start/adapter_model.safetensors")
    (tmp_path / "start/adapter_config.json").write_text((root / "adapter/adapter_config.json").read_text())
    with pytest.raises(LoraSuiteError, match="gives NaN or infinity on the data in"):
        run(root, tmp_path / "out", adapter=tmp_path / "start")
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_the_given_adapter_is_never_the_output(root: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="is ADAPTER "):
        run(root, root / "adapter", overwrite=True)
    shutil.copytree(root / "adapter", tmp_path / "out")
    with pytest.raises(LoraSuiteError, match="exists already"):
        run(root, tmp_path / "out")
    run(root, tmp_path / "out", steps=1, overwrite=True)
    assert (tmp_path / "out/adapter_config.json").exists()


# Resuming

KILLED = """
import json, os, signal, sys
import torch
from lorasuite_fast import finetune

torch.set_num_threads(1)
model, adapter, data, out, at = sys.argv[1:]

def progress(phase, done, total):
    if phase == "train" and done == int(at):
        os.kill(os.getpid(), signal.SIGKILL)

finetune(model, adapter, data, out, batch=8, max_tokens=48, device="cpu", save_every=2, validation=0.2,
         progress=progress)
"""


def test_a_killed_run_goes_on_to_the_same_bits(root: Path, tmp_path: Path) -> None:
    data = written(tmp_path, "data.json", json.dumps(records(20)))
    options = {"data": data, "save_every": 2, "validation": 0.2, "adapter": "dropped"}
    whole = run(root, tmp_path / "whole", **options)
    arguments = [root / "model", root / "dropped", data, tmp_path / "cut", "5"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "cut").exists()
    seen: list[int] = []
    cut = run(
        root, tmp_path / "cut", progress=lambda name, n, _: seen.append(n) if name == "train" else None, **options
    )
    assert seen == [0, 5, 6]
    assert cut.losses == whole.losses
    assert cut.evaluations == whole.evaluations
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "data.json", "whole"]


def interrupt(at: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if name == "train" and done == at:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_goes_on_with_the_text_to_retain(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"retain": general_text(tmp_path), "save_every": 2, "steps": 6, "adapter": "dropped"}
    whole = run(root, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", progress=interrupt(5), **options)
    with pytest.raises(LoraSuiteError, match="retain_weight"):
        run(root, tmp_path / "cut", retain_weight=1.0, **options)
    cut = run(root, tmp_path / "cut", **options)
    assert cut.losses == whole.losses
    assert cut.retained_kl == whole.retained_kl
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_run_cut_off_before_its_result_was_written_only_writes_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(root, tmp_path / "whole", steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(verb, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "cut", steps=4)
    seen: list[int] = []
    cut = run(root, tmp_path / "cut", steps=4, progress=lambda name, n, _: seen.append(n) if name == "train" else None)
    assert seen == [0]
    assert cut.losses == whole.losses
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_the_work_of_another_run_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "out", progress=interrupt(4))
    with pytest.raises(LoraSuiteError, match="learning_rate"):
        run(root, tmp_path / "out", learning_rate=2e-3)
    with pytest.raises(LoraSuiteError, match="with data"):
        run(root, tmp_path / "out", data=records(20, seed=1))


def test_a_seed_makes_it_repeatable(root: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(root, tmp_path / name, adapter="dropped", steps=3, seed=seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same(a, b)
    assert not same(a, c)


# With a migration, and from the command line


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def test_migrate_fine_tunes_what_it_carried_also_after_an_interruption(root: Path, tmp_path: Path) -> None:
    data = records(20)
    options: dict[str, Any] = {"examples": 8, "device": "cpu"}
    carried = migrate(root / "model", root / "new", root / "adapter", tmp_path / "carried", **given(migrate, **options))
    finetune(
        root / "new",
        tmp_path / "carried",
        data,
        tmp_path / "tuned",
        config=FinetuneConfig(epochs=2),
        runtime=Runtime(device="cpu"),
    )
    options |= {"finetune": data, "finetune_options": {"epochs": 2, "save_every": 1}}
    arguments = (root / "model", root / "new", root / "adapter", tmp_path / "both")
    with pytest.raises(KeyboardInterrupt):
        migrate(*arguments, **given(migrate, progress=interrupt(3), **options))
    seen: list[int] = []
    both = migrate(
        *arguments, **given(migrate, progress=lambda name, n, _: seen.append(n) if name == "train" else None, **options)
    )
    assert seen == [0, 3, 4]
    assert same(weights(tmp_path / "both"), weights(tmp_path / "tuned"))
    assert not same(weights(tmp_path / "both"), weights(tmp_path / "carried"))
    assert both.out == str(tmp_path / "both")
    assert both.finetuned is not None
    assert both.as_dict()["finetuning"]["steps"] == 4
    assert carried.as_dict()["finetuning"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "carried", "tuned"]


def test_the_data_are_read_before_a_migration_starts(root: Path, tmp_path: Path) -> None:
    def progress(*_: Any) -> None:
        raise AssertionError("the migration has started")

    with pytest.raises(LoraSuiteError, match="record 1 has the fields none"):
        migrate(
            root / "model",
            root / "new",
            root / "adapter",
            tmp_path / "out",
            finetune=FinetuneConfig([{}]),
            runtime=Runtime(progress=progress),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tuning", "words"),
    [({"learning_rate": -1.0}, "learning_rate is -1.0"), ({"validation": "no-such.jsonl"}, "no-such.jsonl"),
     ({"retain": "no-such.txt"}, "no-such.txt")],
)  # fmt: skip
def test_options_of_a_fine_tuning_are_looked_at_before_a_migration_starts(
    root: Path, tmp_path: Path, tuning: dict[str, Any], words: str
) -> None:
    def progress(*_: Any) -> None:
        raise AssertionError("the migration has started")

    with pytest.raises(LoraSuiteError, match=words):
        migrate(
            root / "model",
            root / "new",
            root / "adapter",
            tmp_path / "out",
            finetune=FinetuneConfig(records(8), **tuning),
            runtime=Runtime(progress=progress),
        )
    assert not list(tmp_path.iterdir())


def test_a_migration_computes_its_trainings_in_the_dtype_asked_for(root: Path, tmp_path: Path) -> None:
    result = migrate(
        root / "model",
        root / "new",
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(examples=8),
        runtime=Runtime(dtype="float64", device="cpu"),
        refine=RefineConfig(steps=1, text=general_text(tmp_path)),
        finetune=FinetuneConfig(records(8), steps=1),
    )
    assert result.refined is not None
    assert result.finetuned is not None
    assert result.refined.options["dtype"] == result.finetuned.options["dtype"] == "float64"


def test_a_migration_that_is_refused_leaves_nothing(root: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="no such folder"):
        migrate(
            root / "model", root / "new", tmp_path / "missing", tmp_path / "out", finetune=FinetuneConfig(records(4))
        )
    assert not list(tmp_path.iterdir())


def test_the_command_migrates_and_fine_tunes(root: Path, tmp_path: Path) -> None:
    data = written(tmp_path, "data.json", json.dumps(records(20)))
    arguments = (root / "model", root / "new", root / "adapter", tmp_path / "out", "--examples", 8, "--finetune", data)
    printed = invoke("migrate", *arguments, "--finetune-epochs", 2, "--completion-only", "--device", "cpu")
    assert "Fine-tuned: 4 steps over 20 samples" in printed
    result = json.loads(
        invoke("migrate", *arguments, "--finetune-rate", 1e30, "--device", "cpu", "--overwrite", "--json", code=3)
    )
    assert result["finetuning"]["diverged"]
    assert result["warning"].startswith("Diverged: ")
    for refusable, words in (
        ((*arguments[:-2], "--retain", "shipped"), "--finetune asks for; give both"),
        ((*arguments, "--retain", "no-such.txt"), "no-such.txt: no such file"),
    ):
        refused = CliRunner(env={"COLUMNS": "140"}).invoke(app, ["migrate", *map(str, refusable), "--overwrite"])
        assert refused.exit_code == 2
        assert words in refused.output


def test_the_command_fine_tunes(root: Path, tmp_path: Path) -> None:
    data = written(tmp_path, "data.json", json.dumps(records(20)))
    template = written(tmp_path, "template.txt", "{instruction}\n")
    arguments = ("finetune", root / "model", root / "adapter", data)
    printed = invoke(*arguments, tmp_path / "out", "--epochs", 1, "--validation", 0.2, "--template", template)
    assert "Fine-tuned: 1 steps over 16 samples" in printed
    assert "validation loss" in printed
    assert f"written: {tmp_path / 'out'}" in printed
    kept = (tmp_path / "kept", "--epochs", 1, "--retain", general_text(tmp_path), "--retain-weight", 2)
    assert "on the text to retain" in invoke(*arguments, *kept)
    zero = ("finetune", root / "model", "none", data, tmp_path / "zero", "--rank", 2, "--roles", "q, v", "--json")
    result = json.loads(invoke(*zero, "--steps", 2, "--max-tokens", 8, "--validation", data))
    assert result["options"]["roles"] == ["q", "v"]
    assert result["truncated"] > 0
    diverged = invoke(*arguments, tmp_path / "diverged", "--learning-rate", 1e30, code=3)
    assert "Diverged" in diverged
    assert invoke(*arguments, tmp_path / "out", code=2) == ""
