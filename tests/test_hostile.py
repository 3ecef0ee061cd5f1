"""Hostile checkpoints, adapters, tokenizers and plans end in one line, soon, in little memory, with nothing touched."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hostile import (
    BITS,
    MODEL,
    Invalid,
    adapter_config,
    adapter_tensors,
    emit,
    model_config,
    model_tensors,
    pack,
    strict_safetensors,
    write_adapter,
    write_model,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from lorasuite_fast import LoraSuiteError, PlanConfig, TransferPlan
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.adapters.aligned_states import LoadedModel, load_tokenizer, read_sizes
from lorasuite_fast.adapters.base_match import check_base
from lorasuite_fast.cli.app import app
from lorasuite_fast.distillation.settings import Settings
from lorasuite_fast.distillation.streams import Side
from lorasuite_fast.evaluation.labelled import load_labelled
from lorasuite_fast.io.json_files import MOST_BYTES
from lorasuite_fast.io.tensor_files import DTYPES, TensorFiles
from lorasuite_fast.io.work import Work
from lorasuite_fast.models.checkpoint import Checkpoint, resolve_folder
from lorasuite_fast.models.families import Shape
from lorasuite_fast.models.family_table import FAMILIES
from lorasuite_fast.models.hidden_states import LayerStream, padded
from lorasuite_fast.models.unembedding import final_norm
from lorasuite_fast.models.vocabulary import check_ids, token_keys
from lorasuite_fast.text.calibration import load_examples
from lorasuite_fast.text.samples import read_records

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

SHAPE = Shape(**MODEL)
LLAMA = FAMILIES["llama"]
Q = "model.layers.0.self_attn.q_proj.weight"
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB")
EXAMPLES = settings(
    max_examples=250,
    deadline=5000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
INSTALLED = tuple(
    os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, torch.__path__[0], Path(__file__).parent.parent)
)
_opened: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_hear)


@contextmanager
def opening_only(*folders: Path) -> Iterator[None]:
    """Fails if a file outside the folders is opened, other than what Python and its packages are made of."""
    global _opened
    _opened = []
    try:
        yield
    finally:
        seen, _opened = _opened, None
    allowed = (*(os.path.realpath(folder) for folder in folders), *INSTALLED, "/proc", "/sys", "/dev/null")
    assert [path for path in seen if not path.startswith(allowed)] == []


def test_a_file_opened_outside_is_heard(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    with pytest.raises(AssertionError, match="outside"), opening_only(tmp_path / "inside"):
        (tmp_path / "outside").read_text()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def refused(read: Callable[[], object], *parts: str, seconds: float = 5.0) -> str:
    """The one line an input is refused with, within a CPU time."""
    start = time.process_time()
    with pytest.raises(LoraSuiteError) as error:
        read()
    assert time.process_time() - start < seconds
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 5000
    for part in parts:
        assert part in message
    return message


def read(folder: Path) -> Any:
    return read_adapter(folder, LLAMA, SHAPE, "OLD")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def entry(shape: list[Any], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# name -> (header as pairs, data bytes, what the message must hold)
HEADERS: dict[str, tuple[list[tuple[str, Any]], int, str]] = {
    "overlapping offsets": ([("a", entry([2], 0, 8)), ("b", entry([2], 4, 12))], 12, "truncated or damaged"),
    "offsets out of range": ([("a", entry([2], 8, 16))], 8, "truncated or damaged"),
    "offsets that end before they begin": ([("a", entry([0], 8, 0))], 8, "truncated or damaged"),
    "a hole": ([("a", entry([1], 0, 4)), ("b", entry([1], 8, 12))], 12, "truncated or damaged"),
    "bytes no tensor has": ([("a", entry([1], 0, 4))], 12, "truncated or damaged"),
    "a key twice": ([("a", entry([1], 0, 4)), ("a", entry([1], 0, 4))], 4, "'a' stands twice"),
    "a key twice, the second one out of range": ([("a", entry([1], 0, 4)), ("a", entry([9], 0, 36))], 4, "damaged"),
    "a product that overflows": ([("a", entry([2**33, 2**33], 0, 16))], 16, "damaged"),
    "a product that overflows beside a zero": ([("a", entry([0, 2**62, 2**62], 0, 0))], 0, "impossible shape"),
    "a size torch cannot hold": ([("a", entry([0, 2**64 - 1], 0, 0))], 0, "impossible shape"),
    "a negative size": ([("a", entry([-1, -1], 0, 4))], 4, "damaged"),
    "a size that is no integer": ([("a", entry([1.0], 0, 4))], 4, "damaged"),
    "a field nobody knows": ([("a", entry([1], 0, 4) | {"stride": [2]})], 4, "the fields dtype, shape"),
    "metadata that are no strings": ([("__metadata__", {"n": 1}), ("a", entry([1], 0, 4))], 4, "damaged"),
}


@pytest.mark.parametrize("name", HEADERS, ids=lambda name: name.replace(" ", "-"))
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    header, size, part = HEADERS[name]
    path = tmp_path / "a.safetensors"
    data = emit(header, bytes(size))
    with pytest.raises(Invalid):
        strict_safetensors(data)
    path.write_bytes(data)
    refused(lambda: TensorFiles([path]), str(path), part)


def test_a_deep_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    text = b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    refused(lambda: TensorFiles([path]), str(path))


@pytest.mark.parametrize("length", [9, 2**31, 2**63 - 1, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(emit([], b"", length))
    refused(lambda: TensorFiles([path]), str(path), f"header alone is to be {length}", "truncated or damaged")


def test_a_header_longer_than_any_model_needs_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 90 << 20) + b"{")
    os.truncate(path, 1 << 30)
    refused(lambda: TensorFiles([path]), str(path), f"header is {90 << 20} bytes", "8 MiB")


def test_names_from_a_file_cannot_write_to_the_terminal(adapter: Path) -> None:
    name = "\x1b]0;title\x07\n\u2028error: all is well" + "x" * 20_000
    (adapter / "adapter_model.safetensors").write_bytes(pack({name: np.zeros(1)}))
    message = refused(lambda: read(adapter), "\\x1b]0;title\\x07\\n\\u2028error", "adapter_model.safetensors")
    assert message.endswith("is not a lora_A or lora_B weight; not supported")


JUNK: list[Any] = [None, True, False, 0, -1, 1, 3, 1.0, 1.5, 2**31, 2**63, 10**400, -1e308, "", "8", "\ud800", [], [1],
                   {}, {"a": 1}, "../../x", "none"]  # fmt: skip


def test_sizes_and_dtypes_of_a_valid_header_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        emit([("b", entry([3], 4, 7, "U8")), ("a", entry([1], 0, 4)), ("c", entry([0, 5], 4, 4))], b"1234567")
    )
    files = TensorFiles([path])
    assert bytes(files.view("b").tolist()) == b"567"
    assert files.view("a").numpy().tobytes() == b"1234"
    assert files.view("c").shape == (0, 5)


def check_against_oracle(data: bytes, path: Path) -> None:
    """The reader takes what the oracle calls valid, bit by bit, and refuses everything else with one line."""
    path.write_bytes(data)
    try:
        expected = strict_safetensors(data)
    except Invalid:
        refused(lambda: TensorFiles([path]), str(path))
        return
    files = TensorFiles([path])
    assert files.entries.keys() == expected.keys()
    for name, (dtype, shape, content) in expected.items():
        if dtype not in DTYPES:
            refused(lambda name=name: files.view(name), dtype, "not read here")
            continue
        tensor = files.view(name)
        assert list(tensor.shape) == shape
        assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == content


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A valid file of up to four tensors, of which up to two things are then wrong."""
    numbers = st.sampled_from([*range(6), -1, 2**31, 2**62, 2**63, 2**64 - 1, 2**64, 1.0, True, None, "2", [1]])
    pairs: list[tuple[str, Any]] = []
    body = b""
    for n in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from([d for d in BITS if BITS[d] >= 8]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = int(np.prod(shape, dtype=int)) * BITS[dtype] // 8
        pairs.append((f"t{n}", entry(list(shape), len(body), len(body) + size, dtype)))
        body += draw(st.binary(min_size=size, max_size=size))
    pairs = draw(st.permutations(pairs))
    length = None
    for _ in range(draw(st.integers(0, 2))):
        what = draw(st.sampled_from(["shape", "offset", "dtype", "twice", "field", "body", "length", "meta", "drop"]))
        if what == "body":
            body = body[: draw(st.integers(0, len(body)))] + draw(st.binary(max_size=4))
        elif what == "length":
            length = draw(st.sampled_from([0, 1, 2, 2**20, 2**40, 2**63, 2**64 - 1]))
        elif what == "meta":
            pairs.append(("__metadata__", draw(st.sampled_from([{}, {"a": "b"}, {"a": 1}, [], "x", {"a": None}]))))
        elif pairs:
            n = draw(st.integers(0, len(pairs) - 1))
            name, fields = pairs[n][0], copy.deepcopy(pairs[n][1])
            if not isinstance(fields, dict) or "shape" not in fields:
                continue
            if what == "shape":
                where = draw(st.integers(0, 3))
                fields["shape"] = [*fields["shape"][:where], draw(numbers), *fields["shape"][where:]]
            elif what == "offset":
                fields["data_offsets"][draw(st.integers(0, 1))] = draw(numbers)
            elif what == "dtype":
                fields["dtype"] = draw(st.sampled_from([*BITS, "f32", "I128", "", None, 4]))
            elif what == "field":
                fields["more"] = 1
            elif what == "drop":
                del fields[draw(st.sampled_from(sorted(fields)))]
            if what == "twice":
                pairs.append((name, fields))
            else:
                pairs[n] = (name, fields)
    return emit(pairs, body, length)


@given(headers())
@EXAMPLES
def test_a_file_is_read_exactly_when_it_is_valid(tmp_path: Path, data: bytes) -> None:
    check_against_oracle(data, tmp_path / "a.safetensors")


@given(st.data())
@EXAMPLES
def test_a_valid_file_with_a_few_bytes_changed_is_read_exactly_when_it_is_still_valid(
    tmp_path: Path, data: st.DataObject
) -> None:
    whole = bytearray(pack({"a": np.arange(6.0).reshape(2, 3), "b": np.zeros((0, 2)), "c": np.ones(1)}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        piece = data.draw(
            st.sampled_from([b"", b"0", b"1", b"9", b"-", b",", b"]", b"{", b'"', b" ", b"\x00", b"\xff", b"e", b"."])
        )
        whole[at : at + data.draw(st.integers(0, 2))] = piece
    check_against_oracle(bytes(whole), tmp_path / "a.safetensors")


INDEX: dict[str, tuple[str, list[str]]] = {
    "a parent folder": ('{"weight_map": {"%s": "../other/model.safetensors"}}', ["outside the model folder"]),
    "an absolute path": ('{"weight_map": {"%s": "/etc/passwd"}}', ["'/etc/passwd'", "outside the model folder"]),
    "a path below": ('{"weight_map": {"%s": "a/../b.safetensors"}}', ["outside the model folder"]),
    "no file at all": ('{"weight_map": {"%s": ".."}}', ["outside the model folder"]),
    "a name longer than any": ('{"weight_map": {"%s": "' + "x" * 5000 + '"}}', ["missing from"]),
    "a NUL": ('{"weight_map": {"%s": "a\\u0000b"}}', ["missing from"]),
    "half a character": ('{"weight_map": {"%s": "\\ud800"}}', ["missing from"]),
    "a number for a file": ('{"weight_map": {"%s": 1}}', ["missing from"]),
    "a tensor in two files": ('{"weight_map": {"%s": "b", "%s": "c"}}', ["stands twice"]),
    "no object": ('{"weight_map": ["%s"]}', ["no weight_map"]),
    "depth": ('{"weight_map": {"%s": ' + "[" * 50_000 + "]" * 50_000 + "}}", ["nested too deeply"]),
}


@pytest.mark.parametrize("name", INDEX, ids=lambda name: name.replace(" ", "-"))
def test_an_index_that_leads_elsewhere_is_refused(name: str, model: Path) -> None:
    text, parts = INDEX[name]
    (model.parent / "other").mkdir()
    (model / "model.safetensors").rename(model.parent / "other/model.safetensors")
    (model / "model.safetensors.index.json").write_text(text.replace("%s", Q))
    with opening_only(model):
        refused(lambda: Checkpoint(model), "model.safetensors.index.json", *parts)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "README.md"])
def test_a_link_out_of_the_folder_is_refused_unopened(name: str, model: Path) -> None:
    outside = model.parent / "secret"
    outside.write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    with opening_only(model):
        refused(lambda: Checkpoint(model), str(model / name), str(outside), "outside its folder", "put the file itself")


def test_a_link_out_of_an_adapter_is_refused_unopened(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter.parent / "weights")
    weights.symlink_to("../weights")
    with opening_only(adapter):
        refused(lambda: read(adapter), str(weights), "outside its folder")


def test_a_link_in_a_folder_of_templates_and_one_that_goes_round_are_refused(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/a.jinja").symlink_to(__file__)
    refused(lambda: Checkpoint(model), "a.jinja", "outside its folder")
    (model / "additional_chat_templates/a.jinja").unlink()
    (model / "tokenizer.json").symlink_to("tokenizer.json")
    refused(lambda: Checkpoint(model), "model")


def test_links_inside_the_folder_and_a_linked_folder_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.bin0")
    (model / "model.safetensors").symlink_to("weights.bin0")
    (tmp_path / "link").symlink_to(model, target_is_directory=True)
    assert torch.equal(Checkpoint(tmp_path / "link").tensors.view(Q), Checkpoint(model).tensors.view(Q))


@pytest.mark.parametrize("shared", [False, True], ids=["blobs-of-the-repository", "blobs-of-the-cache"])
def test_links_of_a_hub_cache_are_followed(shared: bool, model: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub/models--owner--name"
    snapshot, blobs = repo / "snapshots/abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, file in enumerate(("config.json", "model.safetensors")):
        target = tmp_path / f"hub/blobs/ab/{n}" if shared else blobs / str(n)
        target.parent.mkdir(parents=True, exist_ok=True)
        (model / file).rename(target)
        if shared:
            (blobs / str(n)).symlink_to(os.path.relpath(target, blobs))
        (snapshot / file).symlink_to(f"../../blobs/{n}")
    assert Checkpoint(snapshot).shape == SHAPE
    (snapshot / "tokenizer.json").symlink_to("../../../../secret")
    (tmp_path / "secret").write_text("{}")
    refused(lambda: Checkpoint(snapshot), "tokenizer.json", "outside its folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused(lambda: Checkpoint(model), name, "not a regular file")
    refused(lambda: TensorFiles([model / name]), name, "not a regular file")


CONFIGS: dict[str, tuple[str, str]] = {
    "depth": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "depth json itself can read": ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),
    "a number of 5,000 digits": ('{"hidden_size": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    "NaN": ('{"rms_norm_eps": NaN}', "NaN is not JSON"),
    "a key twice with two values": ('{"hidden_size": 8, "hidden_size": 9}', "'hidden_size' stands twice"),
    "no UTF-8": ("\udcff", "cannot be read as JSON"),
    "9 MiB": ("[" + " " * (MOST_BYTES + (1 << 20)), "longer than 8 MiB"),
    "a list": ("[1]", "expected a JSON object"),
}


@pytest.mark.parametrize("name", CONFIGS, ids=lambda name: name.replace(" ", "-"))
def test_a_config_that_is_no_honest_json_is_refused(name: str, model: Path, adapter: Path) -> None:
    text, part = CONFIGS[name]
    for path, open_it in (
        (model / "config.json", lambda: Checkpoint(model)),
        (adapter / "adapter_config.json", lambda: read(adapter)),
    ):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(open_it, str(path), part)


def test_a_key_twice_with_one_value_is_read(model: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"head_dim": 4', '"head_dim": 4, "head_dim": 4'))
    assert Checkpoint(model).shape == SHAPE


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("num_hidden_layers", 10**12, "gives it 1000000000000 layers"),
        ("hidden_size", 10**400, "config.json makes it"),
        ("num_attention_heads", 2.0, "positive integer num_attention_heads"),
        ("num_key_value_heads", 3, "2 attention heads cannot share 3"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps must be a small number"),
        ("rms_norm_eps", 1e300, "rms_norm_eps must be a small number"),
        ("tie_word_embeddings", "false", "tie_word_embeddings must be true or false"),
        ("attention_bias", 1, "attention_bias must be true or false"),
        ("model_type", ["llama"], "no model_type"),
    ],
)
def test_a_config_of_wrong_types_or_sizes_is_refused(key: str, value: object, part: str, model: Path) -> None:
    edit_json(model / "config.json", **{key: value})
    refused(lambda: Checkpoint(model), str(model), part)


@given(st.sampled_from(sorted(model_config())), st.sampled_from(JUNK) | st.integers(1, 16))
@EXAMPLES
def test_a_config_is_read_exactly_when_it_describes_the_tensors(tmp_path: Path, key: str, value: Any) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        write_model(folder)
    config = model_config() | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    if key == "rms_norm_eps":
        valid = type(value) in (int, float) and 0 <= value < 1
    elif key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        # A model without bias tensors has no biases, and one without a head has it tied.
        valid = value is True if key[0] == "t" else value is None or value is False
    elif key == "model_type":
        valid = False
    else:
        sizes = {name: size for name, size in config.items() if type(size) is int and size > 0}
        original = model_config()
        valid = key in sizes and value == original[key]
        # An absent head_dim is d / H, an absent number of key/value heads that of the heads, which is another here.
        valid |= key == "head_dim" and value is None
    if valid:
        assert Checkpoint(folder).shape == SHAPE
    else:
        refused(lambda: Checkpoint(folder), str(folder))


ADAPTERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a rank that is a text": ({"r": "2"}, ["rank r is '2'"]),
    "a rank that is true": ({"r": True}, ["rank r is True"]),
    "half a rank": ({"r": 2.0}, ["rank r is 2.0"]),
    "no rank": ({"r": None}, ["rank r is None"]),
    "a huge rank": ({"r": 10**9}, ["q_proj has rank 2", "gives it 1e+09"]),
    "a rank no float holds": ({"r": 10**400}, ["r must be a number"]),
    "an infinite alpha": ({"lora_alpha": "Infinity"}, ["lora_alpha must be a number"]),
    "an alpha no float holds": ({"lora_alpha": 10**400}, ["lora_alpha must be a number"]),
    "no alpha but in the pattern": ({"lora_alpha": None, "alpha_pattern": {"q_proj": 4}}, ["lora_alpha must be"]),
    "a dropout that is a text": ({"lora_dropout": "0.1"}, ["lora_dropout must be a number"]),
    "a dropout of 7": ({"lora_dropout": 7}, ["lora_dropout is 7", "from 0 to 1"]),
    "a flag that is a text": ({"use_rslora": "false"}, ["use_rslora must be true or false, found 'false'"]),
    "a flag that is a number": ({"use_dora": 1}, ["use_dora must be true or false"]),
    "a pattern rank that is a text": ({"rank_pattern": {"q_proj": "2"}}, ["of 'q_proj' is '2'"]),
    "a pattern alpha that is a list": ({"alpha_pattern": {"k_proj": [1]}}, ["alpha of 'k_proj' must be a number"]),
    "a module PEFT would import": (
        {"megatron_config": {"a": 1}, "megatron_core": "os"},
        ["Megatron adapters", "megatron_config is set"],
    ),
    "a pattern that repeats a repeat": ({"rank_pattern": {"(.*)*x": 2}}, ["'(.*)*x'", "very long to match"]),
    "a pattern that repeats a choice": ({"alpha_pattern": {"(a|a)+x": 2}}, ["'(a|a)+x'", "very long to match"]),
    "a pattern of many choices": ({"rank_pattern": {"(a|a)" * 30 + "x": 2}}, ["very long to match"]),
    "a pattern of many repeats": ({"rank_pattern": {".*" * 10 + "x": 2}}, ["very long to match"]),
    "a pattern that refers back": ({"rank_pattern": {"(.*)\\1x": 2}}, ["very long to match"]),
    "a pattern of 2,000 characters": ({"rank_pattern": {"x" * 2000: 2}}, ["very long to match"]),
    "a repetition no machine holds": ({"rank_pattern": {"a{99999999999}": 2}}, ["no regex", "too large"]),
    "patterns that are slow together": ({"rank_pattern": {f".*.*.*{n}": 2 for n in range(3)}}, ["very long to match"]),
    "100,000 patterns": ({"alpha_pattern": {f"m{n}": 1 for n in range(100_000)}}, ["100000 patterns"]),
}


@pytest.mark.parametrize("name", ADAPTERS, ids=lambda name: name.replace(" ", "-"))
def test_an_adapter_config_of_wrong_types_or_sizes_is_refused(name: str, adapter: Path) -> None:
    changes, parts = ADAPTERS[name]
    edit_json(adapter / "adapter_config.json", **changes)
    with opening_only(adapter):
        refused(lambda: read(adapter), str(adapter), *parts)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"model\.layers\.0\.self_attn\.q_proj",
        r".*layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        r"layers\.(0|1|2|3|4|5|6|7|8|9|10|11|12|13|14|15)\..*q_proj",
        r"^(?:model\.)layers\.[0-9]{1,2}\.self_attn\.[qk]_proj",
    ],
)
def test_patterns_people_write_are_followed(pattern: str, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", r=7, rank_pattern={pattern: 2}, alpha_pattern={pattern: 3})
    assert read(adapter).updates[0, "q"].scale == 1.5


@given(st.sampled_from(sorted(adapter_config())), st.sampled_from(JUNK) | st.floats() | st.integers(1, 8))
@EXAMPLES
def test_an_adapter_config_is_read_exactly_when_its_update_is_defined(tmp_path: Path, key: str, value: Any) -> None:
    folder = tmp_path / "adapter"
    if not folder.exists():
        write_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config() | {key: value}))
    finite = (type(value) is int and abs(value) < 2**1000) or (type(value) is float and abs(value) < float("inf"))
    spelled = not (isinstance(value, float) and not finite)  # json writes NaN and Infinity, which are not JSON
    valid = {
        "peft_type": value == "LORA",
        "r": type(value) is int and value == 2,
        "lora_alpha": finite,
        "lora_dropout": value is None or (finite and 0 <= value <= 1),
        "bias": value == "none",
        "use_dora": value in (None, False) and type(value) in (bool, type(None)),
        "use_rslora": value is None or type(value) is bool,
        # A name that matches no module changes nothing; it must be one that gives a rank or an alpha all the same.
        "rank_pattern": not value or value == {"a": 1},
        "alpha_pattern": not value or value == {"a": 1},
        "task_type": value in (None, "CAUSAL_LM"),
        # None leaves the choice to PEFT; any other value here names no module of the file.
        "target_modules": value is None,
    }.get(key, True)
    if not (spelled and valid):
        refused(lambda: read(folder), str(folder))
        return
    update = read(folder).updates[0, "q"]
    alpha = value if key == "lora_alpha" else 4
    assert update.scale == pytest.approx(alpha / (2**0.5 if key == "use_rslora" and value is True else 2))


