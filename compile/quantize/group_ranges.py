"""Ranges of the inputs of linear layers, and the error of each way of rounding.

One ``GroupRanges`` for each group of ``graphs.linears``; ``compile.quantize.calibration_file``
keeps them in files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graphs.quantization import OBSERVERS, Scheme

FLOAT32_MAX = float(np.finfo(np.float32).max)
VECTORS = ("absmax", "factors", "aware")
"""The fields that are arrays."""


@dataclass(frozen=True, eq=False)
class GroupRanges:
    """Inputs of the linear layers of one group (``graphs.linears``), and the errors of rounding.

    Errors are relative and squared: ||Y - Yq||^2 / ||Y||^2 of a layer's output Y, on a subsample of
    rows and output channels (``calib.run.smoothing``); of a group, the mean of its layers'.

    Attributes:
        rows: how many rows were seen.
        rows_used: how many of them the smoothed thresholds rest on; all else rests on ``rows``.
        absmax: (K,) float32, largest absolute input of each channel.
        alpha: of the smoothing for W8A8; None where it does not help or nothing can take factors.
        factors: (K,) float32 that inputs are divided by; ones without ``alpha``.
        aware_alpha, aware: the same for INT4 weights.
        thresholds: by observer, the input at which the INT8 range ends, without smoothing.
        smoothed_thresholds: the same of the inputs divided by ``factors``.
        errors, smoothed_errors: of W8A8 with either, by observer.
        weight_error, aware_error: of INT4 weights without and with ``aware``.
        sensitivity: of each layer, the error by scheme: ``w8a8`` (smoothed, the calibration's best
            observer), ``w8``, ``w4`` (aware).
    """

    rows: int
    rows_used: int
    absmax: np.ndarray
    alpha: float | None
    factors: np.ndarray
    aware_alpha: float | None
    aware: np.ndarray
    thresholds: Mapping[str, float]
    smoothed_thresholds: Mapping[str, float]
    errors: Mapping[str, float]
    smoothed_errors: Mapping[str, float]
    weight_error: float
    aware_error: float
    sensitivity: Mapping[str, Mapping[str, float]]

    def smoothing(self, scheme: Scheme | None) -> tuple[float | None, np.ndarray]:
        """Return alpha and factors of a scheme: those for W8A8, or for weights alone."""
        if scheme == "w8a8":
            return self.alpha, self.factors
        return self.aware_alpha, self.aware

    def facts(self) -> dict[str, Any]:
        """Return all but the arrays as plain JSON."""
        return {key: _plain(value) for key, value in vars(self).items() if key not in VECTORS}

    @classmethod
    def from_facts(cls, data: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> GroupRanges:
        """Invert ``facts``, with the arrays by field.

        Raises:
            TypeError, ValueError: a field is missing, unknown, or not what it should be.
        """
        if len({(vector.shape, vector.dtype) for vector in vectors.values()}) != 1:
            raise ValueError("arrays differ in shape or type")
        group = cls(**{**data, **vectors})
        by_observer = (
            group.thresholds,
            group.smoothed_thresholds,
            group.errors,
            group.smoothed_errors,
        )
        if any(set(OBSERVERS) != set(numbers) for numbers in by_observer):
            raise ValueError("an observer is missing or unknown")
        numbers = [number for numbers in by_observer for number in numbers.values()]
        if not all(0 <= number <= FLOAT32_MAX for number in numbers):
            raise ValueError("a threshold or an error is negative, or not finite")
        if not all(np.isfinite(v).all() and (v >= 0).all() for v in vectors.values()):
            raise ValueError("a range or a factor is negative, or not finite")
        if not ((group.factors > 0).all() and (group.aware > 0).all()):
            raise ValueError("a factor is 0")
        return group


def best_observer(groups: Iterable[GroupRanges]) -> str:
    """Return the observer with the least summed W8A8 error, as ``Calibration.best_observer``."""
    totals = dict.fromkeys(OBSERVERS, 0.0)
    for group in groups:
        for name in OBSERVERS:
            totals[name] += group.smoothed_errors[name]
    return min(totals, key=totals.__getitem__)


def _plain(value: Any) -> Any:
    """Return numbers and mappings of numbers without NumPy's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return value if value is None or isinstance(value, int) else float(value)
