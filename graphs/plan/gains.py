"""Gains of layers that freeze rows, row by row and call by call: the host fills them. NumPy only.

Source: docs/design.md, "Frozen rows".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .stages import PARTS, Stage


def stage_gains(stage: Stage, kinds: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the factors of what attention and MLP add to each row of a call.

    Args:
        stage: one that freezes rows of its calls (``Stage.masked``).
        kinds: (B, Q) bool by the names of ``stages.FROZEN_ROWS``, which rows are of that kind.

    Returns:
        (gained layers, 2, B, Q) float32, attention before MLP.
    """
    shape = next(iter(kinds.values())).shape
    gains = np.ones((len(stage.gained_layers), len(PARTS), *shape), np.float32)
    for frozen in stage.masked:
        for layer in frozen.layers:
            at = stage.gained_layers.index(layer), PARTS.index(frozen.part)
            gains[at][kinds[frozen.rows]] = 0.0
    return gains