def weights(adapter: Path, tensors: dict[str, np.ndarray]) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(pack(tensors))


def test_one_tensor_under_two_names_is_refused(adapter: Path) -> None:
    weights(adapter, adapter_tensors() | {A.removesuffix(".weight"): np.zeros((2, 8))})
    refused(lambda: read(adapter), A, "one tensor under two names")


@pytest.mark.parametrize("index", ["00", "0" * 5000, "٠", "9" * 5000, "-0"], ids=["00", "0s", "arabic", "9s", "minus"])
def test_a_layer_spelled_otherwise_is_refused(index: str, adapter: Path) -> None:
    weights(adapter, {name.replace("layers.0.", f"layers.{index}."): t for name, t in adapter_tensors().items()})
    refused(lambda: read(adapter), "adapter_model.safetensors", "is not one a llama adapter can be migrated on")


def test_a_rank_beyond_both_sides_of_the_weight_is_refused_unread(adapter: Path) -> None:
    rank = 2**30
    half = 4 * 8 * rank
    data = emit([(A, entry([rank, 8], 0, half)), (B, entry([8, rank], half, 2 * half))], b"")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(data)
    os.truncate(path, len(data) + 2 * half)
    edit_json(adapter / "adapter_config.json", r=rank)
    refused(lambda: read(adapter), str(path), f"has rank {rank}", "[8, 8]", "a rank that fits")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [A, B])
