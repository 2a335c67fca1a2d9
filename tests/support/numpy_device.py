"""NumPy in place of a device, for machines that have none: late, forgetful and strict.

What is asked for is done when it is waited for, not before; memory holds rubbish (NaN in every
float type) until something is written, and again once it is freed; an address outside of living
memory is an ``AssertionError``. Whatever depends on luck on a real device fails here.
"""

from __future__ import annotations

import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
from visistage.runtime.device.protocol import DEVICE_ALIGNMENT, CaptureError

RUBBISH = 0xFF


class HostDevice:
    """``protocol.Device`` in NumPy. ``log`` lists what was done, by name, in order."""

    def __init__(self, name: str = "NumPy", memory: int = 1 << 40):
        self.name, self.memory = name, memory
        self.taken = 0
        self.kept = 0
        self.log: list[str] = []
        self._queue: list[tuple[str, Callable[[], None]]] = []
        self.captured: list[tuple[str, Callable[[], None]]] | None = None
        self.living: dict[int, np.ndarray] = {}
        self._current = threading.local()
        self.activate()

    def activate(self) -> None:
        """See ``protocol.Device``."""
        self._current.here = True

    def allocate(self, nbytes: int) -> HostMemory:
        """Memory full of rubbish."""
        self._check_thread()
        self._not_capturing("allocate")
        buffer = HostMemory(self, nbytes)
        self.taken += nbytes
        return buffer

    allocate_host = allocate

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """See ``protocol.Device``."""
        self.submit("copy", lambda: np.copyto(self.bytes(to, nbytes), self.bytes(source, nbytes)))

    def copy_rows(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """See ``protocol.Device``."""

        def work() -> None:
            for row in range(rows):
                read = self.bytes(source + row * source_pitch, width)
                np.copyto(self.bytes(to + row * to_pitch, width), read)

        self.submit("copy_rows", work)

    def zero(self, to: int, nbytes: int) -> None:
        """See ``protocol.Device``."""
        self.submit("zero", lambda: self.bytes(to, nbytes).fill(0))

    def record(self) -> HostEvent:
        """See ``protocol.Device``."""
        event = HostEvent(self)
        self.submit("record", event.come)
        return event

    def synchronize(self) -> None:
        """Do what was asked for."""
        self._check_thread()
        self._not_capturing("synchronize")
        queue, self._queue = self._queue, []
        for name, work in queue:
            self.log.append(name)
            work()

    def capture(self, work: Callable[[], None]) -> HostGraph:
        """See ``protocol.Device``."""
        self._not_capturing("capture")
        self.captured = []
        try:
            work()
            return HostGraph(self, self.captured)
        finally:
            self.captured = None

    def free_bytes(self) -> int:
        """What is left of ``memory``."""
        return self.memory - self.taken

    def trim(self) -> None:
        """Give back what was freed; ``kept`` is what others cannot use until then."""
        self.synchronize()
        self.kept = 0

    def close(self) -> None:
        """Do what is left to do."""
        self.synchronize()

    def submit(self, name: str, work: Callable[[], None]) -> None:
        """Ask for ``work``: an engine's run, for example."""
        self._check_thread()
        (self._queue if self.captured is None else self.captured).append((name, work))

    def bytes(self, address: int, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8 at ``address``, which must lie in one living buffer."""
        starts = sorted(self.living)
        at = bisect_right(starts, address) - 1
        if at >= 0:
            start, array = starts[at], self.living[starts[at]]
            if address - start + nbytes <= len(array):
                return array[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not in one living buffer")

    def freed(self, start: int) -> None:
        """Free a buffer that is held no more, once the work asked for before is done."""

        def work() -> None:
            array = self.living.pop(start)
            self.taken -= len(array)
            self.kept += len(array)
            array.fill(RUBBISH)

        self._queue.append(("free", work))

    def _check_thread(self) -> None:
        assert getattr(self._current, "here", False), "the device is not this thread's"

    def _not_capturing(self, what: str) -> None:
        if self.captured is not None:
            raise CaptureError(f"{what} while capturing")


class HostMemory:
    """``protocol.Buffer`` and ``HostBuffer`` at once."""

    def __init__(self, device: HostDevice, nbytes: int):
        room = np.full(nbytes + DEVICE_ALIGNMENT, RUBBISH, np.uint8)
        skip = -room.ctypes.data % DEVICE_ALIGNMENT
        self.array = room[skip : skip + nbytes]
        self.address, self.nbytes = int(room.ctypes.data) + skip, nbytes
        device.living[self.address] = self.array
        weakref.finalize(self, device.freed, self.address).atexit = False


class HostEvent:
    """``protocol.Event``."""

    def __init__(self, device: HostDevice):
        self._device = device
        self.came: float | None = None

    def come(self) -> None:
        """The device is here."""
        self.came = time.perf_counter()

    def wait(self) -> None:
        """See ``protocol.Event``."""
        if self.came is None:
            self._device.synchronize()

    def since(self, earlier: HostEvent) -> float:
        """See ``protocol.Event``."""
        assert self.came is not None
        assert earlier.came is not None
        return (self.came - earlier.came) * 1e3


class HostGraph:
    """``protocol.CapturedGraph``: a list of work."""

    def __init__(self, device: HostDevice, work: list[tuple[str, Callable[[], None]]]):
        self.work = work
        self._device = device

    def launch(self) -> None:
        """See ``protocol.CapturedGraph``."""
        self._device.submit("launch", self._all)

    def _all(self) -> None:
        for _, work in self.work:
            work()
