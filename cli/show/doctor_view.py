"""The abilities of this machine: what it can build and run, and what it lacks for the rest."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

import psutil
from rich.console import Group, RenderableType
from rich.table import Table

from ... import __version__
from ...compile.engines.engines import can_compile
from ...graphs.commands import install
from ...graphs.errors import MissingDependencyError
from ...graphs.targets import TARGETS, TENSORRT, TENSORRT_RTX, Target, show_capability
from ...pages.units import show_bytes
from ...runtime.backends.ort_packages import collision, installed
from ...runtime.backends.registry import backend_of
from ...runtime.device.tensorrt import find_trt_variant
from ...runtime.hardware import GpuInfo, cores, find_gpu
from ...runtime.image_cache import FREE_SHARE

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
"""Libraries that building needs besides the runtime: the extra ``compile``."""


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
        "image_cache_bytes": psutil.virtual_memory().available // FREE_SHARE,
        "onnxruntime": ort,
        "onnxruntime_packages": installed(),
        "onnxruntime_collision": collision(),
        "providers": providers,
        "cuda_session": _cuda_session(device, providers),
        "openvino": _version("openvino"),
        "gpu": device and {**asdict(device), "capability": show_capability(device.capability)},
        "engine_compilers": {
            name: trt_variant.version
            for name in (TENSORRT, TENSORRT_RTX)
            if (trt_variant := find_trt_variant(name)) is not None
        },
        "compiler": versions,
        "targets": {target.name: _target(target, absent, device) for target in TARGETS.values()},
    }


def doctor_table() -> RenderableType:
    """Tabulate the same facts."""
    facts = doctor_facts()
    head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    head.add_column(style="dim")
    head.add_column()
    head.add_row("visistage", facts["visistage"])
    head.add_row("python", f"{facts['python']}, {facts['machine']}")
    memory = show_bytes(facts["memory_bytes"])
    head.add_row("machine", f"{facts['cores']} cores, {memory} of memory")
    cache = show_bytes(facts["image_cache_bytes"])
    head.add_row("image cache", f"at most {cache} by default (runtime.load's cache_bytes)")
    providers = f" ({', '.join(facts['providers'])})" if facts["providers"] else ""
    head.add_row("onnxruntime", (facts["onnxruntime"] or "not installed") + providers)
    if facts["onnxruntime_collision"]:
        head.add_row("", facts["onnxruntime_collision"])
    if facts["cuda_session"]:
        head.add_row("on the gpu", facts["cuda_session"])
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
        table.add_row(name, *answers, "\n".join(one["missing"]))
    return Group(head, table)


def _target(target: Target, absent: list[str], device: GpuInfo | None) -> dict[str, Any]:
    """Facts of a target: graphs are exported anywhere, engines compiled where they can be."""
    missing = _to_export(absent)
    why = can_compile(target, device) if target.engines else None
    if why is not None:
        missing.append(f"to compile engines: {why}; until then a portable bundle")
    reasons = backend_of(target).check(target)
    missing += [f"to run: {reason}" for reason in reasons]
    return {"build": not absent and why is None, "run": not reasons, "missing": missing}


def _to_export(absent: list[str]) -> list[str]:
    if not absent:
        return []
    return [f"to build: {', '.join(absent)} ({install('compile')})"]


def _onnxruntime() -> tuple[str | None, list[str]]:
    try:
        from ...runtime.backends.onnx_runtime import ort
    except (ImportError, MissingDependencyError):
        return None, []
    return ort.__version__, ort.get_available_providers()


def _cuda_session(device: GpuInfo | None, providers: list[str]) -> str | None:
    """Return what came of a session on the GPU; None: there is nothing to try."""
    if device is None or "CUDAExecutionProvider" not in providers:
        return None
    from ...runtime.device.cuda_session import why_no_session

    why = why_no_session()
    return "a session computes" if why is None else f"no session computes: {why}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
