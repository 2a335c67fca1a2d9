"""Answers of several prompts, one step of all of them in one call of each stage.

Every prompt has a lane: an entry of the batch axis with its own slots, positions and first free
slot. A call reads the weights once for all of them.

Source: docs/design.md, "Lanes".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..plan.gains import stage_gains
from ..plan.gates import stage_gates
from .chain import Chain
from .executor import Executor, Rows
from .rows import AppendedRows, on_axes, row_kinds


def decode_lanes(
    chains: Sequence[Chain],
    executor: Executor,
    rows: Rows,
    positions: np.ndarray,
    order: np.ndarray,
) -> Any:
    """Append one row to each of ``chains``, which share a plan; return the logits (B, V).

    Args:
        chains: by lane, of one prompt each, on executors of one lane each.
        executor: runs all these lanes at once.
        rows: (B, 1, D).
        positions: (B, 1) int32.
        order: (B, 1) int32.
    """
    plan = chains[0].plan
    segment = AppendedRows(False, rows, positions, order)
    for stage, facts in enumerate(plan.stages):
        for chain in chains:
            chain.reserve(stage, 1)
        width = executor.ensure_slots(stage, 0)
        first = []
        for lane, chain in enumerate(chains):
            chain.slots[stage].grow(width)
            own = slice(lane, lane + 1)
            row = AppendedRows(False, None, positions[own], order[own])
            first.append(chain.slots[stage].write(row))
        slots = [chain.slots[stage] for chain in chains]
        visual = np.concatenate([lane.visual for lane in slots])
        given = {
            "gates": stage_gates(plan, stage, visual, visual_call=False, decoding=True),
            "row_gain": stage_gains(facts, row_kinds([segment])) if facts.masked else None,
        }
        controls = {name: values for name, values in given.items() if values is not None}
        result = executor.append(
            stage,
            segment.rows,
            on_axes(positions, executor.axes),
            order,
            np.concatenate([lane.order for lane in slots]),
            first[0] if len(first) == 1 else np.array(first, np.int64),
            controls,
            {},
        )
        segment = AppendedRows(False, result.rows, positions, order)
    return result.logits
