"""The command line: one command for each thing lorasuite-fast does."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ._version import __version__
from .errors import LoraSuiteError, WriteError, one_line
from .escaping import printable, terminal
from .given_paths import check_file, check_folder, same_model
from .interrupts import INTERRUPTED, interrupts

if TYPE_CHECKING:
    from .choice import Choice
    from .distillation import Distilled, Settings
    from .doctor import Diagnosis
    from .finetuning import Finetuning
    from .phases import Phase
    from .phases import Progress as Reporter
    from .plan import TransferPlan
    from .ranks import Ranks
    from .result import Migration

DIVERGED = 3
"""Exit code of a training that diverged; what it started from is then in OUT."""
UNEXPECTED = 70
"""Exit code of an error nobody has foreseen, a fault of this program."""
_DEBUG = "--debug"

app = typer.Typer(
    name="lorasuite-fast",
    help="Carry a LoRA adapter from the base model it was trained on to that model's successor.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

METHOD, TEXT, TRAINING, MACHINE, OUTPUT = "Method", "Text", "Training", "Machine", "Output"
"""Panels of the help."""

OldArgument = Annotated[str, typer.Argument(metavar="OLD", help="Model the adapter was trained on: folder or hub id.")]
NewArgument = Annotated[str, typer.Argument(metavar="NEW", help="Model to carry it to: folder or hub id.")]
AdapterArgument = Annotated[Path, typer.Argument(metavar="ADAPTER", help="PEFT LoRA folder.")]
PlanArgument = Annotated[
    Path,
    typer.Argument(metavar="PLAN", help="File `lorasuite-fast plan` wrote, or a folder or hub id of a saved plan."),
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="PEFT LoRA folder to write.")]


def _option(panel: str, metavar: str | None, help: str, *names: str, **settings: Any) -> Any:
    """An option whose help is one line on a terminal of 100 columns; defaults stand in the help."""
    shown = escape(help)
    return typer.Option(*names, metavar=metavar, help=shown, rich_help_panel=panel, show_default=False, **settings)


Calibration = Annotated[
    Path | None,
    _option(TEXT, "FILE", "Unlabelled .jsonl or .txt; self: by the old model [shipped]"),
]
Examples = Annotated[int, _option(TEXT, "N", "Calibration examples to read, 128 tokens of each [64]", min=4)]
Layers = Annotated[
    Literal["cka", "first", "medium", "last"],
    _option(METHOD, "MAP", "Which layer continues which: cka, first, medium, last [cka]"),
]
Similarity = Annotated[
    Literal["cka", "mean-cca", "squared-cca", "pwcca", "procrustes"],
    _option(METHOD, "KIND", "cka [default], mean-cca, squared-cca, pwcca, procrustes"),
]
Heads = Annotated[
    Literal["hungarian", "identity"],
    _option(METHOD, "MATCH", "How heads are matched: hungarian, identity [hungarian]"),
]
TransferKind = Annotated[
    Literal["embedding", "identity"],
    _option(METHOD, "KIND", "Transfer matrix: embedding (fitted), identity [embedding]"),
]
MethodName = Annotated[
    Literal["auto", "copy", "lstsq", "distill", "paper"],
    _option(METHOD, "METHOD", "auto (measures), copy, lstsq, distill, paper [auto]"),
]
Rank = Annotated[int | None, _option(METHOD, "N", "Of the result, with distill [the adapter's]", min=1)]
Fill = Annotated[str, _option(METHOD, "KIND", "New layers without a partner: none, zero, nearest [none]")]
FillShare = Annotated[float, _option(METHOD, "X", "Of the neighbour's update, with --fill nearest [0.5]")]
Fitted = Annotated[int | None, _option(METHOD, "N", "Last new layers that distill fits [half of them]", min=1)]
RefineText = Annotated[
    Path | None, _option(TEXT, "FILE", "Unlabelled text to refine on [self: the old model writes it]")
]
Checkpointing = Annotated[
    bool, _option(MACHINE, None, "Recompute activations: less memory, more time", "--gradient-checkpointing")
]
Epochs = Annotated[int, _option(TRAINING, "N", "How often each sample is read [3]", min=1)]
CompletionOnly = Annotated[
    bool, _option(TRAINING, None, "Count only what answers the prompt in the loss", "--completion-only")
]
Retain = Annotated[str | None, _option(TRAINING, "FILE", "Text predicted as before; shipped: general")]
RetainWeight = Annotated[float, _option(TRAINING, "X", "Of what --retain adds to the loss [0.3]", min=0.0)]
Device = Annotated[Literal["auto", "cpu", "cuda"], _option(MACHINE, "DEVICE", "auto, cpu or cuda [auto]")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float64"],
    _option(MACHINE, "DTYPE", "float32, bfloat16 or float64 [auto: float32]"),
]
TrainingDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float64"],
    _option(MACHINE, "DTYPE", "float32, bfloat16 or float64 [auto: bfloat16 on a GPU]"),
]
Seed = Annotated[int, _option(TEXT, "N", "Which examples are taken where there are more [0]")]
Ridge = Annotated[float, _option(METHOD, "X", "Of the transfer matrix, share of the mean diagonal [0]", min=0.0)]
Memory = Annotated[str | None, _option(MACHINE, "SIZE", "What may be resident on the device, e.g. 6GB")]
Mapped = Annotated[
    bool, _option(MACHINE, None, "Map the checkpoints, or read them (unified memory)", "--mmap/--no-mmap")
]
Overwrite = Annotated[bool, _option(OUTPUT, None, "Replace what exists, once the new one is complete", "--overwrite")]
RemoteCode = Annotated[
    bool, _option(MACHINE, None, "Let transformers run code from the folders", "--trust-remote-code")
]
Report = Annotated[Path | None, _option(OUTPUT, "FILE", "Write a report, one HTML file", "--report")]
AsJson = Annotated[bool, _option(OUTPUT, None, "Print one JSON object instead of tables", "--json")]


@contextmanager
def _bus_errors() -> Iterator[None]:
    """A file cut off under its memory map ends in SIGBUS at the next touch; this makes it one line and exit code 2.

    The faulting instruction is tried again and again meanwhile, so a thread of its own has to notice.
    """
    if not hasattr(signal, "SIGBUS") or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while got := os.read(reader, 1):
            if got[0] == signal.SIGBUS:
                message = (
                    b"error: a model file was cut off while it was being read, or its disk failed; fetch it again\n"
                )
                os.write(2, message)
                os._exit(2)

    before = signal.signal(signal.SIGBUS, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGBUS, before)
        os.close(writer)
        thread.join()
        os.close(reader)


class _PlainProgress:
    """Lines instead of bars, for what is no terminal: of phases over 2 s, and no more than one in 10 s."""

    FIRST, EVERY = 2.0, 10.0

    def __init__(self, write: Any | None, clock: Any = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._phase, self._start, self._last = "", 0.0, 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = self._clock()
        if phase != self._phase:
            self._phase, self._start, self._last = phase, now, now + self.FIRST - self.EVERY
        elapsed = now - self._start
        # The last line of a phase only where earlier ones have been printed.
        finished = done >= total and self._last >= self._start
        if self._write is None or not done or not (finished or now - self._last >= self.EVERY):
            return
        self._last = now
        left = f", {(total - done) * elapsed / done:.0f} s left" if done < total else f" in {elapsed:.0f} s"
        self._write(f"{phase}: {done} of {total}, {done / elapsed:.1f}/s{left}", err=True)


_MOST_TEMPLATE = 1 << 20
_OUT_OF_MEMORY = (
    "out of memory; OUT is what it was, or complete. Free some, or pass --memory, where the command has it; "
    "what is finished is kept, and the same command goes on from there"
)
_MEMORY_WORDS = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "can't start new thread",
    "failed to map segment",
)


def _complain(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    typer.echo(f"error{f' (rank {printable(rank)})' if rank != '0' else ''}: {one_line(message)}", err=True)


def _fail(message: str) -> NoReturn:
    _complain(message)
    raise typer.Exit(2) from None


@contextmanager
def _run(as_json: bool) -> Iterator[Reporter | None]:
    """Progress on stderr, and every foreseen failure as one line and exit code 2."""
    # What transformers remarks about its own internals is no business of the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    console = Console(stderr=True)
    bars: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    live = console.is_terminal
    plain = _PlainProgress(None if as_json or live else typer.echo)
    try:
        with (
            _bus_errors(),
            Progress(*columns, console=console, disable=as_json or not live) as progress,
        ):

            def report(phase: str, done: int, total: int) -> None:
                if phase not in bars:
                    bars[phase] = progress.add_task(phase, total=total, rate="")
                elapsed = progress.tasks[bars[phase]].elapsed or 0.0
                rate = f"{done / elapsed:.1f}/s" if done and elapsed > 0 else ""
                progress.update(bars[phase], completed=done, rate=rate)
                plain(phase, done, total)

            yield report
    except LoraSuiteError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror or error}")


@contextmanager
def _checks() -> Iterator[None]:
    """Before anything that takes long to import: what was given is looked at, and refused in one line."""
    try:
        yield
    except LoraSuiteError as error:
        _fail(str(error))


def _check_models(old: str, new: str) -> None:
    check_folder("OLD model", old)
    check_folder("NEW model", new)
    if same_model(old, new):
        typer.echo(f"note: OLD and NEW are the same model, {one_line(old)}", err=True)


def _check_data(what: str, data: str | None) -> None:
    """Labelled data may be a file, a folder or the id of a data set on the hub, which has no such ending."""
    if data is not None and Path(data).suffix in (".json", ".jsonl", ".txt"):
        check_file(what, data)


def _only_for(context: typer.Context, fits: bool, purpose: str, *names: str) -> None:
    """Refuses options that were given and would be left unused."""
    for name in names:
        source = context.get_parameter_source(name)
        if not fits and source is not None and source.name == "COMMANDLINE":
            raise LoraSuiteError(f"--{name.replace('_', '-')} is for {purpose}")


def _check_method(context: typer.Context, method: str, transfer: str) -> None:
    """Options of `migrate` and `plan` that go with some methods alone; what `auto` takes is not known yet."""
    distills = "distillation; leave it out, or pass --method distill"
    _only_for(context, method in ("auto", "distill"), distills, "rank", "distill_layers")
    _only_for(context, method != "distill", "the methods lstsq and paper; leave it out", "heads")
    fitted = "a fitted transfer matrix; leave it out, or pass --transfer embedding"
    _only_for(context, transfer == "embedding", fitted, "ridge")


def _check_fill(context: typer.Context, fill: str) -> None:
    _only_for(context, fill == "nearest", "--fill nearest; give both", "fill_share")


@contextmanager
def _ranks() -> Iterator[Ranks]:
    """The processes torchrun started, if it did; alone otherwise."""
    from .ranks import Ranks

    ranks = Ranks.join()
    yield ranks
    ranks.leave()


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def _phase_table(phases: list[Phase]) -> Table:
    """Times, and memory in MiB: what was predicted for the device stands beside what was measured there."""
    on_gpu = any(phase.peak_device_memory is not None for phase in phases)
    table = Table(title="Phases (memory in MiB, peaks)", title_justify="left")
    table.add_column("phase")
    for name in ("seconds", "anonymous", "resident", *(["on the GPU"] if on_gpu else []), "predicted"):
        table.add_column(name, justify="right")
    for phase in phases:
        sizes = [phase.peak_memory, phase.peak_resident, *([phase.peak_device_memory] if on_gpu else [])]
        table.add_row(phase.name, f"{phase.seconds:.2f}", *map(_mib, [*sizes, phase.predicted]))
    return table


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _measure(plan: TransferPlan) -> str:
    """Heading of the layers' similarity; plans of older releases name no measure."""
    measure = plan.options.get("similarity", "cka")
    return "CKA" if measure == "cka" else terminal(measure)


