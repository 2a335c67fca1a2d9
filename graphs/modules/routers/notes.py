"""Notes of which rows ran: the gates of every call of every router, put at the rows' positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ...contract import PADDING_ORDER
from .route import Route
from .router import Router


class GateNotes:
    """Gates that the routers of ``stages`` gave.

    Attributes:
        order: (B, Q) int32, places of the rows of the call that runs next.
    """

    def __init__(self, stages: Sequence[nn.Module]):
        self.order = np.zeros((1, 0), np.int32)
        self.noted: dict[str, list[tuple[np.ndarray, Tensor]]] = {}
        for stage in stages:
            for name, module in stage.named_modules():
                if isinstance(module, Router):
                    self.noted[name] = []
                    module.register_forward_hook(partial(self._note, name))

    def _note(self, name: str, router: nn.Module, given: tuple, route: Route) -> None:
        """Note the gates (B, Q) of one call; a row that was not gathered has 0."""
        gates = route.scale[:, :, 0]
        if route.picked is not None:
            every = torch.zeros(self.order.shape)
            gates = every.scatter(1, route.picked, gates)
        self.noted[name].append((self.order, gates))

    def placed(self, rows: int) -> dict[str, Tensor]:
        """Return the gates (B, rows) at the places of their rows, by router; 0 elsewhere."""
        out = {}
        for name, calls in self.noted.items():
            placed = torch.zeros(len(self.order), rows)
            for order, gates in calls:
                sample, row = np.nonzero(order < PADDING_ORDER)
                placed[sample, order[sample, row]] = gates[sample, row]
            out[name] = placed
        return out
