"""Room on a disk, checked before gigabytes are written to it, and locks on folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..graphs.errors import CapacityError


def require_disk_space(folder: Path, nbytes: int, what: str, remedy: str) -> None:
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


@contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Hold the lock ``file`` for as long as the context lasts, or fail at once.

    Raises:
        CapacityError: with the text ``busy``, when another process holds it.
    """
    try:
        lock = FileLock(file).acquire(timeout=0)
    except Timeout as error:
        raise CapacityError(busy) from error
    with lock:
        yield
