"""``infer`` in one call, which finds the bundle and keeps its session for the next question.

A session stays loaded until its bundle is built again, or the program ends. Programs that want to
free memory, or ask from several threads, hold their own: ``runtime.load``.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ..graphs.bundle import MANIFEST, find_bundle
from .answer import Answer
from .session import Images, Session, load

BUNDLE_VARIABLE = "VISISTAGE_BUNDLE"
"""Environment variable that names the bundle to use where none is given."""

BUNDLES_FOLDER = "engines"
"""Folder of bundles otherwise: the one that the compiler writes to."""

Stamp = tuple[int, int]  # a manifest's modification time and inode

sessions: dict[Path, tuple[Stamp, Session]] = {}
"""Loaded bundles by their folder."""

_lock = threading.Lock()


def infer(
    image: Images,
    prompt: str,
    *,
    bundle: str | os.PathLike | None = None,
    **options,
) -> Answer:
    """Answer ``prompt`` about ``image``; the first call loads the bundle, later ones reuse it.

    Args:
        image: a path, bytes, file object, PIL image or uint8 array; several; or None.
        prompt: the question.
        bundle: a bundle, or a folder holding exactly one; by default what ``VISISTAGE_BUNDLE``
            names, or the only one in ``./engines``.
        **options: ``max_tokens``, ``stop`` and ``sampling`` of ``Session.stream``.

    Raises:
        VisistageError: no bundle or several, or an input that cannot be used.
    """
    folder = default_bundle() if bundle is None else Path(bundle)
    with _lock:  # a session answers one question at a time
        return _session(folder).infer(image, prompt, **options)


def default_bundle() -> Path:
    """Return where to look for a bundle when none is named."""
    return Path(os.environ.get(BUNDLE_VARIABLE) or BUNDLES_FOLDER)


def _session(path: Path) -> Session:
    folder = find_bundle(path).resolve()
    status = (folder / MANIFEST).stat()
    stamp = (status.st_mtime_ns, status.st_ino)
    known = sessions.pop(folder, None)
    if known is not None and known[0] != stamp:
        known[1].close()
        known = None
    sessions[folder] = known or (stamp, load(folder))
    return sessions[folder][1]
