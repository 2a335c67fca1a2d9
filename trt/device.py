"""The GPU of this machine, asked of the driver itself: no library but the driver is needed."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

from ..graphs.targets import Capability

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NAME_BYTES = 256


@dataclass(frozen=True)
class Device:
    """Name, compute capability and memory in bytes of a GPU."""

    name: str
    capability: Capability
    memory_bytes: int


def find_device() -> Device | None:
    """The first CUDA device, or None where there is no driver or no GPU."""
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
    return Device(name.value.decode(), (major.value, minor.value), memory.value)
