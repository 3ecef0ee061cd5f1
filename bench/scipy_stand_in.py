"""What lorasuite_fast needs of scipy to match heads, for a machine that has none; for benchmarks alone.

The assignment is Jonker and Volgenant's shortest augmenting path, O(n³). Sparse matching is not offered.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np


def linear_sum_assignment(cost: Any, maximize: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the assignment of least (or greatest) sum, as scipy.optimize gives them."""
    table = np.asarray(cost, dtype=float)
    table = -table if maximize else table
    if table.shape[0] > table.shape[1]:
        columns, rows = linear_sum_assignment(table.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    partner = _augmented(table)
    columns = np.flatnonzero(partner >= 0)
    rows = partner[columns]
    order = np.argsort(rows)
    return rows[order], columns[order]


def _augmented(table: np.ndarray) -> np.ndarray:
    """The row of each column, -1 where there is none; n rows, at least as many columns."""
    n, m = table.shape
    row_price, column_price = np.zeros(n + 1), np.zeros(m + 1)
    partner, before = np.zeros(m + 1, dtype=int), np.zeros(m + 1, dtype=int)
    for row in range(1, n + 1):
        partner[0], column = row, 0
        least, seen = np.full(m + 1, np.inf), np.zeros(m + 1, dtype=bool)
        while partner[column]:
            seen[column] = True
            current = partner[column]
            reduced = table[current - 1] - row_price[current] - column_price[1:]
            better = ~seen[1:] & (reduced < least[1:])
            least[1:][better], before[1:][better] = reduced[better], column
            column = 1 + int(np.argmin(np.where(seen[1:], np.inf, least[1:])))
            step = least[column]
            row_price[partner[seen]] += step
            column_price[seen] -= step
            least[~seen] -= step
        while column:
            partner[column] = partner[before[column]]
            column = before[column]
    return partner[1:] - 1


def _absent(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("scipy is not installed: MLP neurons cannot be matched here")


def install() -> None:
    """Puts the stand-in where `import scipy` finds it. For a process in which scipy is not installed."""
    parts = {
        "scipy": {},
        "scipy.optimize": {"linear_sum_assignment": linear_sum_assignment},
        "scipy.sparse": {"coo_array": _absent},
        "scipy.sparse.csgraph": {"min_weight_full_bipartite_matching": _absent},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        # Other packages ask for the spec to see whether scipy is there.
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(members)
        sys.modules[name] = module
