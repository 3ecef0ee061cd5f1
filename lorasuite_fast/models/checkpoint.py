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

from ..errors import LoraSuiteError
from ..io.json_files import MOST_BYTES, MOST_TOKENIZER_BYTES, read_json
from ..io.notices import notice
from ..io.tensor_files import TensorFiles
from .families import Family, Projection, Shape, shape_of
from .family_table import family_of
from .loading import reason
from .pretrained import INDEX, SINGLE, check_weights_name, load_tokenizer, wrapper_prefix
from .text_config import quantisation, text_settings

_SAMPLE_BYTES = 256
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
_SNAPSHOT_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_TEMPLATES = "additional_chat_templates"
_READ_FILES = [*_SNAPSHOT_FILES, "*.md", _TEMPLATES]
_HUB_REPO = re.compile(r"(models|datasets|spaces)--.+")
_BOUNDED = {
    **dict.fromkeys(("config.json", "generation_config.json", "adapter_config.json", "chat_template.json"), MOST_BYTES),
    **dict.fromkeys(("tokenizer_config.json", "special_tokens_map.json", INDEX), MOST_BYTES),
    **dict.fromkeys(("tokenizer.json", "vocab.json", "added_tokens.json"), MOST_TOKENIZER_BYTES),
}
_UNUSED = re.compile(
    r"^(model\.)?(v_head|value_head|score|mtp)\."  # heads of rewards and classes, and of further tokens
    r"|\.(q|k|v|kv|prob|prob_output)(_cache)?_scale$|\.[kv]_proj\.(output|k|v)_scale$"  # of a quantised cache
)
_MOST_FURTHER = 64
"""Layers behind the last one that predict further tokens; they are left out."""
_ROWS = 4096
"""Of a table that are compared at once."""
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
    """Refuses a model or adapter folder with a file that is a link to somewhere else, no file, or far too long.

    A link may lead to something in the folder itself or in a hub cache: the configured one, or the one the folder lies
    in, where snapshots are links to `blobs` of the repository or of the whole cache.

    Raises:
        LoraSuiteError: a file that is read here leads out of the folder, or anywhere but to a file; or a file of JSON
            that transformers or PEFT would read whole is longer than any model's.
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
            most = _BOUNDED.get(entry.name)
            if most is not None and entry.stat().st_size > most:
                raise LoraSuiteError(
                    f"{path}: is longer than {most >> 20} MiB, which is no file of a model; fetch or save it again"
                )
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
        check_weights_name(self.config, self.folder)
        self._quantised = quantisation(self.config)
        self.config = text_settings(self.config, self.folder)
        self.shape: Shape = shape_of(self.config, self.family, str(self.folder))
        self._check_config()
        self._indexed: dict[str, str] = {}
        self.tensors = TensorFiles(self._files(), mapped=mapped)
        self._same_head: bool | None = None
        self._leave_out_what_is_not_the_models()
        # Some files are of the transformer alone, and lack its prefix; those of wrappers have one of several.
        tables = {prefix: f"{prefix}{self.family.embedding}.weight" for prefix in self.family.stored_prefixes}
        self.prefix = next((p for p, table in tables.items() if table in self.tensors.entries), self.family.prefix)
        self._check_tensors()

    def _files(self) -> list[Path]:
        index, single = self.folder / INDEX, self.folder / SINGLE
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
            self._indexed = {str(k): str(v) for k, v in weight_map.items()}
            return [self.folder / shard for shard in shards]
        pickles = sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth")])
        if pickles:
            raise LoraSuiteError(
                f"{self.folder}: holds only pickled weights ({pickles[0].name}), which are never opened; convert them "
                "with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER) in an environment you trust"
            )
        raise LoraSuiteError(f"{self.folder}: holds neither model.safetensors nor model.safetensors.index.json")

    def _leave_out_what_is_not_the_models(self) -> None:
        """Takes a wrapper's prefix off all names, and leaves out tensors transformers ignores; a notice says so."""
        held = self.tensors.entries
        if wrapper := wrapper_prefix(held):
            held = {name.removeprefix(wrapper): entry for name, entry in held.items()}
            self._indexed = {name.removeprefix(wrapper): shard for name, shard in self._indexed.items()}
            notice(
                f"{self.folder}: its tensors are named {wrapper}…, as a wrapper saves them; they are read without it"
            )
        further = self.config.get("num_nextn_predict_layers")
        further = further if self.family.experts and isinstance(further, int) and 0 < further < _MOST_FURTHER else 0
        ahead = tuple(f"{self.family.layer(self.shape.L + n)}." for n in range(further))
        unused = sorted(name for name in held if _UNUSED.search(name) or name.startswith(ahead))
        if unused:
            notice(
                f"{self.folder}: {len(unused)} tensors of its files are not part of the language model and are left "
                f"out ({unused[0]})"
            )
        for name in unused:
            self._indexed.pop(name, None)
        self.tensors.entries = {name: entry for name, entry in held.items() if name not in set(unused)}

    def _check_config(self) -> None:
        """What is read of the config beside the sizes."""
        where = self.folder / "config.json"
        epsilon = self.config.get(self.family.epsilon, 0.0)
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
            raise LoraSuiteError(f"{where}: {self.family.epsilon} must be a small number, found {epsilon!r}")
        factors = ["embedding_multiplier", "residual_multiplier", "logits_scaling"] if self.family.multipliers else []
        factors += ["logit_scale"] if self.family.logit_scale != 1.0 else []
        for key in factors:
            value = self.config.get(key, 1.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise LoraSuiteError(f"{where}: {key} must be a positive number, found {value!r}")
        biases = {p.bias for p in self.family.projections.values() if isinstance(p.bias, str)}
        for key in sorted({*biases, "tie_word_embeddings"}):
            if not isinstance(self.config.get(key), bool | None):
                raise LoraSuiteError(f"{where}: {key} must be true or false, found {self.config[key]!r}")

    def _has_bias(self, projection: Projection) -> bool:
        bias = projection.bias
        return bias if isinstance(bias, bool) else bool(self.config.get(bias, projection.bias_default))

    def _norm_tensors(self, norm: str) -> list[str]:
        return [f"{norm}.{part}" for part in self.family.stored_norm]

    def _expected(self) -> dict[str, tuple[int, ...] | None]:
        """Every tensor the family row and the config ask for; None where the shape is not ours to know."""
        family, shape = self.family, self.shape
        expected: dict[str, tuple[int, ...] | None] = {self.embedding_name: (shape.V, shape.d)}
        for norm in filter(None, (family.final_norm, family.embedding_norm)):
            expected |= dict.fromkeys((f"{self.prefix}{name}" for name in self._norm_tensors(norm)), (shape.d,))
        expected |= {f"{self.prefix}{name}": None for name in family.outside}
        for i in range(shape.L):
            layer = self.layer(i)
            for norm in family.norms():
                expected |= dict.fromkeys((f"{layer}.{name}" for name in self._norm_tensors(norm)), (shape.d,))
            for extra in family.extra:
                expected[f"{layer}.{extra}"] = None
            for projection in family.projections.values():
                out, into = family.module_shape(projection.module, shape)
                expected[f"{layer}.{projection.module}.weight"] = (into, out) if family.transposed else (out, into)
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
        for name, shard in self._indexed.items():
            if name not in entries or entries[name].file.name != shard:
                raise LoraSuiteError(
                    f"{self.folder / shard}: tensor {name} is missing, though the index names it there"
                )
        for name, shape in expected.items():
            if self._quantised and (
                name not in entries
                or entries[name].dtype not in _FLOATS
                or (shape is not None and entries[name].shape != shape)
            ):
                raise LoraSuiteError(
                    f"{self.folder}: its weights are quantised ({self._quantised}), which is not read here; pass the "
                    "16-bit model it was made from"
                )
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
        if not self.tied and not any(f"{head}.weight" in entries for head in self.family.head):
            raise LoraSuiteError(
                f"{self.folder}: tensor {self.family.head[0]}.weight is missing, and config.json does not tie the head "
                "to the embedding, so that transformers would use a random one; set tie_word_embeddings to true if it "
                "is tied, or fetch the model again"
            )
        optional = set(heads)
        optional |= {f"{self.layer(i)}.{name}" for i in range(self.shape.L) for name in self.family.optional}
        for name in entries if self.family.wrapper is None else self._text_tensors():
            if name in expected or name in optional or name.endswith(self.family.ignored):
                continue
            if not self._is_expert(name):
                raise LoraSuiteError(
                    f"{entries[name].file}: tensor {name} is not part of a {self.family.model_type} model of "
                    f"{self.shape.L} layers; check that config.json belongs to these weights"
                )

    def _is_expert(self, name: str) -> bool:
        """Whether a tensor belongs to the experts of one of the layers."""
        place = name.removeprefix(f"{self.prefix}{self.family.layers}.")
        layer, _, inside = place.partition(".")
        return place != name and layer.isdecimal() and int(layer) < self.shape.L and self.family.is_expert(inside)

    def _text_tensors(self) -> list[str]:
        """Names of the text model's tensors, of a wrapper that holds others as well."""
        return [name for name in self.tensors.entries if name.startswith(self.prefix)]

    @property
    def embedding_name(self) -> str:
        return f"{self.prefix}{self.family.embedding}.weight"

    @property
    def epsilon(self) -> float:
        """Of the norms, with transformers' defaults."""
        default = self.family.epsilon_default or (1e-5 if self.family.layer_norm else 1e-6)
        return float(self.config.get(self.family.epsilon, default))

    @property
    def embedding_factor(self) -> float:
        """What embeddings are multiplied by on their way into the residual stream."""
        stated = self.config.get("embedding_multiplier", 1.0) if self.family.multipliers else 1.0
        return float(stated) * (self.shape.d**0.5 if self.family.scaled_embedding else 1.0)

    @property
    def residual_factor(self) -> float:
        """What the outputs of o and down are multiplied by before they join the residual stream."""
        return float(self.config.get("residual_multiplier", 1.0)) if self.family.multipliers else 1.0

    @property
    def logit_factor(self) -> float:
        """What the head's outputs are multiplied by."""
        stated = self.config.get("logit_scale", self.family.logit_scale) if self.family.logit_scale != 1.0 else 1.0
        return float(stated) / float(self.config.get("logits_scaling", 1.0) if self.family.multipliers else 1.0)

    def layer(self, i: int) -> str:
        """What the names of a layer's tensors begin with, as they are stored."""
        return f"{self.prefix}{self.family.layers}.{i}"

    @property
    def tied(self) -> bool:
        """Whether config.json, or its family's default, ties the head to the embedding."""
        return bool(self.config.get("tie_word_embeddings", self.family.tied))

    def head(self, kind: str = "weight") -> str | None:
        """Name of the head's stored weight or bias; None where it is tied to the embedding, or has none.

        A stored weight that is not the embedding is the head even where config.json ties the two, as in transformers.
        """
        names = (f"{head}.{kind}" for head in self.family.head)
        stored = next((name for name in names if name in self.tensors.entries), None)
        return None if kind == "weight" and stored is not None and self.tied and self._is_embedding(stored) else stored

    def _is_embedding(self, name: str) -> bool:
        """Whether a stored table equals the embedding; where it does not, a notice says so."""
        if self._same_head is None:
            tables = [self.tensors.view(n) for n in (name, self.embedding_name)]
            chunks = range(0, len(tables[0]), _ROWS)
            self._same_head = all(
                torch.equal(*(table[start : start + _ROWS].float() for table in tables)) for start in chunks
            )
            self.tensors.release([name, self.embedding_name])
            if not self._same_head:
                notice(
                    f"{self.folder}: config.json ties the head to the embedding, but the files hold another ({name}), "
                    "which is used, as in transformers"
                )
        return self._same_head

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
        return load_tokenizer(self.folder, trust_remote_code=trust_remote_code)

    def __repr__(self) -> str:
        s = self.shape
        return (
            f"Checkpoint({self.name!r}, {self.family.model_type}, V={s.V}, d={s.d}, f={s.f}, L={s.L}, H={s.H}, "
            f"G={s.G}, h={s.h})"
        )
