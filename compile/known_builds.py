"""Builds that were made before, found again without torch: the same request, the same bundle.

    OUT/.builds.json    what was asked for, with what it was made of  ->  the bundle, its manifest

A request whose model is a folder (or the package's own) depends on that folder's files by size and
time, on the calibration's and the plan's, on our sources and on the libraries' versions. Models
on the hub may change there, so they are always opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ..graphs.bundle import MANIFEST, Bundle, sha256
from ..graphs.errors import BundleError, ModelError
from ..graphs.files import write_file
from .checkpoint.known_models import ALIASES, OWN_MODELS, own_folder
from .steps import sources_hash

FILE = ".builds.json"
MOST_NOTED = 200
LIBRARIES = ("torch", "onnx-ir", "transformers", "onnxruntime", "onnxruntime-gpu")
CALIBRATIONS, DUMMIES = Path("calibrations"), Path(".cache") / "dummy"


def request_key(request: Mapping[str, Any]) -> str | None:
    """Return a hash of the arguments of ``make_bundle`` and all that they lead to.

    None where that cannot be told without opening the model.
    """
    model = str(request["model"])
    try:
        folder = own_folder(model) if model in OWN_MODELS else Path(model)
    except ModelError:
        return None
    if request.get("dummy_weights"):
        geometry = {repository: alias for alias, repository in ALIASES.items()}.get(model, model)
        folder = DUMMIES / geometry
    if not os.path.isfile(folder / "config.json"):
        return None
    usual = model if model in OWN_MODELS else folder.resolve().name
    usual += "-dummy" if request.get("dummy_weights") else ""
    name = request.get("name") or usual
    places = [folder, Path(request.get("calibration") or CALIBRATIONS / name)]
    places += [Path(request["plan"])] if request.get("plan") else []
    facts = [
        {key: str(value) for key, value in request.items() if key != "out"},
        str(folder.resolve()),
        [list(_stats(place)) for place in places],
        sources_hash(),
        [_version(name) for name in LIBRARIES],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def known_build(out: Path, key: str | None) -> Bundle | None:
    """Return the bundle that a request made before, complete and unchanged; None otherwise."""
    noted = _read(out).get(key or "")
    if not isinstance(noted, list) or len(noted) != 2 or not all(isinstance(n, str) for n in noted):
        return None
    name, manifest_hash = noted
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    try:
        if sha256(out / name / MANIFEST) != manifest_hash:
            return None
        bundle = Bundle.open(out / name)
        return None if bundle.changed() else bundle
    except (OSError, ValueError, BundleError):
        return None


def note_build(out: Path, key: str | None, bundle: Bundle) -> None:
    """Note which bundle a request made."""
    if key is None:
        return
    noted = {known: value for known, value in _read(out).items() if known != key}
    name = bundle.path.relative_to(out).as_posix()
    noted[key] = [name, sha256(bundle.path / MANIFEST)]
    with contextlib.suppress(OSError):  # it is found the longer way then
        text = json.dumps(dict(list(noted.items())[-MOST_NOTED:]), indent=0)
    with contextlib.suppress(OSError):  # the bundle is there all the same
        write_file(out / FILE, text)


def _read(out: Path) -> dict[str, Any]:
    try:
        data = json.loads((out / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _stats(place: Path) -> Iterator[list[Any]]:
    files = sorted(place.iterdir()) if os.path.isdir(place) else [place]
    for file in files:
        if os.path.isfile(file):
            status = file.stat()
            yield [file.name, status.st_size, status.st_mtime_ns, status.st_ino]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
