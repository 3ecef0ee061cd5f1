"""Everything about an upgrade that depends only on the two models, computed once and saved as one file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._version import __version__
from ..adapters.adapter import Adapter, Update, by_module
from ..adapters.factors import update_norm
from ..adapters.fill import fill_layers
from ..config import PlanConfig, Runtime, pick_device, pick_dtype
from ..errors import LoraSuiteError
from ..io.artifacts import PLAN_FORMAT
from ..io.hub_ids import shown
from ..io.json_files import parse_unique
from ..io.notebook import Rendered
from ..io.number_range import check_range, in_range
from ..io.output import check_output, write_file
from ..io.phases import Phase
from ..io.tensor_files import read_header
from ..io.work import Work
from ..models.checkpoint import Checkpoint
from ..models.families import ATTENTION, ROLES, Shape
from ..models.family_table import family_named
from .build_options import AUTO, EXACT_R2, Options
from .kinship import SAME, plan_kinship
from .memory import Limits
from .plan_check import check_plan, layer_index
from .projection import METHODS, LayerResult, PlannedLayer

FORMAT_VERSION = 2
DISTILLATION = "distill"
"""Sub-folder of the work in which a distillation lies."""


@dataclass(frozen=True)
class ModelRecord:
    """What a plan remembers of a model."""

    name: str
    fingerprint: str
    family: str
    shape: Shape

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelRecord:
        return cls(checkpoint.name, checkpoint.fingerprint(), checkpoint.family.model_type, checkpoint.shape)


@dataclass(frozen=True)
class Plan(Rendered):
    """How to carry any adapter of one old model to one new model.

    Attributes:
        old, new: the two models' names, fingerprints, families and sizes.
        options: the options it was built with.
        layers: new layer -> old layer, for the new layers that have a partner.
        tensors: W_h (d_o, d_n), S (d_n, d_o), cka (L_o, L_n; of whatever measure the option `similarity` names) and
            what the method stored per layer, by name; float32 but for the matches. A loaded plan's tensors stay in its
            file until asked for.
        facts: shared tokens, rank and fit of the transfer matrices.
        phases, limits: time and memory of the build, and what was expected; not saved with the plan, which is the same
            to the bit for the same inputs.
    """

    old: ModelRecord
    new: ModelRecord
    options: dict[str, Any]
    layers: dict[int, int]
    tensors: dict[str, Tensor] | LazyTensors
    facts: dict[str, Any]
    phases: list[Phase] = field(default_factory=list)
    limits: Limits | None = None
    _work: list[Work | None] = field(default_factory=list, repr=False)

    def finish(self) -> None:
        """Removes the work folder the plan was built in; called once what was built from it is on disk."""
        for work in self._work:
            if work is not None:
                work.discard()
        self._work.clear()

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the plan as one safetensors file. Raises LoraSuiteError if the file exists and overwrite is off."""
        target = check_output(path, overwrite=overwrite, kind="plan", inputs=self._inputs())
        self._check_finite()
        write_file(target, self._write, overwrite=overwrite)

    def _inputs(self, **given: object) -> dict[str, object]:
        """What an output made from this plan must not replace, `given` before what the plan remembers."""
        known: dict[str, object] = {
            "OLD": self.old.name,
            "NEW": self.new.name,
            "the plan's text": self.options.get("calibration"),
        }
        if isinstance(self.tensors, LazyTensors):
            known["PLAN"] = self.tensors.path
        return known | {name: value for name, value in given.items() if value is not None}

    def _check_finite(self) -> None:
        for name, tensor in self.tensors.items():
            check_range(f"the plan's tensor {name}", tensor)

    def _write(self, file: Path) -> None:
        header = {
            "format": PLAN_FORMAT,
            "version": FORMAT_VERSION,
            "made_by": __version__,
            "old": asdict(self.old),
            "new": asdict(self.new),
            "options": lasting_options(self.options),
            "layers": {str(j): i for j, i in self.layers.items()},
            "facts": self.facts,
        }
        save_file(dict(self.tensors.items()), file, metadata={"plan": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Opens a saved plan; its tensors are read when needed.

        Raises:
            LoraSuiteError: not a plan file, or one of a version this release does not read.
        """
        try:
            file = Path(path).expanduser()
            found = file.is_file()
        except (OSError, RuntimeError):
            found = False
        if not found:
            raise LoraSuiteError(f"PLAN {path}: no such file")
        try:
            lazy = LazyTensors(file)
            header = parse_unique((lazy.file.metadata() or {})["plan"])
            if header["format"] != PLAN_FORMAT:
                raise KeyError
        except (SafetensorError, KeyError, TypeError, ValueError, OSError):
            raise LoraSuiteError(f"PLAN {path}: is not a plan file, or is damaged; build it again") from None
        if header.get("version") != FORMAT_VERSION:
            raise LoraSuiteError(
                f"PLAN {path}: has format version {header.get('version')!r}, this release reads {FORMAT_VERSION}; "
                "build the plan again"
            )
        try:
            models = [ModelRecord(**(m | {"shape": Shape(**m["shape"])})) for m in (header["old"], header["new"])]
            layers = {layer_index(j): i for j, i in header["layers"].items()}
            plan = cls(models[0], models[1], dict(header["options"]), layers, lazy, dict(header["facts"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise LoraSuiteError(f"PLAN {path}: its header lacks a part or has a wrong one; build it again") from None
        check_plan(plan, lazy.held, f"PLAN {path}")
        # Plans of earlier releases name the device and dtype of the machine they were built on.
        return replace(plan, options=lasting_options(plan.options))

    def check_models(
        self, old: str | os.PathLike[str] | None = None, new: str | os.PathLike[str] | None = None
    ) -> tuple[Checkpoint, Checkpoint]:
        """Opens the plan's two models (or the given ones) and checks their fingerprints.

        Raises:
            LoraSuiteError: a model that cannot be found, or whose fingerprint is not the plan's; both are named.
        """
        opened = []
        for record, source, role in ((self.old, old, "old"), (self.new, new, "new")):
            checkpoint = Checkpoint(source if source is not None else record.name, role)
            found = checkpoint.fingerprint()
            if found != record.fingerprint:
                raise LoraSuiteError(
                    f"{checkpoint.folder}: has fingerprint {found}, the plan was built with the {role} model "
                    f"{record.name} of fingerprint {record.fingerprint}; build a plan for this model"
                )
            if checkpoint.shape != record.shape or checkpoint.family.model_type != record.family:
                raise LoraSuiteError(
                    f"{checkpoint.folder}: is {checkpoint.family.model_type} {checkpoint.shape}, the plan has the "
                    f"{role} model as {record.family} {record.shape}; build a plan for this model"
                )
            opened.append(checkpoint)
        return opened[0], opened[1]

    def _on(self, device: str, dtype: str | None) -> Self:
        """The plan with the device and the dtype it is applied on; those it was built on are another machine's."""
        found = {"device": pick_device(device).type}
        if dtype is not None:
            found["dtype"] = str(pick_dtype(dtype)).removeprefix("torch.")
        return replace(self, options=self.options | found)

    def _project(
        self, source: Adapter, models: Any, fill: str, fill_share: float, step: Any
    ) -> tuple[dict[tuple[int, str], Update], list[LayerResult]]:
        """Updates by (new layer, module), and what came of each layer."""
        method = METHODS[self.options["method"]]
        copied = method.name == "copy"
        W_h, S = self.tensors["W_h"], self.tensors["S"]
        updates: dict[tuple[int, str], Update] = {}
        magnitudes: dict[tuple[int, str], Tensor] = {}
        results = []
        for done, (j, i) in enumerate(sorted(self.layers.items()), 1):
            prefix = f"layers.{j}."
            stored = _Prefixed(self.tensors, prefix)
            scales = float(self.facts["rms_ratio"]), float(self.facts["embedding_factor"])
            layer = PlannedLayer(i, j, stored, W_h, S, *scales, self.old.shape, self.new.shape, models)
            sizes: dict[str, float] = {}
            for role in source.roles:
                update = source.updates.get((i, role))
                if update is None:
                    continue
                factors = type(update.factors)(*(factor.float() for factor in update.factors))
                with in_range(where := f"{source.where} or the plan, layer {i}, {role}"):
                    carried = method.project(layer, role, factors)
                    size = abs(update.scale) * update_norm(carried)
                check_range(where, *carried, size)
                updates[j, role] = Update(carried, update.alpha, update.rslora)
                if source.dora:
                    from .magnitude import carry_factors, stored_factors

                    scaled = stored_factors(models()[0], i, role, update)
                    magnitudes[j, role] = scaled if copied else carry_factors(layer, role, scaled)
                norm = float(layer.tensors[f"{role}.norm"])
                sizes[role] = size / norm if norm else 0.0
            results.append(self._layer_result(layer, sizes))
            step(done)
        if not updates:
            raise LoraSuiteError(f"{source.where}: none of its layers has a partner in the new model")
        dtype = next(iter(source.updates.values())).factors.a.dtype
        family, shape = family_named(self.new.family), self.new.shape
        rank, alpha = int(source.config["r"]), float(source.config["lora_alpha"])
        merged = fill_layers(
            by_module(updates, family, shape, dtype, balance=not copied),
            family,
            shape,
            fill,
            rank=rank,
            alpha=alpha,
            share=fill_share,
            seed=self.options["seed"],
        )
        if source.dora:
            from .magnitude import with_magnitudes

            merged = with_magnitudes(merged, magnitudes, models()[1])
        return merged, results

    def _layer_result(self, layer: PlannedLayer, sizes: dict[str, float]) -> LayerResult:
        def mean(similarity: str, match: str) -> float | None:
            if similarity not in layer.tensors:
                return None
            has = (pairs := layer.tensors[match]) >= 0
            values = layer.tensors[similarity]
            if values.ndim == 2:
                values = values[pairs.clamp_min(0), torch.arange(len(pairs))]
            return float(values[has].mean()) if has.any() else 0.0

        return LayerResult(
            new_layer=layer.new_layer,
            old_layer=layer.old_layer,
            cka=float(self.tensors["cka"][layer.old_layer, layer.new_layer]),
            head_similarity=mean("heads.similarity", "heads.match") if set(ATTENTION) & set(sizes) else None,
            neuron_similarity=mean("neurons.similarity", "neurons.match")
            if {"gate", "up", "down"} & set(sizes)
            else None,
            update=sizes,
        )

    @property
    def method(self) -> str:
        """The method's name; for a plan that leaves the choice to `apply`, auto and its candidates."""
        candidates = self.options.get("candidates")
        if candidates is None:
            return str(self.options["method"])
        return f"{AUTO} (apply chooses among {', '.join(candidates)})"

    @property
    def exact(self) -> bool:
        """Whether an adapter arrives whole: the weights are the same, or a linear map fits both ways and least squares
        carry it."""
        if self.options["method"] == "copy" and self.facts.get("kinship", {}).get("kind") == SAME:
            return True
        both = self.facts.get("r2") is not None and self.facts.get("r2_back") is not None
        return self.options["method"] == "lstsq" and both and min(self.linear_fits) >= EXACT_R2

    @property
    def linear_fits(self) -> list[float]:
        """R² of the linear maps between the models, as far as the plan holds them: both ways on held-out tokens, of
        the heads, and of every mapped layer's states."""
        tables = [self.facts.get(name) for name in ("r2", "r2_back", "head_r2")]
        return [r2 for r2 in [*tables, *self.facts.get("layer_r2", {}).values()] if r2 is not None]

    @property
    def device(self) -> torch.device:
        """Where a distillation runs: the device of the build, or of this machine where the plan came from a file."""
        return pick_device(self.options.get("device", "auto"))

    @property
    def dtype(self) -> torch.dtype:
        """Of a distillation's forward passes: that of the build, float32 where the plan came from a file."""
        return pick_dtype(self.options.get("dtype", "auto"))

    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of each tensor; those of a loaded plan are not read for it."""
        if isinstance(self.tensors, LazyTensors):
            return self.tensors.sizes()
        return {name: tensor.nbytes for name, tensor in self.tensors.items()}

    def summary(self) -> dict[str, Any]:
        """The plan without its tensors, as plain data."""
        cka = self.tensors["cka"]
        return {
            "old": asdict(self.old),
            "new": asdict(self.new),
            "options": self.options,
            "facts": self.facts,
            "relatives": plan_kinship(self.facts),
            "layers": [{"new": j, "old": i, "cka": round(float(cka[i, j]), 6)} for j, i in sorted(self.layers.items())],
            "phases": [phase.as_dict() for phase in self.phases],
        }


class LazyTensors:
    """The tensors of a plan file, read one by one when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = read_header(path)
        try:
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, OSError, RuntimeError) as error:
            raise LoraSuiteError(f"PLAN {path}: cannot be mapped ({error})") from None

    @property
    def held(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor."""
        return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in self._header.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def __getitem__(self, name: str) -> Tensor:
        """Raises LoraSuiteError if the tensor holds NaN or infinity."""
        # A copy is aligned as a fresh tensor is, so that products of a loaded plan give the same bits.
        tensor: Tensor = self.file.get_tensor(name).clone()
        if tensor.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
            raise LoraSuiteError(f"PLAN {self.path}: tensor {name} holds NaN or infinity; build it again")
        return tensor

    def sizes(self) -> dict[str, int]:
        return {name: e["data_offsets"][1] - e["data_offsets"][0] for name, e in sorted(self._header.items())}

    def items(self) -> Any:
        return ((name, self[name]) for name in sorted(self._header))


class _Prefixed(dict[str, Tensor]):
    """One layer's view of a plan's tensors."""

    def __init__(self, tensors: dict[str, Tensor] | LazyTensors, prefix: str) -> None:
        super().__init__()
        self._tensors, self._prefix = tensors, prefix

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._tensors

    def __missing__(self, name: str) -> Tensor:
        if name not in self:
            raise LoraSuiteError(f"the plan lacks tensor {self._prefix}{name}; build it again")
        return self._tensors[f"{self._prefix}{name}"]


def unused_layers(source: Adapter, plan: Plan) -> list[int]:
    """Old layers the adapter updates that no new layer continues."""
    return sorted({layer for layer, _ in source.updates} - set(plan.layers.values()))


def make_options(config: PlanConfig, runtime: Runtime) -> Options:
    """The options a plan is built with, on this machine. Raises LoraSuiteError for a device that there is not."""
    device = pick_device(runtime.device)
    return Options(
        calibration=config.calibration,
        examples=config.examples,
        layers=config.layers,
        similarity=config.similarity,
        heads=config.heads,
        transfer=config.transfer,
        method=config.method,
        roles=ROLES if config.roles is None else tuple(config.roles),
        device=device,
        dtype=pick_dtype(runtime.dtype),
        seed=config.seed,
        ridge=config.ridge,
        memory=runtime.budget,
        mapped=runtime.mapped,
        trust_remote_code=runtime.trust_remote_code,
        tf32=runtime.dtype == "auto" and device.type == "cuda",
    )


def lasting_options(options: dict[str, Any]) -> dict[str, Any]:
    """A plan's options without what belongs to the machine it was built on: device, dtype, the text's folder."""
    text = options["calibration"]
    kept = {name: value for name, value in options.items() if name not in _OF_THE_RUN}
    return kept | {"calibration": text if text in TEXTS else shown(text)}


_OF_THE_RUN = ("device", "dtype")


TEXTS = ("shipped", "self")
"""What the option `calibration` may say in place of a file."""
