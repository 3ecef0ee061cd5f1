"""The pairs of the quality report: an older and a newer model trained independently, and two domains.

`demo` is the pair shipped with the package. The others are much smaller, so that three seeds of everything that
follows the pre-training stay affordable; both their models read the demo pair's general text, in another order and with
a tokenizer of their own:

- `neox`: GPT-NeoX-like, the newer model clearly the stronger one;
- `llama-deep`: Llama-like, all six aspects changed, deep to shallow, the newer model clearly the weaker one.

The domains are the King James Bible and Python source without its docstrings and comments, which are general text.
"""

from __future__ import annotations

import ast
import functools
import json
import random
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import demo_pair
import demo_text
import torch
from demo_pair import DEMO, LENGTH, Recipe, bits_per_byte, packed, tokenizer_text, train, with_lora
from demo_text import Document
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaConfig

from lorasuite_fast.io.phases import PhaseClock, anonymous_memory, release_memory

DOMAINS = ("bible", "code")
CODE_PACKAGES = ("networkx", "scipy", "sympy")
CODE_BYTES = 4_000_000
LONGEST_FILE = 60_000
HELD_OUT_PIECE = 2_500
"""Characters of each held-out source file."""
TINY_TOKENIZER_BYTES = 2_000_000


@dataclass(frozen=True)
class Side:
    """One model of a pair: its configuration's class and sizes, its tokenizer's kind, and how it is pre-trained."""

    config: type
    sizes: dict[str, Any]
    tokenizer: Callable[..., Any]
    recipe: Recipe


@dataclass(frozen=True)
class Pair:
    """Both models, the modules that get an adapter, and the sizes of what is read.

    Attributes:
        held_out: characters of the domain's validation and test text and of the general test text.
        sample: least characters of one of the 100 labelled samples.
        self_bytes: of the text the old model writes with its adapter.
        refine: options of `lorasuite_fast.refine` that are not its defaults.
    """

    name: str
    sides: dict[str, Side]
    targets: tuple[str, ...]
    adapt: Recipe
    full: Recipe
    full_rates: tuple[float, ...]
    held_out: tuple[int, int, int]
    sample: int
    self_bytes: int
    refine: dict[str, Any] = field(default_factory=dict)

    @property
    def mlp(self) -> tuple[str, ...]:
        """The MLP's modules."""
        return ("dense_h_to_4h", "dense_4h_to_h") if self.name == "neox" else ("gate_proj", "up_proj", "down_proj")


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
_ALL = 10**9


def _llama(vocab: int, d: int, f: int, layers: int, heads: int, kv: int, h: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": h,
        "tie_word_embeddings": True,
    }


def _neox(vocab: int, d: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": 4 * d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": False,
    }


_TINY_ADAPT = Recipe(rate=1e-2, steps=100, batch=8, seed=100, warm_up=10)
_TINY_FULL = Recipe(rate=1e-2, steps=100, batch=8, seed=200, warm_up=10)

PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            "demo",
            {},
            _LLAMA,
            demo_pair.ADAPT["old"],
            Recipe(**{**asdict(demo_pair.FULL), "rate": 1e-2}),
            (1e-2,),
            (_ALL, _ALL, _ALL),
            300,
            300_000,
        ),
        Pair(
            "neox",
            {
                "old": Side(
                    GPTNeoXConfig,
                    _neox(1024, 64, 3, 4),
                    demo_text.byte_level_tokenizer,
                    Recipe(rate=4e-3, steps=500, batch=4, seed=21, warm_up=40, weight_decay=0.1),
                ),
                "new": Side(
                    GPTNeoXConfig,
                    _neox(1280, 96, 4, 6),
                    demo_text.byte_level_tokenizer,
                    Recipe(rate=4e-3, steps=1200, batch=4, seed=22, warm_up=60, weight_decay=0.1),
                ),
            },
            ("query_key_value", "attention.dense"),
            _TINY_ADAPT,
            _TINY_FULL,
            (2e-2,),
            (10_000, 24_000, 20_000),
            160,
            130_000,
            {"steps": 200},
        ),
        Pair(
            "llama-deep",
            {
                "old": Side(
                    LlamaConfig,
                    _llama(1280, 80, 208, 6, 4, 4, 20),
                    demo_text.sentencepiece_tokenizer,
                    Recipe(rate=4e-3, steps=900, batch=4, seed=31, warm_up=60, weight_decay=0.1),
                ),
                "new": Side(
                    LlamaConfig,
                    _llama(1024, 96, 256, 4, 6, 2, 16),
                    demo_text.byte_level_tokenizer,
                    Recipe(rate=3e-3, steps=350, batch=4, seed=32, warm_up=40, weight_decay=0.1),
                ),
            },
            _LLAMA,
            _TINY_ADAPT,
            _TINY_FULL,
            (2e-2,),
            (10_000, 24_000, 20_000),
            160,
            130_000,
            {"steps": 200},
        ),
    )
}


