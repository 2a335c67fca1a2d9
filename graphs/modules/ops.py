"""The operators that stages are written in, in plain torch.

``Eager`` is the reference of every test; each lowering writes some of its methods anew. Stage
modules know none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SOFTMAX_FLOOR = torch.finfo(torch.float32).min
"""Score of an invisible key. Not -inf: a row that sees nothing must stay finite."""


class View(NamedTuple):
    """The slots that one call sees and writes; made once per call by ``ops.view``.

    write_index: (B,) int64. visible: (B, 1, Q, S) bool, in the portable lowering (B, 1, Q, S+Q):
    the old slots, then the new rows. window, only where new rows are returned: of ``Portable``
    (B, Q) their slots, of ``LlmRows`` (S,) the new row of each slot, or -1.
    """

    write_index: Tensor
    visible: Tensor
    window: Tensor | None = None


@dataclass(frozen=True)
class Gate:
    """Per-slot gates of a text-blind layer (docs/design.md, "Text-blind layers").

    value: (B, S); sink: (B, S) or None where the layer has no sink. With ``renorm`` the value gate
    masks before the softmax instead of scaling after it.
    """

    value: Tensor
    sink: Tensor | None
    renorm: bool

    def masked(self, visible: Tensor) -> Tensor:
        """Return ``visible`` (B, 1, Q, S) without the slots whose value gate is closed."""
        return visible & (self.value > 0)[:, None, None, :]

    def values(self, value: Tensor, first_visual: Tensor | None) -> Tensor:
        """Return value * V + sink * V[first visual slot], with V: (B, G, S, d)."""
        gated = value * self.value[:, None, :, None].to(value.dtype)
        if first_visual is None or self.sink is None:
            return gated
        return gated + self.sink[:, None, :, None].to(value.dtype) * first_visual

    def first_visual(self, value: Tensor) -> Tensor | None:
        """Return (B, G, 1, d), the value in the first slot whose sink gate is open."""
        if self.sink is None:
            return None
        index = torch.argmax(self.sink.float(), dim=-1)[:, None, None, None]
        return torch.gather(value, 2, index.expand(-1, value.shape[1], 1, value.shape[3]))


Scales = tuple[Tensor, Tensor]
"""Scales of an INT8 cache: keys' and values', (G,) each."""


class Eager:
    """Plain torch. Caches are written in place, scores are explicit, softmax is FP32.

    ``returns_new_rows``: caches are read and not written; new rows are returned, and the caller
    writes them.
    """

    name = "eager"
    returns_new_rows = False

    def view(self, order: Tensor, slot_order: Tensor, write_index: Tensor) -> View:
        """Return the call's view: a key is seen when its order is not above the query's.

        order: (B, Q) int32; slot_order: (B, S) int32, as it is after this append.
        """
        return View(write_index, sees(order, slot_order))

    def reshape(self, x: Tensor, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        """Reshape x: one size may be open, or two that are the first of ``like``."""
        del like
        return x.reshape(shape)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return (M, N) for x: (M, K), weight: (N, K)."""
        return F.linear(x, weight, bias)

    def fake_quantised(self, x: Tensor, scale: Tensor) -> Tensor:
        """Round to multiples of ``scale`` (), at most 127 of them; halves go to even."""
        return torch.clamp(torch.round(x / scale), -128, 127) * scale

    def restored(
        self, weight: Tensor, scale: Tensor, block: int | None, zero: Tensor | None = None
    ) -> Tensor:
        """Return dequantised integers (K, N); scale: (N,), or (K / block, N) with ``block`` inputs.

        ``zero``: zero points, all 0, for who wants them said.
        """
        if block is not None:
            scale = scale.repeat_interleave(block, 0)[: weight.shape[0]]
        return weight.to(scale.dtype) * scale

    def stored(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Return rows (B, G, Q, d) as an INT8 cache keeps them; scale: (G,). Halves go to even."""
        return torch.clamp(torch.round(rows / scale[:, None, None]), -128, 127).to(torch.int8)

    def read(self, cache: Tensor, scale: Tensor) -> Tensor:
        """Return what an INT8 cache (B, G, S, d) stands for, in the type of scale (G,)."""
        return cache.to(scale.dtype) * scale[:, None, None]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return (M, N) for x: (M, K), weight: (K, N)."""
        return x @ weight

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise with FP32 statistics, as Llama's norm does; the result has weight's type."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(weight.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply half-split rotary embedding. x: (B, H, Q, d); cos, sin: (B, Q, d/2)."""
        half = x.shape[-1] // 2
        left, right = x[..., :half], x[..., half:]
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    def best(self, scores: Tensor, share: Fraction) -> Tensor:
        """Return the places (B, k) of the best of scores (B, Q), best first, of equals the first; k
        is a share of Q, rounded up.
        """
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices
        return order[:, : share_of(share, scores.shape[1])]

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Return rows (B, k, ...) of x (B, Q, ...) at ``index`` (B, k)."""
        return x[samples(index), index]

    def put(self, x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """Return x (B, Q, ...) with ``rows`` (B, k, ...) at ``index`` (B, k)."""
        return x.index_put((samples(index), index), rows)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return scaled products (B, G, H/G*Q, S) of queries (B, H, Q, d) and keys (B, G, S, d)."""
        return grouped(q, k) @ k.transpose(-1, -2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Compute grouped attention. q: (B, H, Q, d); k, v: (B, G, S, d); visible: (B, 1, Q, S)."""
        probs = masked_softmax(self.scores(q, k), visible, q.shape, k.shape[1]).to(q.dtype)
        return (probs @ v).reshape(q.shape)

    def scatter(self, cache: Tensor, rows: Tensor, write_index: Tensor) -> Tensor:
        """Write rows (B, G, Q, d) into the cache (B, G, S, d); one index serves the batch."""
        start = int(write_index[0])
        cache[:, :, start : start + rows.shape[2]] = rows
        return cache

    def append(
        self, cache: Tensor, rows: Tensor, scale: Tensor | None, view: View
    ) -> tuple[Tensor, Tensor]:
        """Append rows (B, G, Q, d) to a cache (B, G, S, d), which is INT8 where it has a scale.

        Returns what the graph puts out, and the whole cache (B, G, S, d) as attention reads it.
        """
        if scale is None:
            kept = self.scatter(cache, rows, view.write_index)
            return kept, kept
        kept = self.scatter(cache, self.stored(rows, scale), view.write_index)
        return kept, self.read(kept, scale)

    def keep(self, cache: Tensor | None, rows: Tensor, scale: Tensor | None, view: View) -> Tensor:
        """Append rows to a cache that this call does not read; return what is put out for it, the
        new rows alone where no cache is given.
        """
        if cache is None:
            return rows if scale is None else self.stored(rows, scale)
        return self.append(cache, rows, scale, view)[0]

    def cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, Tensor],
        view: View,
        gate: Gate | None,
        scales: Scales | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append k, v: (B, G, Q, d) to the cache and attend to all of it.

        With ``scales`` the cache is INT8, and attention sees what rounding left of every row, the
        new ones too: a row means the same in the call that brings it as in all later ones.

        Returns the attention output (B, H, Q, d), and what is put out for the two caches.
        """
        of_keys, of_values = scales or (None, None)
        keys, seen_keys = self.append(cache[0], k, of_keys, view)
        values, seen = self.append(cache[1], v, of_values, view)
        return self.gated_attention(q, seen_keys, seen, view, gate), keys, values

    def gated_attention(
        self, q: Tensor, k: Tensor, v: Tensor, view: View, gate: Gate | None
    ) -> Tensor:
        """Compute grouped attention to a whole cache. q: (B, H, Q, d); k, v: (B, G, S, d)."""
        visible = view.visible
        if gate is not None and gate.renorm:
            visible = gate.masked(visible)
        elif gate is not None:
            v = gate.values(v, gate.first_visual(v))
        return self.attend(q, k, v, visible)


def share_of(share: Fraction, rows: int) -> int:
    """Return a share of so many rows, rounded up; a size may be a symbol."""
    return (rows * share.numerator + (share.denominator - 1)) // share.denominator


def samples(index: Tensor) -> Tensor:
    """Return the number (B, 1) of each sample of ``index`` (B, k)."""
    return torch.arange(index.shape[0], device=index.device)[:, None]


def sees(order: Tensor, key_order: Tensor) -> Tensor:
    """Return the mask (B, 1, Q, S) of orders (B, Q) and (B, S)."""
    return key_order[:, None, None, :] <= order[:, None, :, None]


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """Return (B, G, H/G*Q, d), scaled, for (B, H, Q, d): queries of one group share its keys."""
    batch, heads, rows, width = q.shape
    groups = k.shape[1]
    return (q * width**-0.5).reshape(batch, groups, (heads // groups) * rows, width)


def masked_softmax(
    scores: Tensor, visible: Tensor | None, q_shape: torch.Size, groups: int
) -> Tensor:
    """Return the FP32 softmax of (B, G, H/G*Q, S) scores under a (B, 1, Q, S) mask."""
    wide = scores.float()
    if visible is None:
        return wide.softmax(-1)
    batch, heads, rows, _ = q_shape
    split = wide.reshape(batch, groups, heads // groups, rows, scores.shape[-1])
    split = torch.where(visible[:, :, None], split, SOFTMAX_FLOOR)
    return split.softmax(-1).reshape(scores.shape)
