"""verify tells adapters that carry an effect from those that do not, and its figures are those of a dense recount."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flat_options import given
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config
from typer.testing import CliRunner

from lorasuite_fast import LoraSuiteError, PlanConfig, Runtime, TransferPlan, VerifyConfig, migrate, verify
from lorasuite_fast.adapters.aligned_states import Head, States
from lorasuite_fast.cli.app import app
from lorasuite_fast.evaluation import base_fit
from lorasuite_fast.evaluation.base_fit import BaseFit, prediction
from lorasuite_fast.evaluation.effect import chunk_size, effect_sums, position_chunks, resamples
from lorasuite_fast.evaluation.verification import Verification, effect_of, verdict
from lorasuite_fast.models.vocabulary import token_keys
from lorasuite_fast.text.calibration import load_examples

from planted import in_float64, plant, random_adapter, save_folder, tiny_model, tiny_tokenizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
QUICK: dict[str, Any] = {"examples": 12, "max_tokens": 64, "bootstrap": 200, "device": "cpu"}


def edited(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of an adapter with its tensors changed."""
    shutil.copytree(source, out)
    file = out / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return out


def scaled(factor: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {n: t * factor if "lora_B" in n else t for n, t in tensors.items()}


def next_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every layer's factors given to the next layer that has any."""
    layers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in tensors})
    return {
        name.replace(f".layers.{i}.", f".layers.{j}."): tensors[name]
        for i, j in zip(layers, layers[1:] + layers[:1], strict=True)
        for name in tensors
        if f".layers.{i}." in name
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """old, its planted upgrade new, an adapter and its variants on new; and two unrelated models."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("verify")
    model, tokenizer = tiny_model("llama", 0, d=32, layers=3, vocab=420), tiny_tokenizer(420, seed=0)
    # The same tokens under other ids: another tokenization of the text would be another context.
    planted = plant(
        model,
        tokenizer,
        d_new=48,
        layers_new=5,
        heads_new=6,
        intermediate_new=80,
        added_tokens=0,
        dropped=0.0,
        seed=0,
    )
    save_folder(model, tokenizer, root / "old")
    planted.save(root / "new")
    # Small, so that twice the adapter has about twice the effect.
    random_adapter(root / "old", root / "adapter", targets=ALL, rank=4, alpha=8, seed=0, size=0.04)
    migrate(root / "old", root / "new", root / "adapter", root / "migrated", plan=PlanConfig(examples=48))
    edited(root / "migrated", root / "double", scaled(2))
    edited(root / "migrated", root / "flipped", scaled(-1))
    edited(root / "migrated", root / "zero", scaled(0))
    edited(root / "migrated", root / "layers shuffled", next_layer)
    random_adapter(root / "new", root / "other task", targets=ALL, rank=4, alpha=8, seed=5, size=0.04)
    save_folder(
        tiny_model("llama", 7, d=40, layers=4, vocab=500), tiny_tokenizer(500, "sentencepiece", 7), root / "far"
    )
    random_adapter(root / "far", root / "far adapter", targets=ALL, rank=4, alpha=8, seed=6, size=0.04)
    return root


@pytest.fixture(scope="module")
def outcome(root: Path) -> Callable[[str], Verification]:
    found: dict[str, Verification] = {}

    def of(variant: str) -> Verification:
        if variant not in found:
            new, adapter = ("far", "far adapter") if variant == "unrelated model" else ("new", variant)
            found[variant] = verify(
                root / "old", root / "adapter", root / new, root / adapter, **given(verify, **QUICK)
            )
        return found[variant]

    return of


def figure(result: Verification, path: str) -> float:
    value: Any = result.as_dict()["effect"]
    for name in path.split("."):
        value = value[name]
    found = value["value"]
    assert isinstance(found, float)
    return found


KINDS = {
    "migrated": "carried",
    "double": "carried at another size",
    "flipped": "reversed",
    "layers shuffled": "nothing carried",
    "other task": "nothing carried",
    "zero": "nothing carried",
    "unrelated model": "nothing carried",
}


@pytest.mark.parametrize("variant", KINDS)
def test_the_verdict_names_what_was_done_to_the_adapter(variant: str, outcome: Callable[[str], Verification]) -> None:
    assert outcome(variant).kind == KINDS[variant]


def test_an_exact_migration_carries_everything(outcome: Callable[[str], Verification]) -> None:
    result = outcome("migrated")
    for name in ("carried.cosine", "carried.explained_share", "carried.kl_share", "content_cosine"):
        assert figure(result, name) == pytest.approx(1, abs=1e-3)
    assert figure(result, "carried.top1") > 0.98
    assert figure(result, "top1_alone") == 0
    assert figure(result, "size_ratio") == pytest.approx(1, abs=1e-2)


def test_the_sign_shows(outcome: Callable[[str], Verification]) -> None:
    result = outcome("flipped")
    assert figure(result, "carried.cosine") < -0.7
    assert figure(result, "carried.explained_share") < -1
    # The control takes the sign back.
    assert figure(result, "flipped.cosine") == pytest.approx(-figure(result, "carried.cosine"))


def test_the_size_shows_in_the_share_and_not_in_the_cosine(outcome: Callable[[str], Verification]) -> None:
    result, exact = outcome("double"), outcome("migrated")
    assert figure(result, "carried.cosine") > 0.85
    assert figure(result, "size_ratio") > 1.6
    assert figure(result, "carried.explained_share") < figure(exact, "carried.explained_share") - 0.4
    assert figure(result, "best_gain") == pytest.approx(0.5, abs=0.15)


def test_a_zero_adapter_changes_nothing(outcome: Callable[[str], Verification]) -> None:
    result = outcome("zero")
    assert figure(result, "new_kl") == 0
    assert figure(result, "carried.explained_share") == 0
    assert result.as_dict()["effect"]["carried"]["cosine"]["value"] is None
    assert all(layer.new_update == 0 and layer.cka is None for layer in result.layers if layer.new_update is not None)


def test_controls_that_ignore_the_content_stay_far_below_an_exact_migration(
    outcome: Callable[[str], Verification],
) -> None:
    result = outcome("migrated")
    for control in ("shuffled.explained_share", "constant.explained_share", "tempered_share"):
        assert figure(result, control) < 0.4
    assert figure(result, "content.explained_share") > 0.6
    assert figure(result, "constant.explained_share") >= 0


def test_the_layer_table_shows_where_the_effect_sits(root: Path, outcome: Callable[[str], Verification]) -> None:
    result = outcome("migrated")
    assert len(result.layers) == 5
    updated = [layer for layer in result.layers if layer.new_update is not None]
    assert len(updated) == 3
    assert [layer.old_layer for layer in updated] == [0, 1, 2]
    for layer in updated:
        assert layer.old_update is not None
        assert layer.cka is not None
        assert layer.cka > 0.98
        assert layer.new_change == pytest.approx(layer.old_change, rel=0.05)


def test_update_sizes_are_those_of_the_factors(root: Path, outcome: Callable[[str], Verification]) -> None:
    weights = load_file(root / "old/model.safetensors")
    factors = load_file(root / "adapter/adapter_model.safetensors")
    top = bottom = 0.0
    for name, weight in weights.items():
        if name.startswith("model.layers.1.") and name.endswith("_proj.weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            update = 2 * factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
            top, bottom = top + float(update.square().sum()), bottom + float(weight.square().sum())
    found = next(layer.old_update for layer in outcome("migrated").layers if layer.old_layer == 1)
    assert found == pytest.approx(math.sqrt(top / bottom), rel=1e-4)


def test_intervals_hold_the_figure_and_come_from_the_seed(root: Path, tmp_path: Path) -> None:
    options = QUICK | {"examples": 6, "max_tokens": 24, "text": tmp_path / "text.jsonl"}
    # All of them are read, whatever the seed: it moves the resamples and the shuffled control, and no figure else.
    options["text"].write_text("".join(json.dumps({"text": text}) + "\n" for text in load_examples(None, 6, 0)))
    pair = (root / "old", root / "adapter", root / "new", root / "double")
    first, again, other = (
        verify(*pair, **given(verify, **options, seed=seed)).as_dict()["effect"] for seed in (0, 0, 1)
    )
    assert first == again
    for name in ("cosine", "explained_share", "kl_share"):
        one, two = (effect["carried"][name] for effect in (first, other))
        assert one["value"] == pytest.approx(two["value"], abs=1e-4)
        assert abs(one["low"] - two["low"]) > 1e-3 or abs(one["high"] - two["high"]) > 1e-3
    for name in ("cosine", "explained_share", "kl_share", "gain_share", "top1"):
        figure = first["carried"][name]
        assert figure["low"] < figure["value"] < figure["high"]


def synthetic(change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> tuple[str, str]:
    """The verdict on a change of log-probabilities made from the old one, its mean over positions, and noise."""
    generator = torch.Generator().manual_seed(0)
    texts, positions, tokens = 12, 40, 30
    base, content, noise = (torch.randn(texts * positions, tokens, generator=generator) for _ in range(3))
    shift = torch.randn(tokens, generator=generator)
    head, empty = Head(torch.eye(tokens), None), torch.empty(0)
    old = States(base, empty, head), States(base + 0.3 * content + 0.2 * shift, empty, head)
    new = States(base, empty, head), States(base + change(0.3 * content, 0.2 * shift, 0.3 * noise), empty, head)
    text = torch.arange(texts).repeat_interleave(positions)
    sums = effect_sums(old, new, text, device=torch.device("cpu"), seed=0)
    return verdict(effect_of(sums, resamples(texts, 200, 0)))


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda c, s, n: c + s, "carried", "does 100%"),
        (lambda c, s, n: 3 * (c + s), "carried at another size", "scaled by 0.33 it would do 100% of it"),
        # The right content behind a shift of its own: no factor brings that back.
        (lambda c, s, n: c - 2 * s, "partly carried", "is no closer to the old one than no adapter. If"),
        (lambda c, s, n: c + 8 * s, "partly carried", "content cosine 1.00"),
        (lambda c, s, n: 0.6 * c + s + 0.8 * n, "partly carried", "does "),
        (lambda c, s, n: s, "constant shift only", "a constant shift"),
        (lambda c, s, n: n, "nothing carried", "little or nothing to do with it"),
        (lambda c, s, n: -c - s, "reversed", "pushes against"),
    ],
)
def test_the_verdict_follows_from_what_the_change_is_made_of(change: Any, kind: str, said: str) -> None:
    found, sentence = synthetic(change)
    assert (found, said in sentence) == (kind, True), sentence


def test_shares_of_a_divergence_that_is_none_have_no_value(root: Path) -> None:
    edited(root / "adapter", root / "old zero", scaled(0))
    result = verify(root / "old", root / "old zero", root / "new", root / "migrated", **given(verify, **QUICK))
    assert result.kind == "nothing to carry"
    assert result.effect is not None
    for likeness in (result.effect.carried, result.effect.shuffled):
        assert likeness.kl_share.value is None
        assert likeness.gain_share.value is None


def test_more_tokens_than_a_model_has_learned_positions_for_are_refused(root: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=420, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    save_folder(AutoModelForCausalLM.from_config(config), tiny_tokenizer(420, seed=0), tmp_path / "gpt2")
    pair = (root / "old", None, tmp_path / "gpt2", None)
    assert verify(*pair, **given(verify, **QUICK | {"max_tokens": 30})).kind == "nothing"
    with pytest.raises(LoraSuiteError, match=r"gpt2: has learned positions for 32 tokens.*`max_tokens`"):
        verify(*pair, **given(verify, **QUICK))


# An independent recount: whole logits in float64, plain loops over positions.


def exact(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return in_float64(model) if model.config.model_type == "llama" else model.double()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def positions_of(tokenizer: Any, text: str, limit: int) -> tuple[list[int], dict[int, int]]:
    """Ids and (bytes read -> position), by joining the bytes of every prefix anew."""
    keys = token_keys(tokenizer)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    front = full[: len(full) - len(plain)]
    found = {}
    for p in range(min(limit, len(plain))):
        read = b"".join(keys[i][0] for i in plain[: p + 1])
        if not text.encode().startswith(read):
            read = read[1:]
        assert text.encode().startswith(read)
        if read:
            found[len(read)] = len(front) + p
    return front + plain, found


@dataclass
class Dense:
    """Log-probabilities over the shared tokens at every aligned position: (positions, tokens) float64 each."""

    o_0: np.ndarray
    o_1: np.ndarray
    n_0: np.ndarray
    n_1: np.ndarray


def dense(folders: tuple[Path, Path, Path, Path], texts: list[str], limit: int) -> Dense:
    old, old_adapter, new, new_adapter = folders
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (old, new)]
    keys = [token_keys(t) for t in tokenizers]
    by_bytes: list[dict[Any, int]] = [{}, {}]
    for table, names in zip(keys, by_bytes, strict=True):
        for fallbacks in (False, True):
            for i, (k, fallback) in sorted(table.items()):
                if fallback is fallbacks and isinstance(k, bytes):
                    names.setdefault(k, i)
    shared = sorted(set(by_bytes[0]) & set(by_bytes[1]), key=by_bytes[0].__getitem__)
    ids = [[names[k] for k in shared] for names in by_bytes]
    models = []
    for side, folder, adapter in ((0, old, old_adapter), (1, new, new_adapter)):
        tuned = PeftModel.from_pretrained(exact(folder), adapter, autocast_adapter_dtype=False).double().eval()
        models += [(side, exact(folder).eval()), (side, tuned)]
    tables: list[list[np.ndarray]] = [[], [], [], []]
    for text in texts:
        (ids_o, at_o), (ids_n, at_n) = (positions_of(t, text, limit) for t in tokenizers)
        for k, (side, model) in enumerate(models):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([(ids_o, ids_n)[side]])).logits[0].numpy()
            for end in sorted(set(at_o) & set(at_n)):
                tables[k].append(log_softmax(logits[(at_o, at_n)[side][end]][ids[side]]))
    return Dense(*(np.array(table) for table in tables))


def covariance(w: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return float((w * (a - (w * a).sum()) * (b - (w * b).sum())).sum())


def recount(d: Dense, seed: int) -> dict[str, float]:
    count, tokens = d.o_0.shape
    d_o, d_n = d.o_1 - d.o_0, d.n_1 - d.n_0
    m_o, m_n = d_o.mean(0), d_n.mean(0)
    # The order of the positions is the only thing taken from the code under test.
    partner = {}
    for chunk in position_chunks(count, chunk_size(tokens), torch.Generator().manual_seed(seed)):
        order = chunk.tolist()
        for k, p in enumerate(order):
            partner[p] = order[k - 1]
    sums = dict.fromkeys(
        ("oo", "nn", "on", "ss", "os", "mm", "om", "roo", "rnn", "ron", "kl_o", "kl_n", "t0", "t1", "ts", "changed",
         "g1", "gs", "gf", "gc", "go",
         "hit", "alone", "ob", "bb", "uoo", "unn", "uon"), 0.0
    )  # fmt: skip
    uniform = np.full(tokens, 1 / tokens)
    weights = (np.exp(d.o_0) + np.exp(d.o_1) + np.exp(d.n_0) + np.exp(d.n_1)) / 4
    c_o, c_n = (
        sum(covariance(w, x - mean, base) for w, x, base in zip(weights, change, before, strict=True))
        / sum(covariance(w, base, base) for w, base in zip(weights, before, strict=True))
        for change, mean, before in ((d_o, m_o, d.o_0), (d_n, m_n, d.n_0))
    )
    for p in range(count):
        w = weights[p]
        a, b, s = d_o[p], d_n[p], d_n[partner[p]]
        rest_o, rest_n = a - m_o - c_o * d.o_0[p], b - m_n - c_n * d.n_0[p]
        for name, x, y in (
            ("oo", a, a), ("nn", b, b), ("on", a, b), ("ss", s, s), ("os", a, s), ("mm", m_n, m_n), ("om", a, m_n),
            ("roo", rest_o, rest_o), ("rnn", rest_n, rest_n), ("ron", rest_o, rest_n),
            ("ob", a, d.n_0[p]), ("bb", d.n_0[p], d.n_0[p]),
        ):  # fmt: skip
            sums[name] += covariance(w, x, y)
        for name, x, y in (("uoo", a, a), ("unn", b, b), ("uon", a, b)):
            sums[name] += covariance(uniform, x, y)
        sums["kl_o"] += float((np.exp(d.o_1[p]) * a).sum())
        sums["kl_n"] += float((np.exp(d.n_1[p]) * b).sum())
        target = log_softmax(d.n_0[p] + a)
        for name, reached in (("t0", d.n_0[p]), ("t1", d.n_1[p]), ("ts", log_softmax(d.n_0[p] + s))):
            sums[name] += float((np.exp(target) * (target - reached)).sum())
        for name, reached in (
            ("g1", d.n_1[p]),
            ("gs", log_softmax(d.n_0[p] + s)),
            ("gf", log_softmax(d.n_0[p] - b)),
            ("gc", log_softmax(d.n_0[p] + m_n)),
        ):
            # Of next tokens of either old model, what the change makes them likelier by.
            adapted, bare = (float((np.exp(drawn) * (reached - d.n_0[p])).sum()) for drawn in (d.o_1[p], d.o_0[p]))
            sums[name] += adapted - bare
        sums["go"] += float((np.exp(d.o_1[p]) * a).sum()) + float((np.exp(d.o_0[p]) * -a).sum())
        best = d.o_1[p].argmax()
        if best != d.o_0[p].argmax():
            sums["changed"] += 1
            sums["hit"] += d.n_1[p].argmax() == best
            sums["alone"] += d.n_0[p].argmax() == best
    return {
        "old_kl": sums["kl_o"] / count,
        "new_kl": sums["kl_n"] / count,
        "old_rms": math.sqrt(sums["oo"] / count),
        "size_ratio": math.sqrt(sums["nn"] / sums["oo"]),
        "carried.cosine": sums["on"] / math.sqrt(sums["oo"] * sums["nn"]),
        "carried.explained_share": 1 - (sums["oo"] - 2 * sums["on"] + sums["nn"]) / sums["oo"],
        "shuffled.cosine": sums["os"] / math.sqrt(sums["oo"] * sums["ss"]),
        "constant.cosine": sums["om"] / math.sqrt(sums["oo"] * sums["mm"]),
        "constant.explained_share": 1 - (sums["oo"] - 2 * sums["om"] + sums["mm"]) / sums["oo"],
        "flipped.explained_share": 1 - (sums["oo"] + 2 * sums["on"] + sums["nn"]) / sums["oo"],
        "tempered_share": sums["ob"] ** 2 / (sums["oo"] * sums["bb"]),
        "content_cosine": sums["ron"] / math.sqrt(sums["roo"] * sums["rnn"]),
        "carried.kl_share": 1 - sums["t1"] / sums["t0"],
        "shuffled.kl_share": 1 - sums["ts"] / sums["t0"],
        "carried.gain_share": sums["g1"] / sums["go"],
        "shuffled.gain_share": sums["gs"] / sums["go"],
        "flipped.gain_share": sums["gf"] / sums["go"],
        "constant.gain_share": sums["gc"] / sums["go"],
        "top1_changed": sums["changed"] / count,
        "carried.top1": sums["hit"] / sums["changed"],
        "top1_alone": sums["alone"] / sums["changed"],
        "unweighted.cosine": sums["uon"] / math.sqrt(sums["uoo"] * sums["unn"]),
        "unweighted.explained_share": 1 - (sums["uoo"] - 2 * sums["uon"] + sums["unn"]) / sums["uoo"],
    }


TEXTS = [f"{word} one line of plain text, {word}er than the other; ünïcode \U0001f600 and\nnumbers {k * 37}"
         for k, word in enumerate(["new", "old", "long", "short", "wide"])]  # fmt: skip

OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (
        {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False},
        ["q_proj", "down_proj", "lm_head"],
    ),
    "gemma2": (
        {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "final_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 8,
        },
        ["q_proj", "v_proj", "o_proj"],
    ),
    "gpt_neox": ({"intermediate_size": 48}, ["query_key_value", "dense"]),
}


def other_model(model_type: str, folder: Path) -> None:
    """A random model of another architecture, with logits large enough for a cap to matter."""
    fields = OTHERS[model_type][0]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=500,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape) / math.sqrt(weight.shape[1]))
            else:
                weight.add_(torch.randn(weight.shape) * 0.2)
    save_folder(model, tiny_tokenizer(500, "sentencepiece", 3), folder)


@pytest.mark.parametrize("model_type", OTHERS)
def test_figures_are_those_of_a_dense_recount_in_float64(root: Path, model_type: str, tmp_path: Path) -> None:
    other_model(model_type, tmp_path / "new")
    random_adapter(tmp_path / "new", tmp_path / "tuned", targets=OTHERS[model_type][1], rank=2, alpha=4, seed=4)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    folders = (root / "old", root / "adapter", tmp_path / "new", tmp_path / "tuned")
    result = verify(
        *folders,
        config=VerifyConfig(text=tmp_path / "text.jsonl", max_tokens=40, seed=2),
        runtime=Runtime(device="cpu"),
    )
    whole = dense(folders, TEXTS, 40)
    assert result.facts["positions"] == len(whole.o_0)
    assert result.facts["shared_tokens"] == whole.o_0.shape[1]
    for name, expected in recount(whole, 2).items():
        assert figure(result, name) == pytest.approx(expected, rel=1e-4, abs=1e-4), name


def test_bits_per_byte_score_every_token_once_in_windows(root: Path, tmp_path: Path) -> None:
    examples = [{"text": "some words here and a few more of them"}, {"prompt": "one two ", "completion": "three four"}]
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    window = 8
    pairs = {"old": (root / "old", root / "adapter"), "far": (root / "far", root / "far adapter")}
    result = verify(
        *pairs["old"], *pairs["far"], **given(verify, labelled=file, **QUICK | {"max_tokens": window})
    ).bits_per_byte
    assert result is not None
    found = {"old": (result.old, result.old_adapted), "far": (result.new, result.new_adapted)}
    for name, (folder, adapter) in pairs.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        keys = token_keys(tokenizer)
        tuned = PeftModel.from_pretrained(exact(folder), adapter, autocast_adapter_dtype=False).double().eval()
        for model, interval in zip((exact(folder).eval(), tuned), found[name], strict=True):
            nats, counted = 0.0, 0
            for example in examples:
                prompt = example.get("prompt", "")
                text = prompt + example.get("completion", example.get("text", ""))
                plain = tokenizer(text, add_special_tokens=False)["input_ids"]
                full = tokenizer(text)["input_ids"]
                front = full[: len(full) - len(plain)]
                counted += len(text.encode()) - len(prompt.encode())
                ends = [len(b"".join(keys[i][0] for i in plain[: p + 1])) for p in range(len(plain))]
                ends = [end - (ends[-1] - len(text.encode())) for end in ends]
                scored = [p for p, end in enumerate(ends) if end > len(prompt.encode())]
                if scored[0] == 0 and not front:
                    counted -= ends[0]
                    scored = scored[1:]
                # The first window shows what fits in front of the completion, later ones begin with a token seen.
                begin = max(0, min(scored[0] - 1, len(plain) - window))
                for p in scored:
                    if p >= begin + window:
                        begin = p - 1
                    with torch.no_grad():
                        logits = model(input_ids=torch.tensor([front + plain[begin:p]])).logits[0, -1]
                    nats -= float(torch.log_softmax(logits, -1)[plain[p]])
            assert interval is not None
            assert interval.value == pytest.approx(nats / counted / math.log(2), rel=1e-5)


def test_labelled_text_shows_the_gain_of_both_sides(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    migrated = (root / "old", root / "adapter", root / "new", root / "migrated")
    result = verify(*migrated, **given(verify, labelled=file, **QUICK)).bits_per_byte
    assert result is not None
    assert result.old_gain is not None
    assert result.new_gain is not None
    assert result.examples == len(TEXTS)
    assert result.new_gain.value == pytest.approx(result.old_gain.value, abs=1e-3)


# Before a migration.


def test_a_planted_upgrade_is_predicted_to_carry(root: Path) -> None:
    result = verify(root / "old", None, root / "new", None, **given(verify, **QUICK))
    assert result.kind == "exact"
    fit = result.fit
    assert fit is not None
    for r2 in (fit.embedding_r2, fit.embedding_r2_back, fit.unembedding_r2, fit.unembedding_r2_back, fit.layers[-1].r2):
        assert r2 is not None
        assert r2 > 0.999
    assert fit.top1_agreement > 0.99
    assert fit.kl == pytest.approx(0, abs=1e-4)
    assert result.effect is None
    assert result.layers == []


def test_fit_and_layer_map_are_those_of_a_plan(root: Path) -> None:
    """Of one pair, on the same text, `verify` and `migrate` tell the same figures."""
    for new in ("new", "far"):
        plan = TransferPlan.build(
            root / "old",
            root / new,
            config=PlanConfig(roles=("q",), method="distill", examples=8),
            runtime=Runtime(device="cpu"),
        )
        fit = verify(
            root / "old", None, root / new, None, runtime=Runtime(device="cpu"), config=VerifyConfig(examples=8)
        ).fit
        assert fit is not None
        assert (fit.embedding_r2, fit.embedding_r2_back) == pytest.approx((plan.facts["r2"], plan.facts["r2_back"]))
        assert fit.layer_map == plan.layers
        assert fit.layer_r2 == pytest.approx({int(j): r2 for j, r2 in plan.facts["layer_r2"].items()})
        assert {(layer.new_layer, layer.old_layer) for layer in fit.layers} <= set(plan.layers.items())


def test_too_little_text_for_the_hidden_states_does_not_spoil_the_prediction(root: Path) -> None:
    result = verify(root / "old", None, root / "old", None, **given(verify, **QUICK | {"max_tokens": 4}))
    assert result.fit is not None
    assert result.fit.layers[-1].r2 is not None
    assert result.fit.layers[-1].r2 < 0.99
    assert result.kind == "exact"


def test_unrelated_models_are_predicted_to_carry_nothing(root: Path) -> None:
    result = verify(root / "old", None, root / "far", None, **given(verify, **QUICK))
    assert result.kind == "nothing"
    assert result.fit is not None
    assert result.fit.unembedding_r2 is not None
    assert result.fit.unembedding_r2 < 0.3
    assert result.fit.top1_agreement < 0.1


def test_a_fit_that_too_few_tokens_tell_of_has_no_value() -> None:
    """Of 25 rows one is held out, of 10 none: R² over no spread would be infinite or NaN."""
    for rows in (10, 25):
        assert base_fit._table_r2(torch.randn(rows, 4), torch.randn(rows, 6)) is None
    kind, sentence = prediction(BaseFit(None, None, 1.0, 1.0, 0.9, 0.1, 0.0, 1.0, []))
    assert kind == "distillation"
    assert "too few tokens" in sentence


# The command line and bad input.


def run(*arguments: object, columns: int = 100) -> Any:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["verify", *map(str, arguments)])


def test_tables_fit_a_hundred_columns(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "labelled.jsonl"
    file.write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    short = ("--examples", 4, "--max-tokens", 16, "--labelled", file)
    for pair in ((root / "old", root / "adapter", root / "new", root / "flipped"), (root / "old", root / "new")):
        narrow, wide = (run(*pair, *short, columns=columns) for columns in (100, 300))
        assert narrow.exit_code == wide.exit_code == 0, narrow.output
        tables = [[line for line in r.stdout.splitlines() if line[:1] in "│┃┏└"] for r in (narrow, wide)]
        assert len(tables[0]) == len(tables[1])
        assert max(map(len, tables[0])) <= 100
        assert "Bits per byte" in narrow.stdout


def test_json_is_one_object_of_plain_data(root: Path) -> None:
    short = ("--examples", 4, "--max-tokens", 16, "--json")
    done = run(root / "old", root / "adapter", root / "new", root / "other task", *short)
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert result["kind"] == "nothing carried"
    assert result["effect"]["carried"]["cosine"].keys() == {"value", "low", "high"}
    before = json.loads(run(root / "old", root / "new", *short).stdout, parse_constant=pytest.fail)
    assert before["effect"] is None
    assert before["fit"]["layers"][-1]["old_layer"] == 2


@pytest.mark.parametrize("count", [1, 3, 5])
def test_any_other_number_of_models_and_adapters_is_refused(root: Path, count: int) -> None:
    done = run(*[root / "old"] * count)
    assert done.exit_code == 2
    assert f"OLD NEW, or OLD OLD_ADAPTER NEW NEW_ADAPTER; {count} arguments" in done.stderr


def test_help_shows_both_forms() -> None:
    text = run("--help", columns=120).stdout
    assert "lorasuite-fast verify old-model my-adapter new-model my-adapter-new --text domain.txt" in text
    assert "lorasuite-fast verify old-model new-model" in text


def test_an_adapter_of_the_other_model_is_refused(root: Path) -> None:
    with pytest.raises(LoraSuiteError, match="is it an adapter of"):
        verify(root / "old", root / "migrated", root / "new", root / "migrated", **given(verify, **QUICK))


def test_an_adapter_with_a_missing_factor_is_refused(root: Path, tmp_path: Path) -> None:
    lame = edited(root / "adapter", tmp_path / "lame", lambda t: dict(sorted(t.items())[1:]))
    with pytest.raises(LoraSuiteError, match="lacks weights"):
        verify(root / "old", lame, root / "new", root / "migrated", **given(verify, **QUICK))


def test_an_adapter_with_a_factor_too_many_is_refused(root: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.9.self_attn.q_proj.lora_{}.weight"
    extra = {name.format("A"): torch.zeros(4, 32), name.format("B"): torch.zeros(32, 4)}
    stray = edited(root / "adapter", tmp_path / "stray", lambda t: t | extra)
    with pytest.raises(LoraSuiteError, match=r"no place for .*layers\.9"):
        verify(root / "old", stray, root / "new", root / "migrated", **given(verify, **QUICK))


def test_nan_in_an_adapter_is_named(root: Path, tmp_path: Path) -> None:
    broken = edited(root / "migrated", tmp_path / "broken", scaled(float("nan")))
    with pytest.raises(LoraSuiteError, match=r"broken gives NaN or infinity"):
        verify(root / "old", root / "adapter", root / "new", broken, **given(verify, **QUICK))


def test_one_adapter_alone_is_refused(root: Path) -> None:
    with pytest.raises(LoraSuiteError, match="both adapters, or none"):
        verify(root / "old", root / "adapter", root / "new", None, **given(verify, **QUICK))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("{", "is not JSON"), ('{"prompt": "a"}', "neither `text` nor `prompt`"), ("", "holds no text")],
)
def test_a_labelled_file_that_cannot_be_used_is_named(root: Path, tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(LoraSuiteError, match=complaint):
        verify(root / "old", None, root / "new", None, **given(verify, labelled=file, **QUICK))
