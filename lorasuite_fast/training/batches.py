"""Which texts each step of a training reads."""

from __future__ import annotations

import random
from collections.abc import Sequence


def step_batches(sizes: Sequence[int], budget: int, steps: int, seed: int) -> list[list[int]]:
    """Which texts each step reads: `budget` bytes of them or a little more, every text once before any comes again."""
    order: list[int] = []
    generator = random.Random(seed)
    batches: list[list[int]] = []
    for _ in range(steps):
        batch: list[int] = []
        size = 0
        while size < budget and len(batch) < len(sizes):
            if not order:
                order = list(range(len(sizes)))
                generator.shuffle(order)
            size += sizes[order[-1]]
            batch.append(order.pop())
        batches.append(batch)
    return batches


def sample_batches(count: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Which samples each step reads: in every epoch each of them once, in another order; its last batch is the rest."""
    generator = random.Random(seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = list(range(count))
        generator.shuffle(order)
        batches += [order[first : first + batch] for first in range(0, count, batch)]
    return batches[:steps]
