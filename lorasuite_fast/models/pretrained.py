"""What transformers loads of a model folder: its config, its tokenizer, and the bare model.

Every `from_pretrained` of the package stands here. Nothing is fetched, nothing pickled is opened, and code of the
folder runs only with `trust_remote_code`. An adapter that lies in a model folder is left out, though transformers would
make it part of the model. A config that names another file of weights than the one read elsewhere is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ..errors import LoraSuiteError
from ..io.json_files import read_json
from ..io.notices import notice
from ..io.tensor_files import read_header
from .family_table import WRAPPERS
from .loading import loading
from .vocabulary import check_ids

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_IMPLEMENTATIONS = tuple(f"{under}{of}_implementation" for under in ("", "_") for of in ("attn", "experts"))
_MOST_LABELS = 1 << 16
_NO_ADAPTER = {"subfolder": CONFIG}
"""Where transformers is told to look for an adapter: below a regular file there is nothing."""


_WRAPPERS = re.compile(r"(?:_orig_mod\.|module\.)+")


def wrapper_prefix(names: Collection[str]) -> str:
    """What torch.compile or a data-parallel wrapper put in front of every name of a checkpoint; empty if nothing."""
    first = _WRAPPERS.match(next(iter(names), ""))
    return first[0] if first and all(name.startswith(first[0]) for name in names) else ""


def _stored_names(folder: Path) -> list[str]:
    """The names of a folder's tensors, from the file or the index that is read."""
    if (folder / SINGLE).exists():
        return list(read_header(folder / SINGLE))
    return list(read_json(folder / INDEX).get("weight_map") or {}) if (folder / INDEX).exists() else []


def check_weights_name(config: dict[str, Any], folder: Path) -> None:
    """Refuses a config whose `transformers_weights` names other weights than those that are read here.

    Raises:
        LoraSuiteError: naming both files.
    """
    named = config.get("transformers_weights")
    read = SINGLE if (folder / SINGLE).exists() else INDEX
    if named is not None and named != read:
        raise LoraSuiteError(
            f"{folder / CONFIG}: transformers_weights is {named!r}, so that transformers would load other weights than "
            f"{read}, which is read here; take it out, or save the model again"
        )


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
                    "pass `trust_remote_code=True`"
                )
    labels = config.get("num_labels")
    if isinstance(labels, int) and labels > _MOST_LABELS:
        raise LoraSuiteError(f"{where}: num_labels is {labels}; more than {_MOST_LABELS} are not read")
    for inner in config.values():
        check_config(inner, where, trust_remote_code=trust_remote_code)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's config. Raises LoraSuiteError for one that is missing, refused or not understood."""
    from transformers import AutoConfig

    config = read_json(folder / CONFIG)
    check_config(config, folder / CONFIG, trust_remote_code=trust_remote_code)
    check_weights_name(config, folder)
    what = f"{folder}: transformers cannot read this config"
    with loading(what, trust_remote_code=trust_remote_code):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def model_class(config: Any) -> Any:
    """The auto class that makes a config's language model: with a head, and of a wrapper with its other parts."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if config.model_type in WRAPPERS else AutoModelForCausalLM


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises LoraSuiteError if there is none, or it cannot be loaded or used."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise LoraSuiteError(f"{folder}: no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    check_ids(folder)
    if (folder / CONFIG).exists():
        # transformers reads it for the tokenizer.
        check_config(read_json(folder / CONFIG), folder / CONFIG, trust_remote_code=trust_remote_code)
    with loading(f"{folder}: its tokenizer cannot be loaded", trust_remote_code=trust_remote_code):
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        # Some of what is wrong with one shows only when it is used.
        found("a b")
        return found


def load_bare_model(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The folder's causal language model without any adapter, on the CPU.

    Raises:
        LoraSuiteError: for what transformers cannot load, or weights that are missing from the folder.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    wrapper = wrapper_prefix(_stored_names(folder))
    renamed = {"key_mapping": {f"^{re.escape(wrapper)}": ""}} if wrapper else {}
    with loading(f"{folder}: transformers cannot load this model", trust_remote_code=trust_remote_code):
        # safetensors only: nothing that is pickled is ever opened.
        model, info = model_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            adapter_kwargs=dict(_NO_ADAPTER),
            output_loading_info=True,
            **renamed,
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LoraSuiteError(
            f"{folder}: holds an adapter as well as a model ({_ADAPTER}), and transformers loads both as one; put the "
            "adapter into a folder of its own"
        )
    if (folder / _ADAPTER).exists():
        notice(f"{folder}: holds an adapter as well ({_ADAPTER}); the model is read without it")
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise LoraSuiteError(
            f"{folder}: {len(info['missing_keys'])} weights of this model are missing from its files ({first})"
        )
    return model
