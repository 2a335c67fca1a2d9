"""Errors of tensors and their bounds: the largest error against the spread of the reference.

A tensor's error is the largest of its elements' over the standard deviation of the reference, so
that there is one bound for FP32 and one for FP16, whatever the layer's scale. Tokens and positions
must be equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

import numpy as np

from ...graphs.bundle import Manifest
from .verify_report import TensorError


@dataclass(frozen=True)
class Bounds:
    """Largest relative errors that pass.

    Attributes:
        graph: of one graph.
        whole: of the logits of whole answers, where every layer and token adds its own rounding.
        tie: how near, relative to the spread of all, scores of visual tokens are that may change
            places; 0: tokens and choices are equal.
        share: of a tensor's elements, those that must be within: all, or half where routers decide
            row by row, as rounding turns the gate of a row here and there.
    """

    graph: float
    whole: float
    tie: float
    share: float = 1.0


BOUNDS = {
    "float32": Bounds(2e-4, 1e-3, 0.0),
    "float16": Bounds(5e-2, 0.2, 5e-2),
    "w8a8": Bounds(0.25, 1.0, 0.2),
    "w8": Bounds(1.0, 1.0, 0.2),
    "w4": Bounds(1.0, 1.0, 0.2),
    "cache": Bounds(2e-2, 0.3, 5e-2),
}
"""By what a check computes or rounds in: the type of the graphs' floats, schemes of layers, and
``cache`` of INT8. docs/verify.md has the errors that were measured, and why the bounds are wide
where numbers are rounded. A wrong layer is off by more than the spread; another image, plan or
layer changes the logits of whole answers by about the spread and more.
"""

GATES, HALF = "gates", 0.5
"""Beside them: routers, which decide about each row. Where they do in other numbers than FP32, half
of a tensor is held to its bound, and half of an answer's logits to half of their spread: half of
those of two models that have nothing to do with each other are within 0.95 of it."""

LOOSE = ("w8", "w4")
"""Schemes whose inputs ONNX Runtime rounds to INT8 in blocks, which is not the graph's own
arithmetic; with weights that are not rearranged in memory (``disable_prepacking``) it does not."""


def bounds_of(kinds: Iterable[str]) -> Bounds:
    """Return the loosest bounds of several kinds, each for itself."""
    kinds = set(kinds)
    known = [astuple(BOUNDS[kind]) for kind in kinds - {GATES}]
    bounds = Bounds(*map(max, zip(*known, strict=True)))
    return replace(bounds, whole=HALF, share=HALF) if bounds.tie and GATES in kinds else bounds


def bundle_kinds(manifest: Manifest) -> set[str]:
    """Return what a bundle's graphs compute and round in, by the names of ``BOUNDS``."""
    quantization = manifest.quantization
    more = {"cache"} if quantization.quantises_cache else set()
    more |= {GATES} if manifest.plan.routing is not None else set()
    return {manifest.dtype, *quantization.schemes.values(), *more}


def strict(kinds: Iterable[str]) -> set[str]:
    """Return ``kinds`` for a run that rounds no inputs but those that the graph rounds."""
    return set(kinds) - set(LOOSE)


def tensor_error(
    name: str, got: np.ndarray, want: np.ndarray, *, shares: bool = False, share: float = 1.0
) -> TensorError:
    """Return the error of ``got`` against ``want``, of equal shapes; ``share``: of ``Bounds``.

    ``shares``: of attention. They are compared by their logarithms, since rounding multiplies the
    shares themselves and the largest one is most of their spread; and over twice the spread, since
    a logarithm is a product of query and key, with the errors of both.

    Integers count whole. INT8 is what caches hold: a number on the boundary between two steps may
    be rounded to either, so only what is beyond one step counts.
    """
    assert got.shape == want.shape, (name, got.shape, want.shape)
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return TensorError(name, None, None, None)
    found, wide = got.astype(np.float64), want.astype(np.float64)
    if shares:
        found, wide = (np.log(np.maximum(values, 1e-12)) for values in (found, wide))
    apart = np.abs(found - wide)
    largest = float(np.quantile(apart, share)) if apart.size else 0.0
    if want.dtype == np.int8:
        largest = max(largest - 1.0, 0.0)
    elif np.issubdtype(want.dtype, np.integer):
        return TensorError(name, largest, 0.0, largest)
    spread = float(wide.std()) * (2 if shares else 1)
    # A constant tensor has no spread: any error in it is as large as itself.
    scale = spread or float(np.abs(wide).max(initial=0.0)) or 1.0
    return TensorError(name, largest, spread, largest / scale)


def first_wrong(errors: Iterable[TensorError], tolerance: float) -> str:
    """Describe the first tensor beyond ``tolerance``; empty where none is."""
    for error in errors:
        if error.relative is None:
            return f"{error.tensor} is not finite"
        if error.relative > tolerance:
            return (
                f"{error.tensor} is off by {error.relative:.2g} of its spread, expected at most "
                f"{tolerance:g}"
            )
    return ""
