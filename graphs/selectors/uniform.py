"""A control: rows at equal distances."""

from __future__ import annotations

import numpy as np

from .entry import EncoderReadings, Entered, EntrySelector


class UniformRows(EntrySelector):
    """Row floor(i N / K) for each i below K."""

    name = "uniform"
    summary = "control: every n-th patch"
    reads = ()

    def choose(self, given: EncoderReadings, keep: int) -> Entered:
        """Return rows at equal distances."""
        return Entered(np.arange(keep, dtype=np.int64) * given.patches // keep)
