"""What PEFT would load of an adapter: its own loader tries, with tensors and a model that have no memory."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LoraSuiteError
from .adapter_config import CONFIG, check_imports, check_matching, cleared
from .readers import PREFIX, Contents, Reader

_KINDS = ("LORA", "ADALORA")
_NAME = "default"


def check_readable(config: Mapping[str, Any], where: Path) -> None:
    """Refuses a configuration at whose word PEFT would import a module, match for minutes or build another model.

    Raises:
        LoraSuiteError: naming the key.
    """
    check_imports(dict(config), where)
    if config.get("peft_type") not in _KINDS:
        raise LoraSuiteError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA and ADALORA are checked")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise LoraSuiteError(f"{where}: task_type is {config['task_type']!r}; only CAUSAL_LM adapters are checked")
    if config.get("layer_replication"):
        raise LoraSuiteError(f"{where}: adapters with layer_replication are not checked; they repeat layers of a model")
    check_matching(dict(config), where)


def peft(contents: Contents, model: nn.Module) -> Reader:
    """What PEFT would load.

    Args:
        contents: the adapter, checked by `check_readable`.
        model: on the meta device; PEFT's modules are put into it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _loaded(contents, model)
    except OSError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        # PyTorch names the first tensor that does not fit in the second line.
        fault = " ".join(lines[:2])[:300] or type(error).__name__
        lost = sorted(contents.shapes)
        return Reader("PEFT", 0, len(lost), tuple(lost), fault, ())


def _loaded(contents: Contents, model: nn.Module) -> Reader:
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    # The stored factors replace whatever an initialisation would compute from weights that are not here.
    config = cleared(dict(contents.config)) | {"init_lora_weights": False, "inference_mode": True}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(config))
        made = get_peft_model(model, PeftConfig.from_pretrained(folder), low_cpu_mem_usage=True)
    empty = {key: torch.empty(shape, device="meta") for key, shape in contents.shapes.items()}
    result = set_peft_model_state_dict(made, empty, low_cpu_mem_usage=True)
    places = [name for name, module in made.named_modules() if isinstance(module, LoraLayer)]
    missing = [key for key in result.missing_keys if ".lora_" in key]
    without = {key.partition(".lora_")[0] for key in missing}
    active = [name for name in places if name not in without]
    stored = {_plain(key): key for key in contents.shapes}
    lost = sorted({stored.get(_plain(key), key) for key in result.unexpected_keys})
    notes = []
    if len(active) < len(places):
        first = next(name for name in places if name in without).removeprefix(PREFIX)
        notes.append(
            f"the configuration names {len(places) - len(active)} modules without tensors in the file, as {first}"
        )
    return Reader("PEFT", len(active), len(lost), tuple(lost), None, tuple(notes))


def _plain(key: str) -> str:
    """A tensor's name without the adapter's, which PEFT puts into those it knows."""
    return key.replace(f".{_NAME}.", ".").removesuffix(f".{_NAME}").removesuffix(".weight")
