"""HiDrop's score: as FastV's, of the layer behind the edge.

Source: docs/methods.md, "HiDrop".
"""

from .attention import score

__all__ = ["score"]
