"""``compile_engines``, the command ``build``: engines of a bundle, and an index of them.

    BUNDLE/manifest.json ...          portable: the same on every machine
    BUNDLE/engines/engines.json       what was compiled from it, by what, for which GPU
    BUNDLE/engines/NAME.engine, .log

It may be interrupted and goes on. ``Engines.check`` refuses engines that were compiled by another
version, for another GPU or from another bundle, or that changed on disk. What makes the bundle, the
command ``engines``, is ``compile/build.py``.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...graphs.bundle import MANIFEST, Bundle, sha256
from ...graphs.engine_index import (
    ENGINES_FORMAT,
    ENGINES_INDEX,
    EngineFact,
    Engines,
    compile_again,
    engines_folder,
)
from ...graphs.engine_spec import EngineSpec, engine_specs_of
from ...graphs.errors import EngineError, MissingDependencyError, TargetError
from ...graphs.fields import from_json, read_json
from ...graphs.files import user_cache, write_file
from ...graphs.inside import file_inside, vacant
from ...graphs.progress import Progress
from ...graphs.targets import Capability, Target, find_target, show_capability
from ...runtime.device.tensorrt import INSTALL, TensorRtVariant, find_trt_variant, load_trt_variant
from ...runtime.hardware import GpuInfo, find_gpu
from ..disk import require_disk_space
from ..steps import Steps
from .worker_process import run_worker


def can_compile(target: Target, device: GpuInfo | None, *, to_run_here: bool = False) -> str | None:
    """Return why this machine cannot compile for ``target``; None where it can.

    ``to_run_here``: what is compiled shall run on ``device``.
    """
    trt_variant = find_trt_variant(target.backend)
    if trt_variant is None:
        return f"{target.backend} is not installed"
    if not target.serves(trt_variant.version):
        return f"{target.backend} {target.versions[0]} is needed, found {trt_variant.version}"
    if trt_variant.names_capabilities and not (to_run_here and device is not None):
        return None
    if device is None:
        return f"{target.backend} compiles on the GPU that is to run the engines; there is none"
    if target.capabilities and device.capability not in target.capabilities:
        wanted = ", ".join(map(show_capability, target.capabilities))
        return f"this GPU is {show_capability(device.capability)}, the target's {wanted}"
    return trt_variant.why_not_on(device)


def why_portable(target: Target, portable: bool, capabilities: Sequence[Capability]) -> str | None:
    """Return why a bundle for ``target`` stays portable, or None where engines are compiled here.

    Asked before minutes are spent on a build.

    Raises:
        TargetError: an option that means nothing for the target.
        MissingDependencyError: a compiler that needs no GPU is not installed.
    """
    for option, given in (("--portable", portable), ("--sm", bool(capabilities))):
        if given and not target.engines:
            raise TargetError(
                f"target '{target.name}' compiles no engines, {option} means nothing there. "
                "Leave it out"
            )
    if not target.engines:
        return "it runs its graphs as they are"
    why = "--portable was given" if portable else can_compile(target, find_gpu())
    if why is None:
        return None
    trt_variant = find_trt_variant(target.backend)
    if not portable and not target.capabilities and trt_variant is None:
        raise MissingDependencyError(
            f"target '{target.name}' is compiled by {target.backend}, which is not installed here. "
            f"{INSTALL[target.backend]}. Or stop at a portable bundle: --portable"
        )
    if capabilities:
        raise TargetError(f"--sm cannot be honoured: {why}")
    return why


def compile_engines(
    bundle: Bundle,
    *,
    capabilities: Sequence[Capability] = (),
    progress: Progress | None = None,
) -> Engines:
    """Compile every engine of ``bundle`` that is not there yet.

    Args:
        bundle: for a target with engines, complete and unchanged.
        capabilities: GPUs to compile for, where the compiler can name them; by default the
            target's.
        progress: called for every engine.

    Raises:
        TargetError, MissingDependencyError: not with this machine's compiler or GPU.
        EngineError: the compiler failed; the message names engine and log.
        CapacityError: the disk is too small.
    """
    progress = progress or Progress()
    target = find_target(bundle.manifest.target)
    if not target.engines:
        raise TargetError(
            f"{bundle.path} is for target '{target.name}', which runs graphs as they are: there is "
            "nothing to compile"
        )
    folder = engines_folder(bundle)
    trt_variant = load_trt_variant(target)
    named = _capabilities(target, trt_variant, capabilities)
    bundle.check()
    manifest_hash = sha256(bundle.path / MANIFEST)
    index = folder / ENGINES_INDEX
    inputs = [ENGINES_FORMAT, manifest_hash, trt_variant.version, named]
    remedy = "Copy the bundle to another disk"
    with Steps(folder, inputs, progress, remedy=remedy) as steps:
        engine_specs = engine_specs_of(bundle.manifest)
        if not index.exists():
            require_disk_space(
                steps.folder,
                _expected_bytes(bundle) - _written(steps.folder),
                "the set of engines",
                "copy the bundle to another disk",
            )
        cache = timing_cache_file(trt_variant)
        for engine_spec in engine_specs:
            run = partial(
                _compile, bundle, engine_spec, trt_variant, named, cache, steps.folder, progress
            )
            steps.step(f"engine {engine_spec.name}", run)
        facts = [asdict(_read_fact(steps.folder, spec)) for spec in engine_specs]
        data = {
            "format": ENGINES_FORMAT,
            "backend": trt_variant.backend,
            "version": trt_variant.version,
            "capabilities": named,
            "built_on": f"{platform.system()} {platform.machine()}",
            "bundle": manifest_hash,
            "engines": facts,
        }
        write_file(index, json.dumps(data, indent=1) + "\n")
    engines = Engines.open(bundle)
    assert engines is not None
    return engines


def _read_fact(folder: Path, spec: EngineSpec) -> EngineFact:
    """Return what is noted of an engine; the file that it is of is not the note's to say."""
    remedy = compile_again(folder.parent)
    file = file_inside(folder, _facts_file(spec), EngineError, remedy)
    data = read_json(file, EngineError, remedy)
    return replace(from_json(EngineFact, data, EngineError, remedy, str(file)), file=spec.file)


