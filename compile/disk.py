"""Room on a disk, asked for before gigabytes are written to it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..graphs.errors import CapacityError


def require_room(folder: Path, nbytes: int, what: str, remedy: str) -> None:
    """Raise unless ``nbytes`` bytes fit on the disk of ``folder``, which need not exist yet.

    Raises:
        CapacityError: says what ``what`` needs, what is free, and the ``remedy``.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise CapacityError(
            f"{what} needs {nbytes / 2**30:.1f} GiB in {folder}, {free / 2**30:.1f} GiB are free. "
            f"Free some, or {remedy}"
        )