def test_nan_and_infinity_in_a_factor_are_refused(name: str, value: float, adapter: Path) -> None:
    tensors = adapter_tensors()
    tensors[name][1, 1] = value
    weights(adapter, tensors)
    refused(lambda: read(adapter), "adapter_model.safetensors", name.removeprefix("base_model.model."), "NaN")


def test_a_float64_factor_that_float32_cannot_hold_is_refused(adapter: Path) -> None:
    tensors = {name: torch.from_numpy(tensor) for name, tensor in adapter_tensors().items()}
    tensors[A][0, 0] = 1e300
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(lambda: read(adapter), A.removeprefix("base_model.model."), "NaN or infinity")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"])
def test_small_dtypes_are_read_or_refused_in_one_line(dtype: str, adapter: Path) -> None:
    tensors = {name: torch.from_numpy(t).to(getattr(torch, dtype)) for name, t in adapter_tensors().items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert torch.equal(read(adapter).updates[0, "q"].factors.a, tensors[A])


def test_denormals_are_numbers_like_others(adapter: Path, model: Path) -> None:
    tensors = adapter_tensors()
    tensors[A][:] = 1e-42
    weights(adapter, tensors)
    a = read(adapter).updates[0, "q"].factors.a
    assert 0 < float(a.max()) < torch.finfo(torch.float32).tiny
    state = model_tensors()
    state[Q][0, 0] = 1e-42
    (model / "model.safetensors").write_bytes(pack(state))
    checkpoint = Checkpoint(model)
    checkpoint.check_finite(checkpoint.tensors.view(Q), Q)


@pytest.mark.parametrize(
    "base", ["~nobody-here/x", "x" * 5000, "a\0b", "/etc", "../..", "owner/name", "a b/c", "\ud800", "https://x/y"]
)
def test_a_base_that_is_no_model_here_is_left_alone(base: str, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    check_base(read(adapter), "0" * 32, "old")


@pytest.mark.parametrize("source", ["~nobody-here/x", "x" * 5000, "a\0b", "a/b/c", "\ud800/x"])
def test_a_model_that_cannot_be_a_path_is_named(source: str) -> None:
    refused(lambda: resolve_folder(source, what="OLD model"), "OLD model")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)


def test_nothing_is_ever_unpickled(model: Path, adapter: Path, tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"
    data = pickle.dumps(Evil(marker))
    for folder, name, names in (
        (model, "model.safetensors", ("pytorch_model.bin", "model.pt", "consolidated.00.pth")),
        (adapter, "adapter_model.safetensors", ("adapter_model.bin", "adapter_model.pt")),
    ):
        (folder / name).unlink()
        for other in names:
            for old in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")):
                old.unlink()
            (folder / other).write_bytes(data)
            open_it = (lambda: Checkpoint(model)) if folder == model else (lambda: read(adapter))
            refused(open_it, other, "never opened")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(model))
    device = torch.device("cpu")
    refused(lambda: LoadedModel(model, "OLD", device=device, dtype=torch.float32), str(model))
    write_model(model)
    (model / "consolidated.00.pth").unlink()
    refused(lambda: LoadedModel(model, "OLD", device=device, dtype=torch.float32).attach(adapter), "never opened")
    assert not marker.exists()


def test_code_of_a_checkpoint_does_not_run(model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"import os\nos.mkdir({os.fspath(marker)!r})\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (model / name).write_text(code + "class X: pass\n")
    classes = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    edit_json(model / "config.json", auto_map=classes)
    tiny_tokenizer(320).save_pretrained(model)
    edit_json(
        model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X"
    )
    checkpoint = Checkpoint(model)
    for run in (
        checkpoint.tokenizer,
        lambda: LoadedModel(model, "OLD", device=torch.device("cpu"), dtype=torch.float32),
        lambda: LayerStream(checkpoint, *padded(checkpoint, [[1, 2]]), device=torch.device("cpu"), dtype=torch.float32),
    ):
        # Some are loaded by what the library itself has for them, some are refused.
        with suppress(LoraSuiteError):
            run()
    assert not marker.exists()


@pytest.mark.parametrize("value", ["owner/kernel", "flash_attention_2", "flex_attention", {"": "o/k@m:f"}, 1])
def test_a_kernel_the_config_names_is_not_fetched(value: object, model: Path) -> None:
    edit_json(model / "config.json", attn_implementation=value)
    checkpoint = Checkpoint(model)
    device = torch.device("cpu")
    for run in (
        lambda: LoadedModel(model, "OLD", device=device, dtype=torch.float32),
        lambda: LayerStream(checkpoint, *padded(checkpoint, [[1, 2]]), device=device, dtype=torch.float32),
    ):
        refused(run, "config.json", "attn_implementation", "may fetch or compile code")


def test_labels_beyond_memory_are_not_made(model: Path) -> None:
    tiny_tokenizer(320).save_pretrained(model)
    edit_json(model / "config.json", text_config={"num_labels": 10**9})
    for read_it in (
        Checkpoint(model).tokenizer,
        lambda: load_tokenizer(model, "OLD"),
        lambda: read_sizes(model, "OLD"),
        lambda: LoadedModel(model, "OLD", device=torch.device("cpu"), dtype=torch.float32),
    ):
        refused(read_it, "config.json", "num_labels is 1000000000")


@pytest.mark.parametrize("shape", [(3, 8), (12, 8, 1), (12,)])
def test_a_head_of_another_shape_is_refused(shape: tuple[int, ...], model: Path) -> None:
    (model / "model.safetensors").write_bytes(pack(model_tensors() | {"lm_head.weight": np.zeros(shape)}))
    refused(lambda: Checkpoint(model), "model.safetensors", f"lm_head.weight is F32 {list(shape)}", "[12, 8]")


def test_nan_in_the_head_and_the_final_norm_is_refused_by_name(model: Path) -> None:
    edit_json(model / "config.json", tie_word_embeddings=False)
    for name in ("lm_head.weight", "model.norm.weight"):
        tensors = model_tensors() | {"lm_head.weight": np.ones((12, 8))}
        tensors[name][3] = float("nan")
        (model / "model.safetensors").write_bytes(pack(tensors))
        checkpoint = Checkpoint(model)
        side = Side(checkpoint, [[1]], [torch.tensor([0])], Settings(seed=0), torch.device("cpu"))
        reads = {
            "lm_head.weight": lambda s=side: s.head(torch.arange(12)),
            "model.norm.weight": partial(final_norm, checkpoint),
        }
        refused(reads[name], "model.safetensors", f"tensor {name} holds NaN or infinity")


OFFLINE = """
import json, sys
from pathlib import Path
def hear(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("NETWORK", event, arguments[1:2], flush=True)
        raise OSError("no network")
sys.addaudithook(hear)
import torch
from lorasuite_fast import LoraSuiteError, TransferPlan, migrate
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.adapters.base_match import check_base
from lorasuite_fast.adapters.aligned_states import LoadedModel, load_tokenizer
from lorasuite_fast.models.checkpoint import Checkpoint, resolve_folder
from lorasuite_fast.models.families import Shape
from lorasuite_fast.models.family_table import FAMILIES
from lorasuite_fast.text.samples import read_records
model, adapter = map(Path, sys.argv[1:3])
checkpoint = Checkpoint(model)
found = read_adapter(adapter, checkpoint.family, checkpoint.shape, "OLD")
check_base(found, checkpoint.fingerprint(), checkpoint.name)
for run in (
    lambda: resolve_folder("owner/name", what="OLD model"),
    lambda: Checkpoint("owner/name"),
    lambda: read_records("owner/data"),
    lambda: load_tokenizer(model, "OLD"),
    lambda: checkpoint.tokenizer(),
    lambda: LoadedModel(model, "OLD", device=torch.device("cpu"), dtype=torch.float32).attach(adapter),
    lambda: migrate("owner/name", model, adapter, adapter.parent / "out"),
):
    try:
        run()
    except LoraSuiteError as error:
        print(error)
print("DONE")
"""


def test_nothing_is_fetched_when_the_hub_is_offline(model: Path, adapter: Path) -> None:
    tiny_tokenizer(320).save_pretrained(model)
    edit_json(model / "config.json", _name_or_path="owner/name", name_or_path="owner/name")
    edit_json(model / "tokenizer_config.json", name_or_path="owner/name", tokenizer_file="owner/name")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="owner/name", revision="main")
    found = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(model), str(adapter)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.rstrip().endswith("DONE")
    assert "NETWORK" not in found.stdout
    assert "not in the local hub cache" in found.stdout


MEMORY = """
import os, resource, sys
import torch
from pathlib import Path
from lorasuite_fast import LoraSuiteError, TransferPlan
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.families import Shape
from lorasuite_fast.models.family_table import FAMILIES
from lorasuite_fast.io.tensor_files import TensorFiles
def held():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
root = Path(sys.argv[1])
runs = {
    "adapter": lambda: read_adapter(root / "adapter", FAMILIES["llama"], Shape(*map(int, sys.argv[2:])), "OLD"),
    "model": lambda: Checkpoint(root / "model"),
    "header": lambda: TensorFiles([root / "header.safetensors"]),
    "full": lambda: TensorFiles([root / "full.safetensors"]),
    "plan": lambda: TransferPlan.load(root / "plan"),
}
try:
    Checkpoint(root / "warm")
except LoraSuiteError:
    pass
resource.setrlimit(resource.RLIMIT_DATA, (held() + (192 << 20),) * 2)
for name, run in runs.items():
    try:
        run()
        print(name, "read")
    except LoraSuiteError as error:
        print(name, "refused", str(error)[:200])
"""


def test_a_small_bound_of_memory_is_enough_for_whatever_a_file_claims(adapter: Path, model: Path) -> None:
    root = model.parent
    rank = 2**32
    half = 4 * 8 * rank
    data = emit([(A, entry([rank, 8], 0, half)), (B, entry([8, rank], half, 2 * half))], b"")
    (adapter / "adapter_model.safetensors").write_bytes(data)
    os.truncate(adapter / "adapter_model.safetensors", len(data) + 2 * half)
    edit_json(adapter / "adapter_config.json", r=rank)
    edit_json(model / "config.json", num_hidden_layers=10**9)
    (root / "header.safetensors").write_bytes(struct.pack("<Q", 99 << 20))
    os.truncate(root / "header.safetensors", 1 << 40)
    many = [(f"t{n}", entry([0], 0, 0)) for n in range(100_000)]
    (root / "full.safetensors").write_bytes(emit(many, b""))
    (root / "plan").write_bytes(emit([("__metadata__", {"plan": "[" * 4_000_000})], b""))
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, str(root), *(str(MODEL[name]) for name in "VdhHGfL")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    lines = dict(line.split(" ", 1) for line in found.stdout.splitlines())
    assert lines.pop("full") == "read"
    assert all(line.startswith("refused") for line in lines.values()), lines
    assert len(lines) == 4


def word_level(vocab: dict[str, int]) -> str:
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model})


