"""A PEFT LoRA folder: read with every doubt resolved, written so that PEFT loads it without a surprise."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .checkpoint import Checkpoint, read_json
from .errors import LoraSuiteError
from .families import FAMILIES, Family, Shape
from .projection import Factors, balanced
from .tensor_files import TensorFiles

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>A|B|E|magnitude_vector)(\.weight)?")
_PARTS = {"LORA": {"A", "B"}, "DORA": {"A", "B", "magnitude_vector"}, "ADALORA": {"A", "B", "E"}}
_ALLOCATION = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_PLAIN_INITS = (True, False, None, "gaussian", "eva")
_UNSUPPORTED = {
    "fan_in_fan_out": "adapters with fan_in_fan_out",
    "lora_bias": "adapters with lora_bias",
    "modules_to_save": "adapters that save whole modules (modules_to_save)",
    "trainable_token_indices": "adapters with trainable tokens",
    "target_parameters": "adapters on bare parameters (target_parameters)",
    "layer_replication": "adapters with layer_replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA adapters",
}


@dataclass(frozen=True)
class Update:
    """One module's update: the raw factors, its alpha, and its scale s (`ΔW = s B A`).

    `magnitude` (out,) is DoRA's: the adapted weight is `diag(magnitude / |W + ΔW|) (W + ΔW)`, norms taken by row.
    """

    factors: Factors
    alpha: float
    rslora: bool
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.factors.a.shape[0]

    @property
    def scale(self) -> float:
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))


@dataclass(frozen=True)
class Adapter:
    """Updates by (layer, role), and the configuration they came with."""

    where: str
    config: dict[str, Any]
    updates: dict[tuple[int, str], Update]

    @property
    def roles(self) -> tuple[str, ...]:
        present = {role for _, role in self.updates}
        return tuple(role for role in ("q", "k", "v", "o", "gate", "up", "down") if role in present)

    @property
    def dora(self) -> bool:
        return bool(self.config.get("use_dora"))

    @property
    def base(self) -> str | None:
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None


def _pattern_value(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the module's path or an ending of it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _number(value: Any, name: str, where: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value == value:
        raise LoraSuiteError(f"{where}: {name} must be a number, found {value!r}")
    return float(value)


def _check_config(config: dict[str, Any], where: Path) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise LoraSuiteError(f"{where}: peft_type is {kind!r}; only LORA and ADALORA adapters can be migrated")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise LoraSuiteError(f"{where}: {what} are not supported ({key} is set)")
    if config.get("bias", "none") != "none":
        raise LoraSuiteError(f"{where}: adapters that train biases are not supported (bias is {config['bias']!r})")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise LoraSuiteError(
            f"{where}: init_lora_weights {config['init_lora_weights']!r} changes the base weights; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion first"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise LoraSuiteError(f"{where}: {key} must be an object, found {patterns!r}")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise LoraSuiteError(
                    f"{where}: {key} has the pattern {pattern!r}, which is no regex ({error})"
                ) from None
    name = "init_r" if kind == "ADALORA" else "r"
    rank = _number(config.get(name), name, where)
    if rank < 1 or rank != int(rank):
        raise LoraSuiteError(f"{where}: rank {name} is {config.get(name)!r}; it must be a positive integer")


def _place_of(module: str, family: Family, where: Path) -> tuple[int, str]:
    """Layer, and module path inside it."""
    match = re.fullmatch(re.escape(f"{family.prefix}{family.layers}.") + r"(\d+)\.(.+)", module)
    if match is None or match[2] not in family.modules():
        known = ", ".join(family.modules())
        raise LoraSuiteError(
            f"{where}: module {module} is not one a {family.model_type} adapter can be migrated on; known: {known}"
        )
    return int(match[1]), match[2]


def read_adapter(source: str | os.PathLike[str], family: Family, shape: Shape, base: str) -> Adapter:
    """Reads a PEFT LoRA folder and checks every factor against the model it is said to belong to.

    AdaLoRA comes back as the plain LoRA it amounts to: its singular values are multiplied into B, ranks it pruned are
    gone, and alpha gives its scale, lora_alpha / init_r.

    Args:
        source: the folder. family, shape, base: of the old model, the name for messages.

    Raises:
        LoraSuiteError: not a folder, kinds that are not supported, unknown or unpaired tensors, ranks or shapes that do
            not fit, NaN or infinity.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise LoraSuiteError(f"ADAPTER {source}: no such folder")
    config = read_json(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        pickles = [p.name for p in folder.glob("adapter_model.*")]
        hint = f"; {pickles[0]} is never opened, save it with safe_serialization=True" if pickles else ""
        raise LoraSuiteError(f"{folder}: {WEIGHTS} is missing{hint}")
    files = TensorFiles([folder / WEIGHTS])
    found: dict[str, dict[str, Tensor]] = {}
    for name in files.entries:
        key = _KEY.fullmatch(name)
        if key is None:
            raise LoraSuiteError(f"{folder / WEIGHTS}: tensor {name} is not a lora_A or lora_B weight; not supported")
        # A copy, so that nothing points into the file when it is closed or replaced.
        found.setdefault(key["module"], {})[key["which"]] = files.view(name).clone()
    files.close()
    if not found:
        raise LoraSuiteError(f"{folder / WEIGHTS}: holds no LoRA weights")
    kind = "DORA" if config.get("use_dora") else str(config["peft_type"])
    updates: dict[tuple[int, str], Update] = {}
    for module, parts in found.items():
        layer, inside = _place_of(module, family, folder / WEIGHTS)
        for missing in sorted(_PARTS[kind] - set(parts)):
            raise LoraSuiteError(f"{folder / WEIGHTS}: {module}.{_stored_name(missing, kind)} is missing")
        for further in sorted(set(parts) - _PARTS[kind]):
            raise LoraSuiteError(f"{folder / WEIGHTS}: {module}.lora_{further} does not belong to a {kind} adapter")
        if layer >= shape.L:
            raise LoraSuiteError(
                f"{folder / WEIGHTS}: {module} is beyond the {shape.L} layers of {base}; is this adapter's base OLD?"
            )
        sizes = family.module_shape(inside, shape)
        if kind == "ADALORA" and parts["A"].shape[0] == 0:
            continue
        _check_factors(module, parts, sizes, kind, folder / WEIGHTS, base)
        update = _update_of(module, parts, config, kind, folder)
        for role in family.sharing(inside):
            rows = family.rows(role, shape)
            updates[layer, role] = update if rows is None else _with_rows(update, rows)
    if not updates:
        raise LoraSuiteError(f"{folder / WEIGHTS}: every rank is pruned; there is nothing to migrate")
    if kind == "ADALORA":
        config = {name: value for name, value in config.items() if name not in _ALLOCATION}
        largest = max(updates.values(), key=lambda update: update.rank)
        config |= {"peft_type": "LORA", "r": largest.rank, "lora_alpha": largest.alpha, "rank_pattern": {}}
    return Adapter(str(folder), config, dict(sorted(updates.items())))


def _update_of(module: str, parts: dict[str, Tensor], config: dict[str, Any], kind: str, folder: Path) -> Update:
    """One module's update, its rank checked against the configuration."""
    rank, where = parts["A"].shape[0], folder / CONFIG
    patterns = config.get("rank_pattern") or {}
    if kind == "ADALORA":
        kept = next((mask for name, mask in patterns.items() if f"{module}." in f"{name}."), None)
        if kept is not None and (not isinstance(kept, list) or sum(map(bool, kept)) != rank):
            raise LoraSuiteError(f"{folder / WEIGHTS}: {module} has rank {rank}, unlike the rank_pattern of {CONFIG}")
        alpha = _number(config.get("lora_alpha"), "lora_alpha", where)
        # As PEFT has it: the rank the training began with, and a small number against division by zero.
        scale = (alpha if alpha > 0 else rank) / (config["init_r"] + 1e-5)
        return Update(Factors(parts["B"] * parts["E"].T, parts["A"]), scale * rank, rslora=False)
    declared = _number(_pattern_value(patterns, module, config["r"]), "rank", where)
    if declared != rank:
        raise LoraSuiteError(f"{folder / WEIGHTS}: {module} has rank {rank}, {CONFIG} gives it {declared:g}")
    alpha = _number(
        _pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha")), "lora_alpha", where
    )
    rslora = bool(config.get("use_rslora"))
    return Update(Factors(parts["B"], parts["A"]), alpha, rslora, parts.get("magnitude_vector"))


def _with_rows(update: Update, rows: Tensor) -> Update:
    b, a = update.factors
    magnitude = None if update.magnitude is None else update.magnitude[rows]
    return replace(update, factors=Factors(b[rows], a), magnitude=magnitude)


def _stored_name(part: str, kind: str) -> str:
    """What PEFT calls a part in the file, behind the module's path."""
    return f"lora_{part}.weight" if part in "AB" and kind != "ADALORA" else f"lora_{part}"


def _check_factors(
    module: str, parts: dict[str, Tensor], sizes: tuple[int, int], kind: str, where: Path, base: str
) -> None:
    (out, into), b, a = sizes, parts["B"], parts["A"]
    fits = b.ndim == 2 and a.ndim == 2 and b.shape[0] == out and a.shape[1] == into and b.shape[1] == a.shape[0]
    if not fits:
        raise LoraSuiteError(
            f"{where}: {module} has lora_B {list(b.shape)} and lora_A {list(a.shape)}; the weight of {base} is "
            f"{[out, into]}; is this adapter's base OLD?"
        )
    if a.shape[0] == 0:
        raise LoraSuiteError(f"{where}: {module} has rank 0; there is nothing to migrate")
    for which, shape in (("E", (a.shape[0], 1)), ("magnitude_vector", (out,))):
        if which in parts and tuple(parts[which].shape) != shape:
            found = list(parts[which].shape)
            raise LoraSuiteError(f"{where}: {module}.lora_{which} is {found}, expected {list(shape)}")
    for which, tensor in parts.items():
        name = f"{module}.{_stored_name(which, kind)}"
        if not tensor.dtype.is_floating_point:
            raise LoraSuiteError(f"{where}: {name} is {tensor.dtype}, not a floating dtype")
        if not torch.isfinite(tensor).all():
            raise LoraSuiteError(f"{where}: {name} holds NaN or infinity; train or save it again")


def by_module(
    updates: dict[tuple[int, str], Update], family: Family, shape: Shape, dtype: torch.dtype
) -> dict[tuple[int, str], Update]:
    """Updates by (layer, module) instead of (layer, role), with the factors an SVD would give, in `dtype`.

    Updates of one fused module become one. It keeps their rank where they read alike (one A, as from a fused old
    module); else it has the sum of their ranks, and is no less exact.
    """
    parts: dict[tuple[int, str], dict[str, Update]] = {}
    for (layer, role), update in updates.items():
        parts.setdefault((layer, family.projections[role].module), {})[role] = update
    merged = {}
    for (layer, module), found in parts.items():
        role, update = next(iter(found.items()))
        if family.rows(role, shape) is not None:
            update = _merged(found, family, shape)
        # Zero updates keep their A: with both factors zero, nothing could be trained from them.
        factors = balanced(update.factors)[0] if update.factors.b.any() else update.factors
        merged[layer, module] = replace(update, factors=Factors(factors.b.to(dtype), factors.a.to(dtype)))
    return merged


def _merged(parts: dict[str, Update], family: Family, shape: Shape) -> Update:
    """One update of a fused module."""
    first = next(iter(parts.values()))
    scale = first.scale or 1.0
    out, _ = family.module_shape(family.projections[next(iter(parts))].module, shape)
    read: list[Tensor] = []
    written: list[Tensor] = []
    for role, update in parts.items():
        b, a = update.factors
        rows = family.rows(role, shape)
        assert rows is not None
        n = next((n for n, known in enumerate(read) if torch.equal(known, a)), len(read))
        if n == len(read):
            read.append(a)
            written.append(b.new_zeros(out, b.shape[1]))
        written[n][rows] += b if update.scale == first.scale else b * (update.scale / scale)
    factors = Factors(torch.cat(written, 1), torch.cat(read))
    rank = factors.a.shape[0]
    if rank == first.rank:
        return replace(first, factors=factors)
    return Update(factors, scale * (rank**0.5 if first.rslora else rank), first.rslora)


def adapter_files(
    updates: dict[tuple[int, str], Update], source: Adapter, new_family: str, new_layers: int, new_name: str
) -> dict[str, bytes]:
    """The files of a PEFT LoRA folder for the new model, as bytes.

    alpha, dropout and the rest of the configuration are carried over; what names modules or layers is rewritten.

    Args:
        updates: by (layer, module), as `by_module` gives them.

    Raises:
        LoraSuiteError: if a factor holds NaN or infinity.
    """
    family = FAMILIES[new_family]
    modules = {key: f"{family.layer(key[0])}.{key[1]}" for key in updates}
    tensors: dict[str, Tensor] = {}
    for key, update in updates.items():
        named = {"lora_A.weight": update.factors.a, "lora_B.weight": update.factors.b}
        if update.magnitude is not None:
            named["lora_magnitude_vector"] = update.magnitude
        for which, tensor in named.items():
            name = f"base_model.model.{modules[key]}.{which}"
            if not torch.isfinite(tensor).all():
                raise LoraSuiteError(f"the migrated {name} holds NaN or infinity; nothing was written")
            tensors[name] = tensor.contiguous()
    config = dict(source.config)
    config |= {
        "base_model_name_or_path": new_name,
        "revision": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "exclude_modules": None,
    }
    config |= _targets(updates, modules, family, new_layers) | _ranks(updates, modules, source)
    return {
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }


def _targets(
    updates: dict[tuple[int, str], Update], modules: dict[tuple[int, str], str], family: Family, layers: int
) -> dict[str, Any]:
    """target_modules by short name where all cover the same layers, else every module by its full path."""
    covered: dict[str, set[int]] = {}
    for layer, module in updates:
        covered.setdefault(module, set()).add(layer)
    first = next(iter(covered.values()))
    if any(layer_set != first for layer_set in covered.values()):
        return {"target_modules": sorted(modules.values()), "layers_to_transform": None, "layers_pattern": None}
    names = [module.rpartition(".")[2] for module in covered]
    everywhere = first == set(range(layers))
    return {
        "target_modules": names,
        "layers_to_transform": None if everywhere else sorted(first),
        "layers_pattern": None if everywhere else family.layers.rpartition(".")[2],
    }


def _ranks(
    updates: dict[tuple[int, str], Update], modules: dict[tuple[int, str], str], source: Adapter
) -> dict[str, Any]:
    """r and lora_alpha as they were, and a pattern entry for every module that differs."""
    r, alpha = source.config["r"], source.config["lora_alpha"]
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {modules[k]: u.rank for k, u in updates.items() if u.rank != r},
        "alpha_pattern": {modules[k]: u.alpha for k, u in updates.items() if u.alpha != alpha},
    }


def check_base(adapter: Adapter, fingerprint: str, name: str) -> None:
    """Refuses an adapter whose recorded base is a model at hand that is not the plan's old model.

    A base named by a hub id that is not in the local cache, or by a folder that is gone, cannot be compared; the shapes
    then have to do.
    """
    base = adapter.base
    if base is None or base == name:
        return
    folder = Path(base).expanduser()
    if not folder.is_dir():
        cached = _cached(base)
        if cached is None:
            return
        folder = cached
    found = Checkpoint(folder, "base").fingerprint()
    if found != fingerprint:
        raise LoraSuiteError(
            f"{adapter.where}: trained on {base} (fingerprint {found}), while the plan's old model is {name} "
            f"(fingerprint {fingerprint}); build a plan for that base"
        )


def _cached(repo: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
