"""Protocols of a device and of the engines on it, as the device runtime uses them.

Work is asynchronous and in order: there is one stream. Addresses are integers, as the engines'
own interfaces take them; the caller keeps the buffer of one alive until the work is done, and a
buffer that is dropped is freed after the work that was asked for before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...graphs.contract import GraphSpec
from ...graphs.targets import ONNXRUNTIME

DEVICE_ALIGNMENT = 256
"""Bytes to which CUDA aligns an allocation, and to which places inside one are aligned."""

ON_CPU = f"Its graphs run on this CPU, the same numbers more slowly: --backend {ONNXRUNTIME}"
"""The way out where a bundle cannot run on a device."""

Shape = tuple[int, ...]


class Buffer(Protocol):
    """Memory of the device; freed in the order of the stream, when it is held no more."""

    address: int
    nbytes: int


class HostBuffer(Protocol):
    """Pinned memory of the host, which the device copies from and to directly."""

    address: int
    nbytes: int
    array: np.ndarray  # (nbytes,) uint8, looking into it


class Event(Protocol):
    """A point in the stream."""

    def wait(self) -> None:
        """Return when the device has come to it."""

    def since(self, earlier: Any) -> float:
        """Return the milliseconds from ``earlier`` to here; both must have come."""


class CapturedGraph(Protocol):
    """Captured work of a stream."""

    def launch(self) -> None:
        """Ask for all of it again, with the same addresses."""


class CaptureError(Exception):
    """The device cannot capture this work; it can still be asked for piece by piece."""


class Device(Protocol):
    """A device with one stream."""

    name: str

    def activate(self) -> None:
        """Make this the device of the calling thread: what asks for work must do so before."""

    def allocate(self, nbytes: int) -> Buffer:
        """Return memory with whatever it holds.

        Raises:
            CapacityError: there is not enough.
        """

    def allocate_host(self, nbytes: int) -> HostBuffer:
        """Return pinned memory."""

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy bytes between any two addresses of device and pinned memory."""

    def copy_rows(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copy ``rows`` runs of ``width`` bytes that are ``pitch`` bytes apart, on the device."""

    def zero(self, to: int, nbytes: int) -> None:
        """Set bytes to zero."""

    def record(self) -> Event:
        """Return a point after everything asked for so far."""

    def synchronize(self) -> None:
        """Return when everything asked for so far is done."""

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Keep what ``work`` asks for instead of doing it.

        Raises:
            CaptureError: something in it cannot be captured.
        """

    def free_bytes(self) -> int:
        """Return the bytes of free memory, with those that are kept for reuse."""

    def trim(self) -> None:
        """Wait, and give back what is kept for reuse: libraries that allocate cannot use it."""

    def close(self) -> None:
        """Finish what was asked for, and free the device."""


@dataclass(frozen=True)
class Compiled:
    """One engine of a bundle, as a file.

    Attributes:
        graph: of the bundle.
        context: rows of an unpruned prompt and answer that it has room for; None: see ``slots``.
        file: what is loaded.
        spec: the graph's contract.
        slots: cache slots that it has (with a context) or may have; 0: any number.
        profiles: smallest and largest shape of every input, for each profile; none: any shapes.
        nbytes: of the file.
    """

    graph: str
    context: int | None
    file: Path
    spec: GraphSpec
    slots: int
    profiles: tuple[dict[str, tuple[Shape, Shape]], ...]
    nbytes: int

    def profile_for(self, shapes: dict[str, Shape]) -> int | None:
        """Return the first profile that takes inputs of these shapes; None: none does."""
        if not self.profiles:
            return 0
        for number, profile in enumerate(self.profiles):
            if all(_within(shapes[name], *limits) for name, limits in profile.items()):
                return number
        return None


class ExecutionContext(Protocol):
    """One engine with shapes and addresses: ready to run, again and again."""

    @property
    def capturable(self) -> bool:
        """Return whether its work may be captured, as far as it can tell."""

    def bind(self, name: str, shape: Shape, address: int) -> None:
        """Set the address of an input or an output.

        Raises:
            EngineError: the engine has no such tensor, or not in that shape.
        """

    def enqueue(self) -> None:
        """Ask the device to run it.

        Raises:
            EngineError: the engine does not run.
        """


class DeviceEngine(Protocol):
    """A loaded engine."""

    @property
    def scratch_bytes(self) -> int:
        """Memory that a run needs beside inputs and outputs."""

    def context(
        self, profile: int, scratch: Buffer | None, *, replayed: bool = False
    ) -> ExecutionContext:
        """Return a new execution context. ``scratch`` is shared: one engine runs at a time.

        ``replayed``: it is for many runs of the same shapes, which may be captured.
        """


class EngineApi(Protocol):
    """Loader of engines for one device."""

    def load(self, compiled: Compiled) -> DeviceEngine:
        """Load one.

        Raises:
            EngineError, BundleError: it cannot be loaded here.
        """

    def close(self) -> None:
        """Free what the engines shared."""


def aligned(nbytes: int) -> int:
    """Round ``nbytes`` up to the alignment."""
    return -(-nbytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT


def _within(shape: Sequence[int], smallest: Sequence[int], largest: Sequence[int]) -> bool:
    return len(shape) == len(smallest) and all(
        low <= size <= high for size, low, high in zip(shape, smallest, largest, strict=True)
    )
