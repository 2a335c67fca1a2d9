"""SCOPE's rule: rows that are salient and cover what no chosen row covers yet.

With S the cosines of all pairs, a the saliency and m_i the largest cosine of patch i with a chosen
row (0 at first), K times the row j of the largest gain is chosen:

    gain_j = a_j * sum_i max(0, S_ij - m_i)

m only rises, so gains only fall, and a gain computed earlier bounds the present one from above.
That holds for rounded numbers too, as a row's sum always runs in the same order. So few rows have
to be computed in each step, and the choices are those of the plain loop, bit for bit.

Source: docs/methods.md, "Entry selectors".
"""

from __future__ import annotations

import numpy as np

from .arithmetic import cosines
from .entry import EncoderReadings, Entered, EntrySelector

BLOCK = 24
"""Rows computed anew in each step: those with the largest bounds."""


class Scope(EntrySelector):
    """Greedy cover of all patches, weighted by saliency."""

    name = "scope"
    summary = "SCOPE: salient patches that resemble what the others leave uncovered"
    reads = ("features", "saliency")

    def choose(self, given: EncoderReadings, keep: int) -> Entered:
        """Return the rows of a greedy cover."""
        assert given.features is not None
        assert given.saliency is not None
        return Entered(np.sort(covering(cosines(given.features), given.saliency, keep)))


def covering(similarity: np.ndarray, saliency: np.ndarray, keep: int) -> np.ndarray:
    """Return ``keep`` rows, in the order in which they are chosen.

    Args:
        similarity: (N, N), cosines of all pairs.
        saliency: (N,), not negative.
        keep: how many, at most N.
    """
    covered = np.zeros_like(saliency)
    chosen = np.empty(keep, np.int64)

    def gains(rows: np.ndarray) -> np.ndarray:
        return np.maximum(similarity[rows] - covered, 0).sum(1) * saliency[rows]

    bounds = gains(np.arange(len(saliency)))
    for step in range(keep):
        block = min(BLOCK, len(bounds) - step)
        best = np.argpartition(bounds, -block)[-block:]
        bounds[best] = gains(best)
        # An old bound as large as the best gain may hide a better row, or an equal one before it.
        open_rows = np.flatnonzero(bounds >= bounds[best].max())
        if len(open_rows) > 1:
            bounds[open_rows] = gains(open_rows)
        chosen[step] = row = bounds.argmax()
        bounds[row] = -1  # below every gain
        covered = np.maximum(covered, similarity[row])
    return chosen
