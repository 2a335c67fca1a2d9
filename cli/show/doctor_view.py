"""What this machine can build and run, and what it would need for the rest."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

import psutil
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ... import __version__
from ...compile.engines.engines import can_compile
from ...graphs.targets import OPENVINO, TARGETS, TENSORRT, TENSORRT_RTX, Target, show_capability
from ...pages.units import show_bytes
from ...runtime.backends.cpu import cores
from ...runtime.device.probe import GpuInfo, find_gpu
from ...runtime.device.tensorrt import find_trt_variant, serves

COMPILE_EXTRA = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "safetensors",
    "huggingface-hub",
    "pyyaml",
)
"""What building needs besides the runtime; the extra ``compile``."""

CUDA_CORE = "cuda-core (pip install cuda-core 'cuda-bindings==13.*')"
"""What drives a GPU."""


def doctor_facts() -> dict[str, Any]:
    """Versions, machine and targets, as JSON."""
    versions = {name: _version(name) for name in COMPILE_EXTRA}
    absent = [name for name, found in versions.items() if found is None]
    ort, providers = _onnxruntime()
    device = find_gpu()
    return {
        "visistage": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "onnxruntime": ort,
        "providers": providers,
        "openvino": _version("openvino"),
        "gpu": device and {**asdict(device), "capability": show_capability(device.capability)},
        "engine_compilers": {
            name: trt_variant.version
            for name in (TENSORRT, TENSORRT_RTX)
            if (trt_variant := find_trt_variant(name)) is not None
        },
        "compiler": versions,
        "targets": {
            target.name: _engines(target, absent, device)
            if target.engines
            else _openvino(target, absent)
            if target.backend == OPENVINO
            else _graphs(target, absent, ort, providers)
            for target in TARGETS.values()
        },
    }


def doctor_table() -> RenderableType:
    """The same for people."""
    facts = doctor_facts()
    head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    head.add_column(style="dim")
    head.add_column()
    head.add_row("visistage", facts["visistage"])
    head.add_row("python", f"{facts['python']}, {facts['machine']}")
    memory = show_bytes(facts["memory_bytes"])
    head.add_row("machine", f"{facts['cores']} cores, {memory} of memory")
    providers = f" ({', '.join(facts['providers'])})" if facts["providers"] else ""
    head.add_row("onnxruntime", (facts["onnxruntime"] or "not installed") + providers)
    head.add_row("openvino", facts["openvino"] or "not installed")
    gpu = facts["gpu"]
    if gpu:
        memory = show_bytes(gpu["memory_bytes"])
        head.add_row("gpu", f"{gpu['name']}, {gpu['capability']}, {memory}")
    else:
        head.add_row("gpu", "none")
    for name in (TENSORRT, TENSORRT_RTX):
        head.add_row(name, facts["engine_compilers"].get(name) or "not installed")
    for name, found in facts["compiler"].items():
        head.add_row(name, found or "not installed")
    table = Table("target", "build here", "run here", "missing")
    for name, one in facts["targets"].items():
        answers = ("yes" if one[verb] else "no" for verb in ("build", "run"))
        table.add_row(name, *answers, escape("\n".join(one["missing"])))
    return Group(head, table)


def _graphs(
    target: Target, absent: list[str], ort: str | None, providers: list[str]
) -> dict[str, Any]:
    """A target that ONNX Runtime runs."""
    missing = _to_export(absent)
    provider = "CUDAExecutionProvider" if target.name == "cuda" else "CPUExecutionProvider"
    runs = provider in providers
    if ort is None:
        missing.append("to run: onnxruntime")
    elif not runs:
        missing.append(f"to run: an ONNX Runtime with {provider} (pip install onnxruntime-gpu)")
    elif not serves(target, ort):
        runs = False
        missing.append(f"to run: ONNX Runtime {target.versions[0]}, found {ort}")
    if target.name == "cuda" and not _has_cuda_core():
        runs = False
        missing.append(f"to run: {CUDA_CORE}")
    return {"build": not absent, "run": runs, "missing": missing}


def _openvino(target: Target, absent: list[str]) -> dict[str, Any]:
    """A target that OpenVINO runs."""
    missing = _to_export(absent)
    found = _version("openvino")
    runs = found is not None and serves(target, found)
    if found is None:
        missing.append("to run: openvino (pip install 'visistage[openvino]')")
    elif not runs:
        missing.append(f"to run: OpenVINO {target.versions[0]}, found {found}")
    return {"build": not absent, "run": runs, "missing": missing}


def _engines(target: Target, absent: list[str], device: GpuInfo | None) -> dict[str, Any]:
    """A target with engines: graphs are exported anywhere, engines compiled where they can be."""
    missing = _to_export(absent)
    why = can_compile(target, device)
    if why is not None:
        missing.append(f"to compile engines: {why}; until then a portable bundle")
    reasons = [*_to_run(target, device)]
    missing += [f"to run: {reason}" for reason in reasons]
    return {"build": not absent and why is None, "run": not reasons, "missing": missing}


def _to_run(target: Target, device: GpuInfo | None) -> Iterator[str]:
    """What lacks to run the target's engines here."""
    if device is None:
        yield "an NVIDIA GPU and its driver; verify runs their graphs on the CPU"
    elif target.capabilities and device.capability not in target.capabilities:
        yield f"another GPU than this {show_capability(device.capability)}"
    trt_variant = find_trt_variant(target.backend)
    if trt_variant is None:
        yield f"{target.backend} is not installed"
    elif not serves(target, trt_variant.version):
        yield f"{target.backend} {target.versions[0]}, found {trt_variant.version}"
    if not _has_cuda_core():
        yield CUDA_CORE


def _has_cuda_core() -> bool:
    return _version("cuda-core") is not None


def _to_export(absent: list[str]) -> list[str]:
    if not absent:
        return []
    return [f"to build: {', '.join(absent)} (pip install 'visistage[compile]')"]


def _onnxruntime() -> tuple[str | None, list[str]]:
    try:
        import onnxruntime
    except ImportError:
        return None, []
    return onnxruntime.__version__, onnxruntime.get_available_providers()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
