"""One interface to TensorRT and TensorRT-RTX: which module is there, and what it can do.

The two share their Python API almost to the letter. The differences are kept here: the module's
name, whether compute capabilities can be named (RTX compiles for GPUs that are not there), and
whether a timing cache does anything.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ...graphs.commands import install
from ...graphs.errors import MissingDependencyError, TargetError
from ...graphs.targets import TENSORRT, TENSORRT_RTX, Capability, Target, show_capability
from ..hardware import GpuInfo

MODULES = {TENSORRT: ("tensorrt",), TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""Modules of each; the RTX wheels bring the second name alone."""

INSTALL = {
    TENSORRT: "On a Jetson it comes with JetPack (apt install python3-libnvinfer, and a venv made "
    f"with --system-site-packages); elsewhere: {install('tensorrt')}",
    TENSORRT_RTX: f"Type: {install('rtx')}",
}


@dataclass(frozen=True)
class TensorRtVariant:
    """A compiler that was found.

    ``names_capabilities``: it compiles for GPUs by name, so none need be present.
    ``timing_cache``: what it learns about kernels can be kept for the next build.
    """

    backend: str
    module: ModuleType
    names_capabilities: bool
    timing_cache: bool

    @property
    def version(self) -> str:
        """Such as ``10.3.0`` or ``1.7.1.116``."""
        return self.module.__version__

    def capability(self, capability: Capability) -> Any:
        """Return the compiler's own value for a compute capability.

        Raises:
            TargetError: it does not compile for that.
        """
        known = vars(self.module.ComputeCapability)
        name = _member(capability)
        if name not in known:
            listed = sorted(name for name in known if name.startswith("SM"))
            raise TargetError(
                f"{self.backend} {self.version} does not compile for "
                f"{show_capability(capability)}. It compiles for: {', '.join(listed)}"
            )
        return known[name]

    def why_not_on(self, gpu: GpuInfo) -> str | None:
        """Return why engines compiled here may not run on ``gpu``; None: it compiles for that."""
        if not self.names_capabilities or hasattr(
            self.module.ComputeCapability, _member(gpu.capability)
        ):
            return None
        return (
            f"{self.backend} {self.version} does not compile for this GPU, {gpu.name} "
            f"({show_capability(gpu.capability)})"
        )


def _member(capability: Capability) -> str:
    """Return the name of a compute capability as the compiler has it."""
    return show_capability(capability).replace("_", "").upper()


def find_trt_variant(backend: str) -> TensorRtVariant | None:
    """Return the variant called ``backend``, or None where it is not installed or does not load."""
    for name in MODULES[backend]:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, AttributeError):
            continue  # bindings without their libraries
        named = hasattr(module, "ComputeCapability")
        return TensorRtVariant(backend, module, named, timing_cache=not named)
    return None


def load_trt_variant(target: Target) -> TensorRtVariant:
    """Return the compiler that ``target`` needs, in a version that serves it.

    Raises:
        MissingDependencyError: not installed.
        TargetError: another version.
    """
    trt_variant = find_trt_variant(target.backend)
    if trt_variant is None:
        raise MissingDependencyError(
            f"target '{target.name}' is compiled by {target.backend}, which is not installed here. "
            f"{INSTALL[target.backend]}"
        )
    if not target.serves(trt_variant.version):
        first, stop = target.versions
        below = f" and below {stop}" if stop else ""
        raise TargetError(
            f"target '{target.name}' wants {target.backend} {first} or newer{below}, found "
            f"{trt_variant.version}. Choose the target for this machine (visistage doctor lists "
            "them), or install that version"
        )
    return trt_variant
