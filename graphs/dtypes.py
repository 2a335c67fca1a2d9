"""Types of stored numbers: one table of names and sizes.

A type's name is that of manifests and graph specs, and what NumPy (``np.dtype(name)``) and torch
(``getattr(torch, name)``) call it, as far as they have it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """A type: its name in safetensors headers, None where they have none, and bytes of a number."""

    name: str
    safetensors: str | None
    nbytes: float


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("float32", "F32", 4),
        DType("float16", "F16", 2),
        DType("bfloat16", "BF16", 2),
        DType("int64", "I64", 8),
        DType("int32", "I32", 4),
        DType("int8", "I8", 1),
        DType("uint8", "U8", 1),
        DType("int4", None, 0.5),
    )
}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES.values() if dtype.safetensors}
