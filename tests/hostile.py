"""What the tests and the fuzzer of hostile input share: small files to spoil, and a strict idea of what is valid.

The oracle knows the safetensors format from its documentation alone: eight bytes of length, a header that begins with a
brace, tensors that lie one behind the other and fill the file. Its JSON is RFC 8259, read by a parser of its own.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
        "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
        "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}  # fmt: skip
MODEL = {"V": 12, "d": 8, "h": 4, "H": 2, "G": 1, "f": 6, "L": 2}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class Invalid(Exception):
    """The oracle's verdict, with its reason."""


class _Parser:
    """RFC 8259. Objects come back as lists of pairs, so that nothing that stands twice is lost."""

    def __init__(self, text: str, *, halves: bool = False) -> None:
        self.text, self.at, self.halves = text, 0, halves

    def whole(self) -> Any:
        value = self.value(0)
        self.space()
        if self.at != len(self.text):
            raise Invalid("text behind the value")
        return value

    def space(self) -> None:
        while self.text[self.at : self.at + 1] and self.text[self.at] in " \t\n\r":
            self.at += 1

    def take(self, token: str) -> bool:
        self.space()
        found = self.text.startswith(token, self.at)
        self.at += len(token) * found
        return found

    def value(self, depth: int) -> Any:
        if depth > 100:
            raise Invalid("too deep")
        for word, value in (("true", True), ("false", False), ("null", None)):
            if self.take(word):
                return value
        if self.take('"'):
            return self.string()
        if self.take("["):
            items: list[Any] = []
            while not self.take("]"):
                if items and not self.take(","):
                    raise Invalid("no comma")
                items.append(self.value(depth + 1))
            return items
        if self.take("{"):
            return self.object(depth)
        number = _NUMBER.match(self.text, self.at)
        if number is None:
            raise Invalid("no value")
        self.at = number.end()
        whole = number[2] is None and number[3] is None and number[0] != "-0" and len(number[0]) < 4000
        return int(number[0]) if whole else float(number[0])

    def object(self, depth: int) -> Any:
        pairs: list[tuple[str, Any]] = []
        while not self.take("}"):
            if pairs and not self.take(","):
                raise Invalid("no comma")
            if not self.take('"'):
                raise Invalid("no key")
            key = self.string()
            if not self.take(":"):
                raise Invalid("no colon")
            pairs.append((key, self.value(depth + 1)))
        return Pairs(pairs)

    def string(self) -> str:
        parts = []
        while True:
            character = self.text[self.at : self.at + 1]
            self.at += 1
            if character == '"':
                break
            if character < " ":
                raise Invalid("an open string, or a control character in it")
            if character == "\\":
                escape = self.text[self.at : self.at + 1]
                self.at += 1
                if escape == "u":
                    digits = self.text[self.at : self.at + 4]
                    if not re.fullmatch("[0-9a-fA-F]{4}", digits):
                        raise Invalid("a bad escape")
                    self.at += 4
                    character = chr(int(digits, 16))
                elif escape in _ESCAPES:
                    character = _ESCAPES[escape]
                else:
                    raise Invalid("a bad escape")
            parts.append(character)
        try:
            how = "surrogatepass" if self.halves else "strict"
            return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", how)
        except UnicodeDecodeError:
            raise Invalid("half a surrogate pair") from None


class Pairs(list[tuple[str, Any]]):
    """An object, unread."""

    def unique(self) -> dict[str, Any]:
        found = dict(self)
        if len(found) < len(self):
            raise Invalid("a key stands twice")
        return found


def strict_json(data: bytes) -> Any:
    """The value of a JSON file in UTF-8 whose objects say nothing twice in two ways. Raises Invalid for any other."""

    def plain(value: Any) -> Any:
        if isinstance(value, Pairs):
            found: dict[str, Any] = {}
            for key, inner in value:
                inner = plain(inner)
                if key in found and repr(found[key]) != repr(inner):
                    raise Invalid("a key stands twice")
                found[key] = inner
            return found
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    try:
        return plain(_Parser(data.decode("utf-8"), halves=True).whole())
    except UnicodeDecodeError:
        raise Invalid("no UTF-8") from None


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise Invalid("not a count")
    return value


