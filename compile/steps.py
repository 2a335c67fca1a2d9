"""A build that may be interrupted: named steps in a folder of its own.

What each finished step wrote is noted in the folder with its hash, so the next run with the same
inputs goes on where this one stopped, and a step whose files are not what it wrote runs again;
other inputs start afresh. Files are on the disk before a note says so: a power cut is an
interruption like any other. A bundle grows in ``NAME.partial`` and is renamed at the end: nothing
is ever half-written under the final name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..graphs.bundle import MANIFEST, STAMP, FileFact, changed_files
from ..graphs.errors import BundleError, CapacityError
from ..graphs.fields import from_json, read_json, to_json
from ..graphs.files import sync, write_file
from ..graphs.inside import file_inside, is_plain
from ..graphs.progress import Progress, StepFact
from .disk import OUT, file_hash, locked, remember_hash, writing

NOTES = ".build.json"

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


@dataclass(frozen=True)
class StepNote:
    """A finished step: what it took, what there is to say about it, and the files it wrote."""

    seconds: float
    outcome: str
    files: dict[str, FileFact]


@dataclass(frozen=True)
class BuildNotes:
    """Contents of ``NOTES``.

    key: hash of everything the build depends on; origin: of what the checkpoint is, which another
    of the same name is not.
    """

    key: str
    origin: str
    steps: dict[str, StepNote] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> BuildNotes | None:
        """Return a folder's notes; None where there are none, or they are damaged."""
        try:
            file = file_inside(folder, NOTES, BundleError, "", own=True)
            notes = from_json(cls, read_json(file, BundleError, ""), BundleError, "")
        except BundleError:
            return None
        names = {name for note in notes.steps.values() for name in note.files}
        return notes if all(map(is_plain, names)) else None

    def damaged(self, folder: Path) -> set[Path]:
        """Return the files in ``folder`` that are not what their steps wrote."""
        files = {folder / n: fact for note in self.steps.values() for n, fact in note.files.items()}
        return {*changed_files(files, folder / STAMP)}


class Steps:
    """The folder of one build; a context manager that holds its lock.

    Args:
        folder: where its files go.
        inputs: what the build depends on besides our own code, as JSON: other inputs, another
            build.
        progress: called for every step.
        origin: see ``BuildNotes``.
        remedy: what to do where the folder cannot be written.

    Attributes:
        key: hash of ``inputs`` and our own code.
        lock: file that is locked for as long as the context lasts.
        files: every file that steps wrote, by name.
        ran: names of the steps that ran, those found done left out.
        outcome: what the step that runs has to say; it may be set there.
    """

    def __init__(
        self, folder: Path, inputs: Any, progress: Progress, origin: str = "", remedy: str = OUT
    ):
        self.folder, self.progress, self.remedy = folder, progress, remedy
        self.lock = folder / ".lock"
        self.key = hashlib.sha256(json.dumps([sources_hash(), inputs]).encode()).hexdigest()
        self.files: dict[str, FileFact] = {}
        self.ran: set[str] = set()
        self.outcome = ""
        self._notes = BuildNotes(self.key, hashlib.sha256(origin.encode()).hexdigest())

    def __enter__(self: AnySteps) -> AnySteps:
        busy = f"another build is writing {self.folder}. Wait for it, or stop it"
        with ExitStack() as stack:
            stack.enter_context(writing(self.folder, self.remedy))
            if self.folder.is_symlink():
                raise OSError(errno.ELOOP, "it is a link, expected a folder", str(self.folder))
            self.lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.lock, busy))
            self._resume()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._held.__exit__(*error)

    def _resume(self) -> None:
        """Keep what an earlier run of this build left whole, and remove what another left."""
        self.folder.mkdir(exist_ok=True)
        noted = BuildNotes.read(self.folder)
        if noted is None or noted.key != self.key:
            for entry in self.folder.iterdir():
                if entry != self.lock:
                    _remove(entry)
            return
        damaged = noted.damaged(self.folder)
        for file in damaged:
            _remove(file)
        for name, note in noted.steps.items():
            if damaged.isdisjoint(self.folder / file for file in note.files):
                self._notes.steps[name] = note
                for written, fact in note.files.items():
                    remember_hash(self.folder / written, fact.sha256)

    def step(
        self,
        name: str,
        run: Callable[[], Sequence[str]],
        total: int | None = None,
        uses: Collection[str] = (),
    ) -> None:
        """Run ``run`` unless it is noted as done; it returns the names of the files it wrote.

        uses: steps whose results it takes up; it runs again if one of them ran.
        """
        noted = self._notes.steps.get(name)
        cached = noted is not None and self.ran.isdisjoint(uses)
        if not cached:
            self.progress.start(name, total)
            self.outcome, started = "", time.perf_counter()
            files = {file: self._fact(file) for file in run()}
            noted = StepNote(time.perf_counter() - started, self.outcome, files)
            sync(self.folder)
            self._notes.steps[name] = noted
            write_file(self.folder / NOTES, json.dumps(to_json(self._notes)))
            self.ran.add(name)
        assert noted is not None
        self.files |= noted.files
        nbytes = sum(fact.nbytes for fact in noted.files.values())
        self.progress.done(StepFact(name, noted.seconds, noted.outcome, nbytes, cached))

    def check_unchanged(self) -> None:
        """Make sure that all files are still what their steps wrote; reads those that changed.

        Raises:
            BundleError: one is not.
        """
        for name, fact in self.files.items():
            if file_hash(self.folder / name) != fact.sha256:
                raise BundleError(
                    f"{self.folder / name} changed while the build ran. See what else writes "
                    "there, and run the same command again: it goes on from what is whole"
                )

    def _fact(self, name: str) -> FileFact:
        file = self.folder / name
        sync(file)
        return FileFact(file.stat().st_size, file_hash(file))


