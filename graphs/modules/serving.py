"""A stage for visual rows that none of its layers changes: they serve keys and values, and no more.

In the cache of each layer they are what its norm and projections make of the rows as they came. So
they depend on the image and its place alone, and neither queries nor MLPs run for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..caches import ahead_of
from ..contract import injected_of
from ..parts import StagePart
from ..plan.plan import StagePlan
from ..text_config import TextConfig
from .decoder import Call, Inject
from .layer import ServingLayer
from .ops import Eager
from .rope import Rotary


class ServingStage(nn.Module):
    """Keys and values of the layers of (a part of) a stage of ``plan``, in the order of its caches.

    Parameters carry the checkpoint's own names, as in ``decoder.DecoderStage``.
    """

    def __init__(self, text: TextConfig, plan: StagePlan, part: StagePart, ops: Eager):
        super().__init__()
        self.layers = part.layers
        self.injected = part.injected_layers(text)
        held = {str(layer): ServingLayer(text, ops) for layer in part.attention_layers(plan)}
        self.ahead = ahead_of(plan, part.stage) if part.ends(plan) else None
        if self.ahead is not None:
            held[str(self.ahead)] = ServingLayer(text, ops, values=False)
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict(held)
        self.head = Rotary(text)
        self.inject = Inject()

    def compose(
        self, call: Call, rows: Any, positions: Any, inject: Mapping[int, Any]
    ) -> tuple[Any, list[Any]]:
        """Return the rows, with what is added to them on their way, and the new rows of every
        cache; run as calls of pieces, as ``DecoderStage.compose``.
        """
        cos, sin = call(self.head, rows, positions)
        new: list[Any] = []
        last = self.layers[1] if self.ahead is None else self.ahead + 1
        for number in range(self.layers[0], last):
            if number in self.injected and number in inject:
                rows = call(self.inject, rows, inject[number])
            if str(number) in self.model.layers:
                new += call(self.model.layers[str(number)], rows, cos, sin)
        return rows, new

    def compose_named(self, call: Call, inputs: Mapping[str, Any]) -> list[Any]:
        """Return the outputs of ``contract.serve_spec``, in its order."""
        added = injected_of(inputs)
        rows, new = self.compose(call, inputs["rows"], inputs["positions"], added)
        return [rows, *new] if self.injected else new