class Texts:
    """General text and both domains, split by document; collected once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cached_property
    def demo(self) -> dict[str, Any]:
        """The demo pair's texts, from its work folder."""
        work = demo_pair.Work(self.root.parent / "demo_pair", None)
        demo_pair.stage_text(work)
        return work.texts()

    @functools.cached_property
    def code(self) -> dict[str, Any]:
        path = self.root / "code.json"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(split_code(code_documents())))
            temporary.replace(path)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def train(self, domain: str) -> list[Document]:
        """The documents of `general` or of a domain that may be trained on."""
        found: list[Document] = (self.code if domain == "code" else self.demo[self._key(domain)])["train"]
        return found

    def few(self, pair: Pair, domain: str) -> list[str]:
        """100 samples of whole lines."""
        if domain == "bible" and pair.name == "demo":
            demo: list[str] = self.demo["domain"]["few"]
            return demo
        samples = [sample for document in self.train(domain) for sample in demo_pair._samples(document, pair.sample)]
        return random.Random(0).sample(samples, demo_pair.FEW_SAMPLES)

    def held_out(self, pair: Pair, domain: str) -> dict[str, str]:
        """Validation and test text of a domain, and general test text, cut to the pair's sizes."""
        source = self.code if domain == "code" else self.demo["domain"]
        valid, test, general = pair.held_out
        return {
            "domain_valid": _front(source["valid"], valid),
            "domain_test": _front(source["test"], test),
            "general_test": _front(self.demo["general"]["test"], general),
        }

    @staticmethod
    def _key(domain: str) -> str:
        return "general" if domain == "general" else "domain"


def _front(text: str, size: int) -> str:
    """The whole lines among the first `size` characters."""
    return text if len(text) <= size else text[: text.rindex("\n", 0, size) + 1]


