"""Routers in common: linear layers in FP32, and the gather of the capacity form.

Gates are 0 or 1 by the sign of a difference, or compare rows with each other. A residual stream in
FP16 has large numbers among its channels, so routers compute in FP32 whatever the rows are.

Source: docs/methods.md, "Routed depth".
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from ...plan.routing import Routing
from ..ops import SOFTMAX_FLOOR, Eager
from .route import Route

LAST = torch.finfo(torch.float32).max
"""Score of a call's last row where rows are gathered: the next token is read from it."""


class RouterLinear(nn.Module):
    """A projection that no scheme quantises. x: (..., K) FP32 -> (..., N) FP32."""

    def __init__(self, ops: Eager, inputs: int, outputs: int):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (M, N) for x: (M, K)."""
        return self.ops.linear(x, self.weight.float(), self.bias.float())


class Router(nn.Module):
    """Gates of a call's rows in one sublayer, or in both. A subclass computes them."""

    def __init__(self, ops: Eager, width: int, routing: Routing):
        super().__init__()
        self.ops, self.width, self.routing = ops, width, routing

    def gates(self, x: Tensor, like: Tensor, real: Tensor | None, allowed: Tensor | None):
        """Return gates and scores (B, Q) of rows x (B*Q, D), all FP32; ``like`` is (B, Q, ...)."""
        raise NotImplementedError

    def forward(self, rows: Tensor, real: Tensor | None, allowed: Tensor | None) -> Route:
        """Return the route of rows (B, Q, D), which come as they enter the layer.

        ``real`` (B, Q) bool and ``allowed`` (B, 1) FP32, of ``Rivals``, are there where rows
        compete.
        """
        x = self.ops.reshape(rows, (rows.shape[0] * rows.shape[1], self.width)).float()
        gate, score = self.gates(x, rows, real, allowed)
        if not self.routing.gathers:
            return Route(gate[:, :, None])
        assert real is not None
        place = torch.arange(rows.shape[1], device=rows.device)
        score = torch.where(real, score, SOFTMAX_FLOOR)
        score = torch.where(place == rows.shape[1] - 1, LAST, score)
        index = self.ops.best(score, self.routing.fraction)
        gate = self.ops.take(gate[:, :, None], index)
        if not self.routing.router.whole_prompt:
            assert allowed is not None
            # Padding takes none of the share: a prompt's rows are treated as they are without it.
            rank = torch.arange(index.shape[1], device=rows.device)
            gate = torch.where((rank < allowed)[:, :, None], gate, 0.0)
        return Route(gate, index)


class Rivals(nn.Module):
    """Count of the rows that compete and may run, once for all layers of a call."""

    def __init__(self, routing: Routing, max_rows: int):
        super().__init__()
        self.allowed = [routing.allowed(rows) for rows in range(max_rows + 1)]

    def forward(self, real: Tensor) -> Tensor:
        """Return how many of each sample's rows may run, (B, 1) FP32, for ``real`` (B, Q) bool."""
        table = torch.tensor(self.allowed, dtype=torch.float32, device=real.device)
        count = real.float().sum(-1, keepdim=True).long()
        return table[count]


def make_router(ops: Eager, width: int, routing: Routing) -> Router:
    """Return one router of a layer whose rows have ``width`` channels."""
    module = import_module(f".{routing.router.module}", __package__)
    return module.ROUTER(ops, width, routing)
