"""The back ends: one row each, with what it needs and the module that opens it.

The target names the back end; ``onnxruntime`` may be asked for any bundle, whose graphs then run
on this CPU, ``openvino`` for those it can read. A row's module is imported when it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ...graphs.bundle import Bundle
from ...graphs.commands import install, rebuild_command
from ...graphs.errors import MissingDependencyError, TargetError
from ...graphs.targets import (
    ONNXRUNTIME,
    OPENVINO,
    PORTABLE,
    TARGETS,
    TENSORRT,
    TENSORRT_RTX,
    Target,
    find_target,
)
from .backend import Backend, BackendOptions

CUDA = "cuda"
"""Target and back end: ONNX Runtime's CUDA provider, on our stream."""


@dataclass(frozen=True)
class BackendRow:
    """One back end.

    Attributes:
        name: as targets and ``--backend`` call it.
        module: has ``open_bundle(bundle, options)`` and ``missing(target)``.
        extra: of the package, with what it needs beside the runtime's own dependencies.
        options: fields of ``BackendOptions`` that it takes.
        place: what it runs on, in words.
        reads: targets whose graphs it runs, besides the bundles that are its own.
    """

    name: str
    module: str
    extra: str | None = None
    options: tuple[str, ...] = ()
    place: str = "a GPU (target '{target}')"
    reads: Callable[[Target], bool] = lambda target: False

    def runs(self, target: Target) -> bool:
        """Return whether it runs bundles for ``target``."""
        return self.name in (target.name, target.backend) or self.reads(target)

    def check(self, target: Target) -> list[str]:
        """Return what lacks to run bundles for ``target`` on this machine."""
        try:
            return list(self._load().missing(target))
        except MissingDependencyError as error:
            return [str(error)]
        except ImportError:
            return [self.name + (f" ({install(self.extra)})" if self.extra else "")]

    def open(self, bundle: Bundle, options: BackendOptions) -> Backend:
        """Load the bundle's graphs or engines.

        Raises:
            EngineError, BundleError, MissingDependencyError: it cannot run here; says what to type.
        """
        return self._load().open_bundle(bundle, options)

    def _load(self) -> Any:
        return importlib.import_module(self.module, __package__)


ROWS = (
    BackendRow(
        ONNXRUNTIME,
        ".ort",
        "cpu",
        options=("threads", "memory_limit", "profile", "lanes"),
        place="this CPU",
        reads=lambda target: True,
    ),
    BackendRow(
        OPENVINO,
        ".openvino",
        OPENVINO,
        options=("threads",),
        place="OpenVINO",
        reads=lambda target: target.lowering == PORTABLE and not target.engines,
    ),
    BackendRow(TENSORRT, "..device.engine_trt", "tensorrt"),
    BackendRow(TENSORRT_RTX, "..device.engine_trt", "rtx"),
    BackendRow(CUDA, "..device.engine_ort", "gpu", options=("threads", "capture")),
)
BACKENDS = {row.name: row for row in ROWS}
ASKABLE = tuple(name for name in BACKENDS if name != CUDA)
"""Those that ``--backend`` takes; CUDA runs what was built for it."""


def backend_of(target: Target) -> BackendRow:
    """Return the back end that runs ``target``'s bundles unless another is asked for."""
    return BACKENDS[CUDA if target.name == CUDA else target.backend]


def find_backend(bundle: Bundle, name: str | None, options: BackendOptions) -> BackendRow:
    """Return the back end called ``name``, or the one of the bundle's target.

    Raises:
        TargetError: it is unknown, cannot run the bundle, or does not take one of ``options``.
    """
    if name is not None and name not in ASKABLE:
        raise TargetError(f"unknown back end '{name}'. Known: {', '.join(ASKABLE)}")
    target = find_target(bundle.manifest.target)
    row = BACKENDS[name] if name else backend_of(target)
    if not row.runs(target):
        makers = [target.name for target in TARGETS.values() if row.runs(target)]
        raise TargetError(
            f"{bundle.path} is for target '{target.name}', which runs on {target.backend}; {name} "
            f"runs bundles for {', '.join(makers)}. Leave --backend out, or build one: "
            f"{rebuild_command(bundle.manifest, target=makers[0])}"
        )
    for option in (field.name for field in fields(options)):
        if option not in row.options and getattr(options, option) is not None:
            place = row.place.format(target=target.name)
            found = f", and {bundle.path} runs on {place}. Leave it out"
            name = f"--{option.replace('_', '-')}"
            if option not in BACKENDS[ONNXRUNTIME].options:
                raise TargetError(f"{name} is for ONNX Runtime on a GPU (target '{CUDA}'){found}")
            raise TargetError(
                f"{name} is for ONNX Runtime on a CPU{found}, or run the graphs in ONNX Runtime: "
                f"--backend {ONNXRUNTIME}"
            )
    return row
