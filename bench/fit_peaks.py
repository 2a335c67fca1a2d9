"""Shares of its peaks that a device reaches: two efficiencies, fitted to measured calls.

    t = F / (c P) + B / (b W) + n h

F FLOPs, B bytes, P and W the peaks measured in the same run, n layers that were called. c and b are
the efficiencies; h is what calling a layer costs whatever it computes, without which small models
would be fitted as inefficient. Least squares of relative errors; nothing may be negative.

An estimate is worth what it says of things it has not seen: each model, and each length, is left
out once, fitted without, and predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np

from ..tools.estimate.devices import Efficiency


@dataclass(frozen=True)
class Observation:
    """One measured phase: what it did, what the machine could do then, and how long it took.

    length: visual tokens of a prefill, 0 for a later token. layers: layers called, over all calls.
    """

    model: str
    plan: str
    phase: str
    length: int
    flops: float
    nbytes: float
    layers: int
    ms: float
    peak_flops: float
    peak_bandwidth: float


def fit(observations: Sequence[Observation]) -> Efficiency:
    """Fit efficiencies to at least three observations, of compute and of memory.

    Raises:
        ValueError: too few, or all alike.
    """
    rows = np.array(
        [
            (1e3 * o.flops / o.peak_flops, 1e3 * o.nbytes / o.peak_bandwidth, float(o.layers))
            for o in observations
        ]
    )
    if len(rows) < rows.shape[1]:
        raise ValueError(f"{len(rows)} observations cannot fix {rows.shape[1]} numbers")
    times = np.array([o.ms for o in observations])
    weighted = rows / times[:, None]
    slow_compute, slow_memory, layer_ms = _not_negative(weighted, np.ones(len(times)))
    if not slow_compute or not slow_memory:
        raise ValueError("the observations do not tell operations from bytes")
    return Efficiency(1 / slow_compute, 1 / slow_memory, layer_ms)


def error_of(efficiency: Efficiency, seen: Observation) -> float:
    """Return the relative error of a prediction: 0.1 is 10 % too slow."""
    predicted = efficiency.predict_ms(
        seen.flops, seen.nbytes, seen.layers, seen.peak_flops, seen.peak_bandwidth
    )
    return predicted / seen.ms - 1


def _not_negative(matrix: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Solve least squares with no negative factor: the best of all choices of columns."""
    best, least = np.zeros(matrix.shape[1]), np.inf
    columns = range(matrix.shape[1])
    for chosen in (c for count in columns for c in combinations(columns, count + 1)):
        found = np.linalg.lstsq(matrix[:, chosen], wanted, rcond=None)[0]
        error = float(((matrix[:, chosen] @ found - wanted) ** 2).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(matrix.shape[1]), error
            best[list(chosen)] = found
    return best.tolist()


@dataclass(frozen=True)
class Validation:
    """Absolute relative errors of what was left out: their median and the largest, by group."""

    by: str
    median_error: float
    largest_error: float
    groups: dict[str, float]


def leave_one_out(
    observations: Sequence[Observation], by: str, group: Callable[[Observation], str | None]
) -> Validation:
    """Fit without each group, and predict it. ``group`` None: always in, never predicted.

    Raises:
        ValueError: fewer than two groups.
    """
    names = sorted({name for name in map(group, observations) if name is not None})
    if len(names) < 2:
        raise ValueError(f"leaving out one {by} needs two of them, found {names}")
    errors: dict[str, list[float]] = {}
    for name in names:
        known = fit([o for o in observations if group(o) != name])
        errors[name] = [abs(error_of(known, o)) for o in observations if group(o) == name]
    every = [error for own in errors.values() for error in own]
    groups = {name: median(own) for name, own in errors.items()}
    return Validation(by, median(every), max(every), groups)


def validate(observations: Sequence[Observation]) -> list[Validation]:
    """Leave out models, and lengths."""
    return [
        leave_one_out(observations, "model", lambda o: o.model),
        leave_one_out(observations, "length", lambda o: str(o.length) if o.length else None),
    ]
