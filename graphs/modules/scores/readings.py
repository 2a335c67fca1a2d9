"""The view that a score has of an edge: inputs of its graph by their names, and what follows.

Source: ``contract.select_spec``; docs/design.md, "Selection".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..last_row import last_row_attention
from ..ops import Eager


class EdgeReadings:
    """Inputs of a selection by name; of an INT8 cache with its scales, which ``ops`` reads."""

    def __init__(self, inputs: Mapping[str, Tensor | None], ops: Eager):
        self.inputs, self.ops = inputs, ops

    def __getitem__(self, name: str) -> Tensor:
        value = self.inputs[name]
        assert value is not None, f"the score does not say that it reads {name}"
        return value

    def cache(self, name: str) -> Tensor:
        """Return ``key`` or ``value``, (B, G, S, d), in floats."""
        scale = self.inputs[f"{name}_scale"]
        return self[name] if scale is None else self.ops.read(self[name], scale)

    def last_row_attention(self) -> Tensor:
        """Return the last row's attention (B, G, H/G, S) to every slot, in FP32."""
        key = self.cache("key")
        visible = self["slot_order"] <= self["query_order"][:, None]
        return last_row_attention(self["probe_query"], key, visible)

    def of_visual(self, by_slot: Tensor) -> Tensor:
        """Return of numbers (B, S) for each slot those of the visual rows, (B, N)."""
        return torch.gather(by_slot, 1, self["visual_slots"])
