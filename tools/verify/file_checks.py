"""Checks that only read: files and engines are those that were built. Neither torch nor onnx."""

from __future__ import annotations

from ...compile.engines.engine_spec import engine_specs_of
from ...graphs.bundle import Bundle
from ...graphs.engine_index import Engines
from ...graphs.errors import EngineError
from ...graphs.targets import OPENVINO, find_target
from ...runtime.device.engine_trt import check_machine
from ...runtime.device.tensorrt import find_trt_variant
from ...runtime.hardware import find_gpu
from .verify_report import CheckResult
from .verify_target import ImpossibleError, NothingError, VerifyTarget


def check_files(target: VerifyTarget) -> CheckResult:
    """Hash every file, and make sure that the manifest has a hash of every file that it uses.

    Raises:
        BundleError: a file is missing or changed.
    """
    manifest = target.bundle.manifest
    target.bundle.check(rehash=True)
    used = [*manifest.text_files.values(), manifest.embedding.file]
    for fact in manifest.graphs.values():
        used += [fact.file, *fact.variants.values()]
    if manifest.prefix:
        used += [manifest.prefix.keys.file, manifest.prefix.values.file]
    stray = sorted(set(used) - set(manifest.files))
    return CheckResult(
        failure=f"the manifest uses {stray[0]} and holds no hash of it" if stray else "",
        files=tuple(manifest.files),
        facts={
            "hashed": len(manifest.files),
            "bytes": sum(fact.nbytes for fact in manifest.files.values()),
        },
    )


def check_engines(target: VerifyTarget) -> CheckResult:
    """Make sure that all engines of this very bundle are there and unchanged.

    Raises:
        EngineError, BundleError: they are not.
        NothingError: the bundle has no engines.
    """
    engines = _engines(target.bundle)
    engines.check(rehash=True)
    sources = {spec.name: spec.source for spec in engine_specs_of(target.bundle.manifest)}
    found = {engine.name for engine in engines.engines}
    failure = ""
    if found != set(sources):
        lacking = ", ".join(sorted(set(sources) - found)) or "none"
        foreign = ", ".join(sorted(found - set(sources))) or "none"
        failure = f"the index lacks engines ({lacking}) or names foreign ones ({foreign})"
    folder = engines.folder.name
    return CheckResult(
        failure=failure,
        files=tuple(f"{folder}/{engine.file}" for engine in engines.engines),
        facts={
            "compiled by": f"{engines.backend} {engines.version}",
            "compiled for": engines.gpus(),
            "compiled from": {f"{folder}/{name}.engine": file for name, file in sources.items()},
            "bytes": sum(engine.nbytes for engine in engines.engines),
        },
    )


def require_engines_run(bundle: Bundle) -> None:
    """Make sure that this machine can run the bundle's engines; OpenVINO compiles none.

    Raises:
        ImpossibleError: it cannot; says why.
        NothingError: the bundle has no engines.
    """
    if find_target(bundle.manifest.target).backend == OPENVINO:
        return
    engines = _engines(bundle)
    try:
        check_machine(engines, find_trt_variant(engines.backend), find_gpu())
    except EngineError as error:
        raise ImpossibleError(str(error)) from error


def _engines(bundle: Bundle) -> Engines:
    target = find_target(bundle.manifest.target)
    if not target.engines:
        raise NothingError(f"target '{target.name}' runs graphs as they are, without engines")
    engines = Engines.open(bundle)
    if engines is None:
        raise NothingError(
            "no engines were compiled yet. On the machine that is to run them: visistage build "
            f"(target '{target.name}')"
        )
    return engines
