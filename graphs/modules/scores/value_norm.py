"""VisiPruner's score: the norm of what a token contributes to the last row's attention output.

Source: docs/methods.md, "The contribution of a visual token".
"""

from __future__ import annotations

from torch import Tensor

from ..last_row import value_norm
from .readings import EdgeReadings


def score(edge: EdgeReadings) -> Tensor:
    """Return the norm (B, N) for each visual row."""
    attention = edge.last_row_attention()
    return edge.of_visual(value_norm(attention, edge.cache("value")))
