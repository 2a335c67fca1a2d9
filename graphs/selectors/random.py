"""A control: rows by chance, the same for every session that sees the image.

What a smaller ``keep`` chooses, a larger one chooses too.
"""

from __future__ import annotations

import numpy as np

from .entry import EncoderReadings, Entered


def choose(given: EncoderReadings, keep: int) -> Entered:
    """Return rows that follow from the image's digest."""
    order = shuffled(given.image, given.patches)
    return Entered(np.sort(order[:keep]).astype(np.int64))


def shuffled(image: str, count: int) -> np.ndarray:
    """Return 0 to ``count`` - 1 in an order that follows from an image's digest."""
    seed = np.frombuffer(bytes.fromhex(image), np.uint8)
    # The old generator, since NumPy promises the same numbers in every version for it alone.
    return np.random.RandomState(seed).permutation(count)
