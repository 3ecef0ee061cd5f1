"""Whether an adapter does anything on a model: the silent no-op, found before anybody serves it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..adapters.adapter_config import CONFIG, WEIGHTS
from ..adapters.adapter_folder import open_folder
from ..adapters.peft_check import empty_model
from ..adapters.peft_loading import check_readable, peft
from ..adapters.readers import AdapterCheck, Contents, llama_cpp, sglang, vllm
from ..config import Runtime
from ..errors import LoraSuiteError
from ..io.json_files import read_json
from ..io.tensor_files import read_header
from ..models.checkpoint import resolve_folder

if TYPE_CHECKING:
    from torch import nn


def check(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    runtime: Runtime | None = None,
) -> AdapterCheck:
    """Tells what PEFT, vLLM, llama.cpp and SGLang would do with an adapter on a model; no weight is read.

    PEFT's own loader is asked. For the others the names and settings are compared with the rules of their sources:
    `lorasuite_fast.adapters.readers` names them.

    Args:
        model: Model folder or hub id, of any family transformers builds; its config.json alone is read.
        adapter: PEFT folder, made by any tool.
        runtime: `trust_remote_code` for a model whose code lies in its folder.

    Returns:
        Active modules, tensors that are lost and what is ignored, for each program.

    Raises:
        LoraSuiteError: the model cannot be built, or the adapter's files are missing, damaged or no LoRA.
    """
    runtime = runtime or Runtime()
    folder = open_folder(adapter)
    config = read_json(folder / CONFIG)
    check_readable(config, folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise LoraSuiteError(f"{folder}: {WEIGHTS} is missing; save the adapter with safe_serialization=True")
    shapes = {name: tuple(entry["shape"]) for name, entry in read_header(folder / WEIGHTS).items()}
    contents = Contents(config, shapes)
    built = empty_model(resolve_folder(model, what="MODEL"), trust_remote_code=runtime.trust_remote_code)
    paths = {name for name, module in built.named_modules() if _weighted(module)}
    tied = bool(getattr(built.config, "tie_word_embeddings", False))
    # The servers first: PEFT puts modules of its own into the model.
    servers = (vllm(contents, paths), llama_cpp(contents, paths, tied=tied), sglang(contents, paths))
    readers = (peft(contents, built), *servers)
    return AdapterCheck.of(os.fspath(model), os.fspath(adapter), contents, readers)


def _weighted(module: nn.Module) -> bool:
    """Whether a module is a linear map or an embedding of any class."""
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2
