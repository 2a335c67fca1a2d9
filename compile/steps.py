"""A build that may be interrupted: named steps in a folder of its own.

What each finished step wrote is noted in the folder, so the next run with the same inputs goes on
where this one stopped; other inputs start afresh. A bundle grows in ``NAME.partial`` and is renamed
at the end: nothing is ever half-written under the final name.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ..graphs.bundle import MANIFEST
from .disk import locked

NOTES = ".build.json"
LOCK = ".lock"

AnySteps = TypeVar("AnySteps", bound="Steps")


@dataclass(frozen=True)
class StepFact:
    """What one step did: seconds, and the files it wrote with their sizes."""

    name: str
    seconds: float
    files: dict[str, int]
    cached: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the files it wrote."""
        return sum(self.files.values())


class BuildProgress(Protocol):
    """Who is told how a build goes."""

    def start(self, step: str, total: int | None) -> None:
        """A step begins; ``total`` units will be done if that is known."""

    def advance(self, units: int) -> None:
        """Some units are done."""

    def done(self, fact: StepFact) -> None:
        """A step is done, or was found done."""


class NoBuildProgress:
    """A reporter that tells nobody."""

    def start(self, step: str, total: int | None) -> None:
        """Nothing."""

    def advance(self, units: int) -> None:
        """Nothing."""

    def done(self, fact: StepFact) -> None:
        """Nothing."""


class Steps:
    """The folder of one build; a context manager that holds its lock.

    ``key`` says what the build depends on: another key, another build.
    """

    def __init__(self, folder: Path, key: str, progress: BuildProgress):
        self.folder, self.key, self.progress = folder, key, progress
        self.facts: list[StepFact] = []
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

    def step(
        self, name: str, run: Callable[[], Sequence[str]], total: int | None = None
    ) -> StepFact:
        """Run ``run`` unless it is noted as done; it returns the names of the files it wrote."""
        noted = self._noted.get(name)
        if noted is not None and _present(self.folder, noted["files"]):
            fact = StepFact(name, noted["seconds"], noted["files"], cached=True)
        else:
            self.progress.start(name, total)
            started = time.perf_counter()
            files = run()
            sizes = {file: (self.folder / file).stat().st_size for file in files}
            fact = StepFact(name, time.perf_counter() - started, sizes)
            self._noted[name] = {"seconds": fact.seconds, "files": sizes}
            self._write_notes()
        self.facts.append(fact)
        self.progress.done(fact)
        return fact

    def _write_notes(self) -> None:
        temporary = self.folder / (NOTES + ".new")
        temporary.write_text(json.dumps({"key": self.key, "steps": self._noted}))
        temporary.replace(self.folder / NOTES)


class Staging(Steps):
    """Steps in ``NAME.partial``, which becomes ``NAME`` in the end."""

    def __init__(self, final: Path, key: str, progress: BuildProgress):
        super().__init__(final.with_name(final.name + ".partial"), key, progress)
        self.final = final

    def up_to_date(self) -> bool:
        """Whether the final folder already holds this very build, every file in place."""
        noted = _read(self.final / NOTES)
        if noted.get("key") != self.key or not (self.final / MANIFEST).is_file():
            return False
        return all(_present(self.final, step["files"]) for step in noted["steps"].values())

    def finish(self) -> None:
        """Give the folder its final name, in place of what stood there."""
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
