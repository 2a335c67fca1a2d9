"""A bundle on disk: graphs, weights, tokenizer files and one ``manifest.json`` that names them all.

The compiler writes it, the runtime reads nothing else. Standard library only. A bundle may come
from a stranger: names in it are believed only as far as ``inside`` lets them, and nothing is loaded
whose hash the manifest does not hold. Hashes are taken when a bundle is built and again by
``verify``; when it is loaded, a stamp beside the manifest says which files need no second hashing.
What that is worth: docs/security.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .caches import cache_dtype
from .commands import rebuild_command
from .config import ModelConfig
from .contract import ANY_CONTEXT as ANY_CONTEXT
from .contract import GraphSpec, TensorSpec
from .dtypes import DTYPES
from .errors import BundleError, ModelError, PlanError, TargetError
from .fields import check_format, from_json, read_json, to_json
from .files import write_file
from .inside import file_inside
from .manifest_check import check_manifest, used_files
from .onnx_locations import external_files
from .plan.plan import StagePlan
from .precision import NO_FALLBACK, Fp32Fallback
from .quantization import FLOAT, Quantization

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 6
STAMP = ".stamp.json"

ONNX = ".onnx"

_AGAIN = "Build the bundle again: visistage build MODEL"

BUNDLE_VARIABLE = "VISISTAGE_BUNDLE"
"""Environment variable that names the bundle to use where none is given."""

BUNDLES_FOLDER = "engines"
"""Folder of bundles otherwise: the one that the compiler writes to."""

SETTLED_NS = 100_000_000
"""A file that changed less than this before it was hashed gets no stamp: clocks of file systems are
coarse, and another change might leave the same time."""


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

    def parts_of(self, stage: int, kind: str = "stage") -> list[str]:
        """Return the names of the graphs that make a stage, in the order of their layers.

        ``kind``: ``parts.SERVE`` for those of visual rows that no layer changes, if there are any.
        """
        name = f"{kind}{stage}"
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
            BundleError: it cannot be read, has another format, is not what ``to_json`` writes, or
                contradicts itself.
        """
        data = read_json(file, BundleError, _AGAIN)
        data = check_format(data, MANIFEST_FORMAT, BundleError, _AGAIN, str(file))
        try:
            manifest = from_json(cls, data, BundleError, _AGAIN, str(file))
        except (ModelError, PlanError, TargetError) as error:  # of what others read, too
            raise BundleError(f"{file}: {error} {_AGAIN}") from None
        check_manifest(manifest, str(file), _AGAIN)
        return manifest


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
        manifest = Manifest.read(file_inside(folder, MANIFEST, BundleError, _AGAIN))
        bundle = cls(folder, manifest)
        for name in manifest.files:
            bundle.file(name)
        return bundle

    def file(self, name: str) -> Path:
        """Return the path of one file of the bundle.

        Raises:
            BundleError: the manifest holds no hash of it, or it is not a file of the bundle's own.
        """
        file = file_inside(self.path, name, BundleError, _AGAIN)
        if name not in self.manifest.files:
            manifest = self.path / MANIFEST
            raise BundleError(f"{manifest} uses {name} and holds no hash of it. {_AGAIN}")
        return file

    def check(self, *, rehash: bool = False) -> None:
        """Make sure that every file is there and unchanged, and that nothing else would be read.

        Files whose stamp is unchanged since they were last hashed are not read again, unless
        ``rehash``. External data of graphs counts as what they read.

        Raises:
            BundleError: naming the first file that is missing or changed, or has no hash.
        """
        used = [name for _, name in used_files(self.manifest)]
        for name in used:
            self.file(name)
        check_files(self._files(), self.path / STAMP, rehash=rehash, fix=self.again)
        for name in used:
            if name.endswith(ONNX):
                for other in external_files(self.file(name), self.again):
                    self.file(other)

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
    """Return the ``files`` that are missing or changed; ``stamp_file`` notes what was hashed.

    A stamp is believed while size, inode, and times of the last change of contents and of the file
    are what they were: the last is the system's own, and no program can set it (on Windows, which
    keeps none, it is the time of creation). Links and folders count as changed.
    """
    known = {} if rehash else _read_stamps(stamp_file)
    stamps, changed = {}, []
    for file, fact in files.items():
        settled = time.time_ns() - SETTLED_NS
        try:
            status = file.lstat()
        except OSError:
            changed.append(file)
            continue
        times = (status.st_mtime_ns, status.st_ctime_ns)
        stamp = [status.st_size, *times, status.st_ino, fact.sha256]
        fits = stat.S_ISREG(status.st_mode) and status.st_size == fact.nbytes
        if fits and (known.get(file.name) == stamp or sha256(file) == fact.sha256):
            if status.st_ctime_ns < settled:
                stamps[file.name] = stamp
        else:
            changed.append(file)
    if stamps != known:
        with contextlib.suppress(OSError):  # a read-only bundle is hashed every time
            write_file(stamp_file, json.dumps(stamps))
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


DEPTH = 3
"""Levels that are searched for bundles, for ``./engines/MODEL/NAME``: never a whole disk."""


def bundles_in(path: Path) -> list[Path]:
    """Return ``path`` if it is a bundle, else those up to ``DEPTH`` below it, the newest first."""
    if os.path.isfile(path / MANIFEST):
        return [path]
    if not os.path.isdir(path):
        return []
    found = [
        file
        for depth in range(1, DEPTH + 1)
        for file in path.glob("*/" * depth + MANIFEST)
        if not any(part.endswith(".partial") for part in file.parts)
    ]
    return [file.parent for file in sorted(found, key=_age)]


def _age(file: Path) -> tuple[int, Path]:
    return -file.lstat().st_mtime_ns, file


def sha256(file: Path) -> str:
    """Return the hash of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _read_stamps(file: Path) -> dict[str, Any]:
    try:
        own = file_inside(file.parent, file.name, BundleError, "", own=True)
        data = read_json(own, BundleError, "")
    except BundleError:
        return {}
    return data if isinstance(data, dict) else {}
