"""A bundle on disk: graphs, weights, tokenizer files and one ``manifest.json`` that names them all.

The compiler writes it, the runtime reads nothing else. Standard library only. Hashes are taken
when a bundle is built and again by ``verify``; when it is loaded, a stamp (size, modification time,
inode) beside the manifest says which files need no second hashing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .commands import rebuild_command
from .config import ModelConfig
from .contract import GraphSpec, TensorSpec, cache_dtype
from .dtypes import DTYPES
from .errors import BundleError
from .fields import check_format, from_json, read_json, to_json
from .plan.plan import StagePlan
from .precision import NO_FALLBACK, Fp32Fallback
from .quantization import FLOAT, Quantization

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 6
STAMP = ".stamp.json"

_AGAIN = "Build the bundle again: visistage build MODEL"

BUNDLE_VARIABLE = "VISISTAGE_BUNDLE"
"""Environment variable that names the bundle to use where none is given."""

BUNDLES_FOLDER = "engines"
"""Folder of bundles otherwise: the one that the compiler writes to."""

ANY_CONTEXT = 0
"""Key of the one variant of a graph without a cache."""


@dataclass(frozen=True)
class FileFact:
    """Size and SHA-256 of one file of the bundle."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class GraphFact:
    """One graph: its file and its contract.

    ``variants``: the same graph for an engine compiler that wants sizes fixed, by context length
    (``ANY_CONTEXT`` where it has no cache). They differ from ``file`` in dimensions and compiler
    hints only, and share its weights.
    """

    file: str
    variants: dict[int, str] = field(default_factory=dict, kw_only=True, metadata={"omit": True})
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def spec(self) -> GraphSpec:
        """Its contract."""
        return GraphSpec(self.inputs, self.outputs)


@dataclass(frozen=True)
class TensorRef:
    """A tensor that the runtime maps itself: raw little-endian bytes inside a file."""

    file: str
    offset: int
    dtype: str  # "float32", "float16", "bfloat16" or "int8"
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the rows before every image, computed when the bundle was built.

    ids: the P token ids; keys, values: (layers, G, P, d), in the type of the caches.
    """

    ids: tuple[int, ...]
    keys: TensorRef
    values: TensorRef


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle.

    ``text_files`` maps the roles ``tokenizer``, ``tokenizer_config``, ``chat_template`` ... to file
    names; ``preprocessing`` and ``generation`` are the checkpoint's own facts; ``versions`` says
    what built it; ``fallback`` is what the range check demanded of FP16 graphs, ``quantization``
    which linear layers and caches are integers. ``cache_scales``: (2, layers, G) of the keys and
    the values of INT8 caches; None where caches are float.
    """

    model: str
    config: ModelConfig
    plan: StagePlan
    target: str
    precision: str
    dtype: str  # of the float numbers in the graphs: "float32" or "float16"
    lowering: str
    graphs: dict[str, GraphFact]
    embedding: TensorRef
    prefix: Prefix | None
    preprocessing: dict[str, Any]
    generation: dict[str, Any]
    text_files: dict[str, str]
    files: dict[str, FileFact]
    versions: dict[str, str]
    weight_bytes: int
    source: str  # hash of everything the build depended on
    contexts: tuple[int, ...] = ()  # lengths that engines are compiled for, in dense rows
    fallback: Fp32Fallback = field(default=NO_FALLBACK, metadata={"key": "widening"})
    quantization: Quantization = FLOAT
    cache_scales: TensorRef | None = None

    @property
    def element_bytes(self) -> int:
        """Bytes of one float number in the graphs."""
        return int(DTYPES[self.dtype].nbytes)

    @property
    def cache_dtype(self) -> str:
        """Type of cached keys and values."""
        return cache_dtype(self.dtype, self.quantization.cache)

    @property
    def cache_element_bytes(self) -> int:
        """Bytes of one cached number."""
        return int(DTYPES[self.cache_dtype].nbytes)

    def parts_of(self, stage: int) -> list[str]:
        """Return the names of the graphs that make a stage, in the order of their layers."""
        name = f"stage{stage}"
        return [graph for graph in self.graphs if graph.split(".")[0] == name]

    def to_json(self) -> str:
        """Return the manifest's text; equal manifests give equal bytes."""
        data = {"format": MANIFEST_FORMAT, **to_json(self)}
        data["files"] = dict(sorted(data["files"].items()))
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Read a manifest.

        Raises:
            BundleError: it cannot be read, has another format, or is not what ``to_json`` writes.
        """
        data = read_json(file, BundleError, _AGAIN)
        data = check_format(data, MANIFEST_FORMAT, BundleError, _AGAIN, str(file))
        return from_json(cls, data, BundleError, _AGAIN, str(file))


@dataclass(frozen=True)
class Bundle:
    """A folder with a manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike) -> Bundle:
        """Open ``path``: a bundle, or a folder holding exactly one at any depth.

        Raises:
            BundleError: nothing there, several bundles, or a manifest that cannot be read.
        """
        folder = find_bundle(Path(path))
        return cls(folder, Manifest.read(folder / MANIFEST))

    def file(self, name: str) -> Path:
        """Return the path of one file of the bundle; names that leave the folder are refused."""
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or not name:
            raise BundleError(f"{self.path / MANIFEST} names a file outside the bundle: {name!r}")
        return self.path / name

    def check(self, *, rehash: bool = False) -> None:
        """Make sure that every file is there and unchanged.

        Files whose stamp is unchanged since they were last hashed are not read again, unless
        ``rehash``.

        Raises:
            BundleError: naming the first file that is missing or changed.
        """
        check_files(self._files(), self.path / STAMP, rehash=rehash, fix=self.again)

    @property
    def again(self) -> str:
        """The last sentence of errors about its files."""
        return f"Build the bundle again: {rebuild_command(self.manifest)}"

    def changed(self) -> list[Path]:
        """Return its files that are missing or not what was built."""
        return changed_files(self._files(), self.path / STAMP)

    def _files(self) -> dict[Path, FileFact]:
        return {self.file(name): fact for name, fact in self.manifest.files.items()}


