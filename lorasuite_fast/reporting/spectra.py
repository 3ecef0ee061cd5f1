"""Singular values of an adapter's updates, and those of the adapter it was carried from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..adapters.adapter import Update, read_adapter
from ..errors import LoraSuiteError
from ..models.family_table import family_named

if TYPE_CHECKING:
    from ..results import Migration
    from ..transfer.plan import ModelRecord

Spectra = dict[tuple[int, str], list[float]]
"""(layer, role) -> singular values of s·B A, the largest first."""


def singular_values(update: Update) -> list[float]:
    """Of s·B A, from the triangular factors of B and A^T: nothing of the weight's size is formed."""
    b, a = (factor.double() for factor in update.factors)
    core = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
    return [abs(update.scale) * float(value) for value in torch.linalg.svdvals(core)]


def adapter_spectra(folder: str, model: ModelRecord) -> Spectra:
    """Of every module an adapter folder updates. Raises LoraSuiteError if it cannot be read."""
    adapter = read_adapter(folder, family_named(model.family), model.shape, model.name)
    return {key: singular_values(update) for key, update in sorted(adapter.updates.items())}


def migration_spectra(result: Migration) -> tuple[Spectra, Spectra]:
    """Of the old adapter and of the one written; empty where a folder is not there any more."""
    found: list[Spectra] = []
    for folder, model in ((result.adapter, result.plan.old), (result.out, result.plan.new)):
        try:
            found.append(adapter_spectra(folder, model))
        except (LoraSuiteError, OSError):
            found.append({})
    return found[0], found[1]