def _print_transfer(console: Console, plan: TransferPlan, *, measured: bool = False) -> None:
    from .kinship import plan_kinship

    facts, old, new = plan.facts, plan.old.shape, plan.new.shape
    line = (
        f"old: {old.L} layers, d {old.d}, {old.attention}   new: {new.L} layers, d {new.d}, {new.attention}   "
        f"method: {plan.method}, {facts.get('method_reason', 'asked for')}"
    )
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
    relatives = plan_kinship(facts)
    if relatives is not None:
        console.print(printable(relatives), highlight=False, markup=False, soft_wrap=True)
    if plan.options["transfer"] == "identity":
        vocabulary = "the same vocabulary" if facts["same_vocabulary"] else "[yellow]different vocabularies[/yellow]"
        console.print(f"transfer matrix: the identity, as asked for; the two models have {vocabulary}")
        return
    from .build import EXACT_R2

    r2, back = facts["r2"], facts["r2_back"]
    console.print(
        f"transfer matrix: {facts['shared_tokens']:,} shared tokens"
        + (f" ({facts['untrained_tokens']:,} untrained ones left out)" if facts["untrained_tokens"] else "")
        + f", R² on held-out tokens {_share(r2)} old to new, {_share(back)} new to old",
        highlight=False,
    )
    if r2 is not None and min(r2, back) < EXACT_R2 and plan.options["method"] in ("lstsq", "paper") and not measured:
        console.print(
            "[yellow]No linear map carries one embedding onto the other (R² below 0.999): between such models the\n"
            "projection alone usually changes little or nothing for the better. Measure before you rely on it.[/yellow]"
        )


