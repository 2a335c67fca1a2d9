"""Disks: whether a folder can be written and has room, locks on folders, hashes of files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from ..graphs.bundle import sha256
from ..graphs.errors import CapacityError
from ..pages.units import show_bytes

OUT = "Choose another folder: --out DIR"

_HASHES: dict[tuple[int, ...], str] = {}


@contextmanager
def writing(folder: Path, remedy: str) -> Iterator[None]:
    """Turn what the system says against writing ``folder`` into an error that names it.

    Raises:
        CapacityError: says why it cannot be written, and the ``remedy``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"Free some room and run it again. {remedy}"
        named = f" ({error.filename})" if error.filename not in (None, str(folder)) else ""
        raise CapacityError(
            f"{folder} cannot be written: {error.strerror or error}{named}. {remedy}"
        ) from error


def check_folder(folder: Path, remedy: str) -> None:
    """Check that ``folder`` can be written, or made, before work is done for it.

    Raises:
        CapacityError: see ``writing``.
    """
    with writing(folder, remedy), TemporaryFile(dir=_existing(folder)):
        pass


def free_bytes(folder: Path) -> int:
    """Return the room on the disk of ``folder``, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def require_disk_space(folder: Path, nbytes: int, what: str, remedy: str) -> None:
    """Check that ``nbytes`` bytes fit on the disk of ``folder``, which need not exist yet.

    Raises:
        CapacityError: says what ``what`` needs, what is free, and the ``remedy``.
    """
    free = free_bytes(folder)
    if nbytes > free:
        raise CapacityError(
            f"{what} needs {show_bytes(nbytes)} in {folder}, {show_bytes(free)} are free. "
            f"Free some, or {remedy}"
        )


def _existing(folder: Path) -> Path:
    """Return ``folder``, or the folder above it in which the missing ones would be made."""
    for place in (folder.absolute(), *folder.absolute().parents):
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(place.stat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
            return place
    return folder


@contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Hold the lock ``file`` for as long as the context lasts, or fail at once.

    Raises:
        CapacityError: with the text ``busy``, when another process holds it.
    """
    if file.is_symlink():
        raise OSError(errno.ELOOP, "the lock is a link", str(file))
    try:
        lock = FileLock(file).acquire(timeout=0)
    except Timeout as error:
        raise CapacityError(busy) from error
    with lock:
        yield


def file_hash(file: Path) -> str:
    """Return the SHA-256 of ``file``, read once per process under all its names while unchanged.

    A bundle may hard link a checkpoint's gigabytes.
    """
    known = _identity(file)
    if known not in _HASHES:
        _HASHES[known] = sha256(file)
    return _HASHES[known]


def known_hash(file: Path) -> str | None:
    """Return what ``file_hash`` would, if it need not read the file."""
    return _HASHES.get(_identity(file))


def remember_hash(file: Path, sha256: str) -> None:
    """Have ``file_hash`` return ``sha256`` until ``file`` changes."""
    _HASHES[_identity(file)] = sha256


def _identity(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
