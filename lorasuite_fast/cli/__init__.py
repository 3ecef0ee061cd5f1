"""The command line."""

# The commands stand in the help in the order in which they are imported.
from . import carrying, verification, checking, training, commands  # noqa: F401, I001
from .app import app
from .commands import main

__all__ = ["app", "main"]
