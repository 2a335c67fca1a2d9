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
        self.programs = folder / "bin"
        (packages,) = folder.glob("lib/python*/site-packages")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
        (info,) = packages.glob("visistage-*.dist-info")
        asked = metadata.PathDistribution(info).requires or []
        for name in required(asked, extra):
            self._link(metadata.distribution(name), packages)
        program = self.programs / "visistage"
        program.write_text(f'#!/bin/sh\nexec "{self.programs}/python" -m visistage "$@"\n')
        program.chmod(0o755)

    @staticmethod
    def _link(distribution: metadata.Distribution, packages: Path) -> None:
        """Link the folders and modules of a distribution."""
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))

    def run(self, command: str, cwd: Path) -> subprocess.CompletedProcess:
        """Run a line of the shell with the environment's programs; the result has its output."""
        hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VISISTAGE_BUNDLE"}
        variables = {key: value for key, value in os.environ.items() if key not in hidden}
        variables["PATH"] = f"{self.programs}{os.pathsep}{variables['PATH']}"
        words = ["bash", "-c", command]
        return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True)

    def output(self, command: str, cwd: Path) -> str:
        """Return the stdout of a line of the shell, which must succeed."""
        done = self.run(command, cwd)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout
