"""When two tensors are the same: the largest error, seen against the spread of the reference.

A tensor's error is the largest of its elements' over the standard deviation of the reference, so a
rung that computes in FP32 and one that computes in FP16 are held to one bound each, whatever the
layer's scale. Tokens and positions must be equal.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .report import TensorError

TOLERANCE = {"fp32": 2e-4, "fp16": 5e-2}
"""Largest relative error that passes, by the precision that a rung computes or rounds in.

Measured: up to 7e-6 in FP32; in FP16 up to 0.02 over eight layers and 0.034 over thirty-two. A
wrong layer is off by more than the spread.
"""

WHOLE_TOLERANCE = {"fp32": 1e-3, "fp16": 0.2}
"""The same for the logits of whole answers, where every layer and token adds its own rounding.

Measured: up to 1e-5 in FP32; in FP16 0.004 on the demo model, 0.13 on random ones scaled until they
are chaotic. Another picture, plan or layer is off by about the spread and more.
"""


def tensor_error(name: str, got: np.ndarray, want: np.ndarray) -> TensorError:
    """Error of ``got`` against ``want``, of equal shapes. Of integers any error counts whole."""
    assert got.shape == want.shape, (name, got.shape, want.shape)
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return TensorError(name, None, None, None)
    wide = want.astype(np.float64)
    largest = float(np.abs(got.astype(np.float64) - wide).max(initial=0.0))
    if np.issubdtype(want.dtype, np.integer):
        return TensorError(name, largest, 0.0, largest)
    spread = float(wide.std())
    # A constant tensor has no spread: any error in it is as large as itself.
    scale = spread or float(np.abs(wide).max(initial=0.0)) or 1.0
    return TensorError(name, largest, spread, largest / scale)


def first_wrong(errors: Iterable[TensorError], tolerance: float) -> str:
    """What is wrong with the first tensor beyond ``tolerance``; empty where none is."""
    for error in errors:
        if error.relative is None:
            return f"{error.tensor} is not finite"
        if error.relative > tolerance:
            return (
                f"{error.tensor} is off by {error.relative:.2g} of its spread, expected at most "
                f"{tolerance:g}"
            )
    return ""
