"""The distributions of ONNX Runtime: which are installed, and what to type where there are two.

They write one folder, so the one that was installed last is there, whatever the other's version.
"""

from __future__ import annotations

from importlib import metadata

from ...graphs.commands import install
from ...graphs.targets import ORT_PACKAGES

UNINSTALL_CPU = f"pip uninstall -y {ORT_PACKAGES[0]}; then "
ABSENT = f"ONNX Runtime is not installed. Type: {install('cpu')}; with an NVIDIA GPU: '.[gpu]'"


def installed() -> dict[str, str]:
    """Return the versions of the distributions that are installed, by name."""
    found = {}
    for name in ORT_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def install_gpu() -> str:
    """Return what to type for the build for a GPU, where the other one may be in its place."""
    return f"{UNINSTALL_CPU if ORT_PACKAGES[0] in installed() else ''}{install('gpu')}"


def collision() -> str | None:
    """Return what is wrong with two distributions at once, and what to type; None: there is one."""
    found = installed()
    if len(found) < 2:
        return None
    named = " and ".join(f"{name} {version}" for name, version in found.items())
    return (
        f"{named} are both installed, and write one folder: only what came last is there. Type: "
        f"pip uninstall -y {' '.join(found)}; then {install('gpu')}, or '.[cpu]' without a GPU"
    )