def test_a_million_tokens_are_read_in_seconds(tmp_path: Path) -> None:
    text = word_level({"a": 0} | {f"t{n}": n for n in range(1, 1_000_000)})
    (tmp_path / "tokenizer.json").write_text(text)
    backend = Tokenizer.from_str(text)
    tokenizer = SimpleNamespace(
        backend_tokenizer=backend, get_vocab=backend.get_vocab, added_tokens_decoder={}, name_or_path="x"
    )
    start = time.process_time()
    check_ids(tmp_path)
    assert len(token_keys(tokenizer)) == 1_000_000
    assert time.process_time() - start < 10


@pytest.mark.parametrize("kind", ["WordLevel", "BPE", "Unigram"])
def test_two_tokens_of_one_id_are_refused(kind: str, model: Path) -> None:
    tiny_tokenizer(320).save_pretrained(model)
    state = json.loads((model / "tokenizer.json").read_text())
    if kind == "Unigram":
        state["model"] = {"type": kind, "unk_id": 0, "vocab": [["a", 0.0], ["b", 0.0], ["b", 0.0]]}
    else:
        state["model"]["type"] = kind
        state["model"]["vocab"] |= {"one": 400, "two": 400}
    (model / "tokenizer.json").write_text(json.dumps(state))
    for read_it in (Checkpoint(model).tokenizer, lambda: load_tokenizer(model, "OLD")):
        message = refused(read_it, str(model / "tokenizer.json"), "twice, for")
        assert "'b'" in message if kind == "Unigram" else "'one' and 'two'" in message


