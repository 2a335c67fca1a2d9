"""The whole ladder over one bundle: what it opens, every rung in its order, and the report of them.

A machine with the runtime alone climbs what it can, and the report says what it could not.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from ... import __version__
from ...calib.samples import Sample
from ...graphs.bundle import MANIFEST, Bundle, sha256
from ...graphs.errors import DataError
from ...graphs.targets import TENSORRT, TENSORRT_RTX, show_capability
from ...runtime.device.tensorrt import find_trt_variant
from ...runtime.hardware import find_gpu
from .check_steps import Check, run_check, skip_check
from .checks import checks
from .verify_report import FAILED, CheckRecord, VerifyReport
from .verify_target import VerifyTarget

if TYPE_CHECKING:
    from pathlib import Path

VERIFY_MAX_TOKENS = 16

SMALL_BYTES = 256 << 20
"""Weights of a model that one thread is enough for."""

PACKAGES: tuple[str, ...] = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino")
PACKAGES += ("torch", "transformers", "onnx", "onnx-ir")
"""Whose versions a report names."""


class VerifyProgress(Protocol):
    """Who is told how a ladder goes."""

    def start(self, check: Check) -> None:
        """A rung is tried."""

    def done(self, record: CheckRecord) -> None:
        """It is over."""


class NoVerifyProgress:
    """A watcher that tells nobody."""

    def start(self, check: Check) -> None:
        """Nothing."""

    def done(self, record: CheckRecord) -> None:
        """Nothing."""


def verify(
    bundle: Bundle,
    samples: Sequence[Sample],
    *,
    model: str | None = None,
    calibration: Path | None = None,
    max_tokens: int = VERIFY_MAX_TOKENS,
    memory: int | None = None,
    progress: VerifyProgress | None = None,
) -> VerifyReport:
    """Run every rung that this machine can run over the files of ``bundle``.

    Args:
        bundle: nothing of it is believed but that it has a manifest.
        samples: prompts for the rungs of whole answers; at least one.
        model: the checkpoint it was built from, on this machine; None leaves its rungs out.
        calibration: folder of the calibration it rests on; None: the usual one if it is there.
        max_tokens: length of the answers.
        memory: bytes that a rung may take; None: what is free when it begins.
        progress: told of every rung.

    Raises:
        ModelError: ``model`` cannot be opened, or is not the bundle's.
        DataError: ``calibration`` cannot be read, or is not the bundle's.
        ModuleNotFoundError: ``model`` was given and torch is not there to read it.
    """
    progress = progress or NoVerifyProgress()
    origin, known = None, None
    if model is not None:
        from .origin import open_calibration, open_origin

        origin = open_origin(bundle, model)
        known = open_calibration(bundle, calibration)
    elif calibration is not None:
        raise DataError(
            "a calibration is checked together with the checkpoint: --model CHECKPOINT, or leave "
            "--calib out"
        )
    records: list[CheckRecord] = []
    with (
        VerifyTarget(bundle, samples, origin, known, max_tokens, memory) as target,
        _few_threads(bundle.manifest.weight_bytes),
    ):
        for check in checks(target):
            progress.start(check)
            if records and records[0].status == FAILED:
                records.append(skip_check(check, "the files are not those that were built"))
            else:
                records.append(_anonymous(run_check(check), target))
            progress.done(records[-1])
    manifest = bundle.manifest
    return VerifyReport(
        bundle={
            "model": manifest.model,
            "plan": f"{manifest.plan.name} {manifest.plan.hash[:12]}",
            "target": manifest.target,
            "precision": manifest.precision,
            "lowering": manifest.lowering,
            "manifest": f"sha256 {sha256(bundle.path / MANIFEST)[:12]}",
        },
        rungs=tuple(records),
        versions=_versions(bundle),
        machine=_machine(),
    )


def _few_threads(weight_bytes: int) -> AbstractContextManager[None]:
    """One thread of torch's while a small model is verified.

    Sharing out its small matrices takes longer than multiplying them, most of all where ONNX
    Runtime, which takes turns with torch, has threads of its own.
    """
    if weight_bytes >= SMALL_BYTES or importlib.util.find_spec("torch") is None:
        return nullcontext()
    from .module_checks import one_thread

    return one_thread()


def _anonymous(record: CheckRecord, target: VerifyTarget) -> CheckRecord:
    """The rung without this machine's folders in its reason: reports travel."""
    folders = [(target.bundle.path, "BUNDLE")]
    if target.origin is not None:
        folders.append((target.origin.path, "CHECKPOINT"))
    reason = record.reason
    for folder, name in folders:
        reason = reason.replace(str(folder), name)
    return replace(record, reason=reason)


def _versions(bundle: Bundle) -> dict[str, str]:
    """What ran, and what had built the bundle."""
    found = {"visistage": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for backend in (TENSORRT, TENSORRT_RTX):
        trt_variant = find_trt_variant(backend)
        if trt_variant is not None:
            found[backend] = trt_variant.version
    return found | {f"built with {name}": v for name, v in bundle.manifest.versions.items()}


def _machine() -> dict[str, Any]:
    """Facts of the machine that say what it can do, and not whose it is."""
    device = find_gpu()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": psutil.cpu_count(),
        "memory in GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": f"{device.name} ({show_capability(device.capability)})" if device else "none",
    }
