"""Which factor per channel makes a group of linear layers easiest to round. NumPy only.

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
from ...graphs.quantization import SCALE_BLOCK, Observer, Scheme
from .observers import Histogram, threshold

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
    """What a search found.

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
    """max|X_j|^alpha / max|W_j|^(1 - alpha), SmoothQuant eq. 4, with a geometric mean of 1.

    A common factor changes nothing, as every scale moves with it; this one keeps what the factors
    fold into about as large as it was. Dead channels, on either side, take 1 and have no part in
    the mean. All are within ``BOUND``.

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
    """mean|X_j|^alpha, divided by the root of the largest times the smallest, as AWQ's code does.

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
    alphas: Sequence[float] = ALPHAS,
    observer: Observer = "minmax",
) -> Smoothing:
    """The alpha with which a group's outputs suffer least from W8A8.

    Args:
        rows: (M, K) inputs of the group.
        weights: of its layers, (N_i, K) each.
        input_absmax: (K,) over all rows there were; None: over ``rows``.
        alphas: strengths to try.
        observer: how the inputs get their scale; all but ``minmax`` see only the rows multiplied.
    """
    inputs = absmax(rows, 0) if input_absmax is None else input_absmax
    largest = np.max([absmax(weight, 0) for weight in weights], axis=0)
    sample = _Sample.of(rows, weights)

    def error(factors: np.ndarray) -> float:
        scaled = sample.rows / factors
        limit = (
            float((inputs / factors).max()) if observer == "minmax" else _limit(scaled, observer)
        )
        return sample.error_w8a8(factors, activation_scale(limit))

    return _search(error, lambda alpha: smoothing_factors(inputs, largest, alpha), rows, alphas)


def search_awq(
    rows: np.ndarray,
    weights: Sequence[np.ndarray],
    *,
    input_mean: np.ndarray | None = None,
    alphas: Sequence[float] = AWQ_ALPHAS,
    block: int = SCALE_BLOCK,
) -> Smoothing:
    """The alpha with which a group's outputs suffer least from W4.

    ``input_mean`` (K,) is of |x| over all rows there were; None: over ``rows``. All else is as for
    ``search_smoothing``.
    """
    if input_mean is None:
        input_mean = np.abs(rows).mean(0, dtype=np.float64)
    sample = _Sample.of(rows, weights)
    return _search(
        lambda factors: sample.error_w4(factors, block),
        lambda alpha: awq_factors(input_mean, alpha),
        rows,
        alphas,
    )


def sensitivity(
    rows: np.ndarray, weight: np.ndarray, scale: np.float32, *, block: int = SCALE_BLOCK
) -> dict[Scheme, float]:
    """What each scheme costs one linear layer: ||Y - Yq||² / ||Y||², on rows and outputs as above.

    Args:
        rows: (M, K) its inputs.
        weight: (N, K).
        scale: of the inputs, for ``w8a8``.
        block: inputs that share one scale, for ``w4``.
    """
    sample = _Sample.of(rows, [weight])
    ones = np.ones(rows.shape[1], np.float32)
    return {
        "w8a8": sample.error_w8a8(ones, scale),
        "w8": sample.error_of(sample.rows, fake_quantised_weight(sample.weight)),
        "w4": sample.error_w4(ones, block),
    }


def quantisation_error(rows: np.ndarray, weight: np.ndarray, scale: np.float32) -> float:
    """``sensitivity(rows, weight, scale)["w8a8"]`` alone, for whoever compares many scales."""
    ones = np.ones(rows.shape[1], np.float32)
    return _Sample.of(rows, [weight]).error_w8a8(ones, scale)


@dataclass(frozen=True)
class _Sample:
    """Rows (m, K), weights (n, K) of all layers of a group, and their product (m, n)."""

    rows: np.ndarray
    weight: np.ndarray
    exact: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, weights: Sequence[np.ndarray]) -> _Sample:
        some = _spread(rows, SAMPLE_ROWS)
        weight = np.concatenate([_spread(one, SAMPLE_OUTPUTS) for one in weights])
        return cls(some, weight, some @ weight.T)

    def error_w8a8(self, factors: np.ndarray, scale: np.float32) -> float:
        """With inputs divided by ``factors`` and rounded with ``scale``."""
        rows = dequantise(quantise(self.rows / factors, scale), scale)
        return self.error_of(rows, fake_quantised_weight(self.weight * factors))

    def error_w4(self, factors: np.ndarray, block: int) -> float:
        """With inputs divided by ``factors`` and not rounded."""
        return self.error_of(
            self.rows / factors, fake_quantised_weight(self.weight * factors, block)
        )

    def error_of(self, rows: np.ndarray, weight: np.ndarray) -> float:
        """Of the product of rounded rows and weights."""
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


def _limit(values: np.ndarray, observer: Observer) -> float:
    histogram = Histogram("the inputs")
    histogram.add(values)
    return threshold(histogram, observer)


def _spread(matrix: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` rows, evenly spread, the first and the last among them; always the same."""
    if len(matrix) <= most:
        return matrix
    return matrix[np.linspace(0, len(matrix) - 1, most).round().astype(int)]


def _log2(values: np.ndarray, live: np.ndarray) -> np.ndarray:
    return np.log2(np.where(live, values, 1), dtype=np.float64)


def _factors(logs: np.ndarray, live: np.ndarray, middle: float) -> np.ndarray:
    most = np.log2(BOUND)
    return np.exp2(np.where(live, np.clip(logs - middle, -most, most), 0)).astype(np.float32)
