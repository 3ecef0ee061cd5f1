"""Everything about an upgrade that depends only on the two models, computed once and saved as one file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._version import __version__
from .adapter import Adapter, Update, adapter_files, by_module, check_base, read_adapter
from .artifacts import PLAN_FORMAT, Given
from .build import AUTO, EXACT_R2, Inputs, Options, build
from .candidates import Candidate, weight_candidates, without_candidates
from .checkpoint import Checkpoint
from .choice import Choice, choose
from .errors import LoraSuiteError, WriteError
from .families import ATTENTION, ROLES, Shape, family_named
from .fill import FILLS, SHARE, fill_layers
from .identical import identity_facts, identity_tensors, returned_files, same_tensors, same_weights, update_sizes
from .json_files import parse_unique
from .kinship import SAME, Kinship, plan_kinship
from .memory import Limits, parse_memory
from .model_card import card_files, migration_step
from .number_range import check_range, in_range
from .output import check_output, write_file, write_folder
from .phases import Phase, PhaseClock, Progress
from .plan_check import check_plan, layer_index
from .plan_folder import lasting_options, text_of
from .projection import METHODS, PlannedLayer, update_norm
from .ranks import Ranks
from .report_file import check_report, write_report
from .result import LayerResult, Migration
from .similarity import MEASURES
from .tensor_files import read_header
from .text_files import refuse_pipe
from .work import Work, clean_up, work_folder

if TYPE_CHECKING:
    from .distillation import Settings
    from .distilled_adapter import DistilledAdapter
    from .samples import Data

FORMAT_VERSION = 2
_DISTILLATION = "distill"
"""Sub-folder of the work in which a distillation lies."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

