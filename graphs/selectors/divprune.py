"""DivPrune's rule: rows far from each other, by the cosine of rows after the projector.

The first row is the one whose nearest other row is farthest; then, K - 1 times, the row that is
farthest from its nearest chosen row. One vector of nearest chosen rows is kept up.

Source: docs/methods.md, "Entry selectors".
"""

from __future__ import annotations

import numpy as np

from .entry import EncoderReadings, Entered


def choose(given: EncoderReadings, keep: int) -> Entered:
    """Return rows that lie far from each other."""
    assert given.row_similarity is not None
    return Entered(np.sort(farthest(given.row_similarity.copy(), keep)))


def farthest(similarity: np.ndarray, keep: int) -> np.ndarray:
    """Return ``keep`` rows, in the order in which they are chosen.

    Args:
        similarity: (N, N), cosines of all pairs; its diagonal is overwritten.
        keep: how many, at most N.
    """
    np.fill_diagonal(similarity, -np.inf)  # no row is a neighbour of itself
    nearest = similarity.max(0)
    chosen = np.empty(keep, np.int64)
    for step in range(keep):
        chosen[step] = row = nearest.argmin()
        nearest = np.maximum(nearest, similarity[row]) if step else similarity[row].copy()
        nearest[row] = np.inf  # never chosen again
    return chosen
