"""The rungs that only read: files and engines are what was built. Neither torch nor onnx needed."""

from __future__ import annotations

from ...compile.engines.engine_spec import engine_specs_of
from ...graphs.bundle import Bundle
from ...graphs.engine_index import Engines
from ...graphs.errors import EngineError, MissingDependencyError
from ...graphs.targets import OPENVINO, find_target
from ...runtime.device.engine_trt import check_machine
from ...runtime.device.tensorrt import find_trt_variant
from ...runtime.hardware import find_gpu
from .check_steps import ImpossibleError, NothingError
from .verify_report import CheckResult


def rehash(bundle: Bundle) -> CheckResult:
    """Every file has the hash that the manifest notes, and the manifest notes every file it uses.

    Raises:
        BundleError: a file is missing or changed.
    """
    manifest = bundle.manifest
    bundle.check(rehash=True)
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


def engine_files(bundle: Bundle) -> CheckResult:
    """The engines were compiled from this very bundle, are all there, and are unchanged.

    Raises:
        EngineError, BundleError: they are not.
        NothingError: the bundle has no engines.
    """
    engines = _engines(bundle)
    engines.check(rehash=True)
    wanted = {engine_spec.name for engine_spec in engine_specs_of(bundle.manifest)}
    found = {one.name for one in engines.engines}
    failure = ""
    if wanted != found:
        lacking = ", ".join(sorted(wanted - found)) or "none"
        foreign = ", ".join(sorted(found - wanted)) or "none"
        failure = f"the index lacks engines ({lacking}) or names foreign ones ({foreign})"
    return CheckResult(
        failure=failure,
        files=tuple(_name(engines, one.file) for one in engines.engines),
        facts={
            "compiled by": f"{engines.backend} {engines.version}",
            "compiled for": engines.gpus(),
            "compiled from": {
                _name(engines, f"{engine_spec.name}.engine"): engine_spec.source
                for engine_spec in engine_specs_of(bundle.manifest)
            },
            "bytes": sum(one.nbytes for one in engines.engines),
        },
    )


def check_engines_run(bundle: Bundle) -> None:
    """Make sure that this machine can run the bundle's engines; OpenVINO compiles none.

    Raises:
        ImpossibleError: it cannot; the reason is the machine's.
        NothingError: the bundle has no engines.
    """
    if find_target(bundle.manifest.target).backend == OPENVINO:
        return
    engines = _engines(bundle)
    try:
        check_machine(engines, find_trt_variant(engines.backend), find_gpu())
    except (EngineError, MissingDependencyError) as error:
        raise ImpossibleError(str(error)) from error


def _engines(bundle: Bundle) -> Engines:
    target = find_target(bundle.manifest.target)
    if not target.engines:
        raise NothingError(f"target '{target.name}' runs graphs as they are, without engines")
    engines = Engines.open(bundle)
    if engines is None:
        raise NothingError(
            f"no engines were compiled yet. On the machine that shall run them: visistage build "
            f"(target '{target.name}')"
        )
    return engines


def _name(engines: Engines, file: str) -> str:
    return f"{engines.folder.name}/{file}"
