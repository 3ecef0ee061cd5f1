"""Several processes building one plan: which part each takes, and how the parts come together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError, WriteError

_PATIENCE = timedelta(days=7)
"""A process may wait as long as the first one writes text or targets; one that ended is noticed at once."""


@contextmanager
def _company() -> Iterator[None]:
    """Makes one error of whatever torch.distributed raises where another process has ended.

    A WriteError, since nothing is wrong with the input: the work done so far is kept.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise WriteError("torchrun: another process of this run ended; its own error says why") from None


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work; alone by default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Ranks:
        """Joins the group torchrun started this process in; alone where there is none.

        Host tensors travel through gloo, those on a GPU through nccl; each rank takes the GPU of its local rank.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        import torch.distributed as dist

        if not dist.is_available():
            raise LoraSuiteError("this PyTorch has no torch.distributed; run one process")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def leave(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def share(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with _company():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def merge(self, part: dict[Any, Any]) -> dict[Any, Any]:
        """The union of what every rank has, on every rank."""
        if self.size == 1:
            return part
        import torch.distributed as dist

        parts: list[dict[Any, Any]] = [{} for _ in range(self.size)]
        with _company():
            dist.all_gather_object(parts, part)
        return {key: value for each in parts for key, value in each.items()}

    def wait(self) -> None:
        """Goes on once every process has come here."""
        self.merge({})

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through the block alone, and all others behind it, who find what it has written."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def sum(self, values: Tensor) -> Tensor:
        """A tensor summed over the processes; the same bits on each."""
        if self.size > 1:
            import torch.distributed as dist

            with _company():
                dist.all_reduce(values)
        return values

    def block(self, start: int, stop: int) -> range:
        """This rank's share of start … stop - 1: consecutive, earlier ranks first."""
        count, extra = divmod(stop - start, self.size)
        begin = start + self.rank * count + min(self.rank, extra)
        return range(begin, begin + count + (self.rank < extra))

    def mine(self, items: list[Any]) -> list[Any]:
        """This rank's share of a list, every `size`-th."""
        return items[self.rank :: self.size]

    def receive(self, tensors: list[Tensor]) -> None:
        """Fills tensors with what the rank before sends; the first rank keeps its own."""
        if self.rank:
            import torch.distributed as dist

            for tensor in tensors:
                dist.recv(tensor, src=self.rank - 1)

    def send(self, tensors: list[Tensor]) -> None:
        """Hands tensors to the next rank, if there is one."""
        if self.rank + 1 < self.size:
            import torch.distributed as dist

            for tensor in tensors:
                dist.send(tensor.contiguous(), dst=self.rank + 1)
