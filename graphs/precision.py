"""The parts of an FP16 bundle that compute in more than FP16, with the reasons. Pure data.

``ALWAYS`` holds for every bundle. A ``Fp32Fallback`` is what the range check
(``compile/quantize/fp16_ranges.py``) found necessary besides, for one checkpoint: the manifest
carries it, export and runtimes obey it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HALF_MAX = 65504.0
"""Largest finite FP16 number."""

RANGE_MARGIN = 4.0
"""The factor below ``HALF_MAX`` within which a value counts as safe: other prompts reach further
than those tried, and kernels that add up in FP16 pass through partial sums above the result."""

SAFE_MAX = HALF_MAX / RANGE_MARGIN

ALWAYS: Mapping[str, str] = {
    "norm statistics": "a sum of squares overflows where the values themselves are harmless",
    "rotary angles": "a position times a frequency needs more than 11 bits; only the finished "
    "cosines and sines are rounded",
    "softmax": "exponentials of differences; also by which what is invisible is exactly nothing",
    "selection": "scores are compared with each other: rounding would tie what is not tied",
    "logits": "returned in FP32, so that sampling adds no rounding to the head's own",
}
"""Operations that stay FP32 whatever the checkpoint, and the reasons."""


@dataclass(frozen=True)
class Reason:
    """A tensor that reaches too far, how far, and what is done about it."""

    tensor: str
    largest: float
    remedy: str

    def __str__(self) -> str:
        return f"{self.tensor} reaches {self.largest:g}, {self.remedy}"


@dataclass(frozen=True)
class Fp32Fallback:
    """FP32 parts that the range check demands of one checkpoint's decoder.

    Attributes:
        rows: the residual stream travels in FP32 between layers, stages and graphs; every norm
            hands FP16 to the projections behind it.
        attention_shift, mlp_shift: by layer, s: what enters the block's last projection is scaled
            by 2**-s, its result by 2**s in FP32 while it is added to the residual. Powers of two
            are exact, so the function is the same.
        reasons: what was found, one for each remedy.
    """

    rows: bool = False
    attention_shift: Mapping[int, int] = field(default_factory=dict)
    mlp_shift: Mapping[int, int] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()

    def rows_dtype(self, dtype: str) -> str:
        """Return the type of the rows between graphs whose weights are of type ``dtype``."""
        return "float32" if self.rows else dtype

    def shifts(self, layer: int) -> tuple[int, int]:
        """Return the exponents of a layer's attention and MLP updates; 0: as they are."""
        return self.attention_shift.get(layer, 0), self.mlp_shift.get(layer, 0)


NO_FALLBACK = Fp32Fallback()
"""Nothing beyond ``ALWAYS``: most checkpoints, and every FP32 bundle."""
