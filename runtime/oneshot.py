"""``infer`` in one call, which finds the bundle and keeps its session for the next question.

A session stays loaded until its bundle is built again, or the program ends; a process forked from
this one loads its own. Programs that want to free memory hold theirs: ``runtime.load``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..graphs.bundle import MANIFEST, default_bundle, find_bundle
from .answer import Answer
from .loaded import Images, Question
from .session import Session, load
from .settings import DEFAULT_MAX_TOKENS
from .text.sampling import Sampling

Stamp = tuple[int, int]  # a manifest's modification time and inode

sessions: dict[Path, tuple[Stamp, Session]] = {}
"""Loaded bundles by their folder."""

_lock = threading.Lock()


def infer(
    image: Images,
    prompt: Question,
    *,
    bundle: str | os.PathLike | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    max_new_tokens: int | None = None,
    stop: Sequence[str] | str = (),
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    sampling: Sampling | None = None,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
    schema: Mapping[str, Any] | str | None = None,
) -> Answer:
    """Answer ``prompt`` about ``image``; the first call loads the bundle, later ones reuse it.

    Args:
        image: a path, bytes, file object, PIL image or uint8 array; several; or None.
        prompt: the question.
        bundle: a bundle, or a folder holding exactly one; by default what ``VISISTAGE_BUNDLE``
            names, or the only one in ``./engines``.
        max_tokens: this and the others as in ``Session.stream``.
        max_new_tokens: see there.
        stop: see there.
        temperature: see there.
        top_p: see there.
        top_k: see there.
        min_p: see there.
        repetition_penalty: see there.
        seed: see there.
        sampling: see there.
        logit_bias: see there.
        logprobs: see there.
        schema: see there.

    Raises:
        VisistageError: no bundle or several, or an input that cannot be used.
    """
    folder = default_bundle() if bundle is None else Path(bundle)
    with _lock:  # or the session might be closed, for a newer bundle, while it answers
        return _session(folder).infer(
            image,
            prompt,
            max_tokens=max_tokens,
            max_new_tokens=max_new_tokens,
            stop=stop,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            sampling=sampling,
            logit_bias=logit_bias,
            logprobs=logprobs,
            schema=schema,
        )


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


def _forked() -> None:
    """Start anew in a forked process, whose parent may have held the lock."""
    global _lock
    _lock = threading.Lock()
    sessions.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)
