"""Files that appear under their names complete, or not at all, and outlive a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a name beside ``file`` to write to; a block that ends well puts it in its place.

    An error, or Ctrl-C, removes what was written and leaves ``file`` as it was.
    """
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)  # a link with this name would be written through
    try:
        yield partial
        sync(partial)
        os.replace(partial, file)
        sync(file.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            partial.unlink()
        raise


def write_file(file: Path, data: str | bytes) -> None:
    """Write ``data``, text in UTF-8, to ``file`` in one step."""
    with replacing(file) as partial:
        partial.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))


def user_cache() -> Path | None:
    """Return this user's folder for what can be computed again; None: there is none to write to."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "visistage"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return None
    return folder


def check_place(file: Path) -> Path | None:
    """Return what writing to a name that a user gave replaces; None: it is a pipe or a device.

    Of a link that is its target, which need not exist. Files of bundles are never written so.

    Raises:
        OSError: a folder is in the way, there is no folder for it, or it may not be written.
    """
    real = Path(os.path.realpath(file))
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    folder_mode = os.stat(real.parent).st_mode if stat.S_ISREG(mode) else stat.S_IFDIR
    if not stat.S_ISDIR(folder_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(file))
    for needed in (real.parent, real) if stat.S_ISREG(mode) else (file,):
        if os.path.exists(needed) and not os.access(needed, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(needed))
    return real if stat.S_ISREG(mode) else None


def write_to_place(file: Path, data: str | bytes) -> None:
    """Write ``data`` to a name that a user gave: in one step, or through a pipe or a device.

    Raises:
        OSError: ``check_place`` refuses it, the disk is full, or the pipe has no reader.
    """
    real = check_place(file)
    if real is not None:
        write_file(real, data)
        return
    # Without O_NONBLOCK a pipe without a reader is waited for.
    descriptor = os.open(file, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "wb") as stream:
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(descriptor, True)
        stream.write(data if isinstance(data, bytes) else data.encode("utf-8"))


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk.

    What was written and not waited for a power cut loses in any order: a name may last, and the
    bytes under it be gone.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":  # cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