def check_files(
    files: Mapping[Path, FileFact], stamp_file: Path, *, rehash: bool, fix: str
) -> None:
    """Make sure that ``files`` are there and unchanged; see ``Bundle.check``.

    ``fix`` is what to type when one is not what it was.

    Raises:
        BundleError: naming the first file that is missing or changed.
    """
    for file in changed_files(files, stamp_file, rehash=rehash):
        if not file.is_file():
            raise BundleError(f"{file} is missing from the bundle. {fix}")
        raise BundleError(f"{file} is not the file that was built: its contents changed. {fix}")


def changed_files(
    files: Mapping[Path, FileFact], stamp_file: Path, *, rehash: bool = False
) -> list[Path]:
    """Return the ``files`` that are missing or changed; ``stamp_file`` notes what was hashed."""
    known = {} if rehash else _read_stamps(stamp_file)
    stamps, changed = {}, []
    for file, fact in files.items():
        try:
            status = file.stat()
        except OSError:
            changed.append(file)
            continue
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino, fact.sha256]
        if status.st_size == fact.nbytes and (
            known.get(file.name) == stamp or sha256(file) == fact.sha256
        ):
            stamps[file.name] = stamp
        else:
            changed.append(file)
    if stamps != known:
        with contextlib.suppress(OSError):  # a read-only bundle is hashed every time
            stamp_file.write_text(json.dumps(stamps))
    return changed


def find_bundle(path: Path) -> Path:
    """Return the one bundle at or below ``path``.

    Raises:
        BundleError: when there is none, or more than one.
    """
    if os.path.isfile(path / MANIFEST):  # unlike Path.is_file, whatever the name
        return path
    if not os.path.isdir(path):
        raise BundleError(f"no bundle at {path}. Build one: visistage build demo")
    found = sorted(bundles_in(path))
    if not found:
        raise BundleError(f"no bundle in {path}. Build one: visistage build demo")
    if len(found) > 1:
        listed = "\n  ".join(str(folder) for folder in found)
        raise BundleError(f"{path} holds {len(found)} bundles, name one of:\n  {listed}")
    return found[0]


def default_bundle() -> Path:
    """Return where to look for a bundle when none is named."""
    return Path(os.environ.get(BUNDLE_VARIABLE) or BUNDLES_FOLDER)


def bundles_in(path: Path) -> list[Path]:
    """Return ``path`` if it is a bundle, else the bundles below it, the newest first."""
    if os.path.isfile(path / MANIFEST):
        return [path]
    if not os.path.isdir(path):
        return []
    found = [
        file
        for file in path.glob("*/**/" + MANIFEST)
        if not any(part.endswith(".partial") for part in file.parts)
    ]
    return [file.parent for file in sorted(found, key=_age)]


def _age(file: Path) -> tuple[int, Path]:
    return -file.stat().st_mtime_ns, file


def sha256(file: Path) -> str:
    """Return the hash of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _read_stamps(file: Path) -> dict:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
