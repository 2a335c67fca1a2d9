"""The machine under a process: its processor and memory, and its GPU as the driver knows it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from ..graphs.targets import Capability

ROOT = Path("/")
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NAME_BYTES = 256


def cores() -> int:
    """Return how many cores this process may use; macOS cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def busy_machine() -> str | None:
    """Say that other programs keep this machine's cores busy; None where they do not.

    From the load average of the last minute, which Windows has not.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= cores():
        return None
    return (
        f"This machine is busy (load {load:.1f} on {cores()} cores): times measured now mean "
        "nothing. Measure again when it is idle."
    )


def processor(root: Path = ROOT) -> str:
    """Return the processor's model, without the machine's name; ``root`` is for tests."""
    with contextlib.suppress(OSError):
        for line in (root / "proc" / "cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> int:
    """Return the bytes of the process's largest resident set so far.

    Mapped weights count as far as they were read.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # no part of Python on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux a child inherits it
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class GpuInfo:
    """Name, compute capability and memory in bytes of a GPU."""

    name: str
    capability: Capability
    memory_bytes: int


def find_gpu() -> GpuInfo | None:
    """Return the first CUDA device, or None where there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(NAME_BYTES), ctypes.c_size_t()
    calls = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(handle), 0),
        lambda: cuda.cuDeviceGetName(name, NAME_BYTES, handle),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, handle),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, handle),
        lambda: cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle),
    )
    if any(call() for call in calls):  # the driver's error codes; 0 is success
        return None
    return GpuInfo(name.value.decode(), (major.value, minor.value), memory.value)
