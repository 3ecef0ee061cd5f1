"""Fuzzes every reader of files nobody has vouched for, guided by coverage; writes bench/reports/fuzz.md.

    pip install atheris==3.0.0       # Linux; no dependency of the package
    python bench/fuzz.py             # 100,000 inputs a reader
    python bench/fuzz.py --inputs 2000 --readers plan,adapter_config

Every reader runs in a process of its own. An input is either the file's bytes as they are, or a valid file of which a
few values are replaced. A reader may return or raise LoraSuiteError. Anything else ends the run: another exception,
more than 5 seconds or 2 GiB, a file opened outside the folder, and an input taken that the strict oracle of
tests/hostile.py calls invalid.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests"), str(ROOT / "bench")]

REPORT = ROOT / "bench" / "reports" / "fuzz.md"
INPUTS, LONGEST, SECONDS, MEGABYTES = 100_000, 2048, 5, 2048
MENDED = [
    "A name twice in a safetensors header was read, the last one winning; so was an empty tensor whose "
    "other sizes overflow, which ended in a traceback when it was asked for.",
    "A pipe in place of a file was waited for; a link out of the folder was followed; a JSON file of any "
    "size was read whole.",
    "Tracebacks: integers of more than 4,300 digits in any JSON file read here; a plan header nested too "
    "deeply; an adapter's base `~nobody/x`, or longer than a path may be; an alpha no float holds; a "
    "shard or layer name too long; half a surrogate pair in a text; a `model_max_length` that is a text; "
    "a panic inside `tokenizers`.",
    "`num_hidden_layers` of 10^12 was counted up to, and `num_labels` of 10^9 filled the memory. Patterns"
    " such as `(a+)+` in `rank_pattern` took for ever, `a{99999999999}` ended in a traceback.",
    '`use_rslora: "false"` counted as true; a tensor spelled `lora_A` and `lora_A.weight`, or layer `0` '
    "and `00`, was taken twice; an adapter's tensors were read before their shapes were compared.",
    "A plan edited by hand was applied (two layers mapped to one, a head matched twice, a layer 0.9) or "
    "ended in a traceback (a match beyond the heads, facts taken out, NaN).",
    "By the fuzzer: a role twice in a plan; a run.json that says one thing more of its run, with the value null; ids "
    "that were not looked at where an added token was broken.",
    "An id of 2^31 in tokenizer.json had `tokenizers` count the gaps up to it, gigabytes of them. Of two "
    "tokens of one id it keeps another one each time it loads the file, so that two runs differed.",
    "`attn_implementation` in config.json could name a kernel on the hub, which transformers sets out to fetch.",
    "safetensors opened through torch maps a file so that it may count as memory as long as the file is.",
]


class Found(BaseException):
    """A finding that no reader may catch."""


@dataclass
class Target:
    """One reader: writes an input to its place, reads it, and says what the oracle holds of it.

    Attributes:
        seeds: valid files; values of the first are replaced. place: where an input goes. read: the reader.
        check: called with the input and what was read; raises Found, or the oracle's Invalid.
        wrap: the file an input is a part of. header: the seed is a safetensors file, and its header is what is edited.
    """

    seeds: list[bytes]
    place: Path
    read: Callable[[], Any]
    check: Callable[[bytes, Any], None]
    wrap: Callable[[bytes], bytes] = bytes
    header: bool = False


JUNK: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, -0.0, "", "2", "q",
                   "\ud800", "../x", "a" * 300, [], [0], [[]], {}, {"a": 1}, {"": {}}, "(a+)+$", ".*.*.*.*",
                   "~x/y"]  # fmt: skip


def ways(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for key, part in inner for found in ways(part, (*way, key)))]


def edited(base: Any, choices: bytes) -> Any:
    """A JSON value with a few places replaced, taken out or doubled, as the bytes choose: three for each."""
    value = copy.deepcopy(base)
    for at in range(0, min(len(choices) - 2, 9), 3):
        first, second, third = choices[at : at + 3]
        places = [way for way in ways(value) if way]
        if not places:
            return value
        *way, last = places[(first * 256 + third) % len(places)]
        parent = value
        for key in way:
            parent = parent[key]
        if second < 200:
            parent[last] = copy.deepcopy(JUNK[second % len(JUNK)])
        elif second < 215 and isinstance(parent[last], int):
            parent[last] = parent[last] + second - 207
        elif second < 230:
            del parent[last]
        elif isinstance(parent, dict):
            parent[str(JUNK[third % len(JUNK)])[:20]] = copy.deepcopy(parent[last])
        else:
            parent.append(copy.deepcopy(parent[last]))
    return value


def split(data: bytes) -> tuple[Any, bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def make(target: Target, data: bytes) -> bytes:
    """The file an input stands for."""
    kind, rest = data[:1], data[1:]
    if kind > b"\x7f":
        return target.wrap(rest)
    if target.header:
        header, body = split(target.seeds[0])
        text = json.dumps(edited(header, rest)).encode()
        return struct.pack("<Q", len(text)) + text + body
    base = [json.loads(line) for line in target.seeds[0].splitlines()] if b"\n" in target.seeds[0] else None
    if base is not None:
        return target.wrap("\n".join(json.dumps(line) for line in edited(base, rest)).encode())
    return target.wrap(json.dumps(edited(json.loads(target.seeds[0]), rest)).encode())


def model_shape() -> Any:
    """Sizes of the model of tests/hostile.py."""
    import hostile

    from lorasuite_fast.models.families import Shape

    return Shape(**hostile.MODEL)


def tensors_target(folder: Path) -> Target:
    """Tensors of a safetensors file."""
    import hostile
    import torch

    from lorasuite_fast import LoraSuiteError
    from lorasuite_fast.io.tensor_files import DTYPES, TensorFiles

    def read() -> Any:
        files = TensorFiles([folder / "a.safetensors"])
        found = {}
        for name, entry in files.entries.items():
            with contextlib.suppress(LoraSuiteError):
                view = files.view(name).contiguous().view(-1)
                found[name] = entry.dtype, list(entry.shape), view.view(torch.uint8).numpy().tobytes()
        return found, files.entries

    def check(data: bytes, read: Any) -> None:
        expected = hostile.strict_safetensors(data)
        if read[1].keys() != expected.keys() or read[0] != {n: e for n, e in expected.items() if e[0] in DTYPES}:
            raise Found("read otherwise than the oracle reads it")

    return Target([hostile.pack(hostile.adapter_tensors())], folder / "a.safetensors", read, check, header=True)


def config_target(folder: Path) -> Target:
    """A model's config.json."""
    import hostile

    from lorasuite_fast.models.checkpoint import Checkpoint

    shape = model_shape()

    model = hostile.write_model(folder)

    def check(data: bytes, read: Any) -> None:
        said = hostile.strict_json(data)
        for name, size in zip(hostile.model_config(), hostile.model_config().values(), strict=True):
            sized = name.startswith(("vocab", "hidden", "intermediate", "num"))
            if sized and (said[name] != size or type(said[name]) is not int):
                raise Found(f"taken with {name} {said[name]!r}")
        if read.shape != shape or (said["model_type"] != "llama" and read.family.model_type == "llama"):
            raise Found("taken with other sizes")

    seed = (model / "config.json").read_bytes()
    return Target([seed], model / "config.json", lambda: opened(Checkpoint(model)), check)