@pytest.mark.parametrize("name", ["vocab.json", "added_tokens.json"])
@pytest.mark.parametrize(("ids", "message"), [((400, 400), "has 400 twice"), ((400, 2**31), f"has the id {2**31}")])
def test_the_files_before_tokenizer_json_are_held_to_the_same(
    name: str, ids: tuple[int, int], message: str, model: Path
) -> None:
    (model / "tokenizer.json").unlink(missing_ok=True)
    (model / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (model / "merges.txt").write_text("#version: 0.2\n")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert sorted(Checkpoint(model).tokenizer().get_vocab().values())[:2] == [0, 1]
    (model / name).write_text(json.dumps({"a": 0, "one": ids[0], "two": ids[1]}))
    for read_it in (Checkpoint(model).tokenizer, lambda: load_tokenizer(model, "OLD")):
        refused(read_it, str(model / name), message)


def test_a_tokenizer_that_fails_when_it_is_used_ends_in_one_line(model: Path) -> None:
    tiny_tokenizer(320).save_pretrained(model)
    edit_json(model / "tokenizer_config.json", model_max_length="long")
    for read_it in (Checkpoint(model).tokenizer, lambda: load_tokenizer(model, "OLD")):
        refused(read_it, str(model), "its tokenizer cannot be loaded")


@pytest.mark.parametrize("where", ["vocab", "added_tokens"])
def test_an_id_beyond_any_vocabulary_is_refused(where: str, model: Path) -> None:
    tiny_tokenizer(320).save_pretrained(model)
    state = json.loads((model / "tokenizer.json").read_text())
    if where == "vocab":
        state["model"]["vocab"]["far"] = 2**31
    else:
        state["added_tokens"][0]["id"] = 2**31
    (model / "tokenizer.json").write_text(json.dumps(state))
    refused(Checkpoint(model).tokenizer, str(model / "tokenizer.json"), f"has the id {2**31}")


def test_an_added_token_takes_the_place_of_the_entry_whose_id_it_has() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(word_level({"a": 0, "b": 1})))
    before = token_keys(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    after = token_keys(tokenizer)
    assert {index: after[index] for index in before} == before
    assert after[2] == (("special", "<x>"), False)


TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda state: state.pop("model"),
    "an unknown model": lambda state: state["model"].update(type="X"),
    "a merge of tokens it does not have": lambda state: state["model"].update(merges=[["zzzz", "yyyy"]]),
    "ids that are texts": lambda state: state["model"].update(vocab={"a": "0"}),
    "a negative id": lambda state: state["model"].update(vocab={"a": -1}),
    "a decoder in 200 decoders": lambda state: state.update(decoder=deep(200)),
    "a broken pattern": lambda state: state.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
    "a broken map": lambda state: state.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "an added token without content": lambda state: state.update(added_tokens=[{"id": 1}]),
}


