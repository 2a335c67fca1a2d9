"""Tensors that the runtime maps from a bundle's files itself: the embedding table, the prefix, and
what the integers of a cache stand for.
"""

from __future__ import annotations

import numpy as np

from ..graphs.bundle import Bundle, TensorRef
from ..graphs.errors import BundleError

STORED_NUMPY_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
}


def map_tensor(bundle: Bundle, ref: TensorRef) -> np.ndarray:
    """The stored array, mapped read-only; BF16 comes as its raw 16 bits (see ``widen``)."""
    file = bundle.file(ref.file)
    dtype = STORED_NUMPY_DTYPES[ref.dtype]
    try:
        return np.memmap(file, dtype, "r", ref.offset, ref.shape)
    except (ValueError, OSError) as error:
        raise BundleError(f"{file} is too short for a tensor the manifest places in it") from error


def widen(array: np.ndarray, ref: TensorRef, dtype: np.dtype) -> np.ndarray:
    """Copy stored values into ``dtype``; BF16 is the upper half of an FP32."""
    if ref.dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype)


def stored_cache_scales(bundle: Bundle) -> list[dict[str, np.ndarray]]:
    """For each layer, what graphs that read its cache are told (``contract.scale_specs``): (G,)."""
    ref = bundle.manifest.cache_scales
    if ref is None:
        return [{}] * bundle.manifest.config.text.layers
    keys, values = np.array(map_tensor(bundle, ref))
    return [
        {"key_scale": key, "value_scale": value} for key, value in zip(keys, values, strict=True)
    ]


class Embedding:
    """Token ids to rows, read from the mapped table: only the rows asked for are touched."""

    def __init__(self, bundle: Bundle, dtype: np.dtype):
        self.ref, self.dtype = bundle.manifest.embedding, dtype
        self.table = np.asarray(map_tensor(bundle, self.ref))  # a plain view: faster to index

    def __call__(self, ids) -> np.ndarray:
        """ids: (Q,) -> rows (1, Q, D)."""
        return widen(self.table[np.asarray(ids, np.int64)], self.ref, self.dtype)[None]
