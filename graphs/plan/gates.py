"""Gates of text-blind layers, slot by slot and call by call: the host fills them in. NumPy only.

Source: docs/design.md, "Text-blind layers"; docs/methods.md, "Gated and renormalised masks".
"""

from __future__ import annotations

import numpy as np

from .plan import StagePlan


def stage_gates(
    plan: StagePlan, stage: int, visual: np.ndarray, visual_call: bool, decoding: bool = False
) -> np.ndarray | None:
    """Return value gate and sink gate of one call, for each gated layer of a stage.

    Args:
        plan: of which ``stage`` is a stage.
        stage: its index.
        visual: (B, S) bool, the slots that hold visual rows once the call has been appended.
        visual_call: whether the call's rows are visual.
        decoding: whether they are rows of the answer.

    Returns:
        (gated layers, 2, B, S) float32, or None where no layer is gated.
    """
    facts = plan.stages[stage]
    if not facts.gated_layers:
        return None
    gates = np.zeros((len(facts.gated_layers), 2, *visual.shape), np.float32)
    gates[:, 0] = 1.0
    if decoding and plan.decode_sees_shallow_vision:
        return gates
    for index, layer in enumerate(facts.gated_layers):
        mode = facts.modes[layer - facts.layers[0]]
        value, sink = gates[index]
        if visual_call:
            if mode != "text_blind":
                value[visual] = 0.0
        elif mode == "sink_half":
            first_half = np.cumsum(visual, 1) <= visual.sum(1, keepdims=True) // 2
            value[visual & first_half] = 0.0
        else:
            value[visual] = 0.0
            if mode == "sink":
                sink[visual] = 1.0
    return gates