def deep(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "ByteLevel"}
    for _ in range(levels):
        found = {"type": "Sequence", "decoders": [found]}
    return found


@pytest.mark.parametrize("name", TOKENIZERS, ids=lambda name: name.replace(" ", "-"))
def test_a_broken_tokenizer_ends_in_one_line(name: str, model: Path) -> None:
    tiny_tokenizer(320).save_pretrained(model)
    state = json.loads((model / "tokenizer.json").read_text())
    TOKENIZERS[name](state)
    (model / "tokenizer.json").write_text(json.dumps(state))
    refused(Checkpoint(model).tokenizer, str(model), "its tokenizer cannot be loaded", seconds=30)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, an adapter and a plan between them."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("planned")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "adapter", targets=["q_proj", "o_proj"], rank=2, alpha=4, seed=0)
    plan = TransferPlan.build(
        root / "old", root / "new", config=PlanConfig(examples=8, roles=("q", "o"), method="lstsq")
    )
    plan.save(root / "plan")
    return root


def plan_parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    return load_file(path), json.loads(header["__metadata__"]["plan"])


def write_plan(path: Path, tensors: dict[str, torch.Tensor], header: Any) -> Path:
    save_file(tensors, path, metadata={"plan": header if isinstance(header, str) else json.dumps(header)})
    return path


