"""Contributions of visual tokens to the last prompt row in one decoder layer. NumPy, in FP32.

With ``w`` the weights that the row really gives to values (its softmax row after the layer's gates)
and ``o`` its attention output over all heads, token j contributes c_j = concat_h w_hj v_hj:

    norm_j   = |c_j| = sqrt( sum_h w_hj^2 |v_hj|^2 )
    cosine_j = cos(o - c_j, o) = (O - s_j) / sqrt( O (O - 2 s_j + norm_j^2) )
    s_j      = sum_h w_hj <v_hj, o_h>,   O = |o|^2

The one form without torch, which explaining must do without, and with gates: a page about the
answer must show what the graphs did. The graphs' own is ``graphs/modules/select.py``; the tests
hold both against each other. Source: docs/methods.md, "The contribution of a visual token".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gates:
    """Value gate and sink gate (S,) of one text-blind layer; ``renorm`` masks before the softmax.

    A sink gate moves the weight of its slots to the value of the first of them.
    """

    value: np.ndarray
    sink: np.ndarray
    renorm: bool = False


@dataclass(frozen=True)
class LayerReading:
    """One layer. Arrays are over the n visual slots that were asked about.

    norms: |c_j|; cosines: cos(o - c_j, o), 1 where a token changes nothing.
    attention: share of the softmax row on vision before gates, mean over heads.
    output: |o|. vision, text: norms of the two sums that make o, the visual c_j and all others.
    """

    norms: np.ndarray
    cosines: np.ndarray
    attention: float
    output: float
    vision: float
    text: float

    @property
    def part(self) -> float:
        """Vision's part of the output, in 0..1: |sum of visual c_j| against both sums."""
        both = self.vision + self.text
        return self.vision / both if both else 0.0


def unread(tokens: int) -> LayerReading:
    """Return the reading of a layer without attention: no token changes anything."""
    return LayerReading(np.zeros(tokens), np.ones(tokens), 0.0, 0.0, 0.0, 0.0)


def read_row(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    visible: np.ndarray,
    visual: np.ndarray,
    gates: Gates | None = None,
) -> LayerReading:
    """Read one row of one layer.

    Args:
        query: (H, d), rotated.
        key: (G, S, d), rotated; G divides H, heads are sorted by group.
        value: (G, S, d).
        visible: (S,) bool, slots that the row sees.
        visual: (n,) slots of the visual tokens.
        gates: of the layer, where it has any.
    """
    groups, _, width = key.shape
    if gates is not None and gates.renorm:
        visible = visible & (gates.value > 0)
    grouped = query.astype(np.float32).reshape(groups, -1, width) * np.float32(width**-0.5)
    scores = grouped @ key.astype(np.float32).transpose(0, 2, 1)  # (G, H/G, S)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attention = float(weights[..., visual].sum(-1).mean())
    if gates is not None and not gates.renorm:
        weights = _gated(weights, gates)

    wide = value.astype(np.float32)
    out = weights @ wide  # (G, H/G, d)
    seen = np.ascontiguousarray(weights[..., visual])  # (G, H/G, n)
    values = wide[:, visual]
    squared = ((seen**2).sum(1) * (values**2).sum(-1)).sum(0)
    along = (seen * (out @ values.transpose(0, 2, 1))).sum((0, 1))
    total = float((out**2).sum())
    vision = seen @ values
    return LayerReading(
        norms=np.sqrt(squared),
        cosines=(total - along) / np.sqrt(np.maximum(total * (total - 2 * along + squared), 1e-12)),
        attention=attention,
        output=total**0.5,
        vision=float(np.linalg.norm(vision)),
        text=float(np.linalg.norm(out - vision)),
    )


def _gated(weights: np.ndarray, gates: Gates) -> np.ndarray:
    """Return softmax weights (..., S) as the gates leave them on each slot's own value."""
    left = weights * gates.value.astype(np.float32)
    moved = np.flatnonzero(gates.sink)
    if moved.size:
        left[..., moved[0]] += (weights * gates.sink.astype(np.float32)).sum(-1)
    return left
