"""The engines of a bundle: the index beside them, and its checks.

BUNDLE/engines/engines.json       what was compiled from the bundle, by what, for which GPU
BUNDLE/engines/NAME.engine, .log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .bundle import MANIFEST, Bundle, FileFact, check_files, sha256
from .errors import EngineError
from .fields import check_format, from_json, read_json
from .targets import Capability, show_capability

ENGINES_FOLDER = "engines"
ENGINES_INDEX = "engines.json"
ENGINES_STAMP = ".stamp.json"
ENGINES_FORMAT = 1
AGAIN = "Compile the engines again: visistage build"


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
        file = bundle.path / ENGINES_FOLDER / ENGINES_INDEX
        if not file.exists():
            return None
        remedy = f"{AGAIN} {bundle.path}"
        data = read_json(file, EngineError, remedy)
        data = check_format(data, ENGINES_FORMAT, EngineError, remedy, str(file))
        index = from_json(EngineIndex, data, EngineError, remedy, str(file))
        engines = cls(**vars(index), folder=file.parent)
        if engines.bundle != sha256(bundle.path / MANIFEST):
            raise EngineError(
                f"the engines in {file.parent} were compiled from another build of this bundle. "
                f"{remedy}"
            )
        return engines

    def check(self, *, rehash: bool = False) -> None:
        """Make sure that every engine is the file that was compiled.

        Raises:
            BundleError: naming the first that is missing or changed.
        """
        files = {
            self.folder / fact.file: FileFact(fact.nbytes, fact.sha256) for fact in self.engines
        }
        check_files(
            files,
            self.folder / ENGINES_STAMP,
            rehash=rehash,
            fix=f"{AGAIN} {self.folder.parent}",
        )

    def gpus(self) -> str:
        """Return the GPUs they run on, in words."""
        if not self.capabilities:
            return f"any that {self.backend} {self.version} covers"
        return ", ".join(map(show_capability, self.capabilities))
