"""The options and arguments of the commands: names, help and types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

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


def option(panel: str, metavar: str | None, help: str, *names: str, **settings: Any) -> Any:
    """An option whose help is one line on a terminal of 100 columns; defaults stand in the help."""
    shown = escape(help)
    return typer.Option(*names, metavar=metavar, help=shown, rich_help_panel=panel, show_default=False, **settings)


Calibration = Annotated[
    Path | None,
    option(TEXT, "FILE", "Unlabelled .jsonl or .txt; self: by the old model [shipped]"),
]


Examples = Annotated[int, option(TEXT, "N", "Calibration examples to read, 128 tokens of each [64]", min=4)]


Layers = Annotated[
    Literal["cka", "first", "medium", "last"],
    option(METHOD, "MAP", "Which layer continues which: cka, first, medium, last [cka]"),
]


Similarity = Annotated[
    Literal["cka", "mean-cca", "squared-cca", "pwcca", "procrustes"],
    option(METHOD, "KIND", "cka [default], mean-cca, squared-cca, pwcca, procrustes"),
]


Heads = Annotated[
    Literal["hungarian", "identity"],
    option(METHOD, "MATCH", "How heads are matched: hungarian, identity [hungarian]"),
]


TransferKind = Annotated[
    Literal["embedding", "identity"],
    option(METHOD, "KIND", "Transfer matrix: embedding (fitted), identity [embedding]"),
]


MethodName = Annotated[
    Literal["auto", "copy", "lstsq", "distill", "paper"],
    option(METHOD, "METHOD", "auto (measures), copy, lstsq, distill, paper [auto]"),
]


Rank = Annotated[int | None, option(METHOD, "N", "Of the result, with distill [the adapter's]", min=1)]


Fill = Annotated[str, option(METHOD, "KIND", "New layers without a partner: none, zero, nearest [none]")]


FillShare = Annotated[float, option(METHOD, "X", "Of the neighbour's update, with --fill nearest [0.5]")]


Fitted = Annotated[int | None, option(METHOD, "N", "Last new layers that distill fits [half of them]", min=1)]


RefineText = Annotated[
    Path | None, option(TEXT, "FILE", "Unlabelled text to refine on [self: the old model writes it]")
]


Checkpointing = Annotated[
    bool, option(MACHINE, None, "Recompute activations: less memory, more time", "--gradient-checkpointing")
]


Epochs = Annotated[int, option(TRAINING, "N", "How often each sample is read [3]", min=1)]


CompletionOnly = Annotated[
    bool, option(TRAINING, None, "Count only what answers the prompt in the loss", "--completion-only")
]


Retain = Annotated[str | None, option(TRAINING, "FILE", "Text predicted as before; shipped: general")]


RetainWeight = Annotated[float, option(TRAINING, "X", "Of what --retain adds to the loss [0.3]", min=0.0)]


Device = Annotated[Literal["auto", "cpu", "cuda"], option(MACHINE, "DEVICE", "auto, cpu or cuda [auto]")]


Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float64"],
    option(MACHINE, "DTYPE", "float32, bfloat16 or float64 [auto: float32]"),
]


TrainingDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float64"],
    option(MACHINE, "DTYPE", "float32, bfloat16 or float64 [auto: bfloat16 on a GPU]"),
]


Seed = Annotated[int, option(TEXT, "N", "Which examples are taken where there are more [0]")]


Ridge = Annotated[float, option(METHOD, "X", "Of the transfer matrix, share of the mean diagonal [0]", min=0.0)]


Memory = Annotated[str | None, option(MACHINE, "SIZE", "What may be resident on the device, e.g. 6GB")]


Mapped = Annotated[
    bool, option(MACHINE, None, "Map the checkpoints, or read them (unified memory)", "--mmap/--no-mmap")
]


Overwrite = Annotated[bool, option(OUTPUT, None, "Replace what exists, once the new one is complete", "--overwrite")]


RemoteCode = Annotated[bool, option(MACHINE, None, "Let transformers run code from the folders", "--trust-remote-code")]


Report = Annotated[Path | None, option(OUTPUT, "FILE", "Write a report, one HTML file", "--report")]


AsJson = Annotated[bool, option(OUTPUT, None, "Print one JSON object instead of tables", "--json")]
