"""Numbers as pages say them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def percent(share: float | None, digits: int | None = None) -> str:
    """``0.123`` as ``12 %``; a dash for what is not known.

    digits: after the point; None: one below 10, none above.
    """
    if share is None:
        return "–"
    value = 100 * share
    if digits is None:
        digits = 0 if abs(value) >= 9.95 or value == 0 else 1
    return f"{value:.{digits}f}\N{NO-BREAK SPACE}%"


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0–2, 5``."""
    runs = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(runs)


def ms(value: float | None) -> str:
    """``5.1 ms``, ``512 ms``, ``12.3 s``."""
    if value is None:
        return "–"
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def flops(value: float) -> str:
    """``838 MFLOP``."""
    power = 0
    while value >= 1000 and power < 5:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {('', 'K', 'M', 'G', 'T', 'P')[power]}FLOP"
