"""Floats to INT8 and INT4 and back: the arithmetic of every scheme. NumPy only.

Symmetric throughout, so that an engine needs no zero points; the value below the smallest is
never used: -128 and -8 have no counterpart. Rounding is that of ONNX QuantizeLinear: half to even.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...graphs.errors import ModelError
from ...graphs.precision import HALF_MAX
from ...graphs.quantization import SCALE_BLOCK

INT8_LEVELS = 127
"""Largest INT8 value in use."""

INT4_LEVELS = 7
"""Largest INT4 value in use."""

TINY = float(np.finfo(np.float32).tiny)
HALF_TINY = float(np.finfo(np.float16).tiny)
"""Smallest normal numbers: what is smaller, hardware may take for 0, and then divide by it."""

_WEIGHT_CHUNK = 1 << 22
"""Values that are worked on at a time: 16 MiB of FP32."""


def scales_of(
    largest: np.ndarray, levels: int, *, half: bool = False, name: str = "a tensor"
) -> np.ndarray:
    """Return scales by which ranges fill the integers, with the shape of ``largest`` and FP32.

    Never 0 and never subnormal; a range of zeros alone has scale 1.

    Args:
        largest: >= 0, the absolute value that becomes ``levels``.
        levels: largest integer in use.
        half: the scales are FP16 numbers (held in FP32), as graphs in FP16 need them.
        name: of the tensor, for the error.

    Raises:
        ModelError: a range that is not finite.
    """
    largest = np.asarray(largest, np.float32)
    if not np.isfinite(largest).all():
        raise ModelError(
            f"{name} holds NaN or infinity, expected finite numbers only. "
            "Is the checkpoint damaged? Download it again."
        )
    scales = largest / np.float32(levels)
    if half:
        scales = np.minimum(scales, np.float32(HALF_MAX)).astype(np.float16).astype(np.float32)
    scales = np.maximum(scales, np.float32(HALF_TINY if half else TINY))
    return np.where(largest == 0, np.float32(1), scales)


def activation_scale(threshold: float, *, half: bool = False) -> np.float32:
    """Return the scale of a tensor whose values are clipped at ``threshold``: one 127th of it.

    ``half``, the limits and the errors are those of ``scales_of``.
    """
    largest = np.array(threshold, np.float32)
    return np.float32(scales_of(largest, INT8_LEVELS, half=half, name="a range"))


def quantise(
    x: np.ndarray, scale: np.ndarray | np.float32, levels: int = INT8_LEVELS
) -> np.ndarray:
    """Round ``x / scale`` in FP32 half to even and clip it to ±levels; INT8 of the same shape.

    ONNX QuantizeLinear clips at -128 where this clips at -127. Everything else is equal, so the two
    differ by one step, and only below -127.5 scales: beyond the range that the scale was made for.
    """
    return _steps(x, scale, levels).astype(np.int8)


def dequantise(values: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """Return what integers stand for, FP32: ``values * scale``."""
    return np.multiply(values, scale, dtype=np.float32)


def int8_weight(
    weight: np.ndarray, *, half: bool = False, name: str = "a weight"
) -> tuple[np.ndarray, np.ndarray]:
    """Round a linear layer's weight to INT8 with one scale per output channel.

    Args:
        weight: (N, K) as a checkpoint holds it.
        half: scales are rounded to FP16 before the values are rounded with them.
        name: of the weight, for the error.

    Returns:
        Values (K, N) INT8, as the second factor of ONNX ``MatMul``, and scales (N,) FP32.

    Raises:
        ModelError: a weight that is not finite.
    """
    outputs, inputs = weight.shape
    values = np.empty((inputs, outputs), np.int8)
    scales = np.empty(outputs, np.float32)
    for rows in _chunks(outputs, inputs):
        part = np.asarray(weight[rows], np.float32)
        scales[rows] = scales_of(absmax(part, 1), INT8_LEVELS, half=half, name=name)
        values[:, rows] = quantise(part, scales[rows, None]).T
    return values, scales


def blocked_weight(
    weight: np.ndarray,
    block: int = SCALE_BLOCK,
    *,
    levels: int = INT4_LEVELS,
    half: bool = False,
    name: str = "a weight",
) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight to integers with one scale per output channel and ``block`` inputs.

    Arguments and errors are those of ``int8_weight``; the last block may be short. ``levels`` is
    the largest integer in use: ``INT4_LEVELS`` (``w4``) or ``INT8_LEVELS`` (``w8``).

    Returns:
        Values (K, N) INT8 within ±levels, and scales (ceil(K / block), N) FP32.
    """
    outputs, inputs = weight.shape
    values = np.empty((inputs, outputs), np.int8)
    scales = np.empty((-(-inputs // block), outputs), np.float32)
    for rows in _chunks(outputs, inputs):
        part = _blocks(np.asarray(weight[rows], np.float32), block)
        of_rows = scales_of(absmax(part, 2), levels, half=half, name=name)
        scales[:, rows] = of_rows.T
        whole = quantise(part, of_rows[..., None], levels).reshape(len(part), -1)
        values[:, rows] = whole[:, :inputs].T
    return values, scales


def restored(values: np.ndarray, scales: np.ndarray, block: int | None = None) -> np.ndarray:
    """Return the weight (N, K) FP32 that rounded values (K, N) stand for.

    ``scales`` are (N,), or with ``block`` (ceil(K / block), N).
    """
    inputs, outputs = values.shape
    weight = np.empty((outputs, inputs), np.float32)
    for rows in _chunks(outputs, inputs):
        if block is None:
            scale = scales[rows, None]
        else:
            scale = np.repeat(scales[:, rows].T, block, axis=1)[:, :inputs]
        weight[rows] = dequantise(values[:, rows].T, scale)
    return weight


def fake_quantised_weight(weight: np.ndarray, block: int | None = None) -> np.ndarray:
    """Return a weight (N, K) as rounding leaves it: INT8, or with ``block`` INT4.

    Bit for bit ``restored(*int8_weight(weight))``, or ``restored(*blocked_weight(weight, block),
    block)``, in a fifth of the time: searches do this often, to matrices of a few MB.
    """
    outputs, inputs = weight.shape
    levels = INT4_LEVELS if block else INT8_LEVELS
    part = _blocks(weight, block or inputs)
    scales = scales_of(absmax(part, 2), levels)[..., None]
    steps = _steps(part, scales, levels)
    return np.multiply(steps, scales, out=steps).reshape(outputs, -1)[:, :inputs]


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Pack INT4 values as ONNX stores them: UINT8 (ceil(size / 2),), row major, low nibble first.

    An odd last value has a zero above it (ONNX, ``TensorProto`` of INT4).
    """
    flat = np.ascontiguousarray(values, np.int8).reshape(-1).view(np.uint8)
    packed = flat[0::2] & np.uint8(0x0F)
    packed[: flat.size // 2] |= flat[1::2] << np.uint8(4)
    return packed


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Invert ``pack_int4``: INT8 of ``shape``."""
    size = int(np.prod(shape))
    nibbles = np.empty(2 * packed.size, np.int8)
    nibbles[0::2] = (packed << np.uint8(4)).view(np.int8) >> 4  # the shift repeats the sign
    nibbles[1::2] = packed.view(np.int8) >> 4
    return nibbles[:size].reshape(shape)


def absmax(x: np.ndarray, axis: int) -> np.ndarray:
    """Return the largest |x| along ``axis``, without a copy of ``x``; NaN where there is one."""
    return np.maximum(x.max(axis), -x.min(axis))


def _steps(x: np.ndarray, scale: np.ndarray | np.float32, levels: int) -> np.ndarray:
    """Compute ``quantise`` up to its conversion to INT8."""
    with np.errstate(over="ignore"):  # an infinite ratio is clipped like a large one
        ratio = np.asarray(np.divide(x, scale, dtype=np.float32))
    np.rint(ratio, out=ratio)
    return np.clip(ratio, -levels, levels, out=ratio)


def _blocks(weight: np.ndarray, block: int) -> np.ndarray:
    """Reshape (N, K) to (N, blocks, block); a short last block is filled with zeros."""
    missing = -weight.shape[1] % block
    whole = np.pad(weight, ((0, 0), (0, missing))) if missing else weight
    return whole.reshape(len(weight), -1, block)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Cut rows of ``width`` values into pieces that fit ``_WEIGHT_CHUNK``."""
    step = max(1, _WEIGHT_CHUNK // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
