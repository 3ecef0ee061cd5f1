"""What programs that serve adapters do with one, by its names and its configuration.

PEFT is asked itself (`peft_loading`). The others are not installed here; their rules are those of their sources, as of
November 2026, and what these do not settle is left out:

- vLLM: `vllm/lora/peft_helper.py`, `lora_model.py` and `utils.py`, https://docs.vllm.ai/en/latest/api/vllm/lora/.
- llama.cpp: `convert_lora_to_gguf.py`, https://github.com/ggml-org/llama.cpp, and its pull request 8332 for the scale.
- SGLang: `python/sglang/srt/lora/`, https://github.com/sgl-project/sglang.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

PREFIX = "base_model.model."
SHOWN = 20
"""Keys a result names; the rest is counted."""
VLLM_RANK = 16
"""`max_lora_rank` of vLLM where the user does not set it."""
_KEY = re.compile(
    r"(?P<module>.+?)\.lora_(?P<part>(?:A|B|magnitude_vector)(?:\.weight)?|E|embedding_A|embedding_B)", re.DOTALL
)
_PAIR = ("A.weight", "B.weight", "embedding_A", "embedding_B")
_LAYER = re.compile(r"layers\.(\d+)\.")
_BASE_EMBEDDINGS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.", ""))


@dataclass(frozen=True)
class Reader:
    """What one program makes of an adapter.

    Attributes:
        name: Of the program.
        active: Modules of the model that would compute with the adapter.
        lost: Number of the file's tensors that are not read; for servers, those of experts are not counted.
        lost_keys: Names of such tensors, 20 at most.
        refused: Why the program does not load the adapter at all; None where it does.
        notes: Settings of the adapter that are ignored, and conditions.
    """

    name: str
    active: int
    lost: int
    lost_keys: tuple[str, ...]
    refused: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AdapterCheck:
    """What an adapter would do on a model, program by program.

    Attributes:
        model: The model folder or hub id, as given.
        adapter: The adapter's folder, as given.
        modules: Number of modules the file has tensors for.
        readers: PEFT first, then vLLM, llama.cpp and SGLang.
        unread: Number of tensors that none of them reads.
        unread_keys: Names of such tensors, 20 at most.
    """

    model: str
    adapter: str
    modules: int
    readers: tuple[Reader, ...]
    unread: int
    unread_keys: tuple[str, ...]

    @classmethod
    def of(cls, model: str, adapter: str, contents: Contents, readers: Iterable[Reader]) -> AdapterCheck:
        """From programs whose lost keys are all there."""
        found = tuple(readers)
        unread = sorted(set(contents.shapes).intersection(*(reader.lost_keys for reader in found)))
        short = tuple(replace(reader, lost_keys=reader.lost_keys[:SHOWN]) for reader in found)
        return cls(model, adapter, len(contents.parts), short, len(unread), tuple(unread[:SHOWN]))

    @property
    def fine(self) -> bool:
        """Whether PEFT reads every tensor, and at least one module is active."""
        peft = self.readers[0]
        return peft.refused is None and not peft.lost and peft.active > 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, what `--json` prints."""
        return asdict(self) | {"fine": self.fine}

    def __repr__(self) -> str:
        active = ", ".join(f"{reader.name} {reader.active}" for reader in self.readers)
        return f"AdapterCheck({'fine' if self.fine else 'not fine'}, {self.modules} modules, active: {active})"


@dataclass(frozen=True)
class Contents:
    """An adapter as its files have it: the configuration, and the tensors' shapes by their names."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def parts(self) -> dict[str, dict[str, str]]:
        """Module as the file spells it -> part (`A.weight`, ...) -> name of the tensor."""
        found: dict[str, dict[str, str]] = {}
        for key in self.shapes:
            if match := _KEY.fullmatch(key):
                found.setdefault(match["module"], {})[match["part"]] = key
        return found

    @cached_property
    def modules(self) -> dict[str, str]:
        """Modules with both factors, without PEFT's prefix -> as the file spells them."""
        complete = (m for m, parts in self.parts.items() if sum(part in _PAIR for part in parts) == 2)
        return {module.replace(PREFIX, ""): module for module in complete}

    @cached_property
    def others(self) -> list[str]:
        """Tensors that are no factor of a LoRA."""
        paired = {key for parts in self.parts.values() for part, key in parts.items() if part in _PAIR}
        return [key for key in self.shapes if key not in paired]

    @cached_property
    def rank(self) -> int:
        """The largest rank among the factors."""
        sizes = [
            self.shapes[key][0]
            for parts in self.parts.values()
            for part, key in parts.items()
            if part in ("A.weight", "embedding_A") and self.shapes[key]
        ]
        return max(sizes, default=0)

    def differs(self, patterns: str, default: str) -> bool:
        """Whether a pattern of the configuration gives some module another value than all."""
        given = self.config.get(patterns)
        return isinstance(given, dict) and any(value != self.config.get(default) for value in given.values())


def reader(name: str, contents: Contents, active: Collection[str], refused: str | None, notes: list[str]) -> Reader:
    """A program that reads the factors of some modules; of experts, where it loads the adapter, nothing is known."""
    kept = set() if refused else {contents.modules[module] for module in active}
    read = {key for module in kept for part, key in contents.parts[module].items() if part in _PAIR}
    lost = sorted(key for key in contents.shapes if key not in read and (refused or ".experts" not in key))
    return Reader(name, len(kept), len(lost), tuple(lost), refused, tuple(notes))


