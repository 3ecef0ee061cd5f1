"""Make the demo pair: two small Llamas pre-trained independently, and a LoRA adapter of the older one.

    python bench/demo_pair.py                     every stage, in order
    python bench/demo_pair.py old adapter         only these; two processes may share one work folder
    python bench/demo_pair.py few --rates 1e-3    part of a sweep

Stages: text, tokenizers, old, adapter, new, publish, full, few, record. A stage whose output is already in the work
folder is skipped, so an interrupted run goes on where it stopped. ``publish`` and ``record`` write under
``lorasuite_fast/demo``.

Everything is computed in float32. The two models are rounded to bfloat16 when they are saved, and whatever is trained
or measured afterwards starts from the rounded weights. Every stage is seeded; its figures depend on the number of
threads only through the order of float32 sums.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import demo_text
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorasuite_fast import FinetuneConfig
from lorasuite_fast.training.batches import step_batches
from lorasuite_fast.training.retention import summed_shift

DEMO = Path(__file__).resolve().parent.parent / "lorasuite_fast" / "demo"
LENGTH = 256
"""Tokens of one training sequence and of one evaluation window, the leading BOS included."""

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEW_SAMPLES, FEW_BATCH = 100, 16
FEW_RATES, FEW_EPOCHS = (3e-3, 1e-2, 3e-2), (3, 10)
FULL_RATES = (3e-3, 1e-2)
TOKENIZER_BYTES = 6_000_000


@dataclass(frozen=True)
class Recipe:
    """One training run: ``steps`` steps of ``batch`` sequences, AdamW, linear warm-up, then a cosine to a tenth."""

    rate: float
    steps: int
    batch: int
    seed: int
    warm_up: int
    weight_decay: float = 0.0


SHAPES: dict[str, dict[str, int]] = {
    "old": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "new": {
        "vocab_size": 3072,
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
}
PRETRAIN = {
    "old": (Recipe(rate=4e-3, steps=800, batch=4, seed=1, warm_up=60, weight_decay=0.1),),
    "new": (
        Recipe(rate=1.8e-3, steps=800, batch=4, seed=2, warm_up=50, weight_decay=0.1),
        Recipe(rate=1.5e-3, steps=640, batch=4, seed=12, warm_up=30, weight_decay=0.1),
    ),
}
"""Cycles of pre-training: the first starts from random weights, each later one from the weights saved before it."""

ADAPT = {"old": Recipe(rate=5e-3, steps=400, batch=8, seed=3, warm_up=20)}
FULL = Recipe(rate=0.0, steps=300, batch=8, seed=4, warm_up=20)


def bits_per_byte(
    model: torch.nn.Module, tokenizer: Any, text: str, *, window: int = LENGTH, batch_size: int = 8
) -> float:
    """Return the bits per UTF-8 byte a causal language model needs for ``text``.

    The text is tokenised once, without special tokens, and cut into windows of ``window - 1`` tokens. Each window is
    read after a BOS of its own, so every token of the text, the first one included, is scored exactly once; the sum of
    the negative log2-probabilities is divided by the number of bytes. Logits are reduced in float32.

    Raises ``ValueError`` if ``text`` is empty or the tokenizer has no BOS.
    """
    bos = tokenizer.bos_token_id
    if not text or bos is None:
        raise ValueError(f"bits per byte needs text and a BOS token: {len(text)} characters, BOS {bos}")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[i : i + window - 1] for i in range(0, len(ids), window - 1)]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = 0.0
    with torch.inference_mode():
        for first in range(0, len(windows), batch_size):
            chunk = windows[first : first + batch_size]
            inputs, labels = _padded(chunk, bos, device)
            logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
            nats += functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
    model.train(was_training)
    return nats / math.log(2) / len(text.encode())


def _padded(rows: Sequence[Sequence[int]], bos: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels (rows, longest + 1): BOS, the tokens, padding on the right that no label counts."""
    width = max(map(len, rows)) + 1
    inputs = torch.full((len(rows), width), bos, device=device)
    labels = torch.full((len(rows), width), -100, device=device)
    for i, row in enumerate(rows):
        inputs[i, 1 : len(row) + 1] = labels[i, 1 : len(row) + 1] = torch.tensor(row, device=device)
    return inputs, labels