def put(header: Any, *keys: Any) -> None:
    """Sets header[k1][k2]... to the last of the keys."""
    *way, last, value = keys
    for key in way:
        header = header[key]
    header[last] = value


# name -> (what is done to tensors and header, what the message must hold)
PLANS: dict[str, tuple[Callable[[dict[str, torch.Tensor], Any], object], str]] = {
    "another format": (lambda t, h: put(h, "format", "x"), "not a plan file"),
    "no version": (lambda t, h: h.pop("version"), "format version None"),
    "a width that is a text": (lambda t, h: put(h, "old", "shape", "d", "32"), "sizes that no model has"),
    "a width of 0": (lambda t, h: put(h, "new", "shape", "d", 0), "sizes that no model has"),
    "a size that is none": (lambda t, h: put(h, "new", "shape", "x", 1), "lacks a part"),
    "heads that cannot share": (lambda t, h: put(h, "new", "shape", "G", 3), "sizes that no model has"),
    "10^12 layers": (lambda t, h: put(h, "new", "shape", "L", 10**12), "sizes that no model has"),
    "another number of heads": (lambda t, h: put(h, "new", "shape", "H", 8), "heads.match is I64 [4], not I64 [8]"),
    "another width": (lambda t, h: put(h, "new", "shape", "d", 64), "not F32 ["),
    "a family that is a list": (lambda t, h: put(h, "old", "family", ["llama"]), "is no text"),
    "an unknown family": (lambda t, h: put(h, "old", "family", "mamba"), "names a family, mamba"),
    "an unknown method": (lambda t, h: put(h, "options", "method", "magic"), "unknown method 'magic'"),
    "a method that is a list": (lambda t, h: put(h, "options", "method", []), "unknown method []"),
    "unknown roles": (lambda t, h: put(h, "options", "roles", ["q", "x"]), "unknown roles"),
    "a role twice": (lambda t, h: put(h, "options", "roles", ["q", "q", "o"]), "unknown roles"),
    "roles it holds nothing for": (lambda t, h: put(h, "options", "roles", ["q", "k", "o"]), "k.blocks is missing"),
    "a seed that is a text": (lambda t, h: put(h, "options", "seed", "0"), "its option seed is '0'"),
    "a device that is a path": (lambda t, h: put(h, "options", "device", "/dev/sda"), "unknown device '/dev/sda'"),
    "a dtype that is a function": (lambda t, h: put(h, "options", "dtype", "load"), "unknown dtype 'load'"),
    "layers the model lacks": (lambda t, h: put(h, "layers", "9", 0), "maps layers the models do not have"),
    "a layer that is a float": (lambda t, h: put(h, "layers", next(iter(h["layers"])), 0.5), "maps layers"),
    "a layer that is true": (lambda t, h: put(h, "layers", next(iter(h["layers"])), True), "maps layers"),
    "a layer spelled otherwise": (lambda t, h: put(h, "layers", "00", 0), "has a wrong one"),
    "two layers for one": (lambda t, h: [put(h, "layers", j, 0) for j in h["layers"]], "two new layers to one"),
    "layers that are a list": (lambda t, h: put(h, "layers", [0]), "has a wrong one"),
    "a name that writes to the terminal": (lambda t, h: put(h, "old", "name", "\x1b[2J"), "is no text"),
    "no facts": (lambda t, h: put(h, "facts", {}), "its fact same_vocabulary is None"),
    "a negative ratio": (lambda t, h: put(h, "facts", "rms_ratio", -1.0), "its fact rms_ratio is -1.0"),
    "a ratio that is a text": (lambda t, h: put(h, "facts", "rms_ratio", "1"), "its fact rms_ratio is '1'"),
    "an infinite ratio": (lambda t, h: put(h, "facts", "rms_ratio", float("inf")), "not a plan file"),
    "a missing tensor": (lambda t, h: t.pop("S"), "tensor S is missing"),
    "a tensor more": (lambda t, h: t.update(x=torch.zeros(1)), "tensor x does not belong"),
    "a tensor of another dtype": (lambda t, h: t.update(S=t["S"].half()), "tensor S is F16"),
    "a tensor of another shape": (lambda t, h: t.update(S=t["S"].T.contiguous()[:3]), "tensor S is F32 [3, 32]"),
    "a match beyond the heads": (lambda t, h: match_of(t).fill_(-1)[0].fill_(4), "points beyond the old model's 4"),
    "a match below none": (lambda t, h: match_of(t)[0].fill_(-2), "points beyond the old model's 4"),
    "a head matched twice": (lambda t, h: match_of(t).fill_(1), "gives one partner twice"),
}


def match_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[min(name for name in tensors if name.endswith("heads.match"))]


