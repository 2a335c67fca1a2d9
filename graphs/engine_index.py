"""The engines of a bundle: the index beside them, and its checks.

BUNDLE/engines/engines.json       what was compiled from the bundle, by what, for which GPU
BUNDLE/engines/NAME.engine, .log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, Bundle, FileFact, Manifest, check_files, sha256
from .commands import visistage
from .engine_spec import engine_specs_of
from .errors import EngineError
from .fields import check_format, from_json, read_json, reject, show, to_json
from .inside import file_inside, folder_inside
from .targets import Capability, find_target, show_capability

ENGINES_FOLDER = "engines"
ENGINES_INDEX = "engines.json"
ENGINES_STAMP = ".stamp.json"
ENGINES_FORMAT = 1


def compile_again(bundle: Path) -> str:
    """Return the last sentence of errors about the engines of a bundle."""
    return f"Compile the engines again: {visistage('build', bundle)}"


@dataclass(frozen=True)
class EngineFact:
    """One engine: its file, and what is known of it.

    ``layers`` and ``precisions`` count the parsed network's layers by type and by output type;
    ``caches_in_place`` of its caches are updated in place; seconds and peaks are those of
    its compilation.
    """

    name: str
    graph: str
    context: int | None
    slots: int
    file: str
    nbytes: int
    sha256: str
    profiles: list[dict[str, list[list[int]]]]
    layers: dict[str, int]
    precisions: dict[str, int]
    fused_attention: int
    decomposable_attention: int
    caches_in_place: int
    seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int


@dataclass(frozen=True)
class EngineIndex:
    """Contents of ``engines.json``. ``capabilities`` empty: whatever the compiler covers."""

    backend: str
    version: str
    capabilities: tuple[Capability, ...]
    built_on: str
    bundle: str  # SHA-256 of the manifest
    engines: tuple[EngineFact, ...]


@dataclass(frozen=True)
class Engines(EngineIndex):
    """The engines of a bundle, in their folder."""

    folder: Path

    @classmethod
    def open(cls, bundle: Bundle) -> Engines | None:
        """Return the engines of a bundle, or None where none were compiled yet.

        Raises:
            EngineError: the index cannot be read, or belongs to another bundle.
        """
        remedy = compile_again(bundle.path)
        folder = engines_folder(bundle)
        file = file_inside(folder, ENGINES_INDEX, EngineError, remedy)
        if not file.exists():
            return None
        data = read_json(file, EngineError, remedy)
        data = check_format(data, ENGINES_FORMAT, EngineError, remedy, str(file))
        index = from_json(EngineIndex, data, EngineError, remedy, str(file))
        if index.bundle != sha256(bundle.path / MANIFEST):
            raise EngineError(
                f"the engines in {folder} were compiled from another build of this bundle. {remedy}"
            )
        _check_index(index, bundle.manifest, str(file), remedy)
        engines = cls(**vars(index), folder=folder)
        for fact in engines.engines:
            engines.file(fact)
        return engines

    def file(self, fact: EngineFact) -> Path:
        """Return the path of an engine.

        Raises:
            EngineError: it is not a file of the folder's own.
        """
        return file_inside(self.folder, fact.file, EngineError, compile_again(self.folder.parent))

    def check(self, *, rehash: bool = False) -> None:
        """Make sure that every engine is the file that was compiled.

        Raises:
            BundleError: naming the first that is missing or changed.
        """
        files = {self.file(fact): FileFact(fact.nbytes, fact.sha256) for fact in self.engines}
        check_files(
            files,
            self.folder / ENGINES_STAMP,
            rehash=rehash,
            fix=compile_again(self.folder.parent),
        )

    def gpus(self) -> str:
        """Return the GPUs they run on, in words."""
        if not self.capabilities:
            return f"any that {self.backend} {self.version} covers"
        return ", ".join(map(show_capability, self.capabilities))


def _check_index(index: EngineIndex, manifest: Manifest, where: str, remedy: str) -> None:
    """Make sure that an index lists the engines that the bundle's contract asks for, as it does."""

    def expect(field: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            reject(f"{where}: {field}", found, show(wanted), EngineError, remedy)

    specs = engine_specs_of(manifest)
    expect("backend", index.backend, find_target(manifest.target).backend)
    found, wanted = [fact.name for fact in index.engines], [spec.name for spec in specs]
    if found != wanted:
        lacking = ", ".join(name for name in wanted if name not in found) or "none"
        foreign = show([name for name in found if name not in wanted])
        raise EngineError(
            f"{where} lacks engines ({lacking}) or names foreign ones ({foreign}), or one twice. "
            f"{remedy}"
        )
    for fact, spec in zip(index.engines, specs, strict=True):
        for field in ("graph", "context", "slots", "file"):
            expect(f"{spec.name}.{field}", getattr(fact, field), getattr(spec, field))
        expect(f"{spec.name}.profiles", fact.profiles, to_json(spec.profiles))
        expect(f"{spec.name}.nbytes", fact.nbytes, max(fact.nbytes, 0))


def engines_folder(bundle: Bundle) -> Path:
    """Return the folder of a bundle's engines, which need not exist.

    Raises:
        EngineError: it is a link or a file.
    """
    return folder_inside(bundle.path, ENGINES_FOLDER, EngineError, compile_again(bundle.path))
