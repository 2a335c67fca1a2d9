"""A control: rows by chance, the same for every session that sees the image.

What a smaller ``keep`` chooses, a larger one chooses too.
"""

from __future__ import annotations

import numpy as np

from .entry import EncoderReadings, Entered


def choose(given: EncoderReadings, keep: int) -> Entered:
    """Return rows that follow from the image's digest."""
    seed = np.frombuffer(bytes.fromhex(given.image), np.uint8)
    # The old generator, since NumPy promises the same numbers in every version for it alone.
    order = np.random.RandomState(seed).permutation(given.patches)
    return Entered(np.sort(order[:keep]).astype(np.int64))