class Work:
    """The work folder: where each stage leaves its output and its figures."""

    def __init__(self, root: Path, rates: Sequence[float] | None) -> None:
        self.root, self.rates = root, rates
        (root / "results").mkdir(parents=True, exist_ok=True)

    def result(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the figures called ``name``, made now unless an earlier run left them."""
        path = self.root / "results" / f"{name}.json"
        if not path.exists():
            start, start_cpu = time.perf_counter(), time.process_time()
            figures = make()
            figures["seconds"] = round(time.perf_counter() - start, 1)
            figures["cpu_seconds"] = round(time.process_time() - start_cpu, 1)
            figures["threads"] = torch.get_num_threads()
            path.write_text(json.dumps(figures, indent=1))
            print(f"{name}: {figures}", flush=True)
        figures = json.loads(path.read_text())
        assert isinstance(figures, dict)
        return figures

    def texts(self) -> dict[str, Any]:
        """Return the split texts: general train (documents) and test, domain train (documents), few, valid, test."""
        texts = json.loads((self.root / "text.json").read_text())
        assert isinstance(texts, dict)
        return texts

    def load(self, name: str, adapter: str | None = None) -> tuple[Any, Any]:
        """Return the saved model ``old`` or ``new`` in float32, with an adapter if one is named, and its tokenizer."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.root / name, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, self.root / adapter)
        return model, AutoTokenizer.from_pretrained(self.root / name)


def stage_text(work: Work) -> None:
    """Collect both texts and split them by document, so that no held-out paragraph has a neighbour in training."""
    if (work.root / "text.json").exists():
        return
    general, domain = demo_text.general_documents(), demo_text.domain_documents(work.root)
    random.Random(0).shuffle(general)
    random.Random(0).shuffle(domain)
    general_test = _take(general, 40_000)
    domain_test, domain_valid = _take(domain, 50_000), _take(domain, 20_000)
    few = [sample for chapter in domain for sample in _samples(chapter)]
    texts = {
        "general": {"train": general, "test": _joined(general_test)},
        "domain": {
            "train": domain,
            "few": random.Random(0).sample(few, FEW_SAMPLES),
            "valid": _joined(domain_valid),
            "test": _joined(domain_test),
        },
    }
    (work.root / "text.json").write_text(json.dumps(texts))


def _take(documents: list[demo_text.Document], size: int) -> list[demo_text.Document]:
    """Remove documents from the end of the list until they hold ``size`` characters, and return them."""
    taken, held = [], 0
    while held < size:
        taken.append(documents.pop())
        held += sum(map(len, taken[-1]))
    return taken


def _joined(documents: Sequence[demo_text.Document]) -> str:
    return "\n\n".join("\n".join(document) for document in documents) + "\n"


def _samples(chapter: demo_text.Document, size: int = 300) -> list[str]:
    """Cut a chapter into samples of whole verses, each at least ``size`` characters long."""
    samples, verses = [], []
    for verse in chapter:
        verses.append(verse)
        if sum(map(len, verses)) >= size:
            samples.append("\n".join(verses))
            verses = []
    return samples


def stage_tokenizers(work: Work) -> None:
    """Train one tokenizer per model on the general text: SentencePiece-style for old, byte-level for new."""
    for name, make in (("old", demo_text.sentencepiece_tokenizer), ("new", demo_text.byte_level_tokenizer)):
        if not (work.root / name / "tokenizer.json").exists():
            paragraphs = tokenizer_text(work.texts()["general"]["train"], PRETRAIN[name][0].seed, TOKENIZER_BYTES)
            make(paragraphs, SHAPES[name]["vocab_size"], 2 * LENGTH).save_pretrained(work.root / name)


def tokenizer_text(documents: Sequence[demo_text.Document], seed: int, size: int) -> list[str]:
    """Return the paragraphs of documents in random order, a little more than ``size`` characters."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    held, paragraphs = 0, []
    for document in order:
        held += sum(map(len, document))
        paragraphs += document
        if held > size:
            break
    return paragraphs


def packed(documents: Sequence[demo_text.Document], tokenizer: Any, recipe: Recipe) -> torch.Tensor:
    """Return token ids (steps · batch, LENGTH): shuffled documents end to end, EOS between, BOS before each row."""
    order = list(documents)
    shuffle = random.Random(recipe.seed)
    needed = recipe.steps * recipe.batch * (LENGTH - 1)
    ids: list[int] = []
    while len(ids) < needed:
        shuffle.shuffle(order)
        for first in range(0, len(order), 64):
            texts = ["\n".join(document) for document in order[first : first + 64]]
            for encoded in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                ids += [*encoded, tokenizer.eos_token_id]
            if len(ids) >= needed:
                break
    rows = torch.tensor(ids[:needed]).view(-1, LENGTH - 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))]
    return functional.pad(rows, (1, 0), value=tokenizer.bos_token_id)


def train(model: Any, rows: torch.Tensor, recipe: Recipe) -> dict[str, Any]:
    """Train the parameters that require a gradient on ``rows``, in order, once; return the recipe and the last loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)

    def factor(step: int) -> float:
        if step < recipe.warm_up:
            return (step + 1) / recipe.warm_up
        done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    losses: list[float] = []
    start = time.perf_counter()
    for step, batch in enumerate(rows.split(recipe.batch)):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / 50
            print(
                f"  step {step + 1} of {recipe.steps}: loss {recent:.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    last = losses[-50:]
    return {**asdict(recipe), "tokens": rows.numel(), "last_loss_nats": round(sum(last) / len(last), 4)}


def pretrain(work: Work, name: str) -> None:
    """Pre-train one model from random weights on the general text, saving it in bfloat16 after each cycle."""
    for cycle, recipe in enumerate(PRETRAIN[name]):
        work.result(f"pretrain-{name}-{cycle}", functools.partial(_pretrain_cycle, work, name, cycle, recipe))
    work.result(f"score-{name}", lambda: scores(work, *work.load(name)))


def _pretrain_cycle(work: Work, name: str, cycle: int, recipe: Recipe) -> dict[str, Any]:
    if cycle == 0:
        tokenizer = AutoTokenizer.from_pretrained(work.root / name)
        torch.manual_seed(recipe.seed)
        config = LlamaConfig(
            **SHAPES[name],
            head_dim=32,
            tie_word_embeddings=True,
            max_position_embeddings=2 * LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model: Any = LlamaForCausalLM(config)
    else:
        model, tokenizer = work.load(name)
    figures = train(model, packed(work.texts()["general"]["train"], tokenizer, recipe), recipe)
    model.to(torch.bfloat16).save_pretrained(work.root / name)
    return {"parameters": sum(p.numel() for p in model.parameters()), **figures}


def with_lora(model: Any, base: str, targets: Sequence[str] = TARGETS) -> Any:
    """Return ``model`` with a fresh adapter that names ``base`` as its base; the caller seeds torch."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def scores(work: Work, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return bits per byte on the three held-out texts."""
    texts = work.texts()
    held_out = {
        "domain_valid": texts["domain"]["valid"],
        "domain_test": texts["domain"]["test"],
        "general_test": texts["general"]["test"],
    }
    return {name: round(bits_per_byte(model, tokenizer, text), 4) for name, text in held_out.items()}


def adapt(work: Work, base: str, folder: str, recipe: Recipe) -> dict[str, Any]:
    """Train a LoRA adapter of ``base`` on the whole domain text, save it in ``folder``, return its figures."""

    def make() -> dict[str, Any]:
        model, tokenizer = work.load(base)
        torch.manual_seed(recipe.seed)
        model = with_lora(model, f"lorasuite-fast/demo-{base}")
        figures = train(model, packed(work.texts()["domain"]["train"], tokenizer, recipe), recipe)
        model.save_pretrained(work.root / folder)
        return {**figures, **scores(work, model, tokenizer)}

    return work.result(folder, make)


def few(work: Work, rate: float, epochs: int) -> dict[str, Any]:
    """Train a LoRA adapter of the new model on the 100 samples."""

    def make() -> dict[str, Any]:
        model, tokenizer = work.load("new")
        torch.manual_seed(5)
        model = with_lora(model, "lorasuite-fast/demo-new")
        steps = train_few(model, tokenizer, work.texts()["domain"]["few"], rate, epochs, seed=5)
        return {"rate": rate, "epochs": epochs, "steps": steps, "seed": 5, **scores(work, model, tokenizer)}

    return work.result(f"few-{rate:g}-{epochs}", make)


def train_few(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    rate: float,
    epochs: int,
    seed: int,
    retain: Sequence[str] = (),
) -> int:
    """Train what requires a gradient on a few samples: AdamW, linear schedule to zero, no warm-up; return the steps.

    Args:
        retain: texts on which the predictions are to stay those of the bare model, as `lorasuite_fast.finetune` keeps
            them: with its weight, and as many tokens a step as of the samples.
    """
    model.train()
    samples = [ids[: LENGTH - 1] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = epochs * math.ceil(len(samples) / FEW_BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = random.Random(seed)
    rows = (
        [ids[: LENGTH - 1] for ids in tokenizer(list(retain), add_special_tokens=False)["input_ids"]] if retain else []
    )
    size = sum(map(len, samples)) * FEW_BATCH // len(samples)
    kept = iter(step_batches([len(ids) for ids in rows], size, steps, seed))
    for _ in range(epochs):
        order.shuffle(samples)
        for first in range(0, len(samples), FEW_BATCH):
            inputs, labels = _padded(samples[first : first + FEW_BATCH], tokenizer.bos_token_id, model.device)
            logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
            functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
            if rows:
                inputs, labels = _padded([rows[i] for i in next(kept)], tokenizer.bos_token_id, model.device)
                counted = labels != -100
                shift = summed_shift(model, inputs, torch.ones_like(inputs), counted) / counted.sum()
                (FinetuneConfig.retain_weight * shift).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return steps


def stage_full(work: Work) -> list[dict[str, Any]]:
    """Train the adapter of the new model on the whole domain text, once per rate."""
    rates = [rate for rate in FULL_RATES if work.rates is None or rate in work.rates]
    return [adapt(work, "new", f"full-{rate:g}", Recipe(**{**asdict(FULL), "rate": rate})) for rate in rates]


def stage_few(work: Work) -> list[dict[str, Any]]:
    """Sweep the adapter of the new model trained on 100 samples."""
    rates = [rate for rate in FEW_RATES if work.rates is None or rate in work.rates]
    return [few(work, rate, epochs) for rate in rates for epochs in FEW_EPOCHS]


def stage_record(work: Work) -> None:
    """Copy the pair, the adapter and the texts under ``DEMO`` and write ``recorded.json`` from the measured figures."""
    publish(work)
    texts = work.texts()
    sweeps = {"lora_full": stage_full(work), "lora_100": stage_few(work)}
    best = {name: min(runs, key=lambda run: run["domain_valid"]) for name, runs in sweeps.items()}
    adapter = adapt(work, "old", "adapter", ADAPT["old"])
    bits = {
        "old": work.result("score-old", dict),
        "old + adapter": adapter,
        "new": work.result("score-new", dict),
        "new + lora_100": best["lora_100"],
        "new + lora_full": best["lora_full"],
    }
    columns = ("domain_test", "general_test", "domain_valid")
    general = demo_text.general_versions()
    packages = ("torch", "transformers", "peft", "tokenizers", "safetensors")
    recorded = {
        "command": "python bench/demo_pair.py",
        "timing": "two stages ran side by side on a loaded machine: read `seconds` as upper bounds",
        "machine": f"{platform.machine()} CPU, 2 cores",
        "seconds": "wall time on a machine shared with other programs, one run stopped for a while; see cpu_seconds",
        "dtype": "computed in float32; models saved in bfloat16, adapter in float32",
        "software": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "unit": "bits per UTF-8 byte, windows of 256 tokens with BOS, every token scored once",
        "bits_per_byte": {name: {column: run[column] for column in columns} for name, run in bits.items()},
        "selection": "sweeps are selected on domain_valid (not shipped, never trained on), one seed per setting",
        "best": best,
        "sweeps": sweeps,
        "pretraining": {
            name: [work.result(f"pretrain-{name}-{cycle}", dict) for cycle in range(len(cycles))]
            for name, cycles in PRETRAIN.items()
        },
        "adapter": {"rank": RANK, "alpha": ALPHA, "target_modules": TARGETS, **adapter},
        "shapes": SHAPES,
        "text": {
            "general": {
                "source": "prose of docstrings, comments and text files of the packages below",
                "versions": general,
                "train_bytes": len(_joined(texts["general"]["train"]).encode()),
                "train_sha256": demo_text.sha256(_joined(texts["general"]["train"])),
                "test_bytes": len(texts["general"]["test"].encode()),
                "test_sha256": demo_text.sha256(texts["general"]["test"]),
            },
            "domain": {
                "source": f"King James Bible (public domain) from {demo_text.DOMAIN_WHEEL}, {demo_text.DOMAIN_MEMBER}",
                "train_bytes": len(_joined(texts["domain"]["train"]).encode()),
                "train_sha256": demo_text.sha256(_joined(texts["domain"]["train"])),
                "few_bytes": sum(len(sample.encode()) for sample in texts["domain"]["few"]),
                "valid_bytes": len(texts["domain"]["valid"].encode()),
                "test_bytes": len(texts["domain"]["test"].encode()),
                "test_sha256": demo_text.sha256(texts["domain"]["test"]),
            },
        },
    }
    (DEMO / "recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")


def publish(work: Work) -> None:
    """Copy the models, the adapter and the texts that exist so far under ``DEMO``."""
    files = {
        "old": (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
        "new": (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
        "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    }
    for folder, names in files.items():
        (DEMO / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            if (work.root / folder / name).exists():
                shutil.copyfile(work.root / folder / name, DEMO / folder / name)
    texts = work.texts()
    (DEMO / "domain_train.txt").write_text("\n\n".join(texts["domain"]["few"]) + "\n", encoding="utf-8")
    (DEMO / "domain_test.txt").write_text(texts["domain"]["test"], encoding="utf-8")
    (DEMO / "general_test.txt").write_text(texts["general"]["test"], encoding="utf-8")


STAGES: dict[str, Callable[[Work], object]] = {
    "text": stage_text,
    "tokenizers": stage_tokenizers,
    "old": lambda work: pretrain(work, "old"),
    "adapter": lambda work: adapt(work, "old", "adapter", ADAPT["old"]),
    "new": lambda work: pretrain(work, "new"),
    "publish": publish,
    "full": stage_full,
    "few": stage_few,
    "record": stage_record,
}


def main() -> None:
    """Run the stages named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Make the demo pair.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of: {', '.join(STAGES)} (default: all)")
    parser.add_argument("--work", type=Path, default=Path(".cache/demo_pair"), help="work folder")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--rates", type=float, nargs="+", help="only these learning rates of a sweep")
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    work = Work(arguments.work, arguments.rates)
    for name in arguments.stages or STAGES:
        STAGES[name](work)


if __name__ == "__main__":
    main()
