"""An environment of Python with one wheel and what it requires, made without a network.

What is required is linked from the environment that runs the tests: what the wheel's metadata does
not ask for, torch above all, cannot be imported there.
"""

from __future__ import annotations

import os
import subprocess
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def required(requirements: list[str], extra: str = "") -> set[str]:
    """Return the distributions that ``requirements`` lead to, as they are installed here."""
    found: set[str] = set()
    waiting = [(Requirement(text), extra) for text in requirements]
    while waiting:
        requirement, of = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": of}):
            continue
        name = requirement.name
        if name in found:
            continue
        found.add(name)
        wanted = [Requirement(text) for text in metadata.requires(name) or ()]
        waiting += [
            (inner, extra_name) for inner in wanted for extra_name in (*requirement.extras, "")
        ]
    return found


class CleanEnvironment:
    """Commands in an environment that holds ``wheel`` with ``extra``, and nothing else."""

    def __init__(self, folder: Path, wheel: Path, extra: str):
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (packages,) = folder.glob("lib/python*/site-packages")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
        (info,) = packages.glob("visistage-*.dist-info")
        asked = metadata.PathDistribution(info).requires or []
        for name in required(asked, extra):
            self._link(metadata.distribution(name), packages)

    @staticmethod
    def _link(distribution: metadata.Distribution, packages: Path) -> None:
        """Link the folders and modules of a distribution."""
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))

    def run(self, *words: str, cwd: Path) -> subprocess.CompletedProcess:
        """Run Python with ``words``; the result holds what it printed."""
        hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        command = [self.python, *words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    def visistage(self, *words: object, cwd: Path) -> str:
        """Return the stdout of a command, which must succeed."""
        done = self.run("-m", "visistage", *map(str, words), cwd=cwd)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout
