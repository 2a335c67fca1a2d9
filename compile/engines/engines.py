"""The engines of a bundle: an index beside the portable files, and how they get there.

    BUNDLE/manifest.json ...          portable: the same on every machine
    BUNDLE/engines/engines.json       what was compiled from it, by what, for which GPU
    BUNDLE/engines/NAME.engine, .log

``compile_engines`` may be interrupted and goes on; ``Engines.check`` refuses engines that were
compiled by another version, for another GPU or from another bundle, or that changed on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ...graphs.bundle import MANIFEST, Bundle, FileFact, changed_files, sha256
from ...graphs.engine_index import FOLDER, FORMAT, INDEX, STAMP, EngineFact, Engines
from ...graphs.errors import TargetError
from ...graphs.targets import Capability, Target, find_target, show_capability
from ...runtime.device.probe import Device, find_device
from ...runtime.device.tensorrt import Flavour, find, load, serves
from ..disk import require_room
from ..steps import Reporter, Silent, Steps
from .engine_spec import Recipe, recipes_of
from .worker_process import run_worker


def can_compile(target: Target, device: Device | None) -> str | None:
    """Why this machine cannot compile for ``target``; None where it can."""
    flavour = find(target.backend)
    if flavour is None:
        return f"{target.backend} is not installed"
    if not serves(target, flavour.version):
        return f"{target.backend} {target.versions[0]} is needed, found {flavour.version}"
    if flavour.names_capabilities:
        return None
    if device is None:
        return f"{target.backend} compiles on the GPU that shall run the engines; there is none"
    if target.capabilities and device.capability not in target.capabilities:
        wanted = ", ".join(show_capability(one) for one in target.capabilities)
        return f"this GPU is {show_capability(device.capability)}, the target's {wanted}"
    return None


def compile_engines(
    bundle: Bundle,
    *,
    capabilities: Sequence[Capability] = (),
    reporter: Reporter | None = None,
) -> Engines:
    """Compile every engine of ``bundle`` that is not there yet.

    Args:
        bundle: for a target with engines, complete and unchanged.
        capabilities: GPUs to compile for, where the compiler can name them; by default the
            target's.
        reporter: told of every engine.

    Raises:
        TargetError, MissingDependencyError: not with this machine's compiler or GPU.
        EngineError: the compiler failed; the message names engine and log.
        CapacityError: the disk is too small.
    """
    reporter = reporter or Silent()
    target = find_target(bundle.manifest.target)
    if not target.engines:
        raise TargetError(
            f"{bundle.path} is for target '{target.name}', which runs graphs as they are: there is "
            "nothing to compile"
        )
    flavour = load(target)
    named = _capabilities(target, flavour, capabilities)
    bundle.check()
    manifest_hash = sha256(bundle.path / MANIFEST)
    key = hashlib.sha256(
        json.dumps([FORMAT, manifest_hash, flavour.version, named]).encode()
    ).hexdigest()
    index = bundle.path / FOLDER / INDEX
    with Steps(bundle.path / FOLDER, key, reporter) as steps:
        recipes = recipes_of(bundle.manifest)
        _drop_changed(steps.folder, recipes)
        if not index.exists():
            require_room(
                steps.folder,
                _expected_bytes(bundle) - _written(steps.folder),
                "the set of engines",
                "copy the bundle to another disk",
            )
        cache = _timing_cache(flavour)
        for recipe in recipes:
            run = partial(_compile, bundle, recipe, flavour, named, cache, steps.folder, reporter)
            steps.step(f"engine {recipe.name}", run)
        facts = [json.loads((steps.folder / _facts_file(r)).read_text()) for r in recipes]
        data = {
            "format": FORMAT,
            "backend": flavour.backend,
            "version": flavour.version,
            "capabilities": named,
            "built_on": f"{platform.system()} {platform.machine()}",
            "bundle": manifest_hash,
            "engines": facts,
        }
        _write(index, json.dumps(data, indent=1))
    engines = Engines.open(bundle)
    assert engines is not None
    return engines


def _drop_changed(folder: Path, recipes: Sequence[Recipe]) -> None:
    """Remove engines that are not what was compiled, so that they are compiled again."""
    facts = {}
    for recipe in recipes:
        noted = folder / _facts_file(recipe)
        if noted.is_file():
            fact = json.loads(noted.read_text())
            facts[folder / fact["file"]] = FileFact(fact["nbytes"], fact["sha256"])
    for file in changed_files(facts, folder / STAMP):
        file.unlink(missing_ok=True)


def _compile(
    bundle: Bundle,
    recipe: Recipe,
    flavour: Flavour,
    capabilities: Sequence[Capability],
    timing_cache: Path | None,
    folder: Path,
    reporter: Reporter,
) -> list[str]:
    """Compile one engine; it gets its final name when it is complete."""
    file = f"{recipe.name}.engine"
    partial_file = folder / f"{file}.partial"
    job = job_of(bundle, recipe, flavour, capabilities, partial_file, timing_cache)
    log = folder / f"{recipe.name}.log"
    outcome = run_worker(job, f"engine '{recipe.name}'", log, reporter.advance)
    facts: dict[str, Any] = {name: outcome.facts[name] for name in outcome.facts if name != "steps"}
    fact = EngineFact(
        name=recipe.name,
        graph=recipe.graph,
        context=recipe.context,
        slots=recipe.slots,
        file=file,
        nbytes=partial_file.stat().st_size,
        profiles=[
            {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
            for profile in recipe.profiles
        ],
        seconds=round(outcome.seconds, 2),
        peak_bytes=outcome.peak_bytes,
        peak_anonymous_bytes=outcome.peak_anonymous_bytes,
        **facts,
    )
    _write(folder / _facts_file(recipe), json.dumps(asdict(fact)))
    partial_file.replace(folder / file)
    return [file, _facts_file(recipe)]


def job_of(
    bundle: Bundle,
    recipe: Recipe,
    flavour: Flavour,
    capabilities: Sequence[Capability],
    output: Path,
    timing_cache: Path | None = None,
) -> dict[str, Any]:
    """What the worker is told (``worker.compile_engine``)."""
    return {
        "backend": flavour.backend,
        "source": str(bundle.file(recipe.source)),
        "output": str(output),
        "inputs": {spec.name: spec.dtype for spec in recipe.spec.inputs},
        "outputs": {spec.name: spec.dtype for spec in recipe.spec.outputs},
        "profiles": recipe.profiles,
        "capabilities": capabilities,
        "timing_cache": None if timing_cache is None else str(timing_cache),
    }


def _capabilities(
    target: Target, flavour: Flavour, given: Sequence[Capability]
) -> list[Capability]:
    """GPUs to compile for; refuses what this machine cannot compile for."""
    why = can_compile(target, find_device())
    if why is not None:
        raise TargetError(
            f"engines for target '{target.name}' cannot be compiled here: {why}. Copy the bundle "
            "to the machine that shall run it, and type there: visistage build BUNDLE"
        )
    if given and not flavour.names_capabilities:
        raise TargetError(
            f"{flavour.backend} compiles for the GPU that is there; --sm cannot be honoured"
        )
    named = list(given or target.capabilities) if flavour.names_capabilities else []
    foreign = [one for one in named if target.capabilities and one not in target.capabilities]
    if foreign:
        raise TargetError(
            f"target '{target.name}' is {show_capability(target.capabilities[0])}, not "
            f"{show_capability(foreign[0])}. For other GPUs: make engines TARGET=rtx"
        )
    for one in named:
        flavour.capability(one)
    return named


def _timing_cache(flavour: Flavour) -> Path | None:
    """Where the compiler keeps what it learned about kernels, for the next build here."""
    if not flavour.timing_cache:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "visistage"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"timing-{flavour.backend}-{flavour.version}.cache"


def _expected_bytes(bundle: Bundle) -> int:
    """Every engine holds its weights once more."""
    variants = [len(fact.variants) for fact in bundle.manifest.graphs.values()]
    return math.ceil(bundle.manifest.weight_bytes * max([1, *variants]) * 1.02)


def _written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.engine"))


def _facts_file(recipe: Recipe) -> str:
    return f"{recipe.name}.json"


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".partial")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(file)