def opened(checkpoint: Any) -> Any:
    checkpoint.fingerprint()
    assert checkpoint.epsilon < 1
    checkpoint.head()
    return checkpoint


def index_target(folder: Path) -> Target:
    """An index over a model's files."""
    import hostile

    from lorasuite_fast.models.checkpoint import Checkpoint

    model = hostile.write_model(folder)
    (model / "model.safetensors").rename(model / "one.safetensors")
    names = dict.fromkeys(hostile.model_tensors(), "one.safetensors")
    seed = json.dumps({"weight_map": names}).encode()
    (model / "outside").mkdir()
    shutil.copy(model / "one.safetensors", model / "outside/one.safetensors")

    def check(data: bytes, read: Any) -> None:
        said = hostile.strict_json(data)["weight_map"]
        if not said or set(map(str, said.values())) != {"one.safetensors"} or not set(said) <= set(names):
            raise Found("taken with another file or tensor")

    place = model / "model.safetensors.index.json"
    return Target([seed], place, lambda: Checkpoint(model), check)


def adapter_config_target(folder: Path) -> Target:
    """adapter_config.json."""
    import hostile

    from lorasuite_fast.adapters.adapter import read_adapter
    from lorasuite_fast.adapters.base_match import check_base
    from lorasuite_fast.models.family_table import FAMILIES

    shape = model_shape()

    adapter = hostile.write_adapter(folder)

    def read() -> Any:
        found = read_adapter(adapter, FAMILIES["llama"], shape, "OLD")
        check_base(found, "0" * 32, "old")
        return found

    def check(data: bytes, read: Any) -> None:
        said = hostile.strict_json(data)
        module = "model.layers.0.self_attn.q_proj"
        kind = said.get("peft_type")
        rank, alpha = said.get("init_r" if kind == "ADALORA" else "r"), said["lora_alpha"]
        if kind != "LORA" or type(rank) is not int or type(alpha) not in (int, float):
            raise Found(f"taken with rank {rank!r} and alpha {alpha!r}")
        for name, value in (said.get("rank_pattern") or {}).items():
            rank = value if re.match(rf"(.*\.)?({name})$", module) else rank
        for name, value in reversed((said.get("alpha_pattern") or {}).items()):
            alpha = value if re.match(rf"(.*\.)?({name})$", module) else alpha
        scale = alpha / (2**0.5 if said.get("use_rslora") is True else 2)
        if said.get("use_dora") or abs(read.updates[0, "q"].scale - scale) > 1e-9 * abs(scale):
            raise Found("taken with another scale")

    seed = json.dumps(hostile.adapter_config() | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}})
    return Target([seed.encode()], adapter / "adapter_config.json", read, check)


