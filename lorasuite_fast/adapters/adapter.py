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

from ..errors import LoraSuiteError
from ..io.json_files import read_json
from ..io.number_range import check_range
from ..io.tensor_files import TensorFiles
from ..models.families import Family, Shape
from ..models.family_table import family_named
from .adapter_config import (
    ALLOCATION,
    check_adapter_config,
    check_number,
    check_targets,
    cleared,
    pattern_value,
)
from .adapter_config import CONFIG as CONFIG
from .adapter_config import WEIGHTS as WEIGHTS
from .adapter_folder import open_folder
from .factors import Factors, balanced
from .peft_check import check_loads, skeleton

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>A|B|E|magnitude_vector)(\.weight)?")
_PARTS = {"LORA": {"A", "B"}, "DORA": {"A", "B", "magnitude_vector"}, "ADALORA": {"A", "B", "E"}}
_MOST_RANK = 4
"""Times the longer side of a weight. More than the side itself is of no use, but was trained by somebody."""


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


def _place_of(module: str, family: Family, where: Path) -> tuple[int, str]:
    """Layer, and module path inside it."""
    prefixes = "|".join(re.escape(f"{prefix}{family.layers}.") for prefix in family.adapter_prefixes)
    match = re.fullmatch(f"(?:{prefixes})" + r"(0|[1-9][0-9]{0,5})\.(.+)", module)
    if match is not None and family.is_expert(match[2]):
        raise LoraSuiteError(
            f"{where}: module {module} belongs to the experts of a {family.model_type} model, which are not carried; "
            f"pass an adapter that was trained on the attention alone ({', '.join(family.modules())})"
        )
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
    folder = open_folder(source)
    config = read_json(folder / CONFIG)
    check_adapter_config(config, folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        pickles = [p.name for p in folder.glob("adapter_model.*")]
        hint = f"; {pickles[0]} is never opened, save it with safe_serialization=True" if pickles else ""
        raise LoraSuiteError(f"{folder}: {WEIGHTS} is missing{hint}")
    files = TensorFiles([folder / WEIGHTS])
    found: dict[str, dict[str, str]] = {}
    for name in files.entries:
        key = _KEY.fullmatch(name)
        if key is None:
            raise LoraSuiteError(f"{folder / WEIGHTS}: tensor {name} is not a lora_A or lora_B weight; not supported")
        names = found.setdefault(key["module"], {})
        if key["which"] in names:
            raise LoraSuiteError(
                f"{folder / WEIGHTS}: {name} and {names[key['which']]} are one tensor under two names; save it again"
            )
        names[key["which"]] = name
    if not found:
        raise LoraSuiteError(f"{folder / WEIGHTS}: holds no LoRA weights")
    kind = "DORA" if config.get("use_dora") else str(config["peft_type"])
    updates: dict[tuple[int, str], Update] = {}
    places: dict[tuple[int, str], str] = {}
    for module, names in found.items():
        layer, inside = _place_of(module, family, folder / WEIGHTS)
        if (layer, inside) in places:
            raise LoraSuiteError(
                f"{folder / WEIGHTS}: {module} and {places[layer, inside]} are one module under two names; save it "
                "again"
            )
        places[layer, inside] = module
        for missing in sorted(_PARTS[kind] - set(names)):
            raise LoraSuiteError(f"{folder / WEIGHTS}: {module}.{_stored_name(missing, kind)} is missing")
        for further in sorted(set(names) - _PARTS[kind]):
            raise LoraSuiteError(f"{folder / WEIGHTS}: {module}.lora_{further} does not belong to a {kind} adapter")
        if layer >= shape.L:
            raise LoraSuiteError(
                f"{folder / WEIGHTS}: {module} is beyond the {shape.L} layers of {base}; is this adapter's base OLD?"
            )
        sizes = family.module_shape(inside, shape)
        entries = {which: files.entry(name) for which, name in names.items()}
        if kind == "ADALORA" and entries["A"].shape[:1] == (0,):
            continue
        _check_shapes(module, {which: e.shape for which, e in entries.items()}, sizes, folder / WEIGHTS, base)
        # Copies, so that nothing points into the file when it is closed or replaced.
        parts = {which: files.view(name).clone() for which, name in names.items()}
        _check_values(module, parts, kind, folder / WEIGHTS)
        update = _update_of(module, parts, config, kind, folder)
        for role in family.sharing(inside):
            rows = family.rows(role, shape)
            updates[layer, role] = update if rows is None else _with_rows(update, rows)
    files.close()
    check_targets(config, list(found), folder / WEIGHTS)
    if not updates:
        raise LoraSuiteError(f"{folder / WEIGHTS}: every rank is pruned; there is nothing to migrate")
    if kind == "ADALORA":
        config = {name: value for name, value in config.items() if name not in ALLOCATION}
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
        alpha = check_number(config.get("lora_alpha"), "lora_alpha", where)
        # As PEFT has it: the rank the training began with, and a small number against division by zero.
        scale = (alpha if alpha > 0 else rank) / (config["init_r"] + 1e-5)
        return Update(Factors(parts["B"] * parts["E"].T, parts["A"]), scale * rank, rslora=False)
    declared = check_number(pattern_value(patterns, module, config["r"]), "rank", where)
    if declared != rank:
        raise LoraSuiteError(f"{folder / WEIGHTS}: {module} has rank {rank}, {CONFIG} gives it {declared:g}")
    alpha = check_number(
        pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha")), "lora_alpha", where
    )
    rslora = bool(config.get("use_rslora"))
    return Update(Factors(parts["B"], parts["A"]), alpha, rslora, parts.get("magnitude_vector"))


def broken_tensor(weights: Path) -> str | None:
    """The name of a tensor of a safetensors file that holds NaN or infinity, None where there is none."""
    files = TensorFiles([weights])
    try:
        return next((name for name in files.entries if not torch.isfinite(files.view(name)).all()), None)
    finally:
        files.close()


def trained_config(config: dict[str, Any], base: str) -> bytes:
    """The configuration of an adapter PEFT has saved, in the name of its base, the same bytes from every process.

    What PEFT holds as sets it writes in an order that differs between processes.
    """
    ordered = {
        name: sorted(config[name])
        for name in ("target_modules", "exclude_modules", "modules_to_save")
        if isinstance(config.get(name), list)
    }
    named = {"base_model_name_or_path": base, "inference_mode": True, "revision": None}
    return (json.dumps(cleared(config) | ordered | named, indent=2, sort_keys=True) + "\n").encode()


def _with_rows(update: Update, rows: Tensor) -> Update:
    b, a = update.factors
    magnitude = None if update.magnitude is None else update.magnitude[rows]
    return replace(update, factors=Factors(b[rows], a), magnitude=magnitude)


def _stored_name(part: str, kind: str) -> str:
    """What PEFT calls a part in the file, behind the module's path."""
    return f"lora_{part}.weight" if part in "AB" and kind != "ADALORA" else f"lora_{part}"


def _check_shapes(
    module: str, shapes: dict[str, tuple[int, ...]], sizes: tuple[int, int], where: Path, base: str
) -> None:
    (out, into), b, a = sizes, shapes["B"], shapes["A"]
    for which, shape in (("B", b), ("A", a)):
        if shape == (0,):
            raise LoraSuiteError(
                f"{where}: {module} has a lora_{which} that is empty [0]: the file was saved without gathering its "
                "parts; gather them when it is saved (ZeRO-3: stage3_gather_16bit_weights_on_model_save)"
            )
    fits = len(b) == 2 and len(a) == 2 and b[0] == out and a[1] == into and b[1] == a[0]
    if not fits:
        raise LoraSuiteError(
            f"{where}: {module} has lora_B {list(b)} and lora_A {list(a)}; the weight of {base} is {[out, into]}; is "
            "this adapter's base OLD?"
        )
    rank = a[0]
    if rank == 0:
        raise LoraSuiteError(f"{where}: {module} has rank 0; there is nothing to migrate")
    if rank > _MOST_RANK * max(out, into):
        raise LoraSuiteError(
            f"{where}: {module} has rank {rank}, far more than its weight {[out, into]} can hold; save the update "
            "with a rank that fits"
        )
    for which, shape in (("E", (rank, 1)), ("magnitude_vector", (out,))):
        if which in shapes and shapes[which] != shape:
            raise LoraSuiteError(f"{where}: {module}.lora_{which} is {list(shapes[which])}, expected {list(shape)}")


def _check_values(module: str, parts: dict[str, Tensor], kind: str, where: Path) -> None:
    for which, tensor in parts.items():
        name = f"{module}.{_stored_name(which, kind)}"
        if not tensor.dtype.is_floating_point:
            raise LoraSuiteError(f"{where}: {name} is {tensor.dtype}, not a floating dtype")
        # In float32, which it is computed in.
        if not torch.isfinite(tensor.float()).all():
            raise LoraSuiteError(f"{where}: {name} holds NaN or infinity; train or save it again")


def by_role(updates: dict[tuple[int, str], Update], family: Family, shape: Shape) -> dict[tuple[int, str], Update]:
    """Updates by (layer, role) instead of (layer, module), as `read_adapter` gives them."""
    found = {}
    for (layer, module), update in updates.items():
        for role in family.sharing(module):
            rows = family.rows(role, shape)
            found[layer, role] = update if rows is None else _with_rows(update, rows)
    return found


def by_module(
    updates: dict[tuple[int, str], Update],
    family: Family,
    shape: Shape,
    dtype: torch.dtype,
    *,
    balance: bool = True,
) -> dict[tuple[int, str], Update]:
    """Updates by (layer, module) instead of (layer, role), in `dtype`.

    Args:
        balance: give them the factors an SVD would give, instead of their own.

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
        factors = balanced(update.factors)[0] if balance and update.factors.b.any() else update.factors
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
    updates: dict[tuple[int, str], Update], source: Adapter, new_family: str, new_shape: Shape, new_name: str
) -> dict[str, bytes]:
    """The files of a PEFT LoRA folder for the new model, as bytes.

    alpha, dropout and the rest of the configuration are carried over; what names modules or layers is rewritten.

    Args:
        updates: by (layer, module), as `by_module` gives them.

    Raises:
        LoraSuiteError: if a factor holds NaN or infinity, or PEFT would not load the result.
    """
    family = family_named(new_family)
    modules = {key: f"{family.layer(key[0])}.{key[1]}" for key in updates}
    tensors: dict[str, Tensor] = {}
    for key, update in updates.items():
        named = {"lora_A.weight": update.factors.a, "lora_B.weight": update.factors.b}
        if update.magnitude is not None:
            named["lora_magnitude_vector"] = update.magnitude
        for which, tensor in named.items():
            name = f"base_model.model.{modules[key]}.{which}"
            check_range(f"the migrated {name}", tensor)
            tensors[name] = tensor.contiguous()
    config = cleared(source.config)
    config |= {
        "base_model_name_or_path": new_name,
        "revision": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "exclude_modules": None,
    }
    if family.transposed or "fan_in_fan_out" in config:
        config["fan_in_fan_out"] = family.transposed
    config |= _targets(updates, modules, family, new_shape.L) | _ranks(updates, modules, source)
    files = {
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }
    check_loads(files, skeleton(family, new_shape), new_name)
    return files


def _targets(
    updates: dict[tuple[int, str], Update], modules: dict[tuple[int, str], str], family: Family, layers: int
) -> dict[str, Any]:
    """target_modules by short name where all cover the same layers, else every module by its full path."""
    covered: dict[str, set[int]] = {}
    for layer, module in updates:
        covered.setdefault(module, set()).add(layer)
    first = next(iter(covered.values()))
    # Short names would stand for modules of a wrapper's vision tower too.
    if family.wrapper or any(layer_set != first for layer_set in covered.values()):
        return {"target_modules": sorted(modules.values()), "layers_to_transform": None, "layers_pattern": None}
    names = [family.suffix(module) for module in covered]
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
