"""A model folder in Hugging Face format, read tensor by tensor from the memory map."""

from __future__ import annotations

import hashlib
import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import LoraSuiteError
from .families import Family, Projection, Shape, family_of, shape_of
from .json_files import read_json
from .loading import loading, reason
from .tensor_files import TensorFiles
from .vocabulary import check_ids

_SAMPLE_BYTES = 256
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
_SNAPSHOT_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_TEMPLATES = "additional_chat_templates"
_READ_FILES = [*_SNAPSHOT_FILES, "*.md", _TEMPLATES]
_HUB_REPO = re.compile(r"(models|datasets|spaces)--.+")
_IMPLEMENTATIONS = tuple(f"{under}{of}_implementation" for under in ("", "_") for of in ("attn", "experts"))
_MOST_LABELS = 1 << 16
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def resolve_folder(source: str | os.PathLike[str], *, what: str) -> Path:
    """A local folder as it is, or a hub id through huggingface_hub (its cache and offline switch are honoured)."""
    text = os.fspath(source)
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise LoraSuiteError(f"{what} {text}: no such folder ({getattr(error, 'strerror', None) or error})") from None
    if is_folder:
        check_links(path)
        return path
    if exists:
        raise LoraSuiteError(f"{what} {text}: expected a folder or a hub id, found a file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise LoraSuiteError(f"{what} {text}: no such folder")
    try:
        found = Path(snapshot_download(text, allow_patterns=_SNAPSHOT_FILES))
    except HFValidationError:
        raise LoraSuiteError(f"{what} {text}: no such folder, and not a hub id of the form owner/name") from None
    except LocalEntryNotFoundError:
        raise LoraSuiteError(f"{what} {text}: not in the local hub cache, and the hub cannot be reached") from None
    except (HfHubHTTPError, OSError) as error:
        raise LoraSuiteError(f"{what} {text}: no such folder, and the hub answers: {reason(error)}") from None
    check_links(found)
    return found


def check_links(folder: Path) -> None:
    """Refuses a model or adapter folder with a file that is a symbolic link to somewhere else.

    A link may lead to something in the folder itself or in a hub cache: the configured one, or the one the folder lies
    in, where snapshots are links to `blobs` of the repository or of the whole cache.

    Raises:
        LoraSuiteError: a file that is read here leads out of the folder, or anywhere but to a file.
    """
    roots: list[Path] | None = None
    try:
        with os.scandir(folder) as found:
            entries = [e for e in found if any(fnmatch(e.name, pattern) for pattern in _READ_FILES)]
        for entry in entries:
            path = Path(entry.path)
            if entry.is_symlink():
                roots = _link_roots(folder) if roots is None else roots
                target = path.resolve()
                if not any(target.is_relative_to(root) for root in roots):
                    raise LoraSuiteError(
                        f"{path}: is a link to {target}, outside its folder; put the file itself there, or pass the "
                        "folder that holds it"
                    )
            if entry.name == _TEMPLATES and entry.is_dir():
                check_links(path)
            elif not (entry.is_file() or entry.is_dir()):
                raise LoraSuiteError(f"{path}: is not a regular file")
    except (OSError, RuntimeError) as error:
        raise LoraSuiteError(f"{folder}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _link_roots(folder: Path) -> list[Path]:
    """Where links of a folder may lead."""
    from huggingface_hub.constants import HF_HUB_CACHE

    here = folder.resolve()
    roots = [here, Path(HF_HUB_CACHE).expanduser().resolve()]
    for place in (here, *here.parents):
        if _HUB_REPO.fullmatch(place.name) and here.is_relative_to(place / "snapshots"):
            roots += [place / "blobs", place.parent / "blobs"]
    return roots


def check_config(config: Any, where: Path, *, trust_remote_code: bool) -> None:
    """Refuses what transformers would fetch, compile or allocate at a config's word.

    Raises:
        LoraSuiteError: it, or a config inside it, chooses an attention that may be fetched from the hub as code (and
            `trust_remote_code` is off), or more labels than memory is for.
    """
    if not isinstance(config, dict):
        return
    for key in () if trust_remote_code else _IMPLEMENTATIONS:
        chosen = config.get(key)
        for value in chosen.values() if isinstance(chosen, dict) else [chosen]:
            if not (value is None or value in ("eager", "sdpa")):
                raise LoraSuiteError(
                    f"{where}: {key} is {value!r}, for which transformers may fetch or compile code; take it out, or "
                    "pass --trust-remote-code"
                )
    labels = config.get("num_labels")
    if isinstance(labels, int) and labels > _MOST_LABELS:
        raise LoraSuiteError(f"{where}: num_labels is {labels}; more than {_MOST_LABELS} are not read")
    for inner in config.values():
        check_config(inner, where, trust_remote_code=trust_remote_code)


def open_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """A folder's tokenizer through transformers. Raises LoraSuiteError if there is none, or none that works."""
    from transformers import AutoTokenizer

    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise LoraSuiteError(f"{folder}: no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    check_ids(folder)
    with loading(f"{folder}: its tokenizer cannot be loaded"):
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        # Some of what is wrong with one shows only when it is used.
        found("a b")
        return found


class Checkpoint:
    """A model folder: config, sizes, family row, tensors and tokenizer.

    Nothing is read beyond the headers until a tensor is asked for, and no code from the folder ever runs.

    Args:
        source: a folder (config.json, safetensors in one file or sharded with an index, tokenizer) or a hub id.
        role: "old" or "new", for messages.
        mapped: tensors are views of a memory map; otherwise each access reads them into fresh memory.

    Raises:
        LoraSuiteError: for a folder that lacks something, an unknown family, tensors that do not fit the config.
    """

    def __init__(self, source: str | os.PathLike[str], role: str = "model", *, mapped: bool = True) -> None:
        self.folder = resolve_folder(source, what=f"{role.upper()} model")
        self.name = str(self.folder.resolve()) if Path(source).expanduser().is_dir() else os.fspath(source)
        self.role = role
        self.config = read_json(self.folder / "config.json")
        self.family: Family = family_of(self.config, str(self.folder))
        self.shape: Shape = shape_of(self.config, self.family, str(self.folder))
        self._check_config()
        self.tensors = TensorFiles(self._files(), mapped=mapped)
        # Some files are of the transformer alone, and lack its prefix.
        whole = f"{self.family.prefix}{self.family.embedding}.weight" in self.tensors.entries
        bare = f"{self.family.embedding}.weight" in self.tensors.entries
        self.prefix = "" if bare and not whole else self.family.prefix
        self._check_tensors()

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if single.exists():
            return [single]
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise LoraSuiteError(f"{index}: has no weight_map")
            shards = sorted(set(map(str, weight_map.values())))
            present = {path.name for path in self.folder.iterdir()}
            for shard in shards:
                if shard != Path(shard).name or shard in ("", ".", ".."):
                    raise LoraSuiteError(f"{index}: names the shard {shard!r}, which is outside the model folder")
                if shard not in present:
                    raise LoraSuiteError(f"{index}: names the shard {shard}, which is missing from {self.folder}")
            self._indexed: dict[str, str] = {str(k): str(v) for k, v in weight_map.items()}
            return [self.folder / shard for shard in shards]
        pickles = sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth")])
        if pickles:
            raise LoraSuiteError(
                f"{self.folder}: holds only pickled weights ({pickles[0].name}), which are never opened; convert them "
                "with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER) in an environment you trust"
            )
        raise LoraSuiteError(f"{self.folder}: holds neither model.safetensors nor model.safetensors.index.json")

    def _check_config(self) -> None:
        """What is read of the config beside the sizes."""
        where = self.folder / "config.json"
        epsilon = self.config.get(self.family.epsilon, 0.0)
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
            raise LoraSuiteError(f"{where}: {self.family.epsilon} must be a small number, found {epsilon!r}")
        biases = {p.bias for p in self.family.projections.values() if isinstance(p.bias, str)}
        for key in sorted({*biases, "tie_word_embeddings"}):
            if not isinstance(self.config.get(key), bool | None):
                raise LoraSuiteError(f"{where}: {key} must be true or false, found {self.config[key]!r}")

    def _has_bias(self, projection: Projection) -> bool:
        bias = projection.bias
        return bias if isinstance(bias, bool) else bool(self.config.get(bias, projection.bias_default))

    def _norm_tensors(self, norm: str) -> list[str]:
        return [f"{norm}.weight", f"{norm}.bias"] if self.family.layer_norm else [f"{norm}.weight"]

    def _expected(self) -> dict[str, tuple[int, ...] | None]:
        """Every tensor the family row and the config ask for; None where the shape is not ours to know."""
        family, shape = self.family, self.shape
        expected: dict[str, tuple[int, ...] | None] = {self.embedding_name: (shape.V, shape.d)}
        for norm in filter(None, (family.final_norm, family.embedding_norm)):
            expected |= dict.fromkeys((f"{self.prefix}{name}" for name in self._norm_tensors(norm)), (shape.d,))
        for i in range(shape.L):
            layer = self.layer(i)
            for norm in family.norms():
                expected |= dict.fromkeys((f"{layer}.{name}" for name in self._norm_tensors(norm)), (shape.d,))
            for extra in family.extra:
                expected[f"{layer}.{extra}"] = None
            for projection in family.projections.values():
                out, into = family.module_shape(projection.module, shape)
                expected[f"{layer}.{projection.module}.weight"] = (out, into)
                if self._has_bias(projection):
                    expected[f"{layer}.{projection.module}.bias"] = (out,)
        return expected

    def _check_tensors(self) -> None:
        entries = self.tensors.entries
        if len(entries) < self.shape.L:
            raise LoraSuiteError(
                f"{self.folder}: config.json gives it {self.shape.L} layers, its files hold {len(entries)} tensors in "
                "all; check that config.json belongs to these weights"
            )
        expected = self._expected()
        for name, shard in getattr(self, "_indexed", {}).items():
            if name not in entries or entries[name].file.name != shard:
                raise LoraSuiteError(
                    f"{self.folder / shard}: tensor {name} is missing, though the index names it there"
                )
        for name, shape in expected.items():
            if name not in entries:
                raise LoraSuiteError(
                    f"{self.folder}: tensor {name} is missing; a {self.family.model_type} checkpoint of "
                    f"{self.shape.L} layers must hold it"
                )
            found = entries[name]
            if shape is not None and found.shape != shape:
                raise LoraSuiteError(
                    f"{found.file}: tensor {name} is {list(found.shape)}, config.json makes it {list(shape)}"
                )
            if found.dtype not in _FLOATS:
                raise LoraSuiteError(
                    f"{found.file}: tensor {name} is stored as {found.dtype}; quantised weights must be converted to "
                    "bfloat16, float16 or float32 first"
                )
        heads: dict[str, tuple[int, ...]] = {
            f"{head}.weight": (self.shape.V, self.shape.d) for head in self.family.head
        }
        heads |= {f"{head}.bias": (self.shape.V,) for head in self.family.head}
        for name, shape in heads.items():
            if name in entries and (entries[name].shape != shape or entries[name].dtype not in _FLOATS):
                found = entries[name]
                raise LoraSuiteError(
                    f"{found.file}: tensor {name} is {found.dtype} {list(found.shape)}, config.json makes it "
                    f"{list(shape)} of a floating dtype"
                )
        optional = set(heads)
        optional |= {f"{self.layer(i)}.{name}" for i in range(self.shape.L) for name in self.family.optional}
        for name in entries:
            if name not in expected and name not in optional and not name.endswith(self.family.ignored):
                raise LoraSuiteError(
                    f"{entries[name].file}: tensor {name} is not part of a {self.family.model_type} model of "
                    f"{self.shape.L} layers; check that config.json belongs to these weights"
                )

    @property
    def embedding_name(self) -> str:
        return f"{self.prefix}{self.family.embedding}.weight"

    @property
    def epsilon(self) -> float:
        """Of the norms, with transformers' defaults."""
        return float(self.config.get(self.family.epsilon, 1e-5 if self.family.layer_norm else 1e-6))

    def layer(self, i: int) -> str:
        """What the names of a layer's tensors begin with, as they are stored."""
        return f"{self.prefix}{self.family.layers}.{i}"

    def head(self, kind: str = "weight") -> str | None:
        """Name of the head's stored weight or bias; None where it is tied to the embedding, or has none."""
        if kind == "weight" and self.config.get("tie_word_embeddings", False):
            return None
        names = (f"{head}.{kind}" for head in self.family.head)
        return next((name for name in names if name in self.tensors.entries), None)

    def module(self, layer: int, role: str) -> str:
        """Full module path of a projection, as PEFT and transformers name it."""
        return f"{self.family.layer(layer)}.{self.family.projections[role].module}"

    def check_finite(self, tensor: Tensor, name: str) -> None:
        """Raises LoraSuiteError if a tensor read from this checkpoint holds NaN or infinity."""
        if tensor.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
            raise LoraSuiteError(
                f"{self.tensors.entries[name].file}: tensor {name} holds NaN or infinity; fetch or save it again"
            )

    def layer_tensors(self, layer: int, roles: tuple[str, ...] | None = None) -> list[str]:
        """Names of a layer's tensors: all, or those of some projections and of the norms they read through."""
        prefix = f"{self.layer(layer)}."
        if roles is None:
            return [n for n in self.tensors.entries if n.startswith(prefix) and not n.endswith(self.family.ignored)]
        found = [self.family.projections[role] for role in roles if role in self.family.projections]
        wanted = {f"{name}." for p in found for name in (p.module, p.norm, p.after) if name}
        return [n for n in self.layer_tensors(layer) if n.removeprefix(prefix).startswith(tuple(wanted))]

    def fingerprint(self) -> str:
        """SHA-256 over the config, every tensor's name, dtype and shape, and 256 bytes from the middle of each tensor.

        The sample tells apart models that share a config and headers (a base model and its chat version).
        """
        digest = hashlib.sha256()
        config = {k: v for k, v in self.config.items() if k not in _VOLATILE_CONFIG}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name, entry in sorted(self.tensors.entries.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
            sample = bytearray(min(_SAMPLE_BYTES, entry.size))
            file = self.tensors.file(entry)
            file.read_into(memoryview(sample), entry.start + max(0, (entry.size - _SAMPLE_BYTES) // 2))
            digest.update(sample)
        return digest.hexdigest()[:32]

    def tokenizer(self, *, trust_remote_code: bool = False) -> Any:
        """The folder's tokenizer through transformers. Raises LoraSuiteError if there is none."""
        # transformers reads the config for it.
        check_config(self.config, self.folder / "config.json", trust_remote_code=trust_remote_code)
        return open_tokenizer(self.folder, trust_remote_code=trust_remote_code)

    def __repr__(self) -> str:
        s = self.shape
        return (
            f"Checkpoint({self.name!r}, {self.family.model_type}, V={s.V}, d={s.d}, f={s.f}, L={s.L}, H={s.H}, "
            f"G={s.G}, h={s.h})"
        )