def vllm(contents: Contents, paths: Collection[str]) -> Reader:
    """vLLM: refuses a tensor by the last part of its name, and looks a module up by the whole of it.

    Args:
        contents: the adapter.
        paths: the model's modules with weights, as transformers' class has them.
    """
    config, notes = contents.config, []
    ends = {path.rpartition(".")[2] for path in paths}
    dense = [module for module in contents.modules if ".experts" not in module]
    strange = [module for module in dense if module.rpartition(".")[2] not in ends]
    others = [key for key in contents.others if not key.endswith(_BASE_EMBEDDINGS)]
    refused = None
    if config.get("peft_type") != "LORA":
        refused = f"{config.get('peft_type')} is not LoRA"
    elif config.get("use_dora"):
        refused = "DoRA is not supported"
    elif config.get("modules_to_save"):
        refused = "modules_to_save is not supported"
    elif config.get("bias", "none") != "none":
        refused = "trained biases are not supported"
    elif others:
        refused = f"{others[0]} is no tensor of a LoRA"
    elif strange:
        refused = f"the model has no module called {strange[0].rpartition('.')[2]}"
    if contents.rank > VLLM_RANK:
        notes.append(f"needs --max-lora-rank {contents.rank} or more; the default is {VLLM_RANK}")
    if contents.differs("rank_pattern", "r") or contents.differs("alpha_pattern", "lora_alpha"):
        notes.append("scales every module by lora_alpha and r; rank_pattern and alpha_pattern are ignored")
    if len(dense) < len(contents.modules):
        notes.append("experts depend on the model's class and are not counted here")
    if any(module.endswith(("embed_tokens", "lm_head")) for module in dense):
        notes.append("reads embed_tokens and lm_head only where the model's class lists them in embedding_modules")
    texts = {_as_text(path) for path in paths if _as_text(path) != path}
    if any(module not in paths and _as_text(module) in texts for module in dense):
        notes.append(
            "maps names of multimodal classes by tables of its own; transformers' names alone are counted here"
        )
    return reader("vLLM", contents, [module for module in dense if module in paths], refused, notes)


def llama_cpp(contents: Contents, paths: Collection[str], *, tied: bool) -> Reader:
    """llama.cpp: its converter stops at a tensor it does not know, and keeps lora_alpha alone of the settings.

    Args:
        contents: the adapter.
        paths: the model's modules with weights, as transformers' class has them.
        tied: whether the model's head is its embedding.
    """
    known = {_as_text(path) for path in paths}
    dense = [module for module in contents.modules if ".experts" not in module]
    active = [module for module in dense if _as_text(module) in known]
    unknown = [module for module in dense if _as_text(module) not in known]
    others = [key for key in contents.others if ".base_layer.weight" not in key and "norm" not in key]
    refused, notes = None, []
    if others:
        refused = f"the converter stops at {others[0]}, which is no lora_A or lora_B"
    elif unknown:
        refused = f"the converter stops at {unknown[0]}, which is no module of the model"
    elif tied and "lm_head" in dense:
        refused = "the converter stops at lm_head, which this model shares with its embedding"
    if contents.config.get("use_rslora"):
        notes.append("scales by lora_alpha / rank; use_rslora is ignored")
    if contents.differs("alpha_pattern", "lora_alpha"):
        notes.append("keeps one lora_alpha; alpha_pattern is ignored")
    if len(dense) < len(contents.modules):
        notes.append("experts depend on the model's class and are not counted here")
    return reader("llama.cpp", contents, active, refused, notes)


def sglang(contents: Contents, paths: Collection[str]) -> Reader:
    """SGLang: finds a module by the number behind `layers.` and by its name, whatever stands in front.

    Args:
        contents: the adapter.
        paths: the model's modules with weights, as transformers' class has them.
    """
    config, notes = contents.config, []
    places = {place for path in paths if (place := _place(path)) is not None}
    dense = [module for module in contents.modules if ".experts" not in module]
    targets = config.get("target_modules")
    refused = None
    if config.get("peft_type") != "LORA":
        refused = f"{config.get('peft_type')} is not LoRA"
    elif config.get("use_dora"):
        refused = "DoRA is not supported"
    elif contents.differs("rank_pattern", "r") or contents.differs("alpha_pattern", "lora_alpha"):
        refused = "rank_pattern and alpha_pattern are not supported"
    elif isinstance(targets, str) and targets not in ("all", "all-linear"):
        refused = "target_modules is a pattern; a list of names is needed"
    if config.get("use_rslora"):
        notes.append("scales by lora_alpha / r; use_rslora is ignored")
    if len(dense) < len(contents.modules):
        notes.append("experts depend on the model's class and are not counted here")
    found = reader("SGLang", contents, [module for module in dense if _place(module) in places], refused, notes)
    if refused or not contents.others:
        return found
    unsure = f"what it does with tensors that are no factors of a LoRA is not known here, as {contents.others[0]}"
    lost = tuple(key for key in found.lost_keys if key not in contents.others)
    return replace(found, lost=len(lost), lost_keys=lost, notes=(*found.notes, unsure))


def _as_text(module: str) -> str:
    """A module of a multimodal class by the name it has in the text model alone."""
    for prefix, instead in _TEXT_PREFIXES:
        if module.startswith(prefix):
            return instead + module.removeprefix(prefix)
    return module


def _place(module: str) -> tuple[int | None, str] | None:
    """Layer and name of a module; the layer is None for embedding and head; None for what is neither."""
    layer, name = _LAYER.search(module), module.rpartition(".")[2]
    if layer is not None:
        return int(layer[1]), name
    return (None, name) if name in ("embed_tokens", "lm_head") else None
