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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter, adapter_files, read_adapter
from ..adapters.base_match import check_base
from ..config import ApplyConfig, PlanConfig, Runtime
from ..config.flat import takes_flat_keywords
from ..distillation.candidates import Candidate, weight_candidates, with_rest
from ..errors import LoraSuiteError, WriteError
from ..io.artifacts import Given
from ..io.number_range import in_range
from ..io.output import check_output, write_folder
from ..io.phases import PhaseClock
from ..io.ranks import Ranks
from ..io.report_path import check_report
from ..io.text_files import refuse_pipe
from ..io.work import clean_up, work_folder
from ..models.checkpoint import Checkpoint
from ..models.family_table import family_named
from ..reporting.html_report import write_report
from ..reporting.model_card import card_files, migration_step
from ..reporting.plan_folder import text_of
from ..results import Migration
from ..transfer.build import build
from ..transfer.build_options import Inputs
from ..transfer.plan import DISTILLATION, LazyTensors, ModelRecord, Plan, make_options, unused_layers


def settings_are_distill(given: dict[str, Any]) -> Iterator[str]:
    """The keyword `settings` of 0.1 as a configuration."""
    settings = given.pop("settings", None)
    if settings is not None:
        given["config"] = replace(given.get("config") or ApplyConfig(), distill=settings)
        yield "settings is ApplyConfig.distill now, pass config=ApplyConfig(distill=…)"


