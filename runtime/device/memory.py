"""Arrays on the device, and the pinned way to them and back.

An array that a graph wrote to its fixed output is lent, not given: when the graph runs again while
the array is still held, its bytes are moved out of the way first. A decode step holds nothing for
that long, so it copies nothing.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from .protocol import Buffer, Device, Event, HostBuffer, aligned

PINNED_BLOCK = 1 << 20
PINNED_BLOCKS = 4
"""Pinned blocks for uploads: the host fills one while the device reads the others."""


class Storage:
    """Bytes of the device that arrays view. ``buffer`` is theirs, or lent by a ``Place``."""

    def __init__(self, memory: Memory, buffer: Buffer, nbytes: int):
        self.memory, self.buffer, self.nbytes = memory, buffer, nbytes


class DeviceArray:
    """An array in the device's memory; C order, read through ``numpy.asarray``."""

    def __init__(self, storage: Storage, offset: int, shape: Sequence[int], dtype: np.dtype):
        self.storage, self.offset = storage, offset
        self.shape, self.dtype = tuple(int(size) for size in shape), np.dtype(dtype)
        assert offset + self.nbytes <= storage.nbytes

    @property
    def address(self) -> int:
        """Its address now; good until the next call of the graph that wrote it."""
        return self.storage.buffer.address + self.offset

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> DeviceArray:
        """Return ``a[i]``, or ``a[:, i:j]`` where the first axis is 1: what stays in one piece."""
        if isinstance(index, (int, np.integer)):
            at = int(index) + (self.shape[0] if index < 0 else 0)
            if not 0 <= at < self.shape[0]:
                raise IndexError(f"{index} is out of {self.shape[0]}")
            return self._part(at * math.prod(self.shape[1:]), self.shape[1:])
        whole, part = index
        if whole != slice(None) or self.shape[0] != 1 or part.step not in (None, 1):
            raise IndexError(f"{index} of {self.shape} is not one piece of memory")
        start, stop, _ = part.indices(self.shape[1])
        shape = (1, max(stop - start, 0), *self.shape[2:])
        return self._part(start * math.prod(self.shape[2:]), shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on the device is always copied")
        array = self.storage.memory.download(self)
        return array if dtype is None else array.astype(dtype, copy=False)

    def _part(self, elements: int, shape: Sequence[int]) -> DeviceArray:
        offset = self.offset + elements * self.dtype.itemsize
        return DeviceArray(self.storage, offset, shape, self.dtype)


class Layers:
    """Arrays (layers, ...) of consecutive parts, indexed as if they were one."""

    def __init__(self, parts: Sequence[DeviceArray]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    def __getitem__(self, index: int) -> DeviceArray:
        at = range(len(self))[index]
        for part in self.parts:
            if at < part.shape[0]:
                return part[at]
            at -= part.shape[0]
        raise IndexError(index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.concatenate([np.asarray(part) for part in self.parts])
        return array if dtype is None else array.astype(dtype, copy=False)


class Memory:
    """The device's memory, and the ways into it."""

    def __init__(self, device: Device):
        self.device = device
        self._blocks: list[tuple[HostBuffer, Event | None]] = [
            (device.allocate_host(PINNED_BLOCK), None) for _ in range(PINNED_BLOCKS)
        ]
        self._next = 0
        self._back = device.allocate_host(PINNED_BLOCK)

    def view(self, buffer: Buffer, shape: Sequence[int], dtype: np.dtype) -> DeviceArray:
        """Return an array over a buffer that is filled and kept elsewhere."""
        return DeviceArray(Storage(self, buffer, nbytes_of(shape, dtype)), 0, shape, dtype)

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> DeviceArray:
        """Return a new array with whatever its memory holds."""
        (array,) = self.pack([(shape, dtype)])
        return array

    def pack(self, wanted: Sequence[tuple[Sequence[int], np.dtype]]) -> list[DeviceArray]:
        """Return new arrays in one allocation."""
        offsets, total = [], 0
        for shape, dtype in wanted:
            offsets.append(total)
            total += aligned(nbytes_of(shape, dtype))
        storage = Storage(self, self.device.allocate(max(total, 1)), total)
        return [
            DeviceArray(storage, offset, shape, dtype)
            for offset, (shape, dtype) in zip(offsets, wanted, strict=True)
        ]

    def upload(self, to: Sequence[DeviceArray], values: Sequence[np.ndarray]) -> None:
        """Write ``values`` to the beginnings of arrays made by one ``pack``, in one upload."""
        storage = to[0].storage
        block = np.zeros(storage.nbytes, np.uint8)
        for array, value in zip(to, values, strict=True):
            data = np.ascontiguousarray(value, array.dtype).reshape(-1).view(np.uint8)
            block[array.offset : array.offset + data.nbytes] = data
        self.write(storage.buffer.address, block)

    def write(self, to: int, array: np.ndarray) -> None:
        """Upload ``array`` to an address; it may be changed as soon as this returns."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, data.nbytes, PINNED_BLOCK):
            piece = data[start : start + PINNED_BLOCK]
            block, busy = self._blocks[self._next]
            if busy is not None:
                busy.wait()
            block.array[: len(piece)] = piece
            self.device.copy(to + start, block.address, len(piece))
            self._blocks[self._next] = (block, self.device.record())
            self._next = (self._next + 1) % PINNED_BLOCKS

    def put(self, to: int, array: np.ndarray | DeviceArray) -> None:
        """Copy an array to an address, from wherever it is."""
        if isinstance(array, DeviceArray):
            self.device.copy(to, array.address, array.nbytes)
        else:
            self.write(to, array)

    def download(self, array: DeviceArray) -> np.ndarray:
        """Return a copy on the host; waits for the device."""
        return self.download_all([array])[0]

    def download_all(self, arrays: Sequence[DeviceArray]) -> list[np.ndarray]:
        """Return copies on the host of arrays that one call wrote: one copy, one wait for all.

        They lie in one allocation (``pack``); what lies between them comes along.
        """
        storages = {id(array.storage) for array in arrays}
        assert len(storages) == 1
        start = min(array.offset for array in arrays)
        nbytes = max(array.offset + array.nbytes for array in arrays) - start
        if nbytes > self._back.nbytes:
            self._back = self.device.allocate_host(aligned(nbytes))
        source = arrays[0].storage.buffer.address + start
        self.device.copy(self._back.address, source, nbytes)
        self.device.record().wait()
        found = []
        for array in arrays:
            at = array.offset - start
            data = self._back.array[at : at + array.nbytes].copy()
            found.append(data.view(array.dtype).reshape(array.shape))
        return found


class Place:
    """A fixed buffer that a graph writes an output to."""

    def __init__(self, memory: Memory, nbytes: int):
        self.memory = memory
        self.buffer = memory.device.allocate(max(nbytes, 1))
        self._lent: weakref.ref[Storage] | None = None

    @property
    def address(self) -> int:
        """Its address, which does not change."""
        return self.buffer.address

    def lend(self, shape: Sequence[int], dtype: np.dtype) -> DeviceArray:
        """Return what the graph wrote last."""
        storage = Storage(self.memory, self.buffer, nbytes_of(shape, dtype))
        self._lent = weakref.ref(storage)
        return DeviceArray(storage, 0, shape, dtype)

    def reclaim(self) -> None:
        """Move what is still held, before the graph runs again."""
        storage = None if self._lent is None else self._lent()
        self._lent = None
        if storage is not None and storage.nbytes:
            device = self.memory.device
            moved = device.allocate(storage.nbytes)
            device.copy(moved.address, self.address, storage.nbytes)
            storage.buffer = moved


def nbytes_of(shape: Sequence[int], dtype: np.dtype) -> int:
    """Return the bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize
