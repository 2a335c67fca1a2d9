"""A control: row floor(i N / K) for each i below K."""

from __future__ import annotations

import numpy as np

from .entry import EncoderReadings, Entered


def choose(given: EncoderReadings, keep: int) -> Entered:
    """Return rows at equal distances."""
    return Entered(np.arange(keep, dtype=np.int64) * given.patches // keep)
