"""The chain of stages: the host's side in NumPy, and the reference in torch.

``run`` and ``ChainResult`` are a stable entry point for comparisons. They are looked up on first
use, so that the runtime, which needs the NumPy side alone, does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .torch_reference import ChainResult, run

__all__ = ["ChainResult", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import torch_reference

    return getattr(torch_reference, name)
