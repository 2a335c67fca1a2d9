"""Factors per channel that make a group of linear layers easiest to round. NumPy only.

X W^T = (X / s)(s W)^T for any s > 0: what is hard to round moves between inputs and weights. The
factors are folded into what is before the group (``graphs/linears.py``), so the function stays.

    smoothing   W8A8: channels of X that dwarf the others share their size with W
                (SmoothQuant, arXiv 2211.10438, eq. 4)
    awareness   W4: channels of W that X amplifies get finer steps (AWQ, arXiv 2306.00978)

Strength alpha is searched by the error of the group's outputs, on rows and outputs spread evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...compile.quantize.int_arithmetic import (
    absmax,
    activation_scale,
    dequantise,
    fake_quantised_weight,
    quantise,
)
from ...graphs.quantization import SCALE_BLOCK

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Tried for smoothing."""

AWQ_ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Tried for awareness."""

SAMPLE_ROWS, SAMPLE_OUTPUTS = 128, 256
"""Rows, and outputs of each linear layer, that a search multiplies at most."""

GAIN = 0.01
"""Share of the plain error that factors must save to be worth folding."""

BOUND = 2.0**15
"""Largest factor, and one over the smallest: weights and norms they fold into may be FP16."""


@dataclass(frozen=True)
class Smoothing:
    """The result of a search.

    Attributes:
        alpha: the strength with the least error; None where none saves ``GAIN``.
        factors: (K,) FP32; all one where alpha is None.
        error: ||Y - Yq||² / ||Y||² over the group's outputs, with these factors.
        error_plain: the same without factors.
        errors: by alpha, of all that were tried.
    """

    alpha: float | None
    factors: np.ndarray
    error: float
    error_plain: float
    errors: Mapping[float, float]


def smoothing_factors(
    input_absmax: np.ndarray, weight_absmax: np.ndarray, alpha: float
) -> np.ndarray:
    """Return max|X_j|^alpha / max|W_j|^(1 - alpha), SmoothQuant eq. 4, scaled.

    Their geometric mean is 1: a common factor changes nothing, as every scale moves with it, and
    this one keeps what the factors fold into about as large as it was. Dead channels, on either
    side, take 1 and have no part in the mean. All are within ``BOUND``.

    Args:
        input_absmax: (K,) largest |x| of each channel.
        weight_absmax: (K,) largest |w| of each channel, over all layers that read it.
        alpha: 0 to 1; how much of the difficulty moves into the weights.

    Returns:
        s (K,) FP32: the inputs are divided by it, the weights multiplied.
    """
    live = (input_absmax > 0) & (weight_absmax > 0)
    logs = alpha * _log2(input_absmax, live) - (1 - alpha) * _log2(weight_absmax, live)
    return _factors(logs, live, logs[live].mean() if live.any() else 0.0)


def awq_factors(input_mean: np.ndarray, alpha: float) -> np.ndarray:
    """Return mean|X_j|^alpha over the root of the largest times the smallest, as AWQ's code.

    Dead channels take 1; all are within ``BOUND``.

    Args:
        input_mean: (K,) mean |x| of each channel.
        alpha: 0 to 1.

    Returns:
        s (K,) FP32: the inputs are divided by it, the weights multiplied.
    """
    live = np.asarray(input_mean) > 0
    logs = alpha * _log2(input_mean, live)
    middle = (logs[live].max() + logs[live].min()) / 2 if live.any() else 0.0
    return _factors(logs, live, middle)


def search_smoothing(
    rows: np.ndarray,
    weights: Sequence[np.ndarray],
    *,
    input_absmax: np.ndarray | None = None,
) -> Smoothing:
    """Find the alpha with which a group's outputs suffer least from W8A8, clipped nowhere.

    Args:
        rows: (M, K) inputs of the group.
        weights: of its layers, (N_i, K) each.
        input_absmax: (K,) over all rows there were; None: over ``rows``.
    """
    inputs = absmax(rows, 0) if input_absmax is None else input_absmax
    largest = np.max([absmax(weight, 0) for weight in weights], axis=0)
    sample = OutputSample.of(rows, weights)
    return _search(
        lambda factors: sample.error_w8a8(
            activation_scale(float((inputs / factors).max())), factors
        ),
        lambda alpha: smoothing_factors(inputs, largest, alpha),
        rows,
        ALPHAS,
    )


def search_awq(
    rows: np.ndarray,
    weights: Sequence[np.ndarray],
    *,
    input_mean: np.ndarray | None = None,
    block: int = SCALE_BLOCK,
) -> Smoothing:
    """Find the alpha with which a group's outputs suffer least from W4.

    ``input_mean`` (K,) is of |x| over all rows there were; None: over ``rows``. ``block``: inputs
    that share one scale. All else is as for ``search_smoothing``.
    """
    if input_mean is None:
        input_mean = np.abs(rows).mean(0, dtype=np.float64)
    sample = OutputSample.of(rows, weights)
    return _search(
        lambda factors: sample.error_w4(factors, block),
        lambda alpha: awq_factors(input_mean, alpha),
        rows,
        AWQ_ALPHAS,
    )


def evenly(matrix: np.ndarray, most: int) -> np.ndarray:
    """Return at most ``most`` rows, evenly spread, with the first and the last; always the same."""
    if len(matrix) <= most:
        return matrix
    return matrix[np.linspace(0, len(matrix) - 1, most).round().astype(int)]


@dataclass(frozen=True)
class OutputSample:
    """Rows (m, K), weights (n, K) of the layers of a group, and their product (m, n).

    Errors are ||Y - Yq||² / ||Y||² of that product, with inputs divided and weights multiplied by
    factors (K,).
    """

    rows: np.ndarray
    weight: np.ndarray
    exact: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, weights: Sequence[np.ndarray]) -> OutputSample:
        """Sample rows, and outputs of each layer."""
        some = evenly(rows, SAMPLE_ROWS)
        weight = np.concatenate([evenly(weight, SAMPLE_OUTPUTS) for weight in weights])
        return cls(some, weight, some @ weight.T)

    def error_w8a8(self, scale: np.float32, factors: np.ndarray | float = 1.0) -> float:
        """Return the error with INT8 inputs, rounded with ``scale``, and INT8 weights."""
        rows = dequantise(quantise(self.rows / factors, scale), scale)
        return self._error(rows, fake_quantised_weight(self.weight * factors))

    def error_w8(self) -> float:
        """Return the error with INT8 weights."""
        return self._error(self.rows, fake_quantised_weight(self.weight))

    def error_w4(self, factors: np.ndarray | float = 1.0, block: int = SCALE_BLOCK) -> float:
        """Return the error with INT4 weights, of which ``block`` share one scale."""
        return self._error(self.rows / factors, fake_quantised_weight(self.weight * factors, block))

    def _error(self, rows: np.ndarray, weight: np.ndarray) -> float:
        lost = np.square(rows @ weight.T - self.exact, dtype=np.float64).sum()
        of = np.square(self.exact, dtype=np.float64).sum()
        return float(lost / of) if of else 0.0


def _search(
    error: Callable[[np.ndarray], float],
    factors_of: Callable[[float], np.ndarray],
    rows: np.ndarray,
    alphas: Sequence[float],
) -> Smoothing:
    ones = np.ones(rows.shape[1], np.float32)
    plain = error(ones)
    errors = {alpha: error(factors_of(alpha)) for alpha in alphas}
    best = min(errors, key=errors.__getitem__, default=None)
    if best is None or errors[best] >= (1 - GAIN) * plain:
        return Smoothing(None, ones, plain, plain, errors)
    return Smoothing(best, factors_of(best), errors[best], plain, errors)


def _log2(values: np.ndarray, live: np.ndarray) -> np.ndarray:
    return np.log2(np.where(live, values, 1), dtype=np.float64)


def _factors(logs: np.ndarray, live: np.ndarray, middle: float) -> np.ndarray:
    most = np.log2(BOUND)
    return np.exp2(np.where(live, np.clip(logs - middle, -most, most), 0)).astype(np.float32)