def strict_safetensors(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor of a valid file. Raises Invalid for any other."""
    if len(data) < 8:
        raise Invalid("no length")
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise Invalid("the header is longer than the file")
    try:
        text = data[8 : 8 + length].decode("utf-8")
    except UnicodeDecodeError:
        raise Invalid("no UTF-8") from None
    if not text.startswith("{"):
        raise Invalid("no brace")
    header = _Parser(text).whole().unique()
    metadata = header.pop("__metadata__", Pairs([]))
    if metadata is not None and not (
        isinstance(metadata, Pairs) and all(isinstance(value, str) for value in metadata.unique().values())
    ):
        raise Invalid("metadata that are no strings")
    body = data[8 + length :]
    found: dict[str, tuple[str, list[int], bytes]] = {}
    ranges = []
    for name, fields in header.items():
        entry = fields.unique() if isinstance(fields, Pairs) else {}
        if entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise Invalid("other fields")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if entry["dtype"] not in BITS or isinstance(shape, Pairs) or isinstance(offsets, Pairs):
            raise Invalid("an unknown dtype, or no lists")
        if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
            raise Invalid("no lists")
        sizes = [_count(size) for size in shape]
        start, stop = (_count(offset) for offset in offsets)
        if stop < start or math.prod(sizes) * BITS[entry["dtype"]] != 8 * (stop - start):
            raise Invalid("another size")
        if math.prod(size or 1 for size in sizes) > 2**59:
            raise Invalid("more than can be addressed")
        ranges.append((start, stop))
        found[name] = (entry["dtype"], sizes, body[start:stop])
    end = 0
    for start, stop in sorted(ranges):
        if start != end:
            raise Invalid("a gap or an overlap")
        end = stop
    if end != len(body):
        raise Invalid("bytes no tensor has")
    return found


def emit(header: Sequence[tuple[str, Any]], body: bytes, length: int | None = None) -> bytes:
    """A safetensors file; the header is given as pairs, which may repeat a key."""
    text = ("{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in header) + "}").encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def pack(tensors: dict[str, np.ndarray]) -> bytes:
    """A valid safetensors file of float32 tensors."""
    header, body = [], b""
    for name, tensor in tensors.items():
        data = tensor.astype("<f4").tobytes()
        header.append(
            (name, {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(data)]})
        )
        body += data
    return emit(header, body)


def model_config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": MODEL["V"],
        "hidden_size": MODEL["d"],
        "head_dim": MODEL["h"],
        "num_attention_heads": MODEL["H"],
        "num_key_value_heads": MODEL["G"],
        "intermediate_size": MODEL["f"],
        "num_hidden_layers": MODEL["L"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


def model_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A Llama's tensors by name, of the sizes in MODEL."""
    m = MODEL
    sizes = {
        "self_attn.q_proj": (m["H"] * m["h"], m["d"]),
        "self_attn.k_proj": (m["G"] * m["h"], m["d"]),
        "self_attn.v_proj": (m["G"] * m["h"], m["d"]),
        "self_attn.o_proj": (m["d"], m["H"] * m["h"]),
        "mlp.gate_proj": (m["f"], m["d"]),
        "mlp.up_proj": (m["f"], m["d"]),
        "mlp.down_proj": (m["d"], m["f"]),
        "input_layernorm": (m["d"],),
        "post_attention_layernorm": (m["d"],),
    }
    shapes = {"model.embed_tokens.weight": (m["V"], m["d"]), "model.norm.weight": (m["d"],)}
    for i in range(m["L"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in sizes.items()}
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=shape) for name, shape in shapes.items()}


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model_config()))
    (folder / "model.safetensors").write_bytes(pack(model_tensors()))
    return folder


def adapter_config() -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def adapter_tensors(rank: int = 2) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    return {name.format("A"): draw.normal(size=(rank, 8)), name.format("B"): draw.normal(size=(8, rank))}


def write_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config()))
    (folder / "adapter_model.safetensors").write_bytes(pack(adapter_tensors()))
    return folder
