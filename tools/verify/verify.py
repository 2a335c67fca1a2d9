"""The verification of one bundle: what it opens, every check in order, and their report."""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ... import __version__
from ...calib.samples import Sample, demo_samples, read_samples
from ...compile.checkpoint.known_models import own_folder
from ...demo.gallery import general_questions
from ...demo.worlds import WORLDS
from ...graphs.bundle import MANIFEST, Bundle, sha256
from ...graphs.commands import install
from ...graphs.errors import (
    CapacityError,
    DataError,
    ImageError,
    MissingDependencyError,
    ModelError,
    PromptError,
    TargetError,
    VisistageError,
)
from ...graphs.progress import Progress, StepFact
from ...graphs.targets import TENSORRT, TENSORRT_RTX, show_capability
from ...runtime.device.tensorrt import find_trt_variant
from ...runtime.hardware import find_gpu
from .checks import Check, checks_of
from .verify_report import (
    FAILED,
    IMPOSSIBLE,
    NOTHING,
    PASSED,
    CheckRecord,
    CheckResult,
    ImpossibleError,
    NothingError,
    VerifyReport,
)
from .verify_target import VERIFY_MAX_TOKENS, VerifyTarget

DEFAULT_SAMPLES = 6
"""Prompts asked by default."""

SMALL_BYTES = 256 << 20
"""Weights of a model that one thread is enough for."""

PACKAGES: tuple[str, ...] = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino")
PACKAGES += ("torch", "transformers", "onnx", "onnx-ir")
"""Whose versions a report names."""


def verify(
    bundle: Bundle,
    samples: Sequence[Sample],
    *,
    model: str | None = None,
    calibration: Path | None = None,
    max_tokens: int = VERIFY_MAX_TOKENS,
    memory: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Run every check that this machine can run over the files of ``bundle``.

    Args:
        bundle: nothing of it is trusted but that it has a manifest.
        samples: prompts for the checks of whole answers; at least one.
        model: the checkpoint it was built from, on this machine; None leaves its checks out.
        calibration: folder of the calibration it rests on; None: the usual one if it is there.
        max_tokens: length of the answers.
        memory: bytes that a check may take; None: what is free when it begins.
        progress: has a step for every check; its outcome is the status.

    Raises:
        ModelError: ``model`` cannot be opened, or is not the bundle's.
        DataError: ``calibration`` cannot be read, or is not the bundle's.
        ModuleNotFoundError: ``model`` was given and torch is not there to read it.
    """
    progress = progress or Progress()
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
    folders = {str(bundle.path): "BUNDLE"} | ({str(origin.path): "CHECKPOINT"} if origin else {})
    records: list[CheckRecord] = []
    with (
        VerifyTarget(bundle, samples, origin, known, max_tokens, memory) as target,
        _few_threads(bundle.manifest.weight_bytes),
    ):
        for check in checks_of(target):
            progress.start(check.name)
            if records and records[0].status == FAILED:
                check = replace(check, run=_skip)
            record = run_check(check, folders)
            records.append(record)
            progress.done(StepFact(record.name, record.seconds, record.status))
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
        checks=tuple(records),
        versions=_versions(bundle),
        machine=_machine(),
    )


def chosen(model: str, data: Path | None, count: int | None) -> list[Sample]:
    """Return ``count`` samples of ``data``, or else of what the package has for ``model``.

    Raises:
        DataError: the data cannot be used.
    """
    count = count or DEFAULT_SAMPLES
    if data is not None:
        # By file and line alone: a report must not name this machine's folders.
        return [replace(s, name=Path(s.name).name) for s in read_samples(data, count)]
    if model in WORLDS:
        return demo_samples(count, model=model)
    return [
        Sample(f"{image.name}, {text}", image, text, "") for image, text in general_questions(count)
    ]


def checkpoint_at_hand(model: str) -> str | None:
    """Return the name of our own checkpoint of ``model``, where it is and torch can read it."""
    if model not in WORLDS or not importlib.util.find_spec("torch"):
        return None
    try:
        own_folder(model)
    except ModelError:
        return None
    return model


def run_check(check: Check, folders: dict[str, str] | None = None) -> CheckRecord:
    """Run a check; a record is made of whatever happens.

    ``folders``: names that stand for folders of this machine in the reason, because reports travel.

    Raises:
        DataError, ImageError, PromptError: the prompts are what cannot be used.
    """
    started = time.perf_counter()
    status, reason, result = _outcome(check)
    for folder, name in (folders or {}).items():
        reason = reason.replace(folder, name)
    return CheckRecord(
        name=check.name,
        compares=check.compares,
        rule=check.rule,
        status=status,
        reason=" ".join(reason.split()),  # those of libraries have several lines
        seconds=round(time.perf_counter() - started, 3),
        files=result.files,
        errors=result.errors,
        facts=result.facts,
    )


def _outcome(check: Check) -> tuple[str, str, CheckResult]:
    """Run a check; return its status, the reason where it has not passed, and its findings."""
    nothing = CheckResult()
    missing = [name for name in check.needs if importlib.util.find_spec(name) is None]
    if missing:
        absent = f"{', '.join(missing)} not installed ({install('compile')})"
        return IMPOSSIBLE, absent, nothing
    try:
        result = check.run()
    except (ImpossibleError, CapacityError, MissingDependencyError, TargetError) as error:
        return IMPOSSIBLE, str(error), nothing
    except NothingError as error:
        return NOTHING, str(error), nothing
    except (DataError, ImageError, PromptError):
        raise
    except VisistageError as error:
        return FAILED, str(error), nothing
    except Exception as error:  # libraries raise anything over a file that is not what it claims
        return FAILED, f"{type(error).__name__}: {error}", nothing
    return FAILED if result.failure else PASSED, result.failure, result


def _skip() -> CheckResult:
    raise ImpossibleError("the files are not those that were built")


@contextmanager
def _few_threads(weight_bytes: int) -> Iterator[None]:
    """Give torch one thread while a small model is verified.

    Sharing out its small matrices takes longer than multiplying them, most of all where ONNX
    Runtime, which takes turns with torch, has threads of its own.
    """
    if weight_bytes >= SMALL_BYTES or importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _versions(bundle: Bundle) -> dict[str, str]:
    """Return versions of what ran, and of what had built the bundle."""
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
    """Return what this machine can do, and nothing that names it."""
    device = find_gpu()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": psutil.cpu_count(),
        "memory in GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": f"{device.name} ({show_capability(device.capability)})" if device else "none",
    }
