"""Collect the two texts the demo pair is trained on, and train the two tokenizers.

General text: English prose found in packages the project's test environment installs anyway (their docstrings, long
string constants, comment blocks and ``.rst``/``.md``/``.txt`` files) and in Python's own standard library. Versions are
pinned by the project's constraints file, so anyone can rebuild the text.

Domain text: the King James Bible (1611/1769, public domain) as the wheel ``bible-cli`` carries it.

Both texts come back as a list of documents, a document being a list of paragraphs, in an order that depends on names
only.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import subprocess
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

GENERAL_PACKAGES = (
    "accelerate",
    "einops",
    "fonttools",
    "fsspec",
    "huggingface_hub",
    "hypothesis",
    "matplotlib",
    "mpmath",
    "mypy",
    "networkx",
    "numpy",
    "packaging",
    "peft",
    "pip",
    "pydantic",
    "Pygments",
    "pytest",
    "requests",
    "rich",
    "safetensors",
    "scipy",
    "setuptools",
    "sympy",
    "torch",
    "transformers",
    "triton",
    "typer",
)
DOMAIN_WHEEL = "bible-cli==1.0.3"
DOMAIN_MEMBER = "bible_cli/dataset.json"
SHINGLE_WORDS = 6
SHORTEST_PARAGRAPH = 120
EXAMPLE = 400

Document = list[str]

_WORD = re.compile(r"[A-Za-z]+")
_COMMENT_PYTHON = re.compile(r"(?:^[ \t]*#.*\n?)+", re.MULTILINE)
_COMMENT_PYTHON_MARK = re.compile(r"^[ \t]*#+[ \t]?", re.MULTILINE)
_COMMENT_C = re.compile(r"/\*.*?\*/|(?:^[ \t]*//.*\n?)+", re.MULTILINE | re.DOTALL)
_COMMENT_C_MARK = re.compile(r"^[ \t]*(?:/\*+|\*+/?|//[/!]?)[ \t]?|\*/[ \t]*$", re.MULTILINE)
_MARGINAL_NOTE = re.compile(r"\s*\{[^{}]*:[^{}]*\}")
_SUPPLIED_WORD = re.compile(r"[{}]")


def sha256(text: str) -> str:
    """Return the SHA-256 of the UTF-8 bytes of ``text`` as hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def general_documents(packages: Sequence[str] = GENERAL_PACKAGES) -> list[Document]:
    """Return the prose of some packages and of the standard library, one document per source file.

    A paragraph most of whose six-word runs were already seen is dropped, so that templates repeated over hundreds of
    files (model docstrings, licence headers) count once and do not leak into the held-out part.
    """
    seen: set[int] = set()
    documents = []
    for path in _general_files(packages):
        paragraphs = [p for p in _paragraphs(path) if _is_prose(p) and _is_new(p, seen)]
        if paragraphs:
            documents.append(paragraphs)
    return documents


def general_versions() -> dict[str, str]:
    """Return the version of everything ``general_documents`` reads."""
    versions = {name: distribution(name).version for name in GENERAL_PACKAGES}
    return {"python": sys.version.split()[0], **versions}


def examples(documents: list[list[str]], size: int, seed: int = 0) -> list[str]:
    """Whole paragraphs of shuffled documents in examples of at least EXAMPLE characters, `size` characters in all."""
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    found: list[str] = []
    for document in documents:
        held = ""
        for paragraph in document:
            held += paragraph + "\n"
            if len(held) >= EXAMPLE:
                found.append(held)
                held = ""
        if sum(map(len, found)) >= size:
            break
    return found