def _compile(
    bundle: Bundle,
    engine_spec: EngineSpec,
    trt_variant: TensorRtVariant,
    capabilities: Sequence[Capability],
    timing_cache: Path | None,
    folder: Path,
    progress: Progress,
) -> list[str]:
    """Compile one engine; it gets its final name when it is complete."""
    file = engine_spec.file
    partial_file = vacant(folder / f"{file}.partial")
    job = job_of(bundle, engine_spec, trt_variant, capabilities, partial_file, timing_cache)
    log = vacant(folder / f"{engine_spec.name}.log")
    outcome = run_worker(job, f"engine '{engine_spec.name}'", log, progress.advance)
    facts: dict[str, Any] = {name: outcome.facts[name] for name in outcome.facts if name != "steps"}
    fact = EngineFact(
        name=engine_spec.name,
        graph=engine_spec.graph,
        context=engine_spec.context,
        slots=engine_spec.slots,
        file=file,
        nbytes=partial_file.stat().st_size,
        profiles=[
            {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
            for profile in engine_spec.profiles
        ],
        seconds=round(outcome.seconds, 2),
        peak_bytes=outcome.peak_bytes,
        peak_anonymous_bytes=outcome.peak_anonymous_bytes,
        **facts,
    )
    write_file(folder / _facts_file(engine_spec), json.dumps(asdict(fact)) + "\n")
    partial_file.replace(folder / file)
    return [file, _facts_file(engine_spec)]


def job_of(
    bundle: Bundle,
    engine_spec: EngineSpec,
    trt_variant: TensorRtVariant,
    capabilities: Sequence[Capability],
    output: Path,
    timing_cache: Path | None = None,
) -> dict[str, Any]:
    """Return the worker's job (``worker.compile_engine``)."""
    return {
        "backend": trt_variant.backend,
        "source": str(bundle.file(engine_spec.source).absolute()),
        "output": str(output.absolute()),
        "inputs": {spec.name: spec.dtype for spec in engine_spec.spec.inputs},
        "outputs": {spec.name: spec.dtype for spec in engine_spec.spec.outputs},
        "profiles": engine_spec.profiles,
        "capabilities": capabilities,
        "timing_cache": None if timing_cache is None else str(timing_cache.absolute()),
    }


def _capabilities(
    target: Target, trt_variant: TensorRtVariant, given: Sequence[Capability]
) -> list[Capability]:
    """Return GPUs to compile for; refuse those that this machine cannot compile for."""
    why = can_compile(target, find_gpu())
    if why is not None:
        raise TargetError(
            f"engines for target '{target.name}' cannot be compiled here: {why}. Copy the bundle "
            "to the machine that is to run it, and type there: visistage build BUNDLE"
        )
    if given and not trt_variant.names_capabilities:
        raise TargetError(
            f"{trt_variant.backend} compiles for the GPU that is there; --sm cannot be honoured"
        )
    named = list(given or target.capabilities) if trt_variant.names_capabilities else []
    foreign = [c for c in named if target.capabilities and c not in target.capabilities]
    if foreign:
        raise TargetError(
            f"target '{target.name}' is {show_capability(target.capabilities[0])}, not "
            f"{show_capability(foreign[0])}. For other GPUs: visistage build MODEL --target rtx"
        )
    for capability in named:
        trt_variant.capability(capability)
    return named


def timing_cache_file(trt_variant: TensorRtVariant) -> Path | None:
    """Return where the compiler keeps timings of kernels, for the next build here."""
    if not trt_variant.timing_cache:
        return None
    folder = user_cache()
    return folder and folder / f"timing-{trt_variant.backend}-{trt_variant.version}.cache"


def _expected_bytes(bundle: Bundle) -> int:
    """Estimate the size of all engines: each holds its weights once more."""
    variants = [len(fact.variants) for fact in bundle.manifest.graphs.values()]
    return math.ceil(bundle.manifest.weight_bytes * max([1, *variants]) * 1.02)


def _written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.engine"))


def _facts_file(engine_spec: EngineSpec) -> str:
    return f"{engine_spec.name}.json"