DtypeName = Literal["auto", "float32", "bfloat16", "float64"]


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
class TransferPlan:
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
    tensors: dict[str, Tensor] | _LazyTensors
    facts: dict[str, Any]
    phases: list[Phase] = field(default_factory=list)
    limits: Limits | None = None
    _work: list[Work | None] = field(default_factory=list, repr=False)

    @classmethod
    def build(
        cls,
        old: str | os.PathLike[str],
        new: str | os.PathLike[str],
        *,
        calibration: str | os.PathLike[str] | None = None,
        examples: int = 64,
        layers: str = "cka",
        similarity: str = "cka",
        heads: str = "hungarian",
        transfer: str = "embedding",
        method: str = "auto",
        roles: tuple[str, ...] = ROLES,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        ridge: float = 0.0,
        memory: str | int | None = None,
        mapped: bool = True,
        work: str | os.PathLike[str] | None = None,
        ranks: Ranks | None = None,
        trust_remote_code: bool = False,
        report: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> TransferPlan:
        """Compares two models and works out how updates travel between them, a layer of each in memory at a time.

        Args:
            old, new: folders in Hugging Face format, or hub ids.
            calibration: .jsonl or .txt of unlabelled text for CKA and distillation; None takes the text shipped with
                the package. "self" has the old model with its adapter write the text to distil from, at `apply`.
            examples: how many calibration examples both models read, split into the same pieces, 128 of each.
            layers: cka (the most similar ones), first, medium or last. heads: hungarian or identity. transfer:
                embedding or identity.
            similarity: of layers: cka, mean-cca, squared-cca, pwcca or procrustes (`similarity.layer_similarity`).
            method: copy (the adapter as it is, between layers of the same shapes), lstsq (exact wherever the new model
                computes the old function), distill (fits the adapter's effect on text, at `apply`), paper (Eq. 3 of
                LoRASuite) or auto: copy where the weights differ by at most 1 %, lstsq where it is exact (R² of at
                least 0.999, of both transfer matrices on held-out tokens and of W_h on the layers' states), elsewhere
                whichever of them agrees best with the old adapter on held-out text, at `apply`.
            roles: projections to plan for, of q, k, v, o, gate, up, down; the MLP costs several times the rest.
            device: auto, cpu or cuda. dtype: of the forward passes and the per-layer products; auto is float32; on a
                GPU its forward passes may round the operands of their products to TF32 (relative error about 1e-3).
            ridge: regularises the transfer matrix, as a share of the normal equations' mean diagonal.
            memory: what may be resident on the device, such as "6GB": on a CPU the whole process with its mapped
                weights, on a GPU what is allocated there. Micro-batch and chunk sizes follow from it.
            mapped: read the checkpoints through a memory map; off for machines on which mapped pages count twice.
            work: a folder for finished parts. The same call with the same folder goes on where it was interrupted, and
                gives the same plan to the bit; `finish` removes the folder.
            ranks: the processes that share the work (`Ranks.join` under torchrun); each of them gets the whole plan.
            report: HTML file to write (`report_file.write_report`); an earlier report there is replaced.

        Raises:
            LoraSuiteError: for input that cannot be used; the message names it and says what to do.
        """
        options = make_options(
            calibration=calibration,
            examples=examples,
            layers=layers,
            similarity=similarity,
            heads=heads,
            transfer=transfer,
            method=method,
            roles=roles,
            device=device,
            dtype=dtype,
            seed=seed,
            ridge=ridge,
            memory=memory,
            mapped=mapped,
            trust_remote_code=trust_remote_code,
        )
        check_report(report, inputs={"OLD": old, "NEW": new, "--calibration": calibration})
        clock = PhaseClock(progress, options.device)
        with clock.phase("open", 2) as step:
            inputs = Inputs.open(old, new, options)
            records = ModelRecord.of(inputs.old), ModelRecord.of(inputs.new)
            step(2)
        built, unfinished = build(inputs, options, clock, ranks or Ranks(), None if work is None else Path(work))
        found: dict[str, Any] = {"examples": built.examples, "method": built.method, "roles": list(built.roles)}
        if built.candidates:
            found["candidates"] = list(built.candidates)
        chosen = options.as_dict() | found
        plan = cls(*records, chosen, built.mapping, built.tensors, built.facts, clock.phases, built.limits)
        plan._work.append(unfinished)
        if ranks is None or ranks.first:
            write_report(plan, report)
        return plan

    def _repr_html_(self) -> str:
        from .html_report import fragment

        return fragment(self)

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
        if isinstance(self.tensors, _LazyTensors):
            known["PLAN"] = self.tensors.path
        return known | {name: value for name, value in given.items() if value is not None}

    def _check_finite(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
                raise LoraSuiteError(f"the plan's tensor {name} holds NaN or infinity; nothing was written")

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

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        old_model: str | None = None,
        new_model: str | None = None,
        overwrite: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub: Any,
    ) -> str | None:
        """Writes a folder as Hugging Face lays them out, the plan's file and a card, and uploads it if asked to.

        Args:
            old_model, new_model: hub ids, where the plan was built from local folders: they take the names' place in
                what is written. A plan that is pushed needs both, and its calibration file loses its folder's name.
            push_to_hub: upload the folder through huggingface_hub. repo_id: where to [FOLDER's name].
            hub: private, revision, token, commit_message and create_pr, as huggingface_hub has them.

        Returns:
            The commit's address if it was uploaded.

        Raises:
            LoraSuiteError: FOLDER exists and overwrite is off, NaN or infinity in the plan, or a plan to be pushed that
                names local folders; nothing is then written or uploaded.
        """
        from .plan_folder import save_folder

        return save_folder(
            self,
            folder,
            names=(old_model, new_model),
            overwrite=overwrite,
            repo_id=(repo_id or Path(folder).expanduser().absolute().name) if push_to_hub else None,
            **hub,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> TransferPlan:
        """Opens a plan that `save_pretrained` wrote: a folder, or a hub id; a plan's file will do as well.

        Args:
            revision, token, cache_dir, local_files_only: for a hub id, as huggingface_hub has them; its cache and
                offline switch are honoured.

        Raises:
            LoraSuiteError: no such folder, or none that holds a plan; a hub id that cannot be had.
        """
        from .plan_folder import find_plan

        return cls.load(
            find_plan(source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TransferPlan:
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
            lazy = _LazyTensors(file)
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

    def apply(
        self,
        adapter: str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        old: str | os.PathLike[str] | None = None,
        new: str | os.PathLike[str] | None = None,
        text: str | os.PathLike[str] | None = None,
        settings: Settings | None = None,
        fill: str = "none",
        fill_share: float = SHARE,
        memory: str | int | None = None,
        device: str = "auto",
        dtype: str | None = None,
        trust_remote_code: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Migration:
        """Carries one PEFT LoRA folder to the new model and writes the result as another.

        A distillation that is interrupted goes on where it stopped when it is called again with the same arguments.

        Args:
            old, new: where the models are now. They are opened only then, where Eq. (3) needs MLP weights, for DoRA,
                whose magnitudes need them, and by distill, which runs both.
            text: for distill, in place of the plan's calibration text: .jsonl, .txt or "self". settings: rank of the
                result and the rest of distill's settings. Other methods refuse a text, a rank and a number of layers.
            fill: what new layers without a partner get (`fill_layers`): none, zero or nearest; of the nearest update
                `fill_share`.
            memory: for distill, what may be resident on the device (on a CPU: in the process), e.g. "6GB"; states that
                do not fit lie in files beside OUT, and a budget that is too small is refused.
            device, dtype: for distill, of this machine: auto, cpu or cuda, and None for the plan's dtype.

        Raises:
            LoraSuiteError: an adapter of another base, or one the plan does not cover; OUT is then untouched.
        """
        check_settings(self.options["method"], settings, text)
        models = cache(lambda: self.check_models(old, new))
        if old is not None or new is not None:
            models()
        budget = None if memory is None else parse_memory(memory)
        return self._on(device, dtype)._apply(
            adapter, out, models, text, settings, fill, fill_share, budget, trust_remote_code, overwrite, progress,
            self._inputs(OLD=old, NEW=new),
        )  # fmt: skip

    def _on(self, device: str, dtype: str | None) -> TransferPlan:
        """The plan with the device and the dtype it is applied on; those it was built on are another machine's."""
        found = {"device": pick_device(device).type}
        if dtype is not None:
            found["dtype"] = str(pick_dtype(dtype)).removeprefix("torch.")
        return replace(self, options=self.options | found)

    def _apply(
        self,
        adapter: str | os.PathLike[str],
        out: str | os.PathLike[str],
        models: Callable[[], tuple[Checkpoint, Checkpoint]],
        text: str | os.PathLike[str] | None = None,
        settings: Settings | None = None,
        fill: str = "none",
        fill_share: float = SHARE,
        memory: int | None = None,
        trust_remote_code: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
        inputs: Given | None = None,
    ) -> Migration:
        """`apply`, with the models where they are opened once for several adapters."""
        distilled, from_file = self.options["method"] == "distill", isinstance(self.tensors, _LazyTensors)
        check_settings(self.options["method"], settings, text)
        place = work_folder(out)
        clean_up(out, place, _DISTILLATION)
        with suppress(OSError):
            # Of a process that was killed as it removed its work; what holds anything stays.
            place.rmdir()
        given = {"ADAPTER": adapter, "--text": text}
        target = check_output(out, overwrite=overwrite, inputs={**(inputs or {}), **given})
        clock = PhaseClock(progress, self.device if distilled else None)
        source = read_adapter(adapter, family_named(self.old.family), self.old.shape, self.old.name)
        check_base(source, self.old.fingerprint, self.old.name, passed=(self.new.name,))
        if distilled:
            try:
                return self._distil(
                    models(),
                    source,
                    target,
                    text_of(self, from_file=from_file) if text is None else os.fspath(text),
                    settings,
                    clock,
                    overwrite,
                    folder=place / _DISTILLATION,
                    memory=memory,
                    fill=(fill, fill_share),
                    text_given=text is not None,
                    trust_remote_code=trust_remote_code,
                )
            finally:
                with suppress(OSError):
                    # Where there is anything left to go on from it stays, and so does a plan's own work.
                    place.rmdir()
        missing = [role for role in source.roles if role not in self.options["roles"]]
        if missing:
            raise LoraSuiteError(
                f"{source.where}: the adapter targets {', '.join(missing)}, the plan covers only "
                f"{', '.join(self.options['roles'])}; build the plan with --roles all"
            )
        with clock.phase("apply", len(self.layers)) as step, in_range(f"{source.where} or the plan"):
            updates, results = self._project(source, models, fill, fill_share, step)
            files = adapter_files(updates, source, self.new.family, self.new.shape, self.new.name)
            step_done = migration_step(self, source, results, None)
            told = card_files(self.new.name, step_done, wrapped="/" in self.new.family)
            write_folder(target, files | told, overwrite=overwrite)
        return Migration(self, source.where, str(target), results, [*self.phases, *clock.phases], _unused(source, self))

    def _distil(
        self,
        models: tuple[Checkpoint, Checkpoint],
        source: Adapter,
        target: Path,
        text: str,
        settings: Settings | None,
        clock: PhaseClock,
        overwrite: bool,
        **options: Any,
    ) -> Migration:
        from .distilled_adapter import distil_adapter

        others: dict[str, Candidate] = {}
        left_out: dict[str, str] = {}
        # A rank and a number of layers are distill's alone.
        if "candidates" in self.options and (settings is None or settings.rank is settings.layers is None):
            with clock.phase("candidates", len(self.layers)) as step:
                others, left_out = weight_candidates(self, models, source, options["fill"], options["memory"], step)
        result = distil_adapter(self, models, source, text, settings, clock, others=others, **options)
        chosen, choice = _chosen(self, result, others, left_out)
        with clock.phase("write", 1), result.work:
            distilled = None if chosen.options["method"] != "distill" else result.distilled
            best = others.get(chosen.options["method"], result)
            done = migration_step(chosen, source, best.layers, distilled, choice)
            told = card_files(self.new.name, done, wrapped="/" in self.new.family)
            result.work.complete()
            write_folder(target, best.files | told, overwrite=overwrite)
            result.work.discard()
        unused = [] if distilled is not None else _unused(source, self)
        phases = [*self.phases, *clock.phases]
        return Migration(
            chosen, source.where, str(target), best.layers, phases, unused, distilled=distilled, choice=choice
        )

    def apply_all(
        self,
        adapters: Sequence[str | os.PathLike[str]],
        folder: str | os.PathLike[str],
        *,
        old: str | os.PathLike[str] | None = None,
        new: str | os.PathLike[str] | None = None,
        memory: str | int | None = None,
        device: str = "auto",
        dtype: str | None = None,
        overwrite: bool = False,
        ranks: Ranks | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> dict[str, Migration | LoraSuiteError]:
        """Carries many adapters, each into a sub-folder of its own name; one that cannot be carried stops no other.

        Args:
            folder: made if it does not exist. ranks: each process takes its share, and returns the results of that.
            old, new, memory, device, dtype: see `apply`; the models are opened once. options: further ones of `apply`.

        Returns:
            For each adapter, as given, the result or the error.

        Raises:
            LoraSuiteError: two adapters of one name, models that are not the plan's, a folder that cannot be made.
        """
        check_settings(self.options["method"], options.get("settings"), options.get("text"))
        models = cache(lambda: self.check_models(old, new))
        if old is not None or new is not None:
            models()
        if len(adapters) > 1:
            refuse_pipe(options.get("text"))
        options |= {"models": models, "memory": None if memory is None else parse_memory(memory)}
        options["inputs"] = self._inputs(OLD=old, NEW=new) | {f"ADAPTER {n}": a for n, a in enumerate(adapters, 1)}
        plan = self._on(device, dtype)
        target = Path(folder).expanduser()
        names = [Path(adapter).expanduser().resolve().name for adapter in adapters]
        for name in names:
            if names.count(name) > 1:
                raise LoraSuiteError(f"two of the adapters are called {name}; apply them into different folders")
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"OUT {target}: cannot be made ({error.strerror or error})") from None
        share = (ranks or Ranks()).mine(list(zip(adapters, names, strict=True)))
        results: dict[str, Migration | LoraSuiteError] = {}
        for done, (adapter, name) in enumerate(share, 1):
            try:
                results[os.fspath(adapter)] = plan._apply(adapter, target / name, overwrite=overwrite, **options)
            except LoraSuiteError as error:
                results[os.fspath(adapter)] = error
            if progress:
                progress("apply", done, len(share))
        return results

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
        if isinstance(self.tensors, _LazyTensors):
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


class _LazyTensors:
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

    def __init__(self, tensors: dict[str, Tensor] | _LazyTensors, prefix: str) -> None:
        super().__init__()
        self._tensors, self._prefix = tensors, prefix

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._tensors

    def __missing__(self, name: str) -> Tensor:
        if name not in self:
            raise LoraSuiteError(f"the plan lacks tensor {self._prefix}{name}; build it again")
        return self._tensors[f"{self._prefix}{name}"]


def _chosen(
    plan: TransferPlan, result: DistilledAdapter, others: dict[str, Candidate], left_out: dict[str, str]
) -> tuple[TransferPlan, Choice | None]:
    """The plan as the best candidate carried it out, and how that was chosen; None where there was no choice."""
    if not others:
        return plan, None
    judged = result.distilled.others
    broken = {name: "it gives NaN or infinity on the text" for name in others if name not in judged}
    choice = choose(judged | {"distill": result.distilled.agreement}, left_out | broken)
    reason = f"{plan.facts['method_reason']}; measured on held-out text: {choice.table}"
    settled = replace(plan, options=without_candidates(plan))
    if choice.chosen in others:
        settled = others[choice.chosen].plan
    return replace(settled, facts=plan.facts | {"method_reason": reason}), choice


def _unused(source: Adapter, plan: TransferPlan) -> list[int]:
    """Old layers the adapter updates that no new layer continues."""
    return sorted({layer for layer, _ in source.updates} - set(plan.layers.values()))


def _check_choice(what: str, known: Iterable[str], value: str) -> str:
    if value not in known:
        raise LoraSuiteError(f"{what} {value!r} is not one of {', '.join(known)}")
    return value


def check_settings(method: str, settings: Settings | None, text: object = None) -> None:
    """Refuses what only distillation uses with another method; `auto` is left to what it takes."""
    if method in (AUTO, "distill"):
        return
    if settings is not None and settings.rank is not None:
        raise LoraSuiteError(f"method {method} keeps the adapter's rank; only distill changes it")
    if settings is not None and settings.layers is not None:
        raise LoraSuiteError(f"method {method} fits no layers as distill does; leave out --distill-layers")
    if text is not None:
        raise LoraSuiteError(f"method {method} carries adapters without text; leave out --text")


_CHOICES: dict[str, tuple[str, tuple[str, ...]]] = {
    "layers": ("layer mapping", ("cka", "first", "medium", "last")),
    "similarity": ("similarity", tuple(MEASURES)),
    "heads": ("head mapping", ("hungarian", "identity")),
    "transfer": ("transfer", ("embedding", "identity")),
    "method": ("method", (AUTO, *METHODS)),
}


def _check_options(options: dict[str, Any], settings: Settings | None, fill: str) -> None:
    """The options of a build that can be judged without a model."""
    for name, (what, known) in _CHOICES.items():
        if name in options:
            _check_choice(what, known, options[name])
    _check_choice("fill", FILLS, fill)
    pick_device(options.get("device", "auto"))
    pick_dtype(options.get("dtype", "auto"))
    if options.get("memory") is not None:
        parse_memory(options["memory"])
    check_settings(options.get("method", AUTO), settings)


def make_options(
    *,
    calibration: str | os.PathLike[str] | None = None,
    examples: int = 64,
    layers: str = "cka",
    similarity: str = "cka",
    heads: str = "hungarian",
    transfer: str = "embedding",
    method: str = AUTO,
    roles: Iterable[str] = ROLES,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    ridge: float = 0.0,
    memory: str | int | None = None,
    mapped: bool = True,
    trust_remote_code: bool = False,
) -> Options:
    """The checked options of `TransferPlan.build`, which says what they are. Raises LoraSuiteError for others."""
    return Options(
        calibration=calibration,
        examples=examples,
        layers=_check_choice(*_CHOICES["layers"], layers),
        similarity=_check_choice(*_CHOICES["similarity"], similarity),
        heads=_check_choice(*_CHOICES["heads"], heads),
        transfer=_check_choice(*_CHOICES["transfer"], transfer),
        method=_check_choice(*_CHOICES["method"], method),
        roles=tuple(_check_choice("role", ROLES, role) for role in roles),
        device=pick_device(device),
        dtype=pick_dtype(dtype),
        seed=seed,
        ridge=ridge,
        memory=None if memory is None else parse_memory(memory),
        mapped=mapped,
        trust_remote_code=trust_remote_code,
        tf32=dtype == "auto" and pick_device(device).type == "cuda",
    )


def pick_device(name: str) -> torch.device:
    """auto takes the GPU where there is one."""
    _check_choice("device", ("auto", "cpu", "cuda"), name)
    if name == "cuda" and not torch.cuda.is_available():
        raise LoraSuiteError("--device cuda: PyTorch sees no GPU; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def pick_dtype(name: str) -> torch.dtype:
    """auto is float32: float16 and, on many CPUs, bfloat16 products are slow there, and inexact everywhere."""
    if name == "auto":
        return torch.float32
    _check_choice("dtype", ("auto", *_DTYPES), name)
    return _DTYPES[name]


def give_back(
    old: Checkpoint,
    new: str | os.PathLike[str],
    source: Adapter,
    out: Path,
    options: dict[str, Any],
    *,
    overwrite: bool,
    progress: Progress | None,
) -> Migration | None:
    """The adapter as it is, written to `out`, where NEW is OLD, a copy of it, or OLD in another dtype; else None.

    Args:
        options: of `TransferPlan.build`; a method or transfer matrix asked for is not passed over.
    """
    known = signature(make_options).parameters
    chosen = make_options(**{key: value for key, value in options.items() if key in known} | {"roles": source.roles})
    unknown = set(options) - set(signature(TransferPlan.build).parameters)
    if chosen.method != AUTO or chosen.transfer != "embedding" or unknown:
        return None
    successor, clock = Checkpoint(new, "new", mapped=chosen.mapped), PhaseClock(progress)
    if not same_tensors(old, successor):
        return None
    with clock.phase("weights", 1) as step:
        same = same_weights(old, successor)
        step(1)
    if not same:
        return None
    shape = successor.shape
    facts = identity_facts(shape.V, shape.d) | {"kinship": Kinship(SAME, None).as_dict()}
    facts["method_reason"] = "the new model's weights are the old one's, so that the adapter is given back as it is"
    plan = TransferPlan(
        ModelRecord.of(old),
        ModelRecord.of(successor),
        chosen.as_dict() | {"method": "copy", "examples": 0},
        {layer: layer for layer in range(shape.L)},
        identity_tensors(successor, source.roles),
        facts,
    )
    results = update_sizes(source, successor)
    done = migration_step(plan, source, results, None)
    told = card_files(successor.name, done, wrapped=successor.family.wrapper is not None)
    write_folder(out, returned_files(source, successor.name) | told, overwrite=overwrite)
    return Migration(plan, source.where, str(out), results, clock.phases, [])


def default_refinement(device: str) -> int | str:
    """Steps of the refinement a migration ends with: without a GPU it can take hours, and has to be asked for."""
    return "auto" if pick_device(device).type == "cuda" else 0


def _announcement(options: dict[str, Any], refine: int | str, asked: bool, finetune: Data | None) -> str:
    """What a migration will run, in one sentence."""
    parts = [f"migrating by method {options.get('method', AUTO)}"]
    if refine:
        steps = "as many steps as the text is worth" if refine == "auto" else f"{refine} steps"
        reason = "" if asked else " (the default on a GPU; refine 0: not)"
        parts.append(f"then refining without labels, {steps}{reason}")
    if finetune is not None:
        parts.append("then fine-tuning on labelled data")
    return ", ".join(parts)


def migrate(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    settings: Settings | None = None,
    fill: str = "none",
    fill_share: float = SHARE,
    refine: int | str | None = None,
    refine_text: str | os.PathLike[str] | None = None,
    finetune: Data | None = None,
    finetune_options: dict[str, Any] | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Migration:
    """Carries a PEFT LoRA adapter from OLD to NEW: `TransferPlan.build` for the roles it targets, then `apply`.

    With `refine` the result is then the start of a training without labels (`refinement.refine`) of as many steps;
    "auto" takes as many as the text is worth, and none where the adapter arrives whole. None, the default, is "auto" on
    a GPU and 0 without one, here and on the command line. A start that was copied or carried by least squares keeps its
    rank and modules and is trained at half the usual rate. With `finetune` it is trained on labelled data last
    (`finetuning.finetune`).

    Args:
        old, new: model folders or hub ids. adapter: a PEFT LoRA folder trained on old. out: the folder to write.
        settings: rank of the result and the rest of distill's settings. fill, fill_share: as `TransferPlan.apply` has
            them. options: those of `TransferPlan.build`.
        refine_text: None has the old model write it with its adapter; else a .jsonl or .txt file.
        finetune: labelled data, as `finetuning.finetune` takes them. finetune_options: its further arguments.
        report: HTML file to write (`report_file.write_report`); an earlier report there is replaced.
        say: called with one sentence, what will be run, at the start, and with the steps planned before a training.

    Raises:
        LoraSuiteError: for input that cannot be used; OUT is then untouched.
    """
    given = {"OLD": old, "NEW": new, "ADAPTER": adapter, "--calibration": options.get("calibration")}
    inputs = given | {"--refine-text": refine_text, "--finetune": finetune}
    _check_options(options, settings, fill)
    check_report(report, out, inputs)
    if finetune is None and finetune_options:
        raise LoraSuiteError("finetune_options are for the training that finetune asks for; give both")
    asked = refine is not None
    refine = refine if refine is not None else default_refinement(options.get("device", "auto"))
    if refine != "auto" and (isinstance(refine, str) or refine < 0):
        raise LoraSuiteError(f"refine is {refine!r}; it must be auto, or a number of steps, 0 for none")
    if refine_text is not None and not refine:
        raise LoraSuiteError("refine_text is for the training that refine asks for; give both")
    if say and (refine or finetune is not None):
        say(_announcement(options, refine, asked, finetune))
    if finetune is not None:
        from .finetuning import migrate_and_finetune

        options |= {"settings": settings, "fill": fill, "fill_share": fill_share}
        options |= {"refine": refine, "refine_text": refine_text}
        tuned = migrate_and_finetune(old, new, adapter, out, finetune, finetune_options or {}, overwrite=overwrite,
                                     progress=progress, say=say, **options)  # fmt: skip
        write_report(tuned, report)
        return tuned
    start = time.perf_counter()
    if options.get("method", "auto") in ("auto", "distill"):
        refuse_pipe(options.get("calibration"))
    clean_up(out)
    if refine:
        from .refinement import TRAINING, refinement_folder

        clean_up(out, refinement_folder(out), TRAINING)
    path = check_output(out, overwrite=overwrite, inputs=inputs)
    model = Checkpoint(old, "old")
    source = read_adapter(adapter, model.family, model.shape, model.name)
    check_base(source, model.fingerprint(), model.name, passed=(new,))
    if refine in (0, AUTO) and (settings is None or settings.rank is settings.layers is None):
        returned = give_back(model, new, source, path, options, overwrite=overwrite, progress=progress)
        if returned is not None:
            returned = returned.with_seconds(time.perf_counter() - start)
            write_report(returned, report)
            return returned
    options.setdefault("work", work_folder(out))
    plan = TransferPlan.build(old, new, roles=source.roles, progress=progress, **options)
    if refine == "auto" and plan.exact:
        refine = 0
    unrefined = path
    if refine:
        unrefined = refinement_folder(out) / "migrated"
        unrefined.parent.mkdir(exist_ok=True)
    try:
        result = plan.apply(
            adapter,
            unrefined if refine else out,
            settings=settings,
            fill=fill,
            fill_share=fill_share,
            memory=options.get("memory"),
            device=options.get("device", "auto"),
            trust_remote_code=options.get("trust_remote_code", False),
            overwrite=overwrite or bool(refine),
            progress=progress,
        )
    except WriteError:
        raise
    except LoraSuiteError:
        plan.finish()
        raise
    if refine:
        from .refinement import CARRIED_RATE, RATE
        from .refinement import refine as run

        # Such a start is trained as it is: its rank and modules are the old adapter's.
        method = result.plan.options["method"]
        carried = method in ("copy", "lstsq") or (source.dora and method != "distill")
        refined = run(
            old,
            adapter,
            new,
            unrefined,
            out,
            text=refine_text,
            steps=refine,
            roles=None if carried else family_named(plan.new.family).roles,
            rank=None if carried else int(source.config["r"]),
            learning_rate=CARRIED_RATE if method in ("copy", "lstsq") else RATE,
            seed=plan.options["seed"],
            device=plan.options["device"],
            dtype=options.get("dtype", "auto"),
            memory=options.get("memory"),
            trust_remote_code=options.get("trust_remote_code", False),
            overwrite=overwrite,
            progress=progress,
            say=say,
        )
        result = replace(result, out=os.fspath(out), refined=refined, phases=[*result.phases, *refined.phases])
    plan.finish()
    result = result.with_seconds(time.perf_counter() - start)
    write_report(result, report)
    return result
