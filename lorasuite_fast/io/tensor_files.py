"""Tensors in safetensors files: checked against the file first, then mapped or read, a named range at a time."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoraSuiteError
from .json_files import MOST_BYTES, open_regular, parse_unique

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ: like touching every page, but a page that cannot be had is an error, not a signal."""
_MERGE_GAP = 1 << 16
_MOST_ELEMENTS = 1 << 59
"""Of the largest dtype, what a signed 64-bit byte count can hold."""


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file by safetensors and by `_check_ranges`.

    Raises:
        LoraSuiteError: not a regular file, incomplete or damaged, or with a header of more than MOST_BYTES.
    """
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise ValueError(f"{size} bytes, of which the header alone is to be {length}")
            if length > MOST_BYTES:
                raise LoraSuiteError(
                    f"{path}: its header is {length} bytes long, more than {MOST_BYTES >> 20} MiB, which no model "
                    "needs; fetch or save it again"
                )
            text = file.read(length)
        # Of numpy, which maps the file read-only: torch's map may need as much memory as the file is long.
        safe_open(path, framework="np")
        header: dict[str, Any] = parse_unique(text, equal_twice=False)
        header.pop("__metadata__", None)
        _check_ranges(header, size - 8 - length)
    except (SafetensorError, ValueError) as error:
        raise LoraSuiteError(
            f"{path}: not a complete safetensors file ({error}); it is truncated or damaged, fetch or save it again"
        ) from None
    except (OSError, RuntimeError) as error:
        raise LoraSuiteError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return header


def _check_ranges(header: dict[str, Any], size: int) -> None:
    """Tensors must lie one behind the other, fill the file's `size` data bytes, and be no more than torch can address.

    safetensors checks most of this, in a second reading of the file; a field it does not know may mean anything.
    """
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name} has the fields {', '.join(entry)}")
        start, stop = entry["data_offsets"]
        if start != end or stop < start:
            raise ValueError(f"tensor {name} begins at byte {start} and not at {end}")
        end = stop
        shape = entry["shape"]
        if math.prod(dim or 1 for dim in shape) > _MOST_ELEMENTS:
            raise ValueError(f"tensor {name} has the impossible shape {shape}")
        dtype = DTYPES.get(entry["dtype"])
        if dtype is not None and math.prod(shape) * dtype.itemsize != stop - start:
            raise ValueError(f"tensor {name} is {shape} of {entry['dtype']} in {stop - start} bytes")
    if end != size:
        raise ValueError(f"its tensors end at byte {end} of {size}")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, dtype as safetensors names it, shape, and byte range in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class _File:
    """One open file: its descriptor, its map once asked for, and what it looked like when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = open_regular(path)
        except OSError as error:
            raise LoraSuiteError(f"{path}: cannot be read ({error.strerror or error})") from None
        self.state = self._stat()
        self._map: mmap.mmap | None = None
        self._bytes: Any = None

    def __del__(self) -> None:
        if descriptor := getattr(self, "descriptor", None):
            os.close(descriptor)

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    @property
    def map(self) -> mmap.mmap:
        if self._map is None:
            try:
                self._map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise LoraSuiteError(f"{self.path}: cannot be mapped ({error.strerror or error})") from None
        return self._map

    @property
    def bytes(self) -> Any:
        """The mapped file as a buffer. Read-only: nothing here writes to a weight, and an attempt ends the process."""
        if self._bytes is None:
            import numpy as np

            # torch warns of every read-only buffer; this one does not say that it is.
            address = np.frombuffer(self.map, dtype=np.uint8).ctypes.data
            self._bytes = (ctypes.c_ubyte * len(self.map)).from_address(address)
            self._bytes.map = self.map
        return self._bytes

    def check_unchanged(self) -> None:
        if self._stat() != self.state:
            raise LoraSuiteError(
                f"{self.path}: changed while it was being read; run again once nothing writes to it any more"
            )

    def check_name(self) -> None:
        """Raises LoraSuiteError if the name stands for another file by now."""
        try:
            same = os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        except OSError:
            same = False
        if not same:
            raise LoraSuiteError(f"{self.path}: was replaced while it was being read; run again")

    def advise(self, option: int, start: int, stop: int) -> None:
        start -= start % mmap.PAGESIZE
        stop = min(stop, self.state[0])
        if start < stop:
            self.map.madvise(option, start, stop - start)

    def populate(self, start: int, stop: int) -> None:
        """Brings a range into memory; what a later touch would end in a signal for is an error here."""
        try:
            if hasattr(mmap, "MADV_WILLNEED"):
                self.advise(mmap.MADV_WILLNEED, start, stop)
            self.advise(_POPULATE_READ, start, stop)
        except OSError as error:
            # Systems that do not know the option fetch the pages when they are touched.
            if error.errno != errno.EINVAL:
                self.check_unchanged()
                raise LoraSuiteError(
                    f"{self.path}: bytes {start} to {stop} cannot be read ({error.strerror}); is the disk whole, and "
                    "the file complete?"
                ) from None

    def release(self, start: int, stop: int) -> None:
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.advise(mmap.MADV_DONTNEED, start, stop)

    def read_into(self, buffer: memoryview, start: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self.descriptor, [buffer[done:]], start + done)
            except OSError as error:
                raise LoraSuiteError(f"{self.path}: cannot be read ({error.strerror or error})") from None
            if not got:
                self.check_unchanged()
                raise LoraSuiteError(
                    f"{self.path}: ends at byte {start + done}, {len(buffer) - done} bytes too early; fetch it again"
                )
            done += got


