"""Steps that several entry selectors take."""

from __future__ import annotations

import numpy as np


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the ``count`` largest scores, ascending."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