class Staging(Steps):
    """Steps in ``NAME.partial``, which becomes ``NAME`` in the end.

    Args:
        mark: file by which a folder that may be replaced is known.
        again: what to type where ``NAME`` is from another checkpoint of the same name.
    """

    def __init__(
        self,
        final: Path,
        inputs: Any,
        progress: Progress,
        *,
        mark: str = MANIFEST,
        origin: str = "",
        again: str = OUT,
    ):
        super().__init__(final.with_name(final.name + ".partial"), inputs, progress, origin)
        self.final, self.mark, self.again = final, mark, again
        # Outside of the folder, which is renamed before the lock is given back.
        self.lock = final.with_name(f".{final.name}.lock")

    def up_to_date(self) -> bool:
        """Return whether the final folder already holds this very build, every file in place."""
        noted = BuildNotes.read(self.final)
        return (
            noted is not None
            and noted.key == self.key
            and any(self.mark in note.files for note in noted.steps.values())
            and not noted.damaged(self.final)
        )

    def _resume(self) -> None:
        if self.final.exists():
            if not self.final.is_dir():
                raise OSError(errno.EEXIST, "a file is in the way", str(self.final))
            entries = [entry.name for entry in self.final.iterdir()]
            if entries and not {self.mark, NOTES}.intersection(entries):
                raise CapacityError(
                    f"{self.final} holds other files ({entries[0]}), which would be lost. {OUT}"
                )
        noted = BuildNotes.read(self.final)
        if noted is not None and noted.key != self.key and noted.origin != self._notes.origin:
            raise CapacityError(
                f"{self.final} was built from another checkpoint of the same name, and would be "
                f"lost. {self.again}"
            )
        super()._resume()

    def finish(self) -> None:
        """Give the folder its final name, in place of what had it before."""
        old = self.final.with_name(self.final.name + ".old.partial")
        _remove(old)
        sync(self.folder)
        if self.final.exists():
            self.final.rename(old)
        self.folder.rename(self.final)
        sync(self.final.parent)
        _remove(old)


def _remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
