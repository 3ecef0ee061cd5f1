"""The command line's root."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="lorasuite-fast",
    help="Carry a LoRA adapter from the base model it was trained on to that model's successor.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
