"""Histograms of the values that a tensor takes, and thresholds to clip them at. NumPy only.

A ``Histogram`` sees the values in batches, ``threshold`` makes one number of it. All is symmetric:
it is |x| that is counted. The widths of bins are powers of two, which makes placing a value and
merging bins exact: the same values give the same histogram, however they are cut into batches.
"""

from __future__ import annotations

import math

import numpy as np

from ...compile.quantize.int_arithmetic import INT8_LEVELS
from ...graphs.errors import ModelError
from ...graphs.quantization import Observer

BINS = 2048
"""Bins of a histogram; its largest value is always in the upper half of them."""

PERCENTILE = 99.99
"""Share of the values that ``percentile`` leaves unclipped, in percent."""

_LEVELS = INT8_LEVELS + 1
"""Distinct |x| of symmetric INT8, 0 included: the levels of ``entropy``."""

_EMPTY = 1e-4
"""The count of ``entropy`` in a bin that only clipped values are in; ONNX Runtime's number."""

_LEAST = -116
"""Exponent of the smallest range; 2**(11 + 116) is the largest power of two in FP32."""

_HISTOGRAM_CHUNK = 1 << 20


class Histogram:
    """Counts of |x| in ``BINS`` equal bins from 0, for values of unknown range.

    When a value comes that is too large, the range doubles until it fits; bins merge in pairs.

    Attributes:
        name: of the tensor, for the error.
        counts: (BINS,) INT64; bin j counts j <= |x| / width < j + 1.
        maximum: largest |x|, exactly; 0 before any.
    """

    def __init__(self, name: str = "a tensor") -> None:
        self.name = name
        self.counts = np.zeros(BINS, np.int64)
        self.maximum = 0.0

    @property
    def total(self) -> int:
        """Values seen."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Width of a bin: the power of two by which the maximum just fits."""
        return math.ldexp(1.0, _exponent(self.maximum)) / BINS

    def add(self, x: np.ndarray) -> None:
        """Count the values of an array of any shape, FP32 or narrower.

        Raises:
            ModelError: a value that is not finite; then none was counted.
        """
        flat = x.reshape(-1)
        if not flat.size:
            return
        largest = max(float(flat.max()), -float(flat.min()))
        if not math.isfinite(largest):
            raise ModelError(
                f"{self.name} takes the value NaN or infinity, expected finite numbers only. "
                "Check the checkpoint, and the samples that it was run on."
            )
        self._reach(largest)
        per_bin = np.float32(1 / self.width)
        for start in range(0, flat.size, _HISTOGRAM_CHUNK):
            scaled = np.abs(flat[start : start + _HISTOGRAM_CHUNK], dtype=np.float32)
            scaled *= per_bin
            self.counts += np.bincount(scaled.astype(np.int64), minlength=BINS)

    def _reach(self, largest: float) -> None:
        grown = max(self.maximum, largest)
        self.counts = _halved(self.counts, _exponent(grown) - _exponent(self.maximum))
        self.maximum = grown


def threshold(histogram: Histogram, observer: Observer) -> float:
    """Return where an observer clips |x|: from 0 (only where all values are 0) to the maximum.

        minmax      the maximum
        percentile  ``PERCENTILE`` % of the values are below, to within a bin
        entropy     least Kullback-Leibler divergence: from the clipped distribution to what 128
                    levels leave of it ("8-bit inference with TensorRT", GTC 2017, S7310)
        mse         least expected squared error of rounding and clipping

    Raises:
        ValueError: nothing was counted.
    """
    if not histogram.total:
        raise ValueError(f"{histogram.name}: no threshold of a histogram without values")
    if observer == "minmax" or not histogram.maximum:
        return histogram.maximum
    find = {"percentile": _percentile, "entropy": _entropy, "mse": _mse}[observer]
    return min(find(histogram), histogram.maximum)


