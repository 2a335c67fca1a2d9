"""The vision encoders that there are, by the kind that a config names."""

from __future__ import annotations

from ..config import ModelConfig
from ..precision import NO_FALLBACK, Fp32Fallback
from ..vision_config import PATCHES
from .ops import Eager
from .patches import PatchVision
from .vision import Encoder, Vision


def make_vision(
    config: ModelConfig,
    ops: Eager,
    fallback: Fp32Fallback = NO_FALLBACK,
    readings: tuple[str, ...] = ("rows",),
) -> Encoder:
    """Return the module of the ``vision`` graph that hands out ``readings``."""
    kind = PatchVision if config.vision.kind == PATCHES else Vision
    return kind(config, ops, fallback, readings)
