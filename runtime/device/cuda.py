"""A CUDA device over cuda-core: memory, one stream, events and graphs; no torch, nothing compiled.

cuda-core is imported when a device is opened, not before: this module can be read, and its
arguments checked, where there is no driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np

from ...graphs.errors import CapacityError, EngineError, MissingDependencyError
from .protocol import CaptureError

PACKAGE = "cuda-core"


class CudaDevice:
    """``protocol.Device`` on GPU ``number``.

    ``stream``: the stream's handle as an integer, for libraries that issue their own work.

    Raises:
        MissingDependencyError: cuda-core or the bindings are not installed.
        EngineError: there is no driver, or no such GPU.
    """

    def __init__(self, number: int = 0):
        self._core, self._driver = _libraries()
        self._threads = threading.local()
        try:
            self._device = self._core.Device(number)
            self.activate()
            self._stream = self._device.create_stream()
            self._pinned = self._core.LegacyPinnedMemoryResource()
        except Exception as error:  # cuda-core has an exception of its own for every layer
            raise EngineError(
                f"GPU {number} cannot be opened: {error}. Look at nvidia-smi (tegrastats on a "
                "Jetson), or run the graphs on this CPU: --backend onnxruntime"
            ) from error
        self.name = str(self._device.name)
        self.stream = int(self._stream.handle)
        self._timed = self._core.EventOptions(timing_enabled=True)
        self._closed = False

    def activate(self) -> None:
        self._device.set_current()
        self._threads.entered = True

    def _enter(self) -> None:
        """Make this the calling thread's device where the thread is new: each has one of its own.

        Sessions do so before they ask for work; arrays are read and dropped in any thread.
        """
        if not getattr(self._threads, "entered", False):
            self.activate()

    def allocate(self, nbytes: int) -> CudaMemory:
        self._enter()
        try:
            return CudaMemory(self._device.allocate(nbytes, stream=self._stream), nbytes)
        except Exception as error:
            raise CapacityError(
                f"{self.name} has no {nbytes / 2**20:.0f} MiB left ({self.free_bytes() / 2**20:.0f}"
                f" MiB free): {error}. Use a plan with fewer visual tokens, a shorter --context, "
                "or end other programs on the GPU"
            ) from error

    def allocate_host(self, nbytes: int) -> CudaHostMemory:
        self._enter()
        return CudaHostMemory(self._pinned.allocate(nbytes), nbytes)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self._enter()
        driver = self._driver
        self._check("copy", driver.cuMemcpyAsync(to, source, nbytes, self.stream))

    def copy_rows(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        self._enter()
        driver = self._driver
        plan = driver.CUDA_MEMCPY2D()
        plan.srcMemoryType = plan.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        plan.srcDevice, plan.srcPitch = source, source_pitch
        plan.dstDevice, plan.dstPitch = to, to_pitch
        plan.WidthInBytes, plan.Height = width, rows
        self._check("copy rows", driver.cuMemcpy2DAsync(plan, self.stream))

    def zero(self, to: int, nbytes: int) -> None:
        self._enter()
        self._check("zero", self._driver.cuMemsetD8Async(to, 0, nbytes, self.stream))

    def record(self) -> CudaEvent:
        self._enter()
        return CudaEvent(self._stream.record(options=self._timed))

    def synchronize(self) -> None:
        self._enter()
        self._stream.sync()

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        self._enter()
        builder = self._stream.create_graph_builder()
        try:
            # Relaxed: an engine may ask the driver things that a strict capture forbids.
            if int(builder.stream.handle) != self.stream:
                raise CaptureError("cuda-core captures another stream than it was asked to")
            with _uncollected():
                builder.begin_building(mode="relaxed")
                try:
                    work()
                finally:
                    builder.end_building()
            return CudaGraph(builder.complete(), self._stream)
        except (CaptureError, EngineError):
            raise
        except Exception as error:
            raise CaptureError(str(error)) from error
        finally:
            with contextlib.suppress(Exception):  # what matters has been said
                builder.close()

    def free_bytes(self) -> int:
        self._enter()
        free, _ = self._check("ask for free memory", self._driver.cuMemGetInfo())
        # The pool never gives back what was freed; the next allocation takes it from there.
        pool = getattr(self._device.memory_resource, "attributes", None)
        kept = 0 if pool is None else pool.reserved_mem_current - pool.used_mem_current
        return int(free) + int(kept)

    def trim(self) -> None:
        self.synchronize()
        pool = getattr(self._device.memory_resource, "handle", None)
        if pool is not None:  # devices without pools have nothing to give back
            self._check("give memory back", self._driver.cuMemPoolTrimTo(pool, 0))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stream.sync()
            self._stream.close()

    def _check(self, what: str, result: tuple) -> tuple:
        """Return the driver's answer without its error code.

        Raises:
            EngineError: there was an error.
        """
        code, *rest = result
        if int(code) != 0:
            name = getattr(code, "name", code)
            raise EngineError(f"{self.name} could not {what}: {name}")
        return tuple(rest)


class CudaMemory:
    """``protocol.Buffer``: freed with the cuda-core buffer that it holds, in stream order."""

    def __init__(self, buffer: Any, nbytes: int):
        self._buffer, self.nbytes = buffer, nbytes
        self.address = int(buffer.handle)


class CudaHostMemory(CudaMemory):
    """``protocol.HostBuffer``."""

    def __init__(self, buffer: Any, nbytes: int):
        super().__init__(buffer, nbytes)
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))


class CudaEvent:
    """``protocol.Event``."""

    def __init__(self, event: Any):
        self._event = event

    def wait(self) -> None:
        self._event.sync()

    def since(self, earlier: CudaEvent) -> float:
        return float(self._event - earlier._event)


class CudaGraph:
    """``protocol.CapturedGraph``."""

    def __init__(self, graph: Any, stream: Any):
        self._graph, self._stream = graph, stream

    def launch(self) -> None:
        self._graph.launch(self._stream)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the collector of cycles from running: a buffer that it freed in a capture would be freed
    by the graph, again with every launch.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def missing_cuda_core() -> Iterator[str]:
    """Yield what to install to drive a GPU, where it is not."""
    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        yield f"{PACKAGE} (pip install {PACKAGE} 'cuda-bindings==13.*')"


def _libraries() -> tuple[Any, Any]:
    """Return cuda.core and the driver's bindings.

    Raises:
        MissingDependencyError: they are not installed.
    """
    try:
        import cuda.core as core
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependencyError(
            f"a GPU is driven through {PACKAGE}, which is not installed ({error}). Type: pip "
            f"install {PACKAGE} 'cuda-bindings==13.*' (12.* with a driver for CUDA 12, such as "
            "JetPack 6's)"
        ) from error
    return core, driver
