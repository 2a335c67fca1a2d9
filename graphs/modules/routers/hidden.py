"""Routers with a hidden layer, of SkipGPT: width to a quarter of it, ReLU, two numbers.

Source: docs/methods.md, "SkipGPT".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan.routing import Routing
from ..ops import Eager
from .linear import LinearRouter
from .router import RouterLinear


class HiddenRouter(LinearRouter):
    """Executes as its base does, over the hidden layer."""

    def __init__(self, ops: Eager, width: int, routing: Routing):
        super().__init__(ops, width, routing, width // 4)
        self.hidden_layer = RouterLinear(ops, width, width // 4)

    def numbers(self, x: Tensor) -> Tensor:
        """Return (M, 2) for rows x (M, D): execute, skip."""
        return self.weight_predictor(torch.relu(self.hidden_layer(x)))


ROUTER = HiddenRouter