def adapter_weights_target(folder: Path) -> Target:
    """An adapter's tensors."""
    import hostile
    import torch

    from lorasuite_fast.adapters.adapter import read_adapter
    from lorasuite_fast.io.tensor_files import DTYPES
    from lorasuite_fast.models.family_table import FAMILIES

    shape = model_shape()

    adapter = hostile.write_adapter(folder)

    def check(data: bytes, read: Any) -> None:
        for name, (dtype, sizes, content) in hostile.strict_safetensors(data).items():
            if dtype not in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2") or len(sizes) != 2:
                raise Found(f"taken with {dtype} {sizes} for {name}")
            values = torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).float()
            if not torch.isfinite(values).all():
                raise Found(f"taken with NaN in {name}")
        if list(read.updates) != [(0, "q")]:
            raise Found("another update")

    place = adapter / "adapter_model.safetensors"
    seed = place.read_bytes()

    def read() -> Any:
        return read_adapter(adapter, FAMILIES["llama"], shape, "OLD")

    return Target([seed], place, read, check, header=True)


def plan_target(folder: Path) -> Target:
    """A plan's header."""
    import hostile
    import torch

    from lorasuite_fast import TransferPlan

    shape = model_shape()

    tensors, header = plan_parts(shape)
    names = {}
    body = b""
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        kind = "I64" if tensor.dtype == torch.int64 else "F32"
        names[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data

    def wrap(text: bytes) -> bytes:
        said = json.dumps({"__metadata__": {"plan": text.decode("utf-8", "surrogateescape")}, **names})
        return struct.pack("<Q", len(said)) + said.encode() + body

    def read() -> Any:
        found = TransferPlan.load(folder / "plan")
        found.summary()
        return found

    def check(data: bytes, read: Any) -> None:
        said = hostile.strict_json(split(data)[0]["__metadata__"]["plan"].encode("utf-8", "surrogatepass"))
        for role in ("old", "new"):
            for name, size in said[role]["shape"].items():
                if type(size) is not int or (name in "dhHL" and size != getattr(shape, name)):
                    raise Found(f"taken with {role} {name} {size!r}")
        mapping = {str(j): i for j, i in said["layers"].items()}
        if (mapping != {"0": 0, "1": 1} and mapping != {"0": 1, "1": 0}) or any(
            type(i) is not int for i in mapping.values()
        ):
            raise Found(f"taken with the layers {mapping}")
        if said["options"]["roles"] != ["q"] or said["options"]["method"] != "lstsq":
            raise Found("taken with other roles")
        if not 0 < said["facts"]["rms_ratio"] < float("inf"):
            raise Found("taken with another ratio")

    return Target([json.dumps(header).encode()], folder / "plan", read, check, wrap=wrap)


def texts_target(folder: Path, suffix: str, reader: Callable[[Path], Any]) -> Target:
    """Records of text, a reader of which is given."""
    path = folder / f"a{suffix}"
    lines = [{"text": "one"}, {"text": "two"}, {"prompt": "a", "completion": "b", "text": "c"}, {"text": "d"}]
    seed = json.dumps(lines) if suffix == ".json" else "\n".join(map(json.dumps, lines))

    def check(data: bytes, read: Any) -> None:
        text = data.decode("utf-8-sig")
        parts = [text] if suffix == ".json" else [line for line in text.split("\n") if line.strip()]
        values = [json.loads(part, parse_constant=float) for part in parts]
        values = values[0] if suffix == ".json" else values
        if not values or len(read) > len(values):
            raise Found("more than the file holds")

    return Target([seed.encode()], path, lambda: reader(path), check)


def tokenizer_target(folder: Path, name: str) -> Target:
    """Ids of tokenizer.json or vocab.json."""
    import hostile

    from lorasuite_fast.models import vocabulary

    vocab = {"a": 0, "b": 1, "c": 2}
    whole = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    seed = json.dumps(whole if name == "tokenizer.json" else vocab).encode()

    def check(data: bytes, read: Any) -> None:
        try:
            said = hostile.strict_json(data)
            ids = list((said["model"]["vocab"] if name == "tokenizer.json" else said).values())
        except (hostile.Invalid, KeyError, TypeError, AttributeError):
            return
        if all(type(i) is int for i in ids) and len(set(ids)) < len(ids):
            raise Found("two tokens of one id")

    def read() -> None:
        # The clock of a memory file system is too coarse to tell one input from the next.
        vocabulary._check_ids.cache_clear()
        vocabulary.check_ids(folder)

    return Target([seed], folder / name, read, check)


def work_target(folder: Path) -> Target:
    """What an interrupted run has noted of itself."""
    import hostile

    from lorasuite_fast.io.work import Work

    run = folder / "work/run.json"
    run.parent.mkdir()

    def read() -> Any:
        found = Work(run.parent, {"a": 1, "b": "c"})
        found.close()
        return found.record

    def check(data: bytes, read: Any) -> None:
        said = hostile.strict_json(data)
        if said["identity"] != {"a": 1, "b": "c"} or not all(said[key] > 0 for key in said if key != "identity"):
            raise Found("taken as the work of this run")

    seed = json.dumps({"identity": {"a": 1, "b": "c"}, "micro_batch": 4, "chunk_rows": 8}).encode()
    return Target([seed], run, read, check)


def text_readers() -> dict[str, tuple[str, Callable[[Path], Any]]]:
    """What reads texts, by name, with the end of the file's name."""
    from lorasuite_fast.evaluation.labelled import load_labelled
    from lorasuite_fast.text.calibration import load_examples
    from lorasuite_fast.text.samples import read_records

    return {
        "calibration": (".jsonl", lambda path: load_examples(path, 8, 0)),
        "labelled": (".jsonl", lambda path: load_labelled(path, 8, 0)),
        "records_jsonl": (".jsonl", read_records),
        "records_json": (".json", read_records),
    }


def chat_target(folder: Path) -> Target:
    """Turns of a chat, each of which may hold anything."""

    from lorasuite_fast.text.samples import SampleMaker, read_records

    from planted import tiny_tokenizer

    tokenizer = tiny_tokenizer(320)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }} {{ m.name }}>{{ m.content }}|{% endfor %}"
    make = SampleMaker(tokenizer, template="chat", max_tokens=64, completion_only=True)
    path = folder / "a.jsonl"

    def read() -> list[Any]:
        return [make(fields, where)[0] for where, fields in read_records(path)]

    def check(data: bytes, read: list[Any]) -> None:
        for sample in read:
            if len(sample.ids) > 64 or len(sample.ids) != len(sample.counted):
                raise Found("a sample of another length")
        for line in data.decode("utf-8-sig").split("\n"):
            if not line.strip():
                continue
            value = json.loads(line, parse_constant=float)
            turns = value.get("messages") if isinstance(value, dict) else None
            if turns is not None and not all(isinstance(turn["content"], str) for turn in turns):
                raise Found("taken with a turn that is no text")

    turns = [{"role": role, "content": text, "name": "n"} for role, text in (("user", "a b"), ("assistant", "c"))]
    lines = [{"messages": turns}, {"messages": turns * 3}, {"prompt": "a", "completion": "b"}]
    return Target(["\n".join(map(json.dumps, lines)).encode()], path, read, check)