@pytest.mark.parametrize("name", PLANS, ids=lambda name: name.replace(" ", "-"))
def test_a_plan_edited_by_hand_is_refused(name: str, planned: Path, tmp_path: Path) -> None:
    change, part = PLANS[name]
    tensors, header = plan_parts(planned / "plan")
    change(tensors, header)
    path = write_plan(tmp_path / "plan", tensors, header)
    with opening_only(tmp_path):
        refused(lambda: TransferPlan.load(path), f"PLAN {path}", part, "build")


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "1", "{", "[" * 200_000, '{"version": 1e400}', "9" * 5000, '{"a":1,"a":2}'], ids=len
)
def test_a_plan_whose_header_is_none_is_refused(text: str, planned: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan", plan_parts(planned / "plan")[0], text)
    refused(lambda: TransferPlan.load(path), f"PLAN {path}", "is not a plan file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["W_h", "S", "q.blocks", "q.gain_new", "o.norm", "heads.similarity", "cka"])
def test_nan_and_infinity_in_a_plan_are_refused_by_name(
    which: str, value: float, planned: Path, tmp_path: Path
) -> None:
    tensors, header = plan_parts(planned / "plan")
    name = min(name for name in tensors if name.endswith(which))
    tensors[name].view(-1)[0] = value
    path = write_plan(tmp_path / "plan", tensors, header)
    refused(
        lambda: TransferPlan.load(path).apply(planned / "adapter", tmp_path / "out"),
        f"PLAN {path}: tensor {name} holds NaN or infinity",
        "build it again",
    )
    assert not (tmp_path / "out").exists()


def test_a_plan_of_denormals_is_applied(planned: Path, tmp_path: Path) -> None:
    tensors, header = plan_parts(planned / "plan")
    name = min(name for name in tensors if name.endswith("q.blocks"))
    tensors[name][:] = 1e-42
    path = write_plan(tmp_path / "plan", tensors, header)
    TransferPlan.load(path).apply(planned / "adapter", tmp_path / "out")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in written.values())


def test_a_plan_of_a_release_that_said_less_is_read(planned: Path, tmp_path: Path) -> None:
    tensors, header = plan_parts(planned / "plan")
    del header["options"]["similarity"], header["facts"]["layer_r2"], header["facts"]["method_reason"]
    TransferPlan.load(write_plan(tmp_path / "plan", tensors, header)).apply(planned / "adapter", tmp_path / "out")


def test_names_in_a_plan_are_printed_as_they_are(planned: Path, tmp_path: Path) -> None:
    tensors, header = plan_parts(planned / "plan")
    header["old"]["name"] = "[/bold] [red]x"
    path = write_plan(tmp_path / "plan", tensors, header)
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    assert "[/bold] [red]x" in result.stdout


FREE = {"name", "fingerprint", "made_by", "calibration", "method_reason", "seed", "examples", "max_tokens", *"VfG"}
"""What a plan's header may say as it likes, of its own type: nothing in the file tells otherwise."""
CHOICES = {"device", "similarity", "heads", "transfer", "dtype", "layers"}


def leaves(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*way, key))]
    if isinstance(value, list):
        return [leaf for n, inner in enumerate(value) for leaf in leaves(inner, (*way, n))]
    return [way]


@given(st.data(), st.sampled_from(JUNK) | st.integers(0, 70))
@EXAMPLES
def test_a_plan_with_one_value_changed_is_read_only_where_that_value_is_free(
    planned: Path, tmp_path: Path, data: st.DataObject, value: Any
) -> None:
    tensors, header = plan_parts(planned / "plan")
    way = data.draw(st.sampled_from(leaves(header)))
    before: Any = header
    for key in way:
        before = before[key]
    put(header, *way, value)
    path = write_plan(tmp_path / "plan", tensors, header)
    message = None
    try:
        TransferPlan.load(path)
    except LoraSuiteError as error:
        message = str(error)
    if message is not None:
        assert message.startswith(f"PLAN {path}")
        assert value != before or type(value) is not type(before)
        return
    number = (int, float)
    alike = type(value) is type(before) or (type(value) in number and type(before) in number) or before is None
    assert alike or value is None or way == ("made_by",)
    if type(value) is type(before) and value == before:
        return
    kind = way[-1] if way[0] != "layers" else "mapping"
    assert kind in FREE or way[0] == "facts" or kind == "ridge" or kind == "mapping" or kind == "made_by"
    if kind == "mapping":
        assert value in range(2)


def test_nan_in_weights_is_refused_by_name_with_every_transfer(planned: Path, tmp_path: Path) -> None:
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"):
        for transfer in ("embedding", "identity"):
            folder = tmp_path / f"{name}-{transfer}"
            save_folder(tiny_model("llama", 2, layers=3), tiny_tokenizer(320, seed=2), folder)
            tensors = load_file(folder / "model.safetensors")
            tensors[name][:, 3] = float("nan")
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            refused(
                lambda folder=folder, transfer=transfer: TransferPlan.build(
                    planned / "old",
                    folder,
                    config=PlanConfig(examples=8, roles=("q",), transfer=transfer, method="lstsq"),
                ),
                f"{folder / 'model.safetensors'}: tensor {name} holds NaN or infinity",
                seconds=30,
            )


TEXTS: dict[str, tuple[bytes, str]] = {
    "depth": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "a number of 5,000 digits": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "JSON"),
    "no UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "no object": (b'["text"]', ""),
    "a text that is none": (b'{"text": 1}', ""),
}


@pytest.mark.parametrize("name", TEXTS, ids=lambda name: name.replace(" ", "-"))
def test_text_that_is_no_honest_json_lines_is_refused(name: str, tmp_path: Path) -> None:
    content, part = TEXTS[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(content + b"\n")
    refused(lambda: load_examples(path, 8, 0), str(path), part)
    refused(lambda: load_labelled(path, 8, 0), str(path), part)
    if part:
        refused(lambda: read_records(path), str(path), part)


def test_a_line_separator_inside_a_json_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"a{n}\u2028b"}, ensure_ascii=False) + "\n" for n in range(4)))
    assert load_examples(path, 8, 0) == [f"a{n}\u2028b" for n in range(4)]
    assert [completion for _, completion in load_labelled(path, 8, 0)] == [f"a{n}\u2028b" for n in range(4)]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "a\\ud800b \\ud83d\\ude00 {n}"}}\n' for n in range(4)))
    assert load_examples(path, 8, 0) == [f"a\ufffdb \U0001f600 {n}" for n in range(4)]


@pytest.mark.parametrize(
    "text",
    ["", "[", "null", '{"identity": 1}', '{"identity": "ab"}', "[" * 100_000, '{"identity": {}, "micro_batch": "x"}'],
)
def test_damaged_work_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/run.json").write_text(text)
    refused(lambda: Work(tmp_path / "work", {"a": 1}), str(tmp_path / "work"), "damaged work", "delete the folder")


@pytest.mark.parametrize("identity", [{"a": True}, {"a": 1, "b": None}, {}], ids=["true", "more", "none"])
def test_work_of_another_run_is_told_apart(identity: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/run.json").write_text(json.dumps({"identity": identity}))
    refused(lambda: Work(tmp_path / "work", {"a": 1}), str(tmp_path / "work"), "unfinished work of another run")


@pytest.mark.parametrize("note", ["", "[]", "1", "[" * 100_000, "9" * 5000])
def test_a_damaged_part_of_work_counts_as_none(note: str, tmp_path: Path) -> None:
    work = Work(tmp_path / "work", {"a": 1})
    save_file({"a": torch.zeros(1)}, tmp_path / "work/part.safetensors", metadata={"note": note})
    assert work.load("part") is None
    work.close()
