"""A transfer plan with its verbs: built from two models, applied to adapters, shared as a folder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..distillation.candidates import without_candidates
from ..distillation.choice import REST, Choice, choose
from ..transfer.build_options import AUTO

if TYPE_CHECKING:
    from ..distillation.distilled_adapter import DistilledAdapter

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter, adapter_files, read_adapter
from ..adapters.base_match import check_base
from ..adapters.fill import SHARE
from ..distillation.candidates import Candidate, weight_candidates, with_rest
from ..errors import LoraSuiteError, WriteError
from ..io.artifacts import Given
from ..io.number_range import in_range
from ..io.output import check_output, write_folder
from ..io.phases import PhaseClock, Progress
from ..io.ranks import Ranks
from ..io.report_path import check_report
from ..io.text_files import refuse_pipe
from ..io.work import clean_up, work_folder
from ..models.checkpoint import Checkpoint
from ..models.families import ROLES
from ..models.family_table import family_named
from ..reporting.html_report import write_report
from ..reporting.model_card import card_files, migration_step
from ..reporting.plan_folder import text_of
from ..results import Migration
from ..transfer.build import build
from ..transfer.build_options import Inputs
from ..transfer.memory import parse_memory
from ..transfer.plan import DISTILLATION, LazyTensors, ModelRecord, Plan, make_options, unused_layers

if TYPE_CHECKING:
    from ..distillation.settings import Settings


class TransferPlan(Plan):
    """How to carry any adapter of one old model to one new model; `Plan` says what it holds."""

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
            report: HTML file to write (`html_report.write_report`); an earlier report there is replaced.

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
        from ..reporting.plan_folder import save_folder

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
        from ..reporting.plan_folder import find_plan

        return cls.load(
            find_plan(source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        )

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
        distilled, from_file = self.options["method"] == "distill", isinstance(self.tensors, LazyTensors)
        check_settings(self.options["method"], settings, text)
        place = work_folder(out)
        clean_up(out, place, DISTILLATION)
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
                    folder=place / DISTILLATION,
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
        return Migration(
            self, source.where, str(target), results, [*self.phases, *clock.phases], unused_layers(source, self)
        )

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
        from ..distillation.distilled_adapter import distil_adapter

        others: dict[str, Candidate] = {}
        left_out: dict[str, str] = {}
        # A rank and a number of layers are distill's alone.
        if "candidates" in self.options and (settings is None or settings.rank is settings.layers is None):
            with clock.phase("candidates", len(self.layers)) as step:
                others, left_out = weight_candidates(self, models, source, options["fill"], options["memory"], step)
        result = distil_adapter(self, models, source, text, settings, clock, others=others, **options)
        if (rest := result.distilled.rest) is not None:
            others[rest.on + REST] = with_rest(self, others[rest.on], rest, source, models[1])
        chosen, choice = _chosen(self, result, others, left_out)
        with clock.phase("write", 1), result.work:
            best = result if choice is None else others.get(choice.chosen, result)
            distilled = result.distilled if best is result else None
            done = migration_step(chosen, source, best.layers, distilled, choice)
            told = card_files(self.new.name, done, wrapped="/" in self.new.family)
            result.work.complete()
            write_folder(target, best.files | told, overwrite=overwrite)
            result.work.discard()
        unused = [] if distilled is not None else unused_layers(source, self)
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


def _chosen(
    plan: Plan, result: DistilledAdapter, others: dict[str, Candidate], left_out: dict[str, str]
) -> tuple[Plan, Choice | None]:
    """The plan as the best candidate carried it out, and how that was chosen; None where there was no choice."""
    if not others:
        return replace(plan, options=without_candidates(plan)), None
    judged = result.distilled.others
    if (rest := result.distilled.rest) is not None:
        judged = judged | {rest.on + REST: rest.agreement}
    broken = {name: "it gives NaN or infinity on the text" for name in others if name not in judged}
    choice = choose(judged | {"distill": result.distilled.agreement}, left_out | broken)
    reason = f"{plan.facts['method_reason']}; measured on held-out text: {choice.table}"
    settled = replace(plan, options=without_candidates(plan))
    if choice.chosen in others:
        settled = others[choice.chosen].plan
    return replace(settled, facts=plan.facts | {"method_reason": reason}), choice


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
