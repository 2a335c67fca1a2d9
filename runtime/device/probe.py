"""The GPU of this machine, asked of the driver itself: no library but the driver is needed."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

from ...graphs.engine_index import AGAIN, Engines
from ...graphs.errors import EngineError
from ...graphs.targets import Capability, show_capability
from .tensorrt import TensorRtVariant

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NAME_BYTES = 256


@dataclass(frozen=True)
class GpuInfo:
    """Name, compute capability and memory in bytes of a GPU."""

    name: str
    capability: Capability
    memory_bytes: int


def find_gpu() -> GpuInfo | None:
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
    return GpuInfo(name.value.decode(), (major.value, minor.value), memory.value)


def check_machine(
    engines: Engines, trt_variant: TensorRtVariant | None, device: GpuInfo | None
) -> None:
    """Make sure that this machine can run ``engines``; call it before deserialising any.

    Raises:
        EngineError: says what was found and what they were compiled for.
    """
    again = f"{AGAIN} {engines.folder.parent}"
    if trt_variant is None:
        raise EngineError(
            f"the engines need {engines.backend} {engines.version}, none is installed"
        )
    if trt_variant.version != engines.version:
        raise EngineError(
            f"the engines were compiled by {engines.backend} {engines.version}, found "
            f"{trt_variant.version}: they are not portable across versions. {again}"
        )
    if device is None:
        raise EngineError(
            f"the engines need a GPU ({engines.gpus()}), this machine has none. Their graphs run "
            "on the CPU: --backend onnxruntime"
        )
    if engines.capabilities and device.capability not in engines.capabilities:
        raise EngineError(
            f"the engines were compiled for {engines.gpus()}, found {device.name} "
            f"({show_capability(device.capability)}). {again}"
        )
