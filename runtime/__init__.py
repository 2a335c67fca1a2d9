"""Answers to questions about images from a bundle, without torch, onnx or transformers.

    from visistage import runtime
    runtime.infer("photo.jpg", "What is this?")             # VISISTAGE_BUNDLE, or ./engines
    with runtime.load("engines/llava-7b") as session:
        image = session.open("photo.jpg")                   # computed once
        answer = session.infer(image, "How many people?", temperature=0.7, seed=1)

These eight names are the public API. Each is looked up on first use: importing this package loads
neither ONNX Runtime nor anything else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..graphs.errors import VisistageError
    from .answer import Answer
    from .conversation import Conversation
    from .engine import Engine
    from .oneshot import infer
    from .session import Session, load
    from .text.sampling import Sampling

__all__ = [
    "Answer",
    "Conversation",
    "Engine",
    "Sampling",
    "Session",
    "VisistageError",
    "infer",
    "load",
]

_HOMES = {
    "Answer": ".answer",
    "Conversation": ".conversation",
    "Engine": ".engine",
    "Sampling": ".text.sampling",
    "Session": ".session",
    "VisistageError": "..graphs.errors",
    "infer": ".oneshot",
    "load": ".session",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
