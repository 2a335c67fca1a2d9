"""Routers that compare all rows of a prompt, of MoD: those above the k-th largest number run.

Source: docs/methods.md, "MoD".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan.routing import Routing
from ..ops import SOFTMAX_FLOOR, Eager
from .router import Router, RouterLinear


class ThresholdRouter(Router):
    """Executes rows above the k-th largest number, scaled by that number."""

    def __init__(self, ops: Eager, width: int, routing: Routing):
        super().__init__(ops, width, routing)
        self.weight_predictor = RouterLinear(ops, width, 1)

    def gates(self, x: Tensor, like: Tensor, real: Tensor | None, allowed: Tensor | None):
        """Return the numbers w where they are above the k-th largest, else 0; and w.

        Nothing is sorted: w is above it where fewer than k real rows, itself among them, have as
        much. Where k is 1, the largest itself runs, as every row of a decode step does.
        """
        assert real is not None
        assert allowed is not None
        w = self.ops.reshape(self.weight_predictor(x), (*like.shape[:2],), like)
        rivals = torch.where(real, w, SOFTMAX_FLOOR)
        as_much = (rivals[:, None, :] >= w[:, :, None]).float().sum(-1)
        largest = rivals.max(dim=-1, keepdim=True).values
        many = allowed > 1  # ONNX Runtime has no Where over bools
        runs = (many & (as_much < allowed)) | (~many & (w >= largest))
        return torch.where(runs, w, 0.0), w


ROUTER = ThresholdRouter
