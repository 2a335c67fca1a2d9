"""Steps that several entry selectors take."""

from __future__ import annotations

import numpy as np


def cosines(rows: np.ndarray) -> np.ndarray:
    """Return the cosines (N, N) of all pairs of rows (N, h); with a row of zeros they are 0."""
    products = rows @ rows.T  # of a matrix with itself: BLAS computes one half
    lengths = np.sqrt(products.diagonal())
    scales = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    products *= scales[:, None]
    products *= scales
    return products


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the ``count`` largest scores, ascending."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
