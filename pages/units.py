"""Numbers as people write them: bytes, durations, shares, operations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def show_bytes(nbytes: float) -> str:
    """Return ``13.2 GiB``; whole numbers below 1 KiB."""
    value, prefix = _scaled(nbytes, 1024, ("", "Ki", "Mi", "Gi", "Ti"))
    return f"{value:.1f} {prefix}B" if prefix else f"{value:.0f} B"


def show_seconds(seconds: float) -> str:
    """Return ``0.4 s`` or ``3 min 12 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def ms(value: float | None) -> str:
    """Return ``5.1 ms``, ``512 ms``, ``12.3 s``; a dash for what is not known."""
    if value is None:
        return "–"
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def flops(value: float) -> str:
    """Return ``838 MFLOP``."""
    scaled, prefix = _scaled(value, 1000, ("", "K", "M", "G", "T", "P"))
    return f"{scaled:.3g} {prefix}FLOP"


def percent(share: float | None, digits: int | None = None) -> str:
    """Return ``12 %`` of ``0.123``; a dash for what is not known.

    digits: after the point; None: one below 10, none above.
    """
    if share is None:
        return "–"
    value = 100 * share
    if digits is None:
        digits = 0 if abs(value) >= 9.95 or value == 0 else 1
    return f"{value:.{digits}f}\N{NO-BREAK SPACE}%"


def ranges(numbers: Sequence[int]) -> str:
    """Return ``0–2, 5`` of ``[0, 1, 2, 5]``."""
    runs = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(runs)


def _scaled(value: float, step: int, prefixes: Sequence[str]) -> tuple[float, str]:
    power = 0
    while value >= step and power < len(prefixes) - 1:
        value, power = value / step, power + 1
    return value, prefixes[power]