class TensorFiles:
    """The tensors of one or several safetensors files, by name.

    Args:
        files: checked one by one: headers against the files, and no name twice.
        mapped: tensors are read-only views of a memory map, without a copy. Otherwise every access reads from the
            file into memory (for machines whose CPU and GPU share memory, where mapped pages count twice).
    """

    def __init__(self, files: list[Path], *, mapped: bool = True) -> None:
        self.mapped = mapped
        self.bytes_read = 0
        """Bytes handed out so far."""
        self.entries: dict[str, Entry] = {}
        self._open: dict[Path, _File] = {}
        self._opening = threading.Lock()
        for file in files:
            # Open from here on, so that header and tensors come from one file even if another takes its name.
            self._open[file] = opened = _File(file)
            header = read_header(file)
            opened.check_name()
            base = file.stat().st_size - max((e["data_offsets"][1] for e in header.values()), default=0)
            for name, entry in header.items():
                if name in self.entries:
                    raise LoraSuiteError(f"{file}: tensor {name} is also in {self.entries[name].file.name}")
                start, stop = entry["data_offsets"]
                self.entries[name] = Entry(file, entry["dtype"], tuple(entry["shape"]), base + start, base + stop)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def where(self) -> str:
        return str(next(iter(self.entries.values())).file.parent) if self.entries else "checkpoint"

    def entry(self, name: str) -> Entry:
        """Raises LoraSuiteError if there is no tensor of this name."""
        found = self.entries.get(name)
        if found is None:
            raise LoraSuiteError(f"{self.where}: tensor {name} is missing")
        if found.dtype not in DTYPES:
            raise LoraSuiteError(f"{found.file}: tensor {name} is stored as {found.dtype}, which is not read here")
        return found

    def file(self, entry: Entry) -> _File:
        # The loader's thread and its caller both ask.
        with self._opening:
            if entry.file not in self._open:
                self._open[entry.file] = _File(entry.file)
            return self._open[entry.file]

    def check_same(self) -> None:
        """Raises LoraSuiteError if a file that was opened has changed or been replaced since."""
        for file in list(self._open.values()):
            file.check_unchanged()
            file.check_name()

    def view(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU."""
        entry = self.entry(name)
        self.bytes_read += entry.size
        file = self.file(entry)
        file.check_unchanged()
        if self.mapped:
            return _on_bytes(file.bytes, entry)
        buffer = torch.empty(entry.size, dtype=torch.uint8)
        file.read_into(buffer.numpy().data, entry.start)
        return buffer.view(DTYPES[entry.dtype]).view(entry.shape)

    def _ranges(self, names: Iterable[str]) -> list[tuple[_File, int, int]]:
        """The byte ranges of some tensors, neighbours joined."""
        ranges: list[tuple[_File, int, int]] = []
        for entry in sorted((self.entry(n) for n in names), key=lambda e: (str(e.file), e.start)):
            file = self.file(entry)
            if ranges and ranges[-1][0] is file and entry.start - ranges[-1][2] < _MERGE_GAP:
                ranges[-1] = (file, ranges[-1][1], entry.stop)
            else:
                ranges.append((file, entry.start, entry.stop))
        return ranges

    def fetch(self, names: Iterable[str]) -> None:
        """Brings the pages of some mapped tensors into memory.

        Raises:
            LoraSuiteError: a file that changed since it was opened, or bytes the disk does not give.
        """
        for file, start, stop in self._ranges(names):
            file.check_unchanged()
            file.populate(start, stop)

    def release(self, names: Iterable[str]) -> None:
        """Drops the pages of some mapped tensors from the process; touching the tensors again fetches them again."""
        if self.mapped:
            for file, start, stop in self._ranges(names):
                file.release(start, stop)

    def check_unchanged(self) -> None:
        """Raises LoraSuiteError if the size or time of an open file is not what it was."""
        for file in list(self._open.values()):
            file.check_unchanged()

    def close(self) -> None:
        self._open.clear()


def _on_bytes(buffer: Any, entry: Entry) -> Tensor:
    """A tensor on a mapped file, without a copy where it is aligned."""
    offset = entry.start
    dtype = DTYPES[entry.dtype]
    count = entry.size // dtype.itemsize
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    if offset % dtype.itemsize:
        bytes_ = torch.frombuffer(buffer, dtype=torch.uint8, count=entry.size, offset=offset).clone()
        return bytes_.view(dtype).view(entry.shape)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(entry.shape)
