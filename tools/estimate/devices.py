"""Machines and what their makers say they can do: data, with the source of every figure.

Rates are of dense products: data sheets that state sparse ones are halved. What a source leaves
out is None, never guessed; where a figure follows from another one, ``derived`` says how. On Orin's
tensor cores FP16 runs at half of INT8's rate, on Blackwell's at half of FP8's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...graphs.errors import TargetError, nearest

GB = 10**9
TERA = 10**12
CPU_DEVICE = "cpu"


@dataclass(frozen=True)
class DeviceSpec:
    """One machine.

    Attributes:
        flops: FLOPs a second by what is multiplied (``fp32``, ``fp16``, ``int8``); None: unknown.
        bandwidth: bytes a second.
        memory_bytes: all of it; ``shared``: with the operating system and the processor.
        sources: titles and places of what the figures were read from.
        derived: how figures that no source prints were computed.
    """

    name: str
    about: str
    flops: dict[str, float | None]
    bandwidth: float
    memory_bytes: float
    shared: bool
    sources: tuple[str, ...]
    derived: str = ""


DEVICES = {
    device.name: device
    for device in (
        DeviceSpec(
            "orin-agx-64",
            "Jetson AGX Orin 64 GB, GPU at 1.3 GHz",
            {"fp32": 2048 * 2 * 1.3e9, "fp16": 170 / 4 * TERA, "int8": 170 / 2 * TERA},
            204.8 * GB,
            64 * GB,
            True,
            ("NVIDIA Jetson AGX Orin Series Modules Data Sheet, DS-10662-001 v1.8",),
            "170 sparse INT8 TOPS of the GPU alone, halved for dense, again for FP16; FP32 from "
            "2048 cores",
        ),
        DeviceSpec(
            "orin-nx-16",
            "Jetson Orin NX 16 GB, GPU at 918 MHz",
            {"fp32": 1024 * 2 * 918e6, "fp16": 60 / 4 * TERA, "int8": 60 / 2 * TERA},
            102 * GB,
            16 * GB,
            True,
            ("NVIDIA Jetson Orin NX Series Modules Data Sheet, DS-10712-001 v1.0",),
            "100 sparse INT8 TOPS of the module without its two accelerators' 20 each, halved for "
            "dense, again for FP16; FP32 from 1024 cores",
        ),
        DeviceSpec(
            "orin-nano-8",
            "Jetson Orin Nano 8 GB with the clocks of JetPack 6.2 and later (Super)",
            {"fp32": None, "fp16": 67 / 4 * TERA, "int8": 67 / 2 * TERA},
            102 * GB,
            8 * GB,
            True,
            (
                "Jetson Orin Nano Developer Kit User Guide, docs.nvidia.com/jetson/"
                "orin-nano-devkit/user-guide",
            ),
            "67 sparse INT8 TOPS, halved for dense, again for FP16",
        ),
        DeviceSpec(
            "thor",
            "Jetson AGX Thor (T5000)",
            {"fp32": None, "fp16": 1035 / 4 * TERA, "int8": None},
            273 * GB,
            128 * GB,
            True,
            ("SoM Overview to NVIDIA Jetson AGX Thor, RidgeRun developer wiki",),
            "1035 sparse FP8 TFLOPS, halved for dense, again for FP16",
        ),
        DeviceSpec(
            "h100",
            "H100 SXM, 80 GB",
            {"fp32": 66.9 * TERA, "fp16": 989.4 * TERA, "int8": 1978.9 * TERA},
            3350 * GB,
            80 * GB,
            False,
            (
                "H100, glennklockwood.com/garden/processors/h100",
                "H100 SXM. Specs, benchmarks, codesota.com/hardware/h100",
            ),
        ),
        DeviceSpec(
            "h200",
            "H200 SXM, 141 GB",
            {"fp32": 66.9 * TERA, "fp16": 989.4 * TERA, "int8": 1978.9 * TERA},
            4800 * GB,
            141 * GB,
            False,
            (
                "H100, glennklockwood.com/garden/processors/h100 (the H200 computes alike)",
                "NVIDIA H200 GPU Specifications, lzwjava.github.io/nvidia-h200-gpu-specs-en",
            ),
        ),
        DeviceSpec(
            "rtx-4090",
            "GeForce RTX 4090, 24 GB",
            {"fp32": 82.58 * TERA, "fp16": 165.15 * TERA, "int8": 660.6 * TERA},
            1008 * GB,
            24 * GB,
            False,
            ("NVIDIA GeForce RTX 4090, waredb.com/processor/nvidia-geforce-rtx-4090",),
        ),
    )
}

NAMES = (*DEVICES, CPU_DEVICE)


def find_device_spec(name: str) -> DeviceSpec:
    """The device called ``name``; ``cpu`` is measured, not looked up.

    Raises:
        TargetError: unknown.
    """
    if name in DEVICES:
        return DEVICES[name]
    hint = nearest(name, NAMES)
    raise TargetError(f"unknown device '{name}'.{hint} Known: {', '.join(NAMES)}")


def compute_type(precision: str) -> str:
    """What a precision multiplies: INT8 products need INT8 inputs, weights alone do not."""
    base = precision.partition(":")[0].partition("+")[0]
    return {"fp32": "fp32", "int8": "int8"}.get(base, "fp16")
