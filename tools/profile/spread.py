"""Many measurements of one quantity, in few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and two percentiles of ``n`` measurements.

    Percentiles are measurements that took place (nearest rank): the 99th of 20 is the largest.
    """

    n: int
    median: float
    p90: float
    p99: float
    least: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        ranked = sorted(values)
        middle = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
        return cls(len(ranked), middle, _rank(ranked, 0.90), _rank(ranked, 0.99), ranked[0])


def _rank(ranked: Sequence[float], share: float) -> float:
    return ranked[math.ceil(share * len(ranked)) - 1]