def targets(folder: Path) -> dict[str, Callable[[], Target]]:
    """The readers by name; each prepares what lies beside its input."""
    alone = {
        "tensors": tensors_target,
        "config": config_target,
        "index": index_target,
        "adapter_config": adapter_config_target,
        "adapter_weights": adapter_weights_target,
        "plan": plan_target,
        "chat": chat_target,
        "work": work_target,
    }
    found: dict[str, Callable[[], Target]] = {name: partial(prepare, folder) for name, prepare in alone.items()}
    found["tokenizer_ids"] = partial(tokenizer_target, folder, "tokenizer.json")
    found["vocab_ids"] = partial(tokenizer_target, folder, "vocab.json")
    return found | {name: partial(texts_target, folder, *reader) for name, reader in text_readers().items()}


def plan_parts(shape: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and header of a plan between two models of one shape, for q alone."""
    import torch

    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Any:
        return torch.randn(*size, generator=draw)

    tensors = {"W_h": normal(shape.d, shape.d), "S": normal(shape.d, shape.d), "cka": torch.rand(shape.L, shape.L)}
    for j in range(shape.L):
        tensors |= {
            f"layers.{j}.heads.similarity": normal(shape.H, shape.H),
            f"layers.{j}.heads.match": torch.arange(shape.H),
            f"layers.{j}.q.blocks": normal(shape.H, shape.h, shape.h),
            f"layers.{j}.q.norm": torch.ones(1),
            f"layers.{j}.q.gain_old": torch.ones(shape.d),
            f"layers.{j}.q.gain_new": torch.ones(shape.d),
        }
    model = {"name": "m", "fingerprint": "0" * 32, "family": "llama", "shape": vars(shape)}
    options = {"calibration": "shipped", "max_tokens": 128, "layers": "cka", "similarity": "cka", "heads": "hungarian",
               "transfer": "embedding", "method": "lstsq", "roles": ["q"], "device": "cpu", "dtype": "float32",
               "seed": 0, "ridge": 0.0, "examples": 8}  # fmt: skip
    facts = {"same_vocabulary": True, "shared_tokens": 9, "untrained_tokens": 0, "rank": 8, "rms_ratio": 1.0,
             "embedding_factor": 1.0, "r2": 0.9, "r2_back": 0.9, "layer_r2": {"0": 0.5},
             "method_reason": "asked for"}  # fmt: skip
    header = {"format": "lorasuite-fast plan", "version": 2, "made_by": "x", "old": model, "new": model}
    return tensors, header | {"options": options, "layers": {"0": 0, "1": 1}, "facts": facts}


def fuzz(name: str, inputs: int, folder: Path, corpus: Path, result: Path) -> None:
    """Runs one reader in this process; does not return."""
    import atheris
    import torch

    torch.set_num_threads(1)
    import hostile
    import safetensors.torch
    import transformers  # noqa: F401  (what is not to be instrumented)

    with atheris.instrument_imports(include=["lorasuite_fast"]):
        from lorasuite_fast import LoraSuiteError

        target = targets(folder)[name]()
    allowed = tuple(
        os.path.realpath(place) for place in (folder, corpus, ROOT, sys.prefix, sys.base_prefix, torch.__path__[0])
    )
    listening = False
    real = lru_cache(maxsize=4096)(os.path.realpath)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = real(os.fsdecode(arguments[0]))
            if not path.startswith((*allowed, "/proc", "/dev/null")):
                raise Found(f"opened {path}")
        elif listening and event in ("pickle.find_class", "socket.connect", "subprocess.Popen", "os.system"):
            raise Found(event)

    sys.addaudithook(hear)
    for n, seed in enumerate(target.seeds):
        (corpus / f"raw{n}").write_bytes(b"\xff" + (b"" if len(seed) >= LONGEST else seed))
    for n in range(8):
        (corpus / f"edit{n}").write_bytes(bytes([0, 17 * n, 23 * n, 5 * n]))
    counts = {"read": 0, "refused": 0}
    slowest = 0.0
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()

    def one(data: bytes) -> None:
        nonlocal slowest, listening
        file = make(target, data)
        target.place.write_bytes(file)
        start = time.perf_counter()
        listening = True
        try:
            found = target.read()
        except LoraSuiteError as error:
            listening = False
            counts["refused"] += 1
            if not str(error).isprintable() or not str(error).strip():
                raise Found("a message of several lines, or none") from None
        else:
            listening = False
            counts["read"] += 1
            target.check(file, found)
        took = time.perf_counter() - start
        slowest = max(slowest, took)
        if took > SECONDS:
            raise Found(f"took {took:.1f} s")
        if sum(counts.values()) == inputs:
            facts = {"seconds": time.perf_counter() - begin, "slowest": slowest, **counts}
            facts["peak"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024
            result.write_text(json.dumps(facts))

    del hostile, safetensors
    options = [f"-runs={inputs}", f"-max_len={LONGEST}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", "-seed=1"]
    atheris.Setup([name, *options, f"-artifact_prefix={corpus.parent}/{name}-", str(corpus)], one)
    atheris.Fuzz()


def run(name: str, inputs: int, root: Path) -> dict[str, Any]:
    """One reader in a fresh process: its figures, with `crash` if it ended before its time."""
    folder, corpus, result = root / name / "files", root / name / "corpus", root / name / "result.json"
    for made in (folder, corpus):
        made.mkdir(parents=True)
    command = [sys.executable, __file__, "--inputs", str(inputs), "--one", name, "--root", str(root / name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    text = done.stderr + done.stdout
    facts: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    covered = re.findall(r"cov: (\d+) ft: (\d+)", text)
    facts["edges"], facts["features"] = map(int, covered[-1]) if covered else (0, 0)
    if not facts.get("seconds") or done.returncode:
        facts["crash"] = text[-3000:]
    return facts


def report(found: dict[str, dict[str, Any]], inputs: int) -> str:
    lines = [
        "# Hostile input",
        "",
        f"`python bench/fuzz.py`, {platform.machine()} CPU, one thread beside other work, atheris 3.0.0 (libFuzzer), "
        f"inputs of up to {LONGEST:,} bytes",
        "(one that is a few replaced values stands for a whole file). A reader may return what the strict oracle of",
        "tests/hostile.py also reads, or raise LoraSuiteError. Anything else would have ended the run: another "
        "exception,",
        f"{SECONDS} s for one input, {MEGABYTES:,} MiB, a file opened outside the folder, something unpickled or "
        "fetched.",
        "",
        "| reader | inputs | seconds | edges | features | slowest input | memory grew by | read | refused | found |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, f in found.items():
        if "crash" in f:
            lines.append(f"| {name} | – | – | {f['edges']} | {f['features']} | – | – | – | – | **ended early** |")
            continue
        lines.append(
            f"| {name} | {f['read'] + f['refused']:,} | {f['seconds']:,.0f} | {f['edges']:,} | {f['features']:,} | "
            f"{f['slowest'] * 1000:.0f} ms | {f['peak']:.0f} MiB | {f['read']:,} | {f['refused']:,} | nothing |"
        )
    wanted = f"Wanted: {INPUTS:,} inputs a reader and nothing found."
    lines += ["", wanted, "", "Found on the way by this and by tests/test_hostile.py, and mended:", ""]
    return "\n".join([*lines, *(f"- {text}" for text in MENDED), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--readers", help="some of them, by commas; prints, and writes no report")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print(
            "bench/fuzz.py needs the fuzzer atheris: pip install atheris==3.0.0 (Linux; no dependency)", file=sys.stderr
        )
        return 2
    if arguments.one:
        root = arguments.root
        fuzz(arguments.one, arguments.inputs, root / "files", root / "corpus", root / "result.json")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        names = arguments.readers.split(",") if arguments.readers else list(targets(Path(place)))
        found = {}
        for name in names:
            found[name] = run(name, arguments.inputs, Path(place))
            print(name, {key: value for key, value in found[name].items() if key != "crash"}, flush=True)
            if "crash" in found[name]:
                print(found[name]["crash"], flush=True)
    text = report(found, arguments.inputs)
    print(text)
    if not arguments.readers:
        REPORT.write_text(text)
    return int(any("crash" in facts for facts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
