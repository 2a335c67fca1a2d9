"""Routers of one linear layer to two numbers, of LRM-Pruning's SkipGPT and of D-LLM.

Source: docs/methods.md, "SkipGPT" and "D-LLM".
"""

from __future__ import annotations

from torch import Tensor

from ...plan.routing import Routing
from ..ops import Eager
from .router import Router, RouterLinear


class LinearRouter(Router):
    """Executes where the first number is not below the second one."""

    def __init__(self, ops: Eager, width: int, routing: Routing, inputs: int | None = None):
        super().__init__(ops, width, routing)
        self.weight_predictor = RouterLinear(ops, inputs or width, 2)

    def numbers(self, x: Tensor) -> Tensor:
        """Return (M, 2) for rows x (M, D): execute, skip."""
        return self.weight_predictor(x)

    def gates(self, x: Tensor, like: Tensor, real: Tensor | None, allowed: Tensor | None):
        """Return gates of 0 and 1, and by how much to execute is ahead; rows do not compete."""
        execute, skip = self.ops.reshape(self.numbers(x), (*like.shape[:2], 2), like).unbind(-1)
        return (execute >= skip).float(), execute - skip


ROUTER = LinearRouter
