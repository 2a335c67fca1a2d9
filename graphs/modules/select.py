"""The last prompt row's score of each visual token, and the tokens that survive an edge.

``Selector`` keeps the best K. ``Prober`` only reads, for plans that decide per prompt.

No contribution tensor is formed. With ``a`` the softmax row of the last prompt row and ``o`` its
attention output, per token j (docs/methods.md, "The contribution of a visual token", checked
against brute force in the tests):

    L2_j  = sqrt( sum_h a_hj^2 |v_hj|^2 )
    cos_j = (O - s_j) / sqrt( O (O - 2 s_j + L2_j^2) ),   s_j = sum_h a_hj <v_hj, o_h>,  O = |o|^2
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..plan.stages import Edge
from .ops import SOFTMAX_FLOOR, Eager

UNSEEN = -1.0
"""Score of a padding row: below every real score, so that it is chosen last."""


def last_row_attention(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """Return the softmax row of one query. query: (B, H, d); key: (B, G, S, d); visible: (B, S).

    Returns (B, G, H/G, S) in FP32, the heads sorted by the group whose keys they share.
    """
    batch, heads, width = query.shape
    groups = key.shape[1]
    grouped = query.float().reshape(batch, groups, heads // groups, width) * width**-0.5
    scores = grouped @ key.float().transpose(-1, -2)
    return torch.where(visible[:, None, None], scores, SOFTMAX_FLOOR).softmax(-1)


def value_norm(attention: Tensor, value: Tensor) -> Tensor:
    """Return the L2 norm (B, S) of each slot's contribution to (B, G, r, S) attention."""
    return _squared_norm(attention, value).sqrt()


def _squared_norm(attention: Tensor, value: Tensor) -> Tensor:
    squared = value.float().pow(2).sum(-1)  # (B, G, S)
    return (attention.pow(2).sum(2) * squared).sum(1)


def cosine_without(attention: Tensor, value: Tensor) -> Tensor:
    """Return the cosine (B, S) between the last row's output with and without each slot."""
    wide = value.float()
    out = attention @ wide  # (B, G, r, d)
    total = out.pow(2).sum((1, 2, 3))[:, None]
    along = (attention * (out @ wide.transpose(-1, -2))).sum((1, 2))
    squared = _squared_norm(attention, value)
    return (total - along) / (total * (total - 2 * along + squared)).clamp_min(1e-12).sqrt()


class Selector(nn.Module):
    """The graph at a ``select`` edge; contract: ``contract.select_spec``. Runs in FP32.

    An INT8 cache comes with its scales (G,); ``ops`` reads it.
    """

    def __init__(self, edge: Edge, ops: Eager | None = None):
        super().__init__()
        self.ops = ops or Eager()
        self.score, self.keep = edge.score, edge.keep
        self.kind = (edge.score, edge.keep, self.ops.name)

    def forward(
        self,
        probe_query: Tensor,
        key: Tensor,
        value: Tensor | None,
        slot_order: Tensor,
        query_order: Tensor,
        visual_slots: Tensor,
        rows: Tensor,
        positions: Tensor,
        order: Tensor,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return kept rows (B, K, D), their positions and order (B, K), and all scores (B, N)."""
        if key_scale is not None:
            key = self.ops.read(key, key_scale)
        visible = slot_order <= query_order[:, None]
        attention = last_row_attention(probe_query, key, visible)
        if self.score == "value_norm":
            assert value is not None
            if value_scale is not None:
                value = self.ops.read(value, value_scale)
            by_slot = value_norm(attention, value)
        else:
            by_slot = attention.mean((1, 2))
        scores = torch.gather(by_slot, 1, visual_slots)
        # Padding rows share the order of an empty slot, which no query sees.
        scores = torch.where(order <= query_order[:, None], scores, UNSEEN)
        best = torch.topk(scores, self.keep, dim=1).indices
        # Ascending, to keep the order; as floats, because old TensorRT sorts nothing else.
        kept = torch.topk(best.float(), self.keep, dim=1, largest=False).values.long()
        index = kept[:, :, None].expand(-1, -1, rows.shape[2])
        return (
            torch.gather(rows, 1, index),
            torch.gather(positions, 1, kept),
            torch.gather(order, 1, kept),
            scores,
        )


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
