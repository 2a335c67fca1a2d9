"""What this machine can build and run, and what it would need for the rest."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import psutil
from rich.console import Group, RenderableType
from rich.table import Table

from .. import __version__
from ..compile.targets import LATER_TARGETS, TARGETS, Target
from ..graphs.contract import ORT_LLM_SINCE
from .units import show_bytes

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

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def doctor_facts() -> dict[str, Any]:
    """Versions, machine and targets, as JSON."""
    versions = {name: _version(name) for name in COMPILE_EXTRA}
    absent = [name for name, found in versions.items() if found is None]
    ort, providers = _onnxruntime()
    return {
        "visistage": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": _cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "onnxruntime": ort,
        "providers": providers,
        "compiler": versions,
        "targets": {
            **{target.name: _target(target, absent, ort, providers) for target in TARGETS.values()},
            **{
                name: {
                    "build": False,
                    "run": False,
                    "missing": ["planned, not in this version"],
                }
                for name in LATER_TARGETS
            },
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
    for name, found in facts["compiler"].items():
        head.add_row(name, found or "not installed")
    table = Table("target", "build here", "run here", "missing")
    for name, one in facts["targets"].items():
        answers = ("yes" if one[verb] else "no" for verb in ("build", "run"))
        table.add_row(name, *answers, "\n".join(one["missing"]))
    return Group(head, table)


def _target(
    target: Target, absent: list[str], ort: str | None, providers: list[str]
) -> dict[str, Any]:
    missing = []
    if absent:
        missing.append(f"to build: {', '.join(absent)} (pip install 'visistage[compile]')")
    provider = PROVIDERS[target.name.split("-")[0]]
    runs = provider in providers
    if ort is None:
        missing.append("to run: onnxruntime")
    elif not runs:
        missing.append(f"to run: an ONNX Runtime with {provider} (pip install onnxruntime-gpu)")
    elif target.lowering == "llm" and _pair(ort) < ORT_LLM_SINCE:
        runs = False
        missing.append(f"to run: ONNX Runtime {'.'.join(map(str, ORT_LLM_SINCE))}, found {ort}")
    return {"build": not absent, "run": runs, "missing": missing}


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


def _pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _cores() -> int:
    """Those this process may use; macOS cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