def code_documents() -> list[Document]:
    """Python source of the standard library and of CODE_PACKAGES, one document a file, one paragraph a line.

    Docstrings and comments are taken out: parsed, and written anew by `ast.unparse`.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "__pycache__"}
    files = [p for p in sorted(stdlib.rglob("*.py")) if not skipped & set(p.relative_to(stdlib).parts)]
    for name in CODE_PACKAGES:
        dist = distribution(name)
        named = sorted(str(f) for f in dist.files or () if str(f).endswith(".py"))
        files += [Path(str(dist.locate_file(f))) for f in named if not skipped & set(Path(f).parts)]
    documents = []
    for path in files:
        if path.stat().st_size <= LONGEST_FILE:
            lines = _bare_lines(path.read_text("utf-8", errors="ignore"))
            if sum(map(len, lines)) > HELD_OUT_PIECE:
                documents.append(lines)
    return documents


def _bare_lines(source: str) -> list[str]:
    tree = demo_text.parsed(source)
    if tree is None:
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    try:
        source = ast.unparse(tree)
    except RecursionError:
        # A few files of tables or very long sums.
        return []
    return [line for line in source.splitlines() if line.strip() and line.isascii()]


def split_code(documents: list[Document]) -> dict[str, Any]:
    """Split by file into train, valid and test; of a held-out file the middle is taken, for many files in little."""
    random.Random(0).shuffle(documents)

    def take(size: int) -> str:
        pieces: list[str] = []
        while sum(map(len, pieces)) < size:
            document = documents.pop()
            pieces.append(_front("\n".join(document[len(document) // 2 :]) + "\n", HELD_OUT_PIECE))
        return "\n".join(pieces)

    test, valid = take(50_000), take(20_000)
    held, train_documents = 0, []
    for document in documents:
        train_documents.append(document)
        held += sum(map(len, document))
        if held > CODE_BYTES:
            break
    return {"train": train_documents, "valid": valid, "test": test}


class Lab:
    """Where the models and adapters of the pairs lie, and how they are trained and measured."""

    def __init__(self, root: Path) -> None:
        self.root, self.texts = root, Texts(root)
        root.mkdir(parents=True, exist_ok=True)

    def model(self, pair: Pair, name: str) -> Path:
        return (DEMO if pair.name == "demo" else self.root / pair.name) / name

    def load(self, pair: Pair, name: str, adapter: Path | None = None) -> tuple[Any, Any]:
        """The model in float32, with an adapter if one is given, and its tokenizer."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.model(pair, name), dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        return model, AutoTokenizer.from_pretrained(self.model(pair, name))

    def score(
        self, pair: Pair, domain: str, model: Any, tokenizer: Any, *, only: tuple[str, ...] | None = None
    ) -> dict[str, float]:
        """Bits per byte of the held-out texts, or of one of them."""
        held_out = self.texts.held_out(pair, domain)
        return {
            name: round(bits_per_byte(model, tokenizer, text), 4)
            for name, text in held_out.items()
            if only is None or name in only
        }

    def pretrain(self, pair: Pair, name: str) -> dict[str, Any]:
        """Train a tokenizer and a model on the general text, and save the model in bfloat16."""
        side, folder = pair.sides[name], self.model(pair, name)
        recipe, documents = side.recipe, self.texts.train("general")
        tokenizer = side.tokenizer(
            tokenizer_text(documents, recipe.seed, TINY_TOKENIZER_BYTES), side.sizes["vocab_size"], 2 * LENGTH
        )
        tokenizer.save_pretrained(folder)
        config = side.config(
            **side.sizes,
            max_position_embeddings=2 * LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(recipe.seed)
        model: Any = AutoModelForCausalLM.from_config(config)
        with measured() as cost:
            figures = train(model, packed(documents, tokenizer, recipe), recipe)
        model.to(torch.bfloat16).save_pretrained(folder)
        parameters = sum(p.numel() for p in model.parameters())
        bits = {domain: self.score(pair, domain, *self.load(pair, name)) for domain in DOMAINS}
        return {"parameters": parameters, **figures, **cost, "bits": bits}

    def adapt(
        self, pair: Pair, domain: str, name: str, recipe: Recipe, out: Path, *, only: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """Train an adapter of one model on the whole domain text and save it."""
        model, tokenizer = self.load(pair, name)
        torch.manual_seed(recipe.seed)
        model = with_lora(model, str(self.model(pair, name)), pair.targets)
        with measured() as cost:
            figures = train(model, packed(self.texts.train(domain), tokenizer, recipe), recipe)
        model.save_pretrained(out)
        return {**figures, **cost, "bits": self.score(pair, domain, model, tokenizer, only=only)}


class measured:
    """A context whose value is filled with the seconds, CPU seconds and peak memory its body took."""

    def __enter__(self) -> dict[str, Any]:
        release_memory()
        self.clock, self.before, self.start_cpu = PhaseClock(), anonymous_memory(), time.process_time()
        self.figures: dict[str, Any] = {}
        self.phase = self.clock.phase("all", 1)
        self.phase.__enter__()
        return self.figures

    def __exit__(self, *error: Any) -> None:
        self.phase.__exit__(*error)
        (phase,) = self.clock.phases
        self.figures |= {
            "seconds": round(phase.seconds, 2),
            "cpu_seconds": round(time.process_time() - self.start_cpu, 2),
            "peak_memory": phase.peak_memory,
            "added_memory": phase.peak_memory - self.before,
        }
