"""The last prompt row's view of a layer, from its query and the layer's cache.

No contribution tensor is formed. With ``a`` the softmax row of the last prompt row and ``o`` its
attention output, per token j (docs/methods.md, "The contribution of a visual token", checked
against brute force in the tests):

    L2_j  = sqrt( sum_h a_hj^2 |v_hj|^2 )
    cos_j = (O - s_j) / sqrt( O (O - 2 s_j + L2_j^2) ),   s_j = sum_h a_hj <v_hj, o_h>,  O = |o|^2
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import SOFTMAX_FLOOR


def last_row_attention(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """Return the softmax row of one query. query: (B, H, d); key: (B, G, S, d); visible: (B, S).

    Returns (B, G, H/G, S) in FP32, the heads sorted by the group whose keys they share.
    """
    batch, heads, width = query.shape
    groups = key.shape[1]
    grouped = query.float().reshape(batch, groups, heads // groups, width) * width**-0.5
    scores = grouped @ key.float().transpose(-1, -2)
    return torch.where(visible[:, None, None], scores, SOFTMAX_FLOOR).softmax(-1)


def row_attention(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """Return the softmax rows of several queries. query: (B, H, T, d); visible: (B, T, S).

    Otherwise as ``last_row_attention``: (B, G, H/G, T, S).
    """
    batch, heads, count, width = query.shape
    groups = key.shape[1]
    grouped = query.float().reshape(batch, groups, -1, width) * width**-0.5
    scores = grouped @ key.float().transpose(-1, -2)
    scores = scores.reshape(batch, groups, heads // groups, count, key.shape[2])
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