def domain_documents(work: Path) -> list[Document]:
    """Return the King James Bible, one document per chapter and one paragraph per verse.

    The wheel is downloaded into ``work`` once. Marginal notes (``{firmament: Heb. expansion}``) are dropped; the braces
    around words the translators supplied are removed and the words kept.
    """
    wheels = work / "wheels"
    name, version = DOMAIN_WHEEL.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    if not list(wheels.glob(f"{stem}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(wheels), DOMAIN_WHEEL], check=True)
    (wheel,) = wheels.glob(f"{stem}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        books = json.loads(archive.read(DOMAIN_MEMBER).decode("utf-8-sig"))
    return [[_verse(verse) for verse in chapter] for book in books for chapter in book["chapters"]]


def _verse(raw: str) -> str:
    text = _SUPPLIED_WORD.sub("", _MARGINAL_NOTE.sub("", raw))
    return " ".join(text.split())


def _general_files(packages: Sequence[str]) -> Iterator[Path]:
    for name in packages:
        dist = distribution(name)
        files = sorted(str(f) for f in dist.files or ())
        for file in files:
            skipped = any(part in file for part in ("..", ".dist-info/", "/nvidia/"))
            if not skipped and file.endswith((".py", ".pyi", ".h", ".hpp", ".rst", ".md", ".txt")):
                path = Path(str(dist.locate_file(file)))
                if path.is_file():
                    yield path
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if not {"site-packages", "test", "tests", "encodings"} & set(path.relative_to(stdlib).parts):
            yield path


def _paragraphs(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8", errors="ignore").replace("\r\n", "\n")
    if path.suffix in (".py", ".pyi"):
        blocks = _python_blocks(source)
    elif path.suffix in (".h", ".hpp"):
        blocks = [_COMMENT_C_MARK.sub("", block) for block in _COMMENT_C.findall(source)]
    else:
        blocks = [source]
    for block in blocks:
        if len(block) >= SHORTEST_PARAGRAPH:
            for paragraph in re.split(r"\n[ \t]*\n", block):
                yield " ".join(paragraph.split())


def parsed(source: str) -> ast.Module | None:
    """The syntax tree of a Python file; None if this Python cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _python_blocks(source: str) -> list[str]:
    """Return the long string constants, then the comment blocks, of one Python file."""
    tree = parsed(source)
    if tree is None:
        return []
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return strings + [_COMMENT_PYTHON_MARK.sub("", block) for block in _COMMENT_PYTHON.findall(source)]


def _is_prose(paragraph: str) -> bool:
    """Say whether a paragraph reads as English: long enough, mostly letters, words of ordinary length, a full stop."""
    if not SHORTEST_PARAGRAPH <= len(paragraph) <= 4000 or paragraph[-1] not in ".!?" or ">>>" in paragraph:
        return False
    plain = sum(c.isalpha() or c in " ,.'-" for c in paragraph) / len(paragraph)
    words = paragraph.split()
    lower = sum((w.strip(",.;:()'\"").isalpha() and w == w.lower()) or w[0] in ",.;" for w in words) / len(words)
    return plain > 0.93 and lower > 0.6 and paragraph.isascii() and not paragraph.startswith(("|", "+", "="))


def _is_new(paragraph: str, seen: set[int]) -> bool:
    words = _WORD.findall(paragraph.lower())
    runs = [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]
    hashes = [int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs]
    repeated = sum(h in seen for h in hashes) / len(hashes)
    seen.update(hashes)
    return repeated < 0.3


def sentencepiece_tokenizer(paragraphs: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a BPE as SentencePiece writes it: spaces are ``▁``, whatever has no token falls back to its UTF-8 bytes."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _sentencepiece_split()
    pieces = vocab_size - len(special) - len(byte_tokens)
    trained.train_from_iterator(paragraphs, trainers.BpeTrainer(vocab_size=pieces, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    ordered = special + byte_tokens + sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {token: i for i, token in enumerate(ordered)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = _sentencepiece_split()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    return _wrapped(tokenizer, "<s>", "</s>", max_length, unk_token="<unk>")


def _sentencepiece_split() -> pre_tokenizers.PreTokenizer:
    """Return the split SentencePiece trains with: before spaces, and between letters and punctuation."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation(behavior="contiguous")]
    )


def byte_level_tokenizer(paragraphs: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (the ``Ġ`` alphabet), which has no unknown token."""
    special = ["<|begin|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    return _wrapped(tokenizer, *special, max_length)


def _wrapped(tokenizer: Tokenizer, bos: str, eos: str, max_length: int, **extra: str) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **extra,
    )
