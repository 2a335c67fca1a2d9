"""Space on a disk, checked before gigabytes are written; locks on folders; hashes of files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..graphs.bundle import sha256
from ..graphs.errors import CapacityError

_HASHES: dict[tuple[int, ...], str] = {}


def require_disk_space(folder: Path, nbytes: int, what: str, remedy: str) -> None:
    """Check that ``nbytes`` bytes fit on the disk of ``folder``, which need not exist yet.

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


def file_hash(file: Path) -> str:
    """Return the SHA-256 of ``file``, read once per process under all its names while unchanged.

    A bundle hard links a checkpoint's gigabytes.
    """
    status = file.stat()
    known = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if known not in _HASHES:
        _HASHES[known] = sha256(file)
    return _HASHES[known]
