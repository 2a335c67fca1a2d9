"""SparseVLM's score: the mean attention of the question's rows that have most to do with the image.

These *raters* are the rows whose attention to all visual rows together is not below the mean of the
question's rows.

Source: docs/methods.md, "SparseVLM".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import INVISIBLE
from ..last_row import row_attention
from .readings import EdgeReadings


def score(edge: EdgeReadings) -> Tensor:
    """Return the raters' mean attention (B, N), over heads and raters, to each visual row."""
    order = edge["text_order"]
    visible = edge["slot_order"][:, None] <= order[:, :, None]
    attention = row_attention(edge["text_queries"].transpose(1, 2), edge.cache("key"), visible)
    slots = edge["visual_slots"][:, None].expand(-1, order.shape[1], -1)
    to_vision = torch.gather(attention.mean((1, 2)), 2, slots)  # (B, T, N)
    real = order != INVISIBLE
    mass = torch.where(real, to_vision.sum(-1), 0.0)
    mean = mass.sum(1, keepdim=True) / real.sum(1, keepdim=True)
    # The mean of equal numbers may round to more than each of them.
    bound = torch.minimum(mean, mass.amax(1, keepdim=True))
    raters = (real & (mass >= bound)).float()
    return (to_vision * raters[:, :, None]).sum(1) / raters.sum(1, keepdim=True)
