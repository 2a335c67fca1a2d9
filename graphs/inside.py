"""Names that strangers wrote, and the one way from such a name to a file of a bundle.

A bundle may come from anywhere, so no name in it is believed: a file of a bundle, or of its folder
of engines, has a plain name, lies in that very folder, and is a regular file. Whatever reads,
writes or removes one asks here for its path.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from .errors import VisistageError
from .fields import Words, reject

MOST_NAME_BYTES = 255
_FOREIGN = re.compile(r'[/\\:<>"|?*]')
"""Separators, drives and streams of some system; the name must mean the same on all of them."""
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that are devices on Windows, in every folder."""


def is_plain(name: str) -> bool:
    """Return whether ``name`` names a file in a folder, on every system, and nothing else."""
    return (
        0 < len(name.encode("utf-8", "surrogatepass")) <= MOST_NAME_BYTES
        and name.isprintable()
        and name[0] != "."
        and name[-1] not in ". "
        and not _FOREIGN.search(name)
        and not _DEVICE.fullmatch(name)
    )


def file_inside(
    folder: Path, name: str, error: type[VisistageError], remedy: str, *, own: bool = False
) -> Path:
    """Return the path of a regular file of ``folder``, or of none yet.

    ``own``: the name is our own, not a stranger's, and may begin with a dot.

    Raises:
        error: the name is not plain, or a link, a folder, a pipe or a device has it.
    """
    if not own and not is_plain(name):
        reject(
            f"{folder}: a file's name", name, "a plain name: no file lies outside", error, remedy
        )
    file = folder / name
    kind = _kind(file)
    if kind not in (None, stat.S_IFREG):
        found = Words(_WORDS.get(kind, "a device"))
        reject(str(file), found, "a regular file: nothing outside is used", error, remedy)
    return file


def folder_inside(folder: Path, name: str, error: type[VisistageError], remedy: str) -> Path:
    """Return the path of a folder of our own name in ``folder``, or of none yet.

    Raises:
        error: a link or a file has the name.
    """
    path = folder / name
    kind = _kind(path)
    # A junction of Windows is no link to os.lstat, but leads elsewhere as well.
    elsewhere = os.path.realpath(path) != os.path.join(os.path.realpath(folder), name)
    if kind is not None and (kind != stat.S_IFDIR or elsewhere):
        found = Words("a link" if elsewhere else _WORDS.get(kind, "a device"))
        reject(str(path), found, "a folder: nothing outside is used", error, remedy)
    return path


def vacant(file: Path) -> Path:
    """Remove a file or link that has a name of ours, and return the name, to be written to."""
    file.unlink(missing_ok=True)
    return file


_WORDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def _kind(path: Path) -> int | None:
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
