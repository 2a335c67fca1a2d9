"""Scales of an INT8 cache of keys and values in a bundle, and the prefix rounded by them.

    calibration ──▶ (2, L, G) scales ──▶ cache_scales.bin ◀── every graph, and the runtime
                                    └──▶ prefix.bin, INT8

One scale for each layer and head, keys and values apart, from the largest value that calibration
saw: clipping a key moves a token's attention wherever it is looked at again, and rounding to 255
steps of the whole range was measured to change no answer (docs/quantisation.md).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...graphs.bundle import TensorRef
from ...graphs.config import TextConfig
from ...graphs.modules.ops import Eager
from ...graphs.modules.quantized import cache_scale_names
from ..export.export import WeightSpan
from .calibration_file import Calibration
from .int_arithmetic import INT8_LEVELS, scales_of

CACHE_SCALES_FILE = "cache_scales.bin"


def calibrated_cache_scales(calibration: Calibration, *, half: bool) -> np.ndarray:
    """Return scales of keys and of values, (2, L, G) FP32; those of heads of zeros alone are 1.

    ``half``: FP16 numbers, as graphs in FP16 need them.
    """
    assert calibration.cache is not None  # ``quantize.resolve`` checks that
    return scales_of(calibration.cache, INT8_LEVELS, half=half, name="the cache's range")


def describe_scales(text: TextConfig, dtype: str) -> TensorRef:
    """Say where ``write_scales`` puts them, in graphs whose floats are of type ``dtype``."""
    return TensorRef(CACHE_SCALES_FILE, 0, dtype, (2, text.layers, text.kv_heads))


def scale_spans(text: TextConfig, dtype: str) -> dict[str, WeightSpan]:
    """Say the same for the graphs, by the names of their tensors."""
    nbytes = text.kv_heads * getattr(torch, dtype).itemsize
    return {
        name: WeightSpan(CACHE_SCALES_FILE, (number * text.layers + layer) * nbytes, nbytes)
        for layer in range(text.layers)
        for number, name in enumerate(cache_scale_names(layer))
    }


def write_scales(scales: np.ndarray, dtype: str, folder: Path) -> list[str]:
    """Write them in the graphs' type; return the file's name."""
    (folder / CACHE_SCALES_FILE).write_bytes(np.ascontiguousarray(scales, dtype).tobytes())
    return [CACHE_SCALES_FILE]


def quantised_rows(cache: Tensor, scales: np.ndarray) -> Tensor:
    """Round keys and values (2, L, G, P, d) FP32 to INT8, as the graphs cache them.

    The prefix is shipped so, and not rounded when a bundle is loaded: every runtime then copies the
    same bytes, and none has to know how graphs round.
    """
    assert math.prod(cache.shape[:3]) == scales.size
    ops = Eager()
    return torch.stack(
        [
            torch.stack([ops.stored(rows[None], scale)[0] for rows, scale in zip(*of, strict=True)])
            for of in zip(cache, torch.from_numpy(scales), strict=True)
        ]
    )
