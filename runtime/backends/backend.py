"""Who runs a bundle's graphs: ONNX Runtime or OpenVINO on this CPU, or a device.

The target names the back end; ``onnxruntime`` may be asked for any bundle, whose graphs then run
on this CPU, ``openvino`` for those it can read. Nothing of a device or of OpenVINO is imported
until a bundle needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...graphs.bundle import Bundle
from ...graphs.chain.executor import Executor, Rows
from ...graphs.errors import TargetError
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
from .ort import ENGINE, OrtExecutor, OrtOptions
from .tune_threads import choose_threads

BACKENDS = (ONNXRUNTIME, OPENVINO, TENSORRT, TENSORRT_RTX)
CUDA_TARGET = "cuda"


class Backend(Executor, Protocol):
    """An executor that a session can load, fill, rewind and close."""

    rows_dtype: np.dtype
    device_name: str | None  # None: no device, this CPU
    threads: int | None  # of this CPU; None: a device

    def prepare(self, needs: Sequence[int]) -> bool:
        """Make sure of room for ``needs`` slots in each stage; True: the caches are new and empty.

        Raises:
            CapacityError: there is not that much room.
        """

    def trim_slots(self, stage: int, used: int, wanted: int) -> int:
        """Give slots up where there are far more than ``wanted``, if it can; returns what is left.

        Attention pays for all there are. The first ``used`` slots keep what they hold.
        """

    def padding(self, stage: int, count: int) -> int:
        """Padding rows that it wants before ``count`` rows of a question."""

    def encode(self, pixels: np.ndarray) -> Rows:
        """Pixels (1, C, H, W) float32 -> visual rows (1, N, D)."""

    def snapshot(self, stage: int, start: int, stop: int) -> dict[str, Any]:
        """Copies of a stage's cache slots [start, stop)."""

    def restore(self, stage: int, start: int, saved: dict[str, Any]) -> None:
        """Write a snapshot back, or arrays of the host; the slots must exist."""

    def reset_elapsed(self) -> dict[str, float]:
        """Milliseconds per graph since the last call."""

    def end_profiles(self) -> dict[str, Path]:
        """Files with the times of every operator, by graph, where they were asked for."""

    def close(self) -> None:
        """Free everything."""


def open_backend(bundle: Bundle, backend: str | None, options: OrtOptions) -> Backend:
    """Load the bundle's graphs or engines.

    Args:
        bundle: complete and unchanged.
        backend: ``onnxruntime`` or ``openvino`` for its graphs on this CPU; None: as its target
            says.
        options: of ONNX Runtime; None in them where others run the bundle, but ``threads`` where
            that is OpenVINO, or ONNX Runtime again.

    Raises:
        TargetError: the back end is unknown, or another than the target's, or takes no such option.
        EngineError, BundleError, MissingDependencyError: it cannot run here; says what to type.
    """
    check_backend(bundle, backend)
    target = find_target(bundle.manifest.target)
    cuda = target.name == CUDA_TARGET and backend is None
    chosen = backend or target.backend
    if not cuda and chosen == ONNXRUNTIME:
        return _open_onnxruntime(bundle, options)
    where = "OpenVINO" if chosen == OPENVINO else f"a GPU (target '{target.name}')"
    allowed = {"threads"} if cuda or chosen == OPENVINO else set()
    for field in fields(options):
        if getattr(options, field.name) is not None and field.name not in allowed:
            raise TargetError(
                f"--{field.name.replace('_', '-')} is for ONNX Runtime on a CPU, and {bundle.path} "
                f"runs on {where}. Leave it out, or run the graphs in ONNX Runtime: "
                f"--backend {ONNXRUNTIME}"
            )
    if chosen == OPENVINO:
        return _open_openvino(bundle, options.threads)
    from ..device import opening

    return opening.open_cuda(bundle, options.threads) if cuda else opening.open_engines(bundle)


def _open_onnxruntime(bundle: Bundle, options: OrtOptions) -> OrtExecutor:
    def load(threads: int) -> OrtExecutor:
        return OrtExecutor(bundle, replace(options, threads=threads, profile=None))

    threads = options.threads or choose_threads(bundle, ENGINE, load)
    return OrtExecutor(bundle, replace(options, threads=threads))


def _open_openvino(bundle: Bundle, threads: int | None) -> Backend:
    from .openvino import OpenVinoExecutor, engine

    def load(threads: int) -> Backend:
        return OpenVinoExecutor(bundle, threads)

    return load(threads or choose_threads(bundle, engine(), load))


def check_backend(bundle: Bundle, backend: str | None) -> None:
    """Refuse a back end that cannot run the bundle.

    Raises:
        TargetError: says which can.
    """
    if backend is not None and backend not in BACKENDS:
        raise TargetError(f"unknown back end '{backend}'. Known: {', '.join(BACKENDS)}")
    target = find_target(bundle.manifest.target)
    if backend in (None, ONNXRUNTIME) or _runs(backend, target):
        return
    makers = [one.name for one in TARGETS.values() if _runs(backend, one)]
    raise TargetError(
        f"{bundle.path} is for target '{target.name}', which runs on {target.backend}; {backend} "
        f"runs bundles for {', '.join(makers)}. Leave --backend out, or build one: make engines "
        f"TARGET={makers[0]}"
    )


def _runs(backend: str, target: Target) -> bool:
    """Whether ``backend``, if not ONNX Runtime, runs bundles for ``target``."""
    portable = target.lowering == PORTABLE and not target.engines
    return backend == target.backend or (backend == OPENVINO and portable)
