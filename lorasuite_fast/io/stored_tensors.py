"""Lists of tensors that lie in files, for what is too large to stay in memory between two layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, MutableSequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from ..errors import LoraSuiteError, WriteError


class StoredTensors(MutableSequence[Tensor]):
    """Tensors in one file each, read when they are asked for and written when they are set; on the CPU.

    Args:
        folder: made if it does not exist. tensors: to begin with.

    Raises:
        WriteError: no room, or the folder cannot be written. LoraSuiteError: a file that was cut off or is gone.
    """

    def __init__(self, folder: Path, tensors: Iterable[Tensor] = ()) -> None:
        self.folder = folder
        self._kinds: list[tuple[torch.dtype, torch.Size]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"{folder}: cannot be written ({error.strerror or error})") from None
        self.extend(tensors)

    @classmethod
    def found(cls, folder: Path, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> StoredTensors | None:
        """The list an earlier process left, None unless all its files are there and of the right size."""
        stored = cls(folder)
        stored._kinds = [(dtype, torch.Size(shape)) for shape in shapes]
        for n, (_, shape) in enumerate(stored._kinds):
            path = stored._path(n)
            if not path.exists() or path.stat().st_size != shape.numel() * dtype.itemsize:
                return None
        return stored

    def sync(self) -> None:
        """Returns once everything is on disk."""
        for n in range(len(self)):
            handle = os.open(self._path(n), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def __len__(self) -> int:
        return len(self._kinds)

    @overload
    def __getitem__(self, n: int) -> Tensor: ...
    @overload
    def __getitem__(self, n: slice) -> MutableSequence[Tensor]: ...
    def __getitem__(self, n: int | slice) -> Tensor | MutableSequence[Tensor]:
        if isinstance(n, slice):
            raise TypeError("one at a time")
        dtype, shape = self._kinds[n]
        value = torch.empty(shape, dtype=dtype)
        into = value.view(-1).view(torch.uint8).numpy().data
        path = self._path(n)
        try:
            with path.open("rb", buffering=0) as file:
                done = 0
                while done < len(into) and (got := file.readinto(into[done:])):
                    done += got
        except OSError as error:
            raise LoraSuiteError(f"{path}: cannot be read ({error.strerror or error})") from None
        if done < len(into):
            raise LoraSuiteError(f"{path}: {done} of {len(into)} bytes are there; start over")
        return value

    @overload
    def __setitem__(self, n: int, value: Tensor) -> None: ...
    @overload
    def __setitem__(self, n: slice, value: Iterable[Tensor]) -> None: ...
    def __setitem__(self, n: int | slice, value: Tensor | Iterable[Tensor]) -> None:
        if isinstance(n, slice) or not isinstance(value, Tensor):
            raise TypeError("one tensor at a time")
        value = value.detach().cpu().contiguous()
        path = self._path(n)
        try:
            with path.open("wb", buffering=0) as file:
                left = value.view(-1).view(torch.uint8).numpy().data
                while left:
                    left = left[file.write(left) :]
        except OSError as error:
            raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from None
        self._kinds[n] = value.dtype, value.shape

    def __delitem__(self, n: int | slice) -> None:
        if n != len(self) - 1:
            raise TypeError("only the last one can be removed")
        self._path(n).unlink(missing_ok=True)
        self._kinds.pop()

    def insert(self, n: int, value: Tensor) -> None:
        if n != len(self):
            raise TypeError("tensors are added at the end")
        self._kinds.append((value.dtype, value.shape))
        self[n] = value

    def __iter__(self) -> Iterator[Tensor]:
        return (self[n] for n in range(len(self)))

    def _path(self, n: int) -> Path:
        return self.folder / f"{n:05d}"