def _print_layers(console: Console, result: Migration) -> None:
    plan, distilled = result.plan, result.distilled is not None
    figures = ("explained",) if distilled else ("head cosine", "neuron cosine")
    table = Table(title="Layers", title_justify="left")
    for name in ("new", "old", _measure(plan), *figures, "relative size of the update"):
        table.add_column(name, justify="left" if name.startswith("relative") else "right")
    results = {layer.new_layer: layer for layer in result.layers}
    for j in range(plan.new.shape.L):
        layer, old = results.get(j), plan.layers.get(j)
        similarity = None if old is None else float(plan.tensors["cka"][old, j])
        if layer is None:
            none = "not fitted, no update" if distilled else "no partner, no update"
            row, update = [""] * len(figures), f"[dim]{none}[/dim]"
        else:
            shares = (layer.explained,) if distilled else (layer.head_similarity, layer.neuron_similarity)
            row = [_share(share) for share in shares]
            update = "  ".join(f"{role}\u00a0{size:.3f}" for role, size in layer.update.items()) or "–"
        table.add_row(str(j), "–" if old is None else str(old), _share(similarity), *row, update)
    console.print(table)


def _steps(option: str, text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise LoraSuiteError(f"{option} {text}: expected auto or a number of steps") from None


def _kept(text: str) -> int | str | None:
    if text in ("auto", "all"):
        return None if text == "all" else text
    try:
        return int(text)
    except ValueError:
        raise LoraSuiteError(f"--top-k {text}: expected auto, all or a number") from None


def _say(sentence: str) -> None:
    typer.echo(printable(sentence), err=True)


def _settings(rank: int | None, layers: int | None, seed: int) -> Settings | None:
    if rank is None and layers is None:
        return None
    from .distillation import Settings

    return Settings(rank=rank, layers=layers, seed=seed)


def _print_distilled(console: Console, distilled: Distilled) -> None:
    share, content = distilled.agreement["kl_share"], distilled.agreement["content_kl_share"]
    console.print(
        f"distilled on {distilled.positions:,} aligned positions of {distilled.texts:,} texts, gain {distilled.gain}\n"
        f"agreement with the old adapter on held-out text (1: the same change, 0: none): {share[0]:.3f} "
        f"[{share[1]:.3f}, {share[2]:.3f}], of which {content[0]:.3f} [{content[1]:.3f}, {content[2]:.3f}] depends on "
        "the text",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _print_choice(console: Console, choice: Choice) -> None:
    console.print(
        f"candidates, by what depends on the text in their agreement on held-out text: {choice.table}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for name, reason in choice.left_out.items():
        console.print(f"{name} was not judged: {reason}", highlight=False, markup=False, soft_wrap=True)


def _print_finetuned(console: Console, tuned: Finetuning) -> None:
    lost = [
        f"{count:,} of its samples {what}"
        for count, what in (
            (tuned.truncated, f"were cut off at {tuned.options['max_tokens']} tokens"),
            (tuned.left_out, "were left out, nothing to learn being left of them there"),
        )
        if count
    ]
    if lost:
        console.print(f"[yellow]data: {'; '.join(lost)}[/yellow]", soft_wrap=True, highlight=False)
    style = "yellow" if tuned.kept_start else None
    console.print(printable(tuned.summary), style=style, highlight=False, markup=False, soft_wrap=True)


def _print_written(console: Console, report_file: Path | None, out: str | Path | None = None) -> None:
    for what, path in (("written", out), ("report", report_file)):
        if path is not None:
            console.print(f"{what}: {printable(path)}", highlight=False, markup=False, soft_wrap=True)


def _print_result(result: Migration, as_json: bool, report_file: Path | None = None) -> None:
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
    console = Console()
    _print_transfer(console, result.plan, measured=result.choice is not None)
    _print_layers(console, result)
    console.print(_phase_table(result.phases))
    if result.choice is not None:
        _print_choice(console, result.choice)
    if result.distilled is not None:
        _print_distilled(console, result.distilled)
    if result.refined is not None:
        console.print(printable(result.refined.summary), highlight=False, markup=False, soft_wrap=True)
    if result.finetuned is not None:
        _print_finetuned(console, result.finetuned)
    elif result.warning:
        console.print(f"[yellow]WARNING: {terminal(result.warning)}.[/yellow]", soft_wrap=True)
    if result.unused_old_layers:
        console.print(f"old layers without a partner, left out: {', '.join(map(str, result.unused_old_layers))}")
    _print_written(console, report_file, result.out)


@app.command()
def migrate(
    context: typer.Context,
    old: OldArgument,
    new: NewArgument,
    adapter: AdapterArgument,
    out: OutArgument,
    calibration: Calibration = None,
    examples: Examples = 64,
    layers: Layers = "cka",
    similarity: Similarity = "cka",
    heads: Heads = "hungarian",
    transfer: TransferKind = "embedding",
    method: MethodName = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    ridge: Ridge = 0.0,
    rank: Rank = None,
    distill_layers: Fitted = None,
    fill: Fill = "none",
    fill_share: FillShare = 0.5,
    refine: Annotated[
        str | None,
        _option(TRAINING, "STEPS", "Then train without labels: N, auto; 0: no [auto on a GPU]"),
    ] = None,
    refine_text: RefineText = None,
    finetune: Annotated[
        str | None,
        _option(TRAINING, "DATA", "Then train on labelled data, as `finetune` does"),
    ] = None,
    finetune_epochs: Epochs = 3,
    finetune_rate: Annotated[float, _option(TRAINING, "X", "Learning rate of --finetune [1e-3]")] = 1e-3,
    retain: Retain = None,
    completion_only: CompletionOnly = False,
    memory: Memory = None,
    mapped: Mapped = True,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    report_file: Report = None,
    as_json: AsJson = False,
) -> None:
    """Carry an adapter from OLD to NEW: plan and apply in one step.

    Example: lorasuite-fast migrate Qwen/Qwen1.5-1.8B Qwen/Qwen2.5-3B my-adapter my-adapter-qwen2.5
    """
    with _checks():
        _check_models(old, new)
        check_folder("ADAPTER", adapter, hub=False)
        check_file("--calibration", calibration, "self")
        check_file("--refine-text", refine_text, "self")
        check_file("--retain", retain, "shipped")
        _check_data("--finetune", finetune)
        _check_method(context, method, transfer)
        _check_fill(context, fill)
        tuned = "the training that --finetune asks for; give both"
        _only_for(context, finetune is not None, tuned, "finetune_epochs", "finetune_rate", "retain", "completion_only")
        _only_for(context, refine != "0", "the training that --refine asks for; give both", "refine_text")
    with _run(as_json) as report:
        from .plan import migrate as run

        result = run(
            old,
            new,
            adapter,
            out,
            calibration=calibration,
            examples=examples,
            layers=layers,
            similarity=similarity,
            heads=heads,
            transfer=transfer,
            method=method,
            device=device,
            dtype=dtype,
            seed=seed,
            ridge=ridge,
            memory=memory,
            mapped=mapped,
            settings=_settings(rank, distill_layers, seed),
            fill=fill,
            fill_share=fill_share,
            refine=None if refine is None else _steps("--refine", refine),
            refine_text=refine_text,
            finetune=finetune,
            finetune_options=None
            if finetune is None
            else {
                "epochs": finetune_epochs,
                "learning_rate": finetune_rate,
                "completion_only": completion_only,
                "retain": retain,
            },
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            report=report_file,
            progress=report,
            say=_say,
        )
    _print_result(result, as_json, report_file)
    if result.finetuned is not None and result.finetuned.diverged:
        raise typer.Exit(DIVERGED)


@app.command()
def plan(
    context: typer.Context,
    old: OldArgument,
    new: NewArgument,
    out: Annotated[Path, typer.Argument(metavar="PLAN", help="File to write, e.g. old-to-new.plan.safetensors.")],
    roles: Annotated[
        str, _option(METHOD, "ROLES", "Projections: all, attention, mlp, or names like q,v [all]")
    ] = "all",
    calibration: Calibration = None,
    examples: Examples = 64,
    layers: Layers = "cka",
    similarity: Similarity = "cka",
    heads: Heads = "hungarian",
    transfer: TransferKind = "embedding",
    method: MethodName = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    ridge: Ridge = 0.0,
    memory: Memory = None,
    mapped: Mapped = True,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    report_file: Report = None,
    as_json: AsJson = False,
) -> None:
    """Work out how adapters travel from OLD to NEW and save it as one file, for any number of adapters.

    Interrupted, the same command goes on where it stopped. Under torchrun the processes share the layers.

    Example: lorasuite-fast plan old-model new-model old-to-new.plan.safetensors --memory 6GB
    """
    with _checks():
        _check_models(old, new)
        check_file("--calibration", calibration, "self")
        _check_method(context, method, transfer)
    with _run(as_json) as report, _ranks() as ranks:
        from .families import ATTENTION, MLP, ROLES
        from .output import check_output
        from .plan import TransferPlan
        from .work import clean_up, work_folder

        if ranks.first:
            clean_up(out)
        given = {"OLD": old, "NEW": new, "--calibration": calibration}
        check_output(out, overwrite=overwrite, kind="plan", inputs=given)
        named = {"all": ROLES, "attention": ATTENTION, "mlp": MLP}
        built = TransferPlan.build(
            old,
            new,
            roles=named.get(roles) or tuple(role.strip() for role in roles.split(",")),
            calibration=calibration,
            examples=examples,
            layers=layers,
            similarity=similarity,
            heads=heads,
            transfer=transfer,
            method=method,
            device=device,
            dtype=dtype,
            seed=seed,
            ridge=ridge,
            memory=memory,
            mapped=mapped,
            work=work_folder(out),
            ranks=ranks,
            trust_remote_code=trust_remote_code,
            report=report_file,
            progress=report if ranks.first else None,
        )
        if ranks.first:
            try:
                built.save(out, overwrite=overwrite)
            except WriteError:
                raise
            except LoraSuiteError:
                built.finish()
                raise
            built.finish()
    if not ranks.first:
        return
    if as_json:
        typer.echo(json.dumps(built.summary() | {"plan": str(out)}))
        return
    console = Console()
    _print_transfer(console, built)
    table = Table(title="Layers", title_justify="left")
    for name in ("new", "old", _measure(built)):
        table.add_column(name, justify="right")
    for layer in built.summary()["layers"]:
        table.add_row(str(layer["new"]), str(layer["old"]), f"{layer['cka']:.3f}")
    console.print(table)
    console.print(_phase_table(built.phases))
    _print_written(console, report_file, out)


@app.command()
def apply(
    context: typer.Context,
    plan_file: PlanArgument,
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER [OUT]", help="PEFT LoRA folder, and where to write.")
    ],
    out: Annotated[
        Path | None, _option(OUTPUT, "DIR", "Carry every ADAPTER given into DIR/<its name>", "--out")
    ] = None,
    old: Annotated[str | None, _option(MACHINE, "OLD", "Where the old model is now; it is checked")] = None,
    new: Annotated[str | None, _option(MACHINE, "NEW", "Where the new model is now; it is checked")] = None,
    text: Annotated[Path | None, _option(TEXT, "FILE", "For distill: .jsonl, .txt or self [the plan's text]")] = None,
    rank: Rank = None,
    distill_layers: Fitted = None,
    fill: Fill = "none",
    fill_share: FillShare = 0.5,
    memory: Memory = None,
    device: Device = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"] | None,
        _option(MACHINE, "DTYPE", "For distill: float32, bfloat16 or float64 [the plan's]"),
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Carry one more adapter with a saved plan, or many; takes seconds each. Under torchrun the processes share them.

    Example: lorasuite-fast apply old-to-new.plan.safetensors my-adapter my-adapter-new

    Example: lorasuite-fast apply old-to-new.plan.safetensors adapters/* --out adapters-new
    """
    with _checks():
        if out is None and len(adapters) != 2:
            raise LoraSuiteError("apply takes PLAN ADAPTER OUT, or PLAN ADAPTER... --out DIR")
        if "/" not in str(plan_file) or Path(plan_file).suffix:
            check_file("PLAN", plan_file)
        for what, model in (("--old", old), ("--new", new)):
            if model is not None:
                check_folder(what, model)
        if out is None:
            check_folder("ADAPTER", adapters[0], hub=False)
        check_file("--text", text, "self")
        _check_fill(context, fill)
    given: dict[str, Any] = {"old": old, "new": new, "text": text, "fill": fill, "fill_share": fill_share}
    given |= {"memory": memory, "overwrite": overwrite, "device": device, "dtype": dtype}
    given["trust_remote_code"] = trust_remote_code
    if out is None:
        with _run(as_json) as report:
            from .plan import TransferPlan

            loaded = TransferPlan.from_pretrained(plan_file)
            _check_distils(context, loaded)
            settings = _settings(rank, distill_layers, loaded.options["seed"])
            result = loaded.apply(adapters[0], adapters[1], settings=settings, progress=report, **given)
        _print_result(result, as_json)
        return
    with _run(as_json) as report, _ranks() as ranks:
        from .plan import TransferPlan

        loaded = TransferPlan.from_pretrained(plan_file)
        _check_distils(context, loaded)
        settings = _settings(rank, distill_layers, loaded.options["seed"])
        share = loaded.apply_all(adapters, out, settings=settings, ranks=ranks, progress=report, **given)
        outcomes = ranks.merge(
            {name: {"error": str(r)} if isinstance(r, LoraSuiteError) else {"out": r.out} for name, r in share.items()}
        )
    if ranks.first:
        _print_outcomes(outcomes, as_json)


def _check_distils(context: typer.Context, loaded: TransferPlan) -> None:
    """Options of `apply` that only a plan by distillation uses."""
    method = loaded.options["method"]
    purpose = f"plans whose method is distill; this one's is {method}, leave it out"
    _only_for(context, method == "distill", purpose, "memory", "dtype")


def _print_outcomes(outcomes: dict[str, dict[str, str]], as_json: bool) -> None:
    """What became of each of many adapters; exit code 2 if any failed."""
    failed = [name for name, outcome in outcomes.items() if "error" in outcome]
    if as_json:
        typer.echo(json.dumps({"adapters": outcomes, "failed": len(failed)}))
    else:
        for name, outcome in sorted(outcomes.items()):
            typer.echo(printable(f"{name}: {outcome['out']}" if "out" in outcome else f"{name}: FAILED"))
        typer.echo(f"carried: {len(outcomes) - len(failed)} of {len(outcomes)}")
        for name in failed:
            typer.echo(printable(f"error: {name}: {outcomes[name]['error']}"), err=True)
    if failed:
        raise typer.Exit(2)


@app.command()
def verify(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="OLD [OLD_ADAPTER] NEW [NEW_ADAPTER]",
            help="Two models, or each with its adapter.",
        ),
    ],
    text: Annotated[
        Path | None,
        _option(TEXT, "FILE", "Unlabelled, best of the domain: .jsonl, .txt [shipped]"),
    ] = None,
    labelled: Annotated[
        Path | None,
        _option(TEXT, "FILE", "Adds bits per byte: .jsonl, `text` or `prompt`, `completion`"),
    ] = None,
    examples: Annotated[int, _option(TEXT, "N", "Examples to read of either file [64]", min=4)] = 64,
    max_tokens: Annotated[int, _option(TEXT, "N", "Tokens each model reads of an example [256]", min=2)] = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, _option(TEXT, "N", "Of the examples, the shuffles and the bootstrap [0]")] = 0,
    trust_remote_code: RemoteCode = False,
    report_file: Report = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a migrated adapter still does, or of two base models whether a migration will carry.

    Example: lorasuite-fast verify old-model my-adapter new-model my-adapter-new --text domain.txt

    Before a migration: lorasuite-fast verify old-model new-model

    Exit code 0 whatever the verdict.
    """
    with _checks():
        if len(models) not in (2, 4):
            raise LoraSuiteError(
                f"verify takes OLD NEW, or OLD OLD_ADAPTER NEW NEW_ADAPTER; {len(models)} arguments were given"
            )
        old, old_adapter, new, new_adapter = models if len(models) == 4 else (models[0], None, models[1], None)
        _check_models(old, new)
        for what, folder in (("OLD_ADAPTER", old_adapter), ("NEW_ADAPTER", new_adapter)):
            if folder is not None:
                check_folder(what, folder)
        check_file("--text", text)
        check_file("--labelled", labelled)
    with _run(as_json) as report:
        from .verification import verify as run

        result = run(
            old,
            old_adapter,
            new,
            new_adapter,
            text=text,
            labelled=labelled,
            examples=examples,
            max_tokens=max_tokens,
            device=device,
            dtype=dtype,
            seed=seed,
            trust_remote_code=trust_remote_code,
            report=report_file,
            progress=report,
        )
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
    from .verification_tables import print_verification

    console = Console()
    print_verification(console, result)
    console.print(_phase_table(result.phases))
    _print_written(console, report_file)


@app.command()
def refine(
    context: typer.Context,
    old: OldArgument,
    old_adapter: Annotated[str, typer.Argument(metavar="OLD_ADAPTER", help="PEFT LoRA folder trained on OLD.")],
    new: NewArgument,
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="PEFT LoRA folder for NEW to start from, or `none`.")
    ],
    out: OutArgument,
    text: RefineText = None,
    text_bytes: Annotated[int, _option(TEXT, "N", "Bytes of text the old model writes [600,000]", min=1000)] = 600_000,
    steps: Annotated[str, _option(TRAINING, "N", "Steps; auto: as many as the text is worth [auto]")] = "auto",
    learning_rate: Annotated[float, _option(TRAINING, "X", "Falls to 0; large models need less [1e-2]")] = 1e-2,
    rank: Annotated[int | None, _option(METHOD, "N", "Of a new adapter [8]; widens ADAPTER", min=1)] = None,
    roles: Annotated[str | None, _option(METHOD, "ROLES", "Projections to train [those of ADAPTER, or all]")] = None,
    imitation: Annotated[
        float, _option(TRAINING, "X", "0: carry the change; 1: copy OLD [0.5]", min=0.0, max=1.0)
    ] = 0.5,
    kl_weight: Annotated[float, _option(TRAINING, "X", "Of the divergence from the teacher [1]", min=0.0)] = 1.0,
    next_token_weight: Annotated[float, _option(TRAINING, "X", "Of a next-token loss besides [0]", min=0.0)] = 0.0,
    retain: Retain = None,
    retain_weight: RetainWeight = 0.3,
    batch_bytes: Annotated[int, _option(TRAINING, "N", "Text a step reads [2,000]", min=1)] = 2000,
    top_k: Annotated[str, _option(TRAINING, "N", "Tokens kept of a target; all; auto loses 2 % [auto]")] = "auto",
    eval_every: Annotated[int, _option(TRAINING, "N", "Steps between evaluations [25]", min=1)] = 25,
    patience: Annotated[int, _option(TRAINING, "N", "Evaluations without gain to stop at; 0: never [6]")] = 6,
    device: Device = "auto",
    dtype: TrainingDtype = "auto",
    seed: Annotated[int, _option(TRAINING, "N", "Of the text, its order and a new adapter [0]")] = 0,
    memory: Memory = None,
    gradient_checkpointing: Checkpointing = False,
    cache: Annotated[Path | None, _option(MACHINE, "DIR", "Folder that keeps the targets for further runs")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    report_file: Report = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter of NEW, without labels, to do what OLD_ADAPTER does on OLD.

    Interrupted, the same command goes on from its last checkpoint.

    Example: lorasuite-fast refine old-model my-adapter new-model my-adapter-new my-adapter-refined
    """
    with _checks():
        _check_models(old, new)
        check_folder("OLD_ADAPTER", old_adapter)
        if adapter != "none":
            check_folder("ADAPTER", adapter)
        check_file("--text", text, "self")
        check_file("--retain", retain, "shipped")
        written = text is None or str(text) == "self"
        _only_for(context, written, "text the old model writes; leave out --text, or this", "text_bytes")
        _only_for(context, retain is not None, "--retain; give both", "retain_weight")
    with _run(as_json) as report:
        from .refinement import refine as run

        result = run(
            old,
            old_adapter,
            new,
            None if adapter == "none" else adapter,
            out,
            text=text,
            text_bytes=text_bytes,
            steps=_steps("--steps", steps),
            learning_rate=learning_rate,
            rank=rank,
            roles=None if roles is None else [role.strip() for role in roles.split(",")],
            imitation=imitation,
            kl_weight=kl_weight,
            next_token_weight=next_token_weight,
            retain=retain,
            retain_weight=retain_weight,
            batch_bytes=batch_bytes,
            top_k=_kept(top_k),
            eval_every=eval_every,
            patience=patience or None,
            device=device,
            dtype=dtype,
            seed=seed,
            memory=memory,
            gradient_checkpointing=gradient_checkpointing,
            cache=cache,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            report=report_file,
            progress=report,
            say=_say,
        )
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
    console = Console()
    table = Table(title="Evaluations on held-out text", title_justify="left")
    for name in ("step", "agreement", "KL, nats", "next token, nats", "retained text, nats"):
        table.add_column(name, justify="right")
    for e in result.evaluations:
        table.add_row(str(e.step), f"{e.agreement:.3f}", _share(e.kl), _share(e.next_token), _share(e.retained_kl))
    console.print(table)
    console.print(_phase_table(result.phases))
    facts = result.teacher
    console.print(
        f"targets: {facts.k:,} of {facts.shared:,} shared tokens kept at {facts.positions:,} positions; the rest holds "
        f"{facts.rest:.2%} of the mass, and merging it loses {facts.as_dict()['truncation']:.2%} of the divergence",
        highlight=False,
        soft_wrap=True,
    )
    console.print(printable(result.summary), highlight=False, markup=False, soft_wrap=True)
    _print_written(console, report_file, result.out)


@app.command()
def finetune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model of the adapter: folder or hub id.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="PEFT folder to start from, or `none`: from zero.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Labelled: .json, .jsonl, .txt, `datasets` folder or hub id.",
        ),
    ],
    out: OutArgument,
    epochs: Epochs = 3,
    steps: Annotated[int | None, _option(TRAINING, "N", "Optimizer steps, in place of epochs", min=1)] = None,
    batch: Annotated[int, _option(TRAINING, "N", "Samples a step reads [16]", min=1)] = 16,
    micro_batch: Annotated[int | None, _option(MACHINE, "N", "Samples computed at once [all of a step]", min=1)] = None,
    learning_rate: Annotated[float, _option(TRAINING, "X", "At the first step; falls linearly to 0 [1e-3]")] = 1e-3,
    max_tokens: Annotated[int, _option(TEXT, "N", "Of a sample; the rest is cut off [256]", min=2)] = 256,
    template: Annotated[
        str,
        _option(TEXT, "FORM", "alpaca, chat, or a file with {instruction} and {input} [alpaca]"),
    ] = "alpaca",
    completion_only: CompletionOnly = False,
    validation: Annotated[
        str | None,
        _option(TEXT, "DATA", "To choose the checkpoint on: a share such as 0.1, or data"),
    ] = None,
    rank: Annotated[int | None, _option(METHOD, "N", "Of an adapter from zero [32]", min=1)] = None,
    alpha: Annotated[float | None, _option(METHOD, "X", "Of an adapter from zero [its rank]")] = None,
    dropout: Annotated[float | None, _option(METHOD, "X", "Of an adapter from zero [0]")] = None,
    roles: Annotated[str | None, _option(METHOD, "ROLES", "Of an adapter from zero, like q,v [q,k,v,o]")] = None,
    save_every: Annotated[
        int | None, _option(MACHINE, "N", "Steps between checkpoints [an epoch, 50 at most]", min=1)
    ] = None,
    retain: Retain = None,
    retain_weight: RetainWeight = 0.3,
    seed: Annotated[int, _option(TRAINING, "N", "Of the order, dropout and an adapter from zero [0]")] = 0,
    device: Device = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"],
        _option(MACHINE, "DTYPE", "Of the base model [bfloat16 on a GPU, else float32]"),
    ] = "auto",
    gradient_checkpointing: Checkpointing = False,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    report_file: Report = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter of MODEL on labelled data, from the factors it has.

    Records have instruction, output and perhaps input; prompt and completion; messages; or text.

    Interrupted, the same command goes on from its last checkpoint. Exit code 3: it diverged, and
    OUT got what ADAPTER holds.

    Example: lorasuite-fast finetune new-model my-adapter-new samples.jsonl my-adapter-tuned
    """
    with _checks():
        check_folder("MODEL", model)
        if adapter != "none":
            check_folder("ADAPTER", adapter)
        _check_data("DATA", data)
        _check_data("--validation", validation)
        check_file("--retain", retain, "shipped")
        anew = "a new adapter; leave it out, or give `none` as ADAPTER"
        _only_for(context, adapter == "none", anew, "rank", "alpha", "dropout", "roles")
        _only_for(context, steps is None, "trainings without --steps; give one of the two", "epochs")
        _only_for(context, retain is not None, "--retain; give both", "retain_weight")
    with _run(as_json) as report:
        from .finetuning import finetune as run

        result = run(
            model,
            None if adapter == "none" else adapter,
            data,
            out,
            epochs=epochs,
            steps=steps,
            batch=batch,
            micro_batch=micro_batch,
            learning_rate=learning_rate,
            max_tokens=max_tokens,
            template=_template(template),
            completion_only=completion_only,
            validation=_validation(validation),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            roles=None if roles is None else [role.strip() for role in roles.split(",")],
            save_every=save_every,
            retain=retain,
            retain_weight=retain_weight,
            seed=seed,
            device=device,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            report=report_file,
            progress=report,
            say=_say,
        )
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    else:
        console = Console()
        if result.evaluations:
            table = Table()
            for name in ("step", "validation loss, nats a token"):
                table.add_column(name, justify="right")
            for e in result.evaluations:
                table.add_row(str(e.step), f"{e.loss:.4f}")
            console.print(table)
        console.print(_phase_table(result.phases))
        _print_finetuned(console, result)
        _print_written(console, report_file, result.out)
    if result.diverged:
        raise typer.Exit(DIVERGED)


@app.command()
def inspect(
    plan_file: PlanArgument,
    as_json: AsJson = False,
) -> None:
    """Show what is in a plan: models, layers, matches, fit, options and sizes. Neither model is opened.

    Example: lorasuite-fast inspect old-to-new.plan.safetensors
    """
    with _checks():
        if "/" not in str(plan_file) or Path(plan_file).suffix:
            check_file("PLAN", plan_file)
    with _run(as_json=True):
        from .inspection import inspect_plan, print_plan
        from .plan import TransferPlan

        loaded = TransferPlan.from_pretrained(plan_file)
        if as_json:
            typer.echo(json.dumps(inspect_plan(loaded) | {"plan": str(plan_file)}))
            return
        console = Console()
        print_plan(console, loaded, _measure(loaded))
        _print_transfer(console, loaded)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices, how kernels run here, free memory and disk, and what to do about gaps.

    Example: lorasuite-fast doctor

    Exit code 1 if something needed is missing.
    """
    from .doctor import examine

    found = examine()
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    else:
        _print_diagnosis(Console(), found)
    if found.problems:
        raise typer.Exit(1)


_WAYS = {"triton": "compiled Triton kernel", "interpreter": "Triton's interpreter", "torch": "PyTorch twin"}


def _print_diagnosis(console: Console, found: Diagnosis) -> None:
    def gib(size: int | None) -> str:
        return "unknown" if size is None else f"{size / 2**30:,.1f} GiB"

    def line(text: str, style: str | None = None) -> None:
        console.print(printable(text), style=style, highlight=False, markup=False, soft_wrap=True)

    line("  ".join(f"{name} {version}" for name, version in found.versions.items()))
    table = Table(title="Packages", title_justify="left")
    for name in ("package", "installed", "needed", ""):
        table.add_column(name)
    for package in found.packages:
        state = "" if package.fine else "[red]missing[/red]" if package.required else "[yellow]optional[/yellow]"
        least = f">= {package.least}" if package.least else ""
        table.add_row(package.name, package.found or "–", least, state)
    console.print(table)
    table = Table(title="Devices", title_justify="left")
    for name in ("device", "", "memory", "free", "kernels"):
        table.add_column(name)
    for device in found.devices:
        ways = sorted({_WAYS[kernel.runs] for kernel in found.kernels if kernel.device == device.name})
        table.add_row(device.name, device.description, gib(device.memory), gib(device.free), ", ".join(ways))
    console.print(table)
    for reason in dict.fromkeys(f"{k.device}: {k.reason}" for k in found.kernels if k.reason):
        line(reason, "dim")
    line("free disk: " + ", ".join(f"{place} {gib(free)}" for place, free in found.disk.items()))
    hub = found.hub
    state = f"{hub['models']} models" if hub["exists"] else "not there yet"
    line(f"hub cache: {hub['cache']} ({state}), {'offline' if hub['offline'] else 'downloads allowed'}")
    for problem in found.problems:
        line(f"PROBLEM: {problem}", "red")
    for sentence in found.advice:
        line(f"note: {sentence}", "yellow")
    line("problems found" if found.problems else "everything needed is here", "red" if found.problems else "green")


def _template(name: str) -> str:
    if name in ("alpaca", "chat"):
        return name
    from .text_files import read_text

    try:
        return read_text(Path(name).expanduser(), most=_MOST_TEMPLATE)
    except LoraSuiteError as error:
        raise LoraSuiteError(f"--template {name}: is neither alpaca nor chat nor a text file ({error})") from None


def _validation(text: str | None) -> float | str | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lorasuite-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show the traceback of an unexpected error.")] = False,
) -> None:
    pass


def _unexpected(error: Exception, debug: bool) -> str:
    """One line about an error nobody has foreseen, whatever it says of itself."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    hint = (
        "please report it with the lines above" if debug else f"run it again with {_DEBUG} to see where, and report it"
    )
    return f"unexpected {one_line(what)}; OUT is what it was, or complete; {hint}"


def main(arguments: list[str] | None = None) -> Any:
    """Entry point of the console script: whatever is raised ends in one line and an exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = _DEBUG in given
    with interrupts():
        try:
            return app(args=[argument for argument in given if argument != _DEBUG])
        except SystemExit as end:
            if end.code == INTERRUPTED:
                raise KeyboardInterrupt from None
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            # torch has a class of its own for GPUs alone, and what is imported late may not find room.
            late = isinstance(error, RuntimeError | ImportError)
            if isinstance(error, MemoryError) or (late and any(words in str(error).lower() for words in _MEMORY_WORDS)):
                _complain(_OUT_OF_MEMORY)
                raise SystemExit(2) from None
            _complain(_unexpected(error, debug))
            raise SystemExit(UNEXPECTED) from None
