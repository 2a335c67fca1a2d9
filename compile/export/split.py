"""Stages cut into parts that a compiler can swallow: its peak memory grows with a part's weights.

A part is a graph with the contract of a stage over some of its layers; parts follow each other as
stages do, so nobody but the executor's loop knows of them.
"""

from __future__ import annotations

import math
from itertools import pairwise

from ...graphs.config import TextConfig
from ...graphs.contract import StagePart
from ...graphs.errors import CapacityError
from ...graphs.plan.plan import StagePlan
from ..checkpoint.names import HEAD_WEIGHT, decoder_shapes

COPIES = 3
"""Times a part's weights that compiling it takes at its peak: two copies and the mapped file."""

BASE = 512 << 20
"""Bytes that the compiler takes besides."""


def compiler_peak(weight_bytes: int) -> int:
    """Bytes that compiling a graph with so many bytes of weights is expected to take."""
    return BASE + COPIES * weight_bytes


def split(text: TextConfig, plan: StagePlan, itemsize: int, budget: int) -> list[StagePart]:
    """As few parts as ``budget`` bytes of compiler memory allow, equally deep within a stage.

    Args:
        text: shape of the decoder.
        plan: its stages.
        itemsize: bytes of one weight.
        budget: what compiling one part may take.

    Raises:
        CapacityError: a single layer takes more.
    """
    shapes = decoder_shapes(text)
    of_layer = [0] * text.layers
    tail = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if name.startswith("model.layers."):
            of_layer[int(name.split(".")[2])] += nbytes
        elif name == HEAD_WEIGHT:
            tail = nbytes
    parts = []
    for index, stage in enumerate(plan.stages):
        extra = tail if index == len(plan.stages) - 1 else 0
        parts += _cut(index, stage.layers, of_layer, extra, budget)
    return parts


def _cut(
    stage: int, layers: tuple[int, int], of_layer: list[int], tail: int, budget: int
) -> list[StagePart]:
    """The fewest equal cuts of one stage whose every part fits; ``tail`` weighs on the last."""
    first, stop = layers
    for count in range(1, stop - first + 1):
        bounds = [first + (stop - first) * i // count for i in range(count + 1)]
        ranges = list(pairwise(bounds))
        sizes = [sum(of_layer[start:end]) for start, end in ranges]
        sizes[-1] += tail
        if all(compiler_peak(size) <= budget for size in sizes):
            return [StagePart(stage, one) for one in ranges]
    needed = compiler_peak(max(max(of_layer[first:stop]), of_layer[stop - 1] + tail))
    raise CapacityError(
        f"compiling one layer of stage {stage} takes about {needed / 2**30:.1f} GiB, the budget is "
        f"{budget / 2**30:.1f} GiB. Give more: --build-memory {math.ceil(needed / 2**30)}GiB"
    )
