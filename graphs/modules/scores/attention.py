"""FastV's and PyramidDrop's score: attention of the last row, mean over heads.

Source: docs/methods.md, "FastV" and "PyramidDrop".
"""

from __future__ import annotations

from torch import Tensor

from .readings import EdgeReadings


def score(edge: EdgeReadings) -> Tensor:
    """Return the mean (B, N) for each visual row."""
    return edge.of_visual(edge.last_row_attention().mean((1, 2)))
