"""A build that may be interrupted: named steps in a folder of its own.

What each finished step wrote is noted in the folder, so the next run with the same inputs goes on
where this one stopped; other inputs start afresh. A bundle grows in ``NAME.partial`` and is renamed
at the end: nothing is ever half-written under the final name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..graphs.bundle import MANIFEST
from ..graphs.files import write_file
from ..graphs.progress import Progress, StepFact
from .disk import locked

NOTES = ".build.json"
LOCK = ".lock"

AnySteps = TypeVar("AnySteps", bound="Steps")


@cache
def sources_hash() -> str:
    """Return a hash of our own code that makes graphs: another code, another build."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in ("graphs", "compile"):
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(package).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class Steps:
    """The folder of one build; a context manager that holds its lock.

    Args:
        folder: where its files go.
        inputs: what the build depends on besides our own code, as JSON: other inputs, another
            build.
        progress: called for every step.

    Attributes:
        files: size of every file that steps wrote, by name.
    """

    def __init__(self, folder: Path, inputs: Any, progress: Progress):
        self.folder, self.progress = folder, progress
        self.key = hashlib.sha256(json.dumps([sources_hash(), inputs]).encode()).hexdigest()
        self.files: dict[str, int] = {}
        self._noted: dict[str, dict] = {}

    def __enter__(self: AnySteps) -> AnySteps:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(
            self.folder / LOCK, f"another build is writing {self.folder}. Wait for it, or stop it"
        )
        self._lock.__enter__()
        noted = _read(self.folder / NOTES)
        if noted.get("key") == self.key:
            self._noted = noted["steps"]
        else:
            for entry in self.folder.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return self

    def __exit__(self, *error) -> None:
        self._lock.__exit__(*error)

    def step(self, name: str, run: Callable[[], Sequence[str]], total: int | None = None) -> None:
        """Run ``run`` unless it is noted as done; it returns the names of the files it wrote."""
        noted = self._noted.get(name)
        cached = noted is not None and _present(self.folder, noted["files"])
        if not cached:
            self.progress.start(name, total)
            started = time.perf_counter()
            sizes = {file: (self.folder / file).stat().st_size for file in run()}
            noted = self._noted[name] = {"seconds": time.perf_counter() - started, "files": sizes}
            notes = {"key": self.key, "steps": self._noted}
            write_file(self.folder / NOTES, json.dumps(notes))
        assert noted is not None
        self.files |= noted["files"]
        nbytes = sum(noted["files"].values())
        self.progress.done(StepFact(name, noted["seconds"], nbytes=nbytes, cached=cached))


class Staging(Steps):
    """Steps in ``NAME.partial``, which becomes ``NAME`` in the end."""

    def __init__(self, final: Path, inputs: Any, progress: Progress):
        super().__init__(final.with_name(final.name + ".partial"), inputs, progress)
        self.final = final

    def up_to_date(self) -> bool:
        """Return whether the final folder already holds this very build, every file in place."""
        noted = _read(self.final / NOTES)
        if noted.get("key") != self.key or not (self.final / MANIFEST).is_file():
            return False
        return all(_present(self.final, step["files"]) for step in noted["steps"].values())

    def finish(self) -> None:
        """Give the folder its final name, in place of what had it before."""
        old = self.final.with_name(self.final.name + ".old.partial")
        shutil.rmtree(old, ignore_errors=True)
        (self.folder / LOCK).unlink()
        if self.final.exists():
            self.final.rename(old)
        self.folder.rename(self.final)
        shutil.rmtree(old, ignore_errors=True)


def _read(file: Path) -> dict:
    try:
        data = json.loads(file.read_text())
        return data if isinstance(data, dict) and isinstance(data.get("steps"), dict) else {}
    except (OSError, ValueError):
        return {}


def _present(folder: Path, files: dict[str, int]) -> bool:
    try:
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False
