"""The graphs between two stages: the visual tokens that survive an edge, and a reading of a layer.

``Selector`` keeps the best K, by a score in ``scores``. ``Prober`` only reads, for plans that
decide per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..plan.stages import Edge
from .last_row import cosine_without, last_row_attention, value_norm
from .ops import Eager
from .scores.readings import EdgeReadings

UNSEEN = -1.0
"""Score of a padding row: below every real score, so that it is chosen last."""


class Selector(nn.Module):
    """The graph at a ``select`` edge; contract: ``contract.select_spec``. Runs in FP32.

    An INT8 cache comes with its scales (G,); ``ops`` reads it.
    """

    def __init__(self, edge: Edge, ops: Eager | None = None):
        super().__init__()
        self.ops = ops or Eager()
        assert edge.keep is not None
        self.keep = edge.keep
        self.score = import_module(f".scores.{edge.score}", __package__).score
        self.kind = (edge.score, edge.keep, self.ops.name)

    @classmethod
    def ordered(cls, named: Mapping[str, Any]) -> list[Any]:
        """Return the arguments of ``forward``, from what there is of them by name."""
        return [named.get(name) for name in signature(cls.forward).parameters if name != "self"]

    def of(self, named: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run on tensors, and arrays, which are copied, by name."""
        given = self.ordered(named)
        return self(*(torch.tensor(v) if isinstance(v, np.ndarray) else v for v in given))

    def forward(
        self,
        probe_query: Tensor | None,
        key: Tensor | None,
        value: Tensor | None,
        slot_order: Tensor | None,
        query_order: Tensor,
        visual_slots: Tensor | None,
        rows: Tensor,
        positions: Tensor,
        order: Tensor,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        change: Tensor | None = None,
        text_queries: Tensor | None = None,
        text_order: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return kept rows (B, K, D), their positions (B, K) or (B, K, A), their order (B, K), and
        all scores (B, N).

        What the score does not read may be None.
        """
        inputs = {name: value for name, value in locals().items() if name != "self"}
        scores = self.score(EdgeReadings(inputs, self.ops))
        # Padding rows share the order of an empty slot, which no query sees.
        scores = torch.where(order <= query_order[:, None], scores, UNSEEN)
        best = torch.topk(scores, self.keep, dim=1).indices
        # Ascending, to keep the order; as floats, because old TensorRT sorts nothing else.
        kept = torch.topk(best.float(), self.keep, dim=1, largest=False).values.long()
        return (
            torch.gather(rows, 1, _along(kept, rows)),
            torch.gather(positions, 1, _along(kept, positions)),
            torch.gather(order, 1, kept),
            scores,
        )


def _along(index: Tensor, x: Tensor) -> Tensor:
    """Return ``index`` (B, K) as ``torch.gather`` wants it for x (B, N) or (B, N, W)."""
    return index if x.ndim == 2 else index[:, :, None].expand(-1, -1, x.shape[2])


class Prober(nn.Module):
    """The graph that reads one layer; contract: ``contract.probe_spec``. Runs in FP32.

    No weights and no plan: one graph serves every layer of a model. An INT8 cache comes with its
    scales (G,); ``ops`` reads it.
    """

    def __init__(self, ops: Eager | None = None):
        super().__init__()
        self.ops = ops or Eager()
        self.kind = (self.ops.name,)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slot_order: Tensor,
        query_order: Tensor,
        visual_slots: Tensor,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return cosine without each visual token and norm of its contribution: (B, N) each."""
        if key_scale is not None and value_scale is not None:
            key, value = self.ops.read(key, key_scale), self.ops.read(value, value_scale)
        attention = last_row_attention(query, key, slot_order <= query_order[:, None])
        return (
            torch.gather(cosine_without(attention, value), 1, visual_slots),
            torch.gather(value_norm(attention, value), 1, visual_slots),
        )
