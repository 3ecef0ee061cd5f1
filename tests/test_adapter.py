"""What a PEFT folder holds is read exactly, and a rank no weight can hold is refused."""

from __future__ import annotations

import json
from pathlib import Path

import hostile
import pytest

from lorasuite_fast.adapter import Adapter, read_adapter
from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.families import FAMILIES, Shape

SHAPE = Shape(**hostile.MODEL)


def read(folder: Path) -> Adapter:
    return read_adapter(folder, FAMILIES["llama"], SHAPE, "old")


def of_rank(folder: Path, rank: int) -> Path:
    hostile.write_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps(hostile.adapter_config() | {"r": rank}))
    (folder / "adapter_model.safetensors").write_bytes(hostile.pack(hostile.adapter_tensors(rank)))
    return folder


def test_a_rank_of_four_times_the_longer_side_is_read_and_one_more_is_not(tmp_path: Path) -> None:
    most = 4 * max(SHAPE.expected("q"))
    assert read(of_rank(tmp_path / "most", most)).updates[0, "q"].rank == most
    with pytest.raises(LoraSuiteError, match=f"rank {most + 1}, far more than its weight"):
        read(of_rank(tmp_path / "more", most + 1))
