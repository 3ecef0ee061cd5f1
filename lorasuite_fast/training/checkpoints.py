"""Checkpoints of a training that goes on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

TRAINING = "training"
"""Of a work folder, the part in which a training keeps its checkpoints."""


STATE = "trainer_state.json"


def out_of_patience(checkpoint: Path, patience: int) -> bool:
    """Whether a training stopped early at its last checkpoint."""
    kept = json.loads((checkpoint / STATE).read_text()).get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    # Of several callbacks of a kind there would be a list.
    counter = kept.get("attributes", {}).get("early_stopping_patience_counter", 0) if isinstance(kept, dict) else 0
    return int(counter) >= patience


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a Trainer; its state is written last."""

    def complete(checkpoint: Path) -> bool:
        try:
            json.loads((checkpoint / STATE).read_text())
        except (OSError, ValueError):
            return False
        return True

    found = [p for p in folder.glob("checkpoint-*") if complete(p)]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