def _percentile(histogram: Histogram) -> float:
    """Return the upper edge of the bin that reaches the share: it never clips more than that."""
    reached = np.cumsum(histogram.counts) >= histogram.total * PERCENTILE / 100
    return float(np.argmax(reached) + 1) * histogram.width


def _entropy(histogram: Histogram) -> float:
    """Return the upper edge of the first i bins with the least divergence; of equals the largest.

    For each i from 128: P is the first i bins with all that is beyond added to the last of them.
    Q is the first i bins alone, whose counts are shared evenly among the bins of each of 128 equal
    levels that hold any; the last bin counts as ``_EMPTY`` where P has values in it and Q has none.
    """
    counts = histogram.counts[: np.flatnonzero(histogram.counts)[-1] + 1].astype(np.float64)
    ends = np.arange(_LEVELS, max(len(counts), _LEVELS) + 1)
    counts = np.pad(counts, (0, ends[-1] - len(counts)))
    # Sums over a range of bins, as differences of sums over all bins before an edge.
    below, filled, negentropy = (
        np.concatenate([[0.0], np.cumsum(column)])
        for column in (counts, counts > 0, _xlogx(counts))
    )
    total, inside, last = below[-1], below[ends], counts[ends - 1]
    clipped = total - inside

    # Bin j of the first i belongs to level j * 128 // i.
    edges = -(-np.arange(_LEVELS + 1) * ends[:, None] // _LEVELS)
    mass, bins = np.diff(below[edges]), np.diff(filled[edges])
    with np.errstate(divide="ignore", invalid="ignore"):
        shared = np.where(mass > 0, np.log(mass / bins), 0.0)
        at_last = np.where(last > 0, shared[:, -1], math.log(_EMPTY))
        of_p = negentropy[ends - 1] + _xlogx(last + clipped) - total * math.log(total)
        of_q = (mass * shared).sum(1) + clipped * at_last - total * np.log(inside)
    divergence = np.where(inside > 0, (of_p - of_q) / total, np.inf)
    # Equals: a range whose values are all in its last bin is like itself whatever is clipped.
    least = np.flatnonzero(divergence <= divergence.min() + 1e-9)[-1]
    return float(ends[least]) * histogram.width


def _mse(histogram: Histogram) -> float:
    """Return the best of 100 thresholds at equal ratios, then of 64 between its neighbours."""
    stop = np.flatnonzero(histogram.counts)[-1] + 1
    counts, most = histogram.counts[:stop].astype(np.float64), histogram.maximum / histogram.width

    def best(thresholds: np.ndarray) -> int:
        return int(np.argmin(_squared_error(counts, thresholds)))

    coarse = np.geomspace(min(1.0, most), most, 100)
    at = best(coarse)
    fine = np.linspace(coarse[max(at - 1, 0)], coarse[min(at + 1, len(coarse) - 1)], 65)
    return float(fine[best(fine)]) * histogram.width


def _squared_error(counts: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the sum of (x - Q(x))² for every threshold, in squares of a bin, spread over bins.

    With step s and y = x / s, the error integrated from 0 to x is s³ (n / 12 + (y - n)³ / 3) with
    n = min(round(y), 127): every full step adds s³ / 12, and beyond 127 it is all clipping.
    """
    step = thresholds[:, None] / INT8_LEVELS
    y = np.arange(len(counts) + 1) / step
    level = np.minimum(np.rint(y), INT8_LEVELS)
    y -= level
    return (step[:, 0] ** 3) * (np.diff(level / 12 + y * y * y / 3) @ counts)


def _xlogx(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1.0))


def _exponent(maximum: float) -> int:
    """Return the exponent of the range that ``maximum`` just fits into: maximum < 2**exponent."""
    return max(math.frexp(maximum)[1], _LEAST) if maximum else _LEAST


def _halved(counts: np.ndarray, times: int) -> np.ndarray:
    """Return the counts when the range has doubled ``times`` times."""
    merged = 1 << min(times, BINS.bit_length() - 1)
    sums = counts.reshape(-1, merged).sum(1)
    return np.pad(sums, (0, BINS - len(sums)))
