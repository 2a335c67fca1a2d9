"""Machines: what their makers say they can do, what was measured on them here and by others.

Rates are of dense products: data sheets that state sparse ones are halved. What a source leaves
out is None, never guessed; where a figure follows from another one, ``derived`` says how. On Orin's
tensor cores FP16 runs at half of INT8's rate, on Blackwell's at half of FP8's.

Published figures are shown beside estimates, marked as their authors'. Of those whose model's sizes
are known, it is computed what they reached of the device's peaks: the range of efficiencies that an
estimate for a device that was not measured takes. Sources: TinyChat,
github.com/mit-han-lab/llm-awq, tinychat/README.md; TensorRT-Edge-LLM 0.10.0, performance benchmarks
(batch 1, JetPack 7.2, TensorRT 10.16), nvidia.github.io/TensorRT-Edge-LLM.

What a device reaches of its peaks is fitted by ``bench/fit.py``, which writes ``measured.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...graphs.errors import TargetError, nearest
from ...graphs.plan.call_cost import GraphCall, Sizes, stage_work
from ...graphs.plan.cost import LLAVA_7B, Geometry
from ...graphs.quantization import base_of

GB = 10**9
TERA = 10**12
CPU_DEVICE = "cpu"
MEASURED_FILE = Path(__file__).with_name("measured.json")


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
    """Return the device called ``name``; ``cpu`` is measured, not looked up.

    Raises:
        TargetError: unknown.
    """
    if name in DEVICES:
        return DEVICES[name]
    hint = nearest(name, NAMES)
    raise TargetError(f"unknown device '{name}'.{hint} Known: {', '.join(NAMES)}")


def compute_type(precision: str) -> str:
    """Return what a precision multiplies: INT8 products need INT8 inputs, not weights alone."""
    return {"fp32": "fp32", "int8": "int8"}.get(base_of(precision), "fp16")


TINYCHAT = "TinyChat"
EDGE_LLM = "TensorRT-Edge-LLM 0.10.0"

LLAMA_3_8B = Geometry(
    layers=32, hidden=4096, intermediate=14336, vocab=128256, kv_width=1024, query_width=4096
)


@dataclass(frozen=True)
class Figure:
    """One published measurement.

    tokens: of the prefill, 0 for a decode figure; ms: of that prefill, or of one token.
    geometry: the decoder's sizes where they are known; weights: their precision.
    """

    stack: str
    device: str
    model: str
    precision: str
    tokens: int
    ms: float
    weights: str = "fp16"
    geometry: Geometry | None = None

    @property
    def efficiency(self) -> float | None:
        """Share of the device's peak that it reached: of FP16 products in a prefill, of the
        bandwidth (weights alone counted) in a decode step.
        """
        if self.geometry is None:
            return None
        device, call = DEVICES[self.device], GraphCall("stage0", self.tokens or 1, 0)
        layers, sizes = self.geometry.layers, Sizes.of(self.weights)
        work = stage_work(self.geometry, layers, call, sizes, head=True)
        if not self.tokens:
            return work.weight_bytes / (self.ms / 1e3) / device.bandwidth
        peak = device.flops["fp16"]
        assert peak is not None
        return work.flops / (self.ms / 1e3) / peak


def _edge(device: str, model: str, tokens: int, ms: float, per_second: float) -> list[Figure]:
    times = {tokens: ms, 0: 1e3 / per_second}
    return [Figure(EDGE_LLM, device, model, "INT4 AWQ", n, each) for n, each in times.items()]


FIGURES = (
    Figure(TINYCHAT, "orin-agx-64", "Vicuna-7B", "FP16", 0, 84.8, geometry=LLAVA_7B),
    Figure(TINYCHAT, "orin-agx-64", "Vicuna-7B", "INT4", 0, 26.3, "w4", LLAVA_7B),
    Figure(TINYCHAT, "orin-agx-64", "VILA-7B, one image", "FP16", 0, 86.9, geometry=LLAVA_7B),
    Figure(TINYCHAT, "orin-agx-64", "VILA-7B, one image", "INT4", 0, 28.1, "w4", LLAVA_7B),
    Figure(
        "Hugging Face, by TinyChat",
        *("orin-agx-64", "Llama-3-8B", "FP16", 512, 399, "fp16", LLAMA_3_8B),
    ),
    Figure(TINYCHAT, "orin-agx-64", "Llama-3-8B", "INT4", 512, 315, "w4", LLAMA_3_8B),
    Figure(
        "Hugging Face, by TinyChat",
        *("orin-agx-64", "Llama-3-8B", "FP16", 1024, 566, "fp16", LLAMA_3_8B),
    ),
    Figure(TINYCHAT, "orin-agx-64", "Llama-3-8B", "INT4", 1024, 623, "w4", LLAMA_3_8B),
    *_edge("orin-agx-64", "Qwen3-VL-8B", 292, 178.3, 32.1),
    *_edge("orin-agx-64", "Qwen3-VL-4B", 292, 105.7, 54.7),
    *_edge("orin-nx-16", "Qwen3-VL-8B", 292, 400.5, 18.4),
    *_edge("orin-nx-16", "Qwen3-VL-4B", 292, 217.2, 31.7),
    *_edge("orin-nano-8", "Qwen3-VL-2B", 292, 167.2, 36.1),
    *_edge("thor", "Qwen3-VL-8B", 292, 115.1, 48.5),
    *_edge("thor", "Qwen3-VL-4B", 292, 64.5, 82.8),
)


def efficiency_range(prefill: bool) -> tuple[float, float]:
    """Return the least and most that published figures reached of a device's peak."""
    seen = [figure.efficiency for figure in FIGURES if bool(figure.tokens) == prefill]
    known = [share for share in seen if share is not None]
    return min(known), max(known)


def figures_of(device: str) -> list[Figure]:
    """Return those of one device."""
    return [figure for figure in FIGURES if figure.device == device]


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that a device reaches, and milliseconds of calling one layer."""

    compute: float
    bandwidth: float
    layer_ms: float

    def predict_ms(
        self, flops: float, nbytes: float, layers: int, peak_flops: float, peak_bandwidth: float
    ) -> float:
        """Return how long a phase takes on a device with these peaks."""
        operations = flops / (self.compute * peak_flops)
        reading = nbytes / (self.bandwidth * peak_bandwidth)
        return 1e3 * (operations + reading) + layers * self.layer_ms


@dataclass(frozen=True)
class Measured:
    """Efficiencies of one device in one precision, how wrong they are, and where they are from."""

    efficiency: Efficiency
    validations: list[dict[str, Any]]
    origin: dict[str, Any]

    @property
    def error(self) -> float:
        """The median error of models that the fit had not seen."""
        return next(v["median_error"] for v in self.validations if v["by"] == "model")


def measured(device: str, precision: str, file: Path = MEASURED_FILE) -> Measured | None:
    """Return what was measured of ``device``, if anything."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    facts = known.get(device, {}).get(precision)
    if facts is None:
        return None
    return Measured(Efficiency(**facts["efficiency"]), facts["validations"], facts["origin"])