class TransferPlan(Plan):
    """How to carry any adapter of one old model to one new model; `Plan` says what it holds."""

    @classmethod
    @takes_flat_keywords(config=PlanConfig, runtime=Runtime)
    def build(
        cls,
        old: str | os.PathLike[str],
        new: str | os.PathLike[str],
        *,
        config: PlanConfig | None = None,
        runtime: Runtime | None = None,
        work: str | os.PathLike[str] | None = None,
        ranks: Ranks | None = None,
    ) -> TransferPlan:
        """Compares two models and works out how updates travel between them, a layer of each in memory at a time.

        Args:
            old: Folder in Hugging Face format, or hub id.
            new: Folder in Hugging Face format, or hub id.
            config: How they are compared.
            runtime: Device, dtype, memory, report and progress. With dtype auto, the forward passes on a GPU may round
                the operands of their products to TF32 (relative error about 1e-3).
            work: A folder for finished parts. The same call with the same folder goes on where it was interrupted, and
                gives the same plan to the bit; `finish` removes the folder.
            ranks: The processes that share the work (`Ranks.join` under torchrun); each of them gets the whole plan.

        Returns:
            The plan.

        Raises:
            LoraSuiteError: for input that cannot be used; the message names it and says what to do.
        """
        config, runtime = config or PlanConfig(), runtime or Runtime()
        options = make_options(config, runtime)
        check_report(runtime.report, inputs={"OLD": old, "NEW": new, "`calibration`": config.calibration})
        clock = PhaseClock(runtime.progress, options.device)
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
            write_report(plan, runtime.report)
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

    @takes_flat_keywords(settings_are_distill, config=ApplyConfig, runtime=Runtime)
    def apply(
        self,
        adapter: str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        old: str | os.PathLike[str] | None = None,
        new: str | os.PathLike[str] | None = None,
        config: ApplyConfig | None = None,
        runtime: Runtime | None = None,
        overwrite: bool = False,
    ) -> Migration:
        """Carries one PEFT LoRA folder to the new model and writes the result as another.

        A distillation that is interrupted goes on where it stopped when it is called again with the same arguments.

        Args:
            adapter: PEFT LoRA folder.
            out: PEFT LoRA folder to write.
            old: Where the old model is now. The models are opened only then, where Eq. (3) needs MLP weights, for DoRA,
                whose magnitudes need them, and by distill, which runs both.
            new: Where the new model is now.
            config: How it is carried.
            runtime: Device and progress, and for distill dtype (auto: the plan's) and memory; states that do not fit
                lie in files beside OUT, and a budget that is too small is refused.
            overwrite: Replace what exists at out, once the new one is complete.

        Returns:
            What was written, and how it came about.

        Raises:
            LoraSuiteError: an adapter of another base, or one the plan does not cover; OUT is then untouched.
        """
        config, runtime = config or ApplyConfig(), runtime or Runtime()
        check_distilled(self.options["method"], config)
        models = cache(lambda: self.check_models(old, new))
        if old is not None or new is not None:
            models()
        plan = self._on(runtime.device, None if runtime.dtype == "auto" else runtime.dtype)
        return plan._apply(adapter, out, models, config, runtime, overwrite, self._inputs(OLD=old, NEW=new))

    def _apply(
        self,
        adapter: str | os.PathLike[str],
        out: str | os.PathLike[str],
        models: Callable[[], tuple[Checkpoint, Checkpoint]],
        config: ApplyConfig,
        runtime: Runtime,
        overwrite: bool,
        inputs: Given,
    ) -> Migration:
        """`apply`, with the models where they are opened once for several adapters."""
        distilled = self.options["method"] == "distill"
        place = work_folder(out)
        clean_up(out, place, DISTILLATION)
        with suppress(OSError):
            # Of a process that was killed as it removed its work; what holds anything stays.
            place.rmdir()
        given = {"ADAPTER": adapter, "`text`": config.text}
        target = check_output(out, overwrite=overwrite, inputs={**inputs, **given})
        clock = PhaseClock(runtime.progress, self.device if distilled else None)
        source = read_adapter(adapter, family_named(self.old.family), self.old.shape, self.old.name)
        check_base(source, self.old.fingerprint, self.old.name, passed=(self.new.name,))
        if distilled:
            try:
                return self._distil(models(), source, target, config, runtime, clock, place / DISTILLATION, overwrite)
            finally:
                with suppress(OSError):
                    # Where there is anything left to go on from it stays, and so does a plan's own work.
                    place.rmdir()
        missing = [role for role in source.roles if role not in self.options["roles"]]
        if missing:
            raise LoraSuiteError(
                f"{source.where}: the adapter targets {', '.join(missing)}, the plan covers only "
                f"{', '.join(self.options['roles'])}; build the plan with `roles=all`"
            )
        with clock.phase("apply", len(self.layers)) as step, in_range(f"{source.where} or the plan"):
            updates, results = self._project(source, models, config.fill, config.fill_share, step)
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
        config: ApplyConfig,
        runtime: Runtime,
        clock: PhaseClock,
        folder: Path,
        overwrite: bool,
    ) -> Migration:
        from ..distillation.distilled_adapter import distil_adapter

        fill = config.fill, config.fill_share
        others: dict[str, Candidate] = {}
        left_out: dict[str, str] = {}
        # A rank and a number of layers are distill's alone.
        if "candidates" in self.options and config.distill.rank is config.distill.layers is None:
            with clock.phase("candidates", len(self.layers)) as step:
                others, left_out = weight_candidates(self, models, source, fill, runtime.budget, step)
        from_file = isinstance(self.tensors, LazyTensors)
        text = text_of(self, from_file=from_file) if config.text is None else os.fspath(config.text)
        result = distil_adapter(
            self,
            models,
            source,
            text,
            config.distill,
            clock,
            others=others,
            folder=folder,
            memory=runtime.budget,
            fill=fill,
            text_given=config.text is not None,
            trust_remote_code=runtime.trust_remote_code,
        )
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

    @takes_flat_keywords(settings_are_distill, config=ApplyConfig, runtime=Runtime)
    def apply_all(
        self,
        adapters: Sequence[str | os.PathLike[str]],
        folder: str | os.PathLike[str],
        *,
        old: str | os.PathLike[str] | None = None,
        new: str | os.PathLike[str] | None = None,
        config: ApplyConfig | None = None,
        runtime: Runtime | None = None,
        overwrite: bool = False,
        ranks: Ranks | None = None,
    ) -> dict[str, Migration | LoraSuiteError]:
        """Carries many adapters, each into a sub-folder of its own name; one that cannot be carried stops no other.

        Args:
            adapters: PEFT LoRA folders.
            folder: Where the sub-folders go; made if it does not exist.
            old: Where the old model is now; the models are opened once.
            new: Where the new model is now.
            config: How they are carried.
            runtime: See `apply`.
            overwrite: Replace what exists, once the new one is complete.
            ranks: Each process takes its share, and returns the results of that.

        Returns:
            For each adapter, as given, the result or the error.

        Raises:
            LoraSuiteError: two adapters of one name, models that are not the plan's, a folder that cannot be made.
        """
        config, runtime = config or ApplyConfig(), runtime or Runtime()
        check_distilled(self.options["method"], config)
        models = cache(lambda: self.check_models(old, new))
        if old is not None or new is not None:
            models()
        if len(adapters) > 1:
            refuse_pipe(config.text)
        inputs = self._inputs(OLD=old, NEW=new) | {f"ADAPTER {n}": a for n, a in enumerate(adapters, 1)}
        plan = self._on(runtime.device, None if runtime.dtype == "auto" else runtime.dtype)
        progress, runtime = runtime.progress, replace(runtime, progress=None)
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
                results[os.fspath(adapter)] = plan._apply(
                    adapter, target / name, models, config, runtime, overwrite, inputs
                )
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


def check_distilled(method: str, config: ApplyConfig) -> None:
    """Refuses what only distillation uses with another method; `auto` is left to what it takes."""
    if method in (AUTO, "distill"):
        return
    if config.distill.rank is not None:
        raise LoraSuiteError(f"method {method} keeps the adapter's rank; only distill changes it")
    if config.distill.layers is not None:
        raise LoraSuiteError(f"method {method} fits no layers as distill does; leave out `distill.layers`")
    if config.text is not None:
        raise LoraSuiteError(f"method {method} carries adapters without text; leave out `text`")
