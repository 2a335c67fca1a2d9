"""V2Drop's score: how far the last layer before the edge moved a row.

Source: docs/methods.md, "V2Drop".
"""

from __future__ import annotations

from torch import Tensor

from .readings import EdgeReadings


def score(edge: EdgeReadings) -> Tensor:
    """Return the length (B, N) of each visual row's change."""
    return edge["change"]
