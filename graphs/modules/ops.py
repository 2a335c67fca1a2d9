"""The operators that stages are written in, once per lowering.

``Eager`` is plain torch and the reference of every test. ``Llm`` emits ONNX opset-24 operators that
ONNX Runtime >= 1.25 and TensorRT >= 10.15 fuse; ``Portable`` emits basic operators up to opset 20
for older runtimes and leaves writing the cache to its caller. Stage modules know none of them.
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

CONDITIONAL_ATTENTION = "visistage::BranchedAttention"
"""No operator of ONNX: what ``compile/export/branched_attention.py`` writes out. Takes q (B, H, Q,
d), k and v (B, G, S, d), visible (B, 1, Q, S), write_index (B,), and in a text-blind layer the
value gate and perhaps the sink gate, (B, S) each."""


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
        return View(write_index, _sees(order, slot_order))

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
        """Return the places (B, k) of the best of scores (B, Q), best first; k is a share of Q,
        rounded up.
        """
        return torch.topk(scores, _share_of(share, scores.shape[1]), dim=1).indices

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Return rows (B, k, ...) of x (B, Q, ...) at ``index`` (B, k)."""
        return x[_samples(index), index]

    def put(self, x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """Return x (B, Q, ...) with ``rows`` (B, k, ...) at ``index`` (B, k)."""
        return x.index_put((_samples(index), index), rows)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return scaled products (B, G, H/G*Q, S) of queries (B, H, Q, d) and keys (B, G, S, d)."""
        return _grouped(q, k) @ k.transpose(-1, -2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Compute grouped attention. q: (B, H, Q, d); k, v: (B, G, S, d); visible: (B, 1, Q, S)."""
        probs = _softmax(self.scores(q, k), visible, q.shape, k.shape[1]).to(q.dtype)
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

    def keep(self, cache: Tensor, rows: Tensor, scale: Tensor | None, view: View) -> Tensor:
        """Append rows to a cache that this call does not read; return what is put out for it."""
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


class Onnx(Eager):
    """The operators that all ONNX lowerings share."""

    opset: int

    def trace(self, op: str, inputs: list, dtype: torch.dtype, shape, **attributes) -> Tensor:
        """Trace one operator with an output of this type and shape."""
        return torch.onnx.ops.symbolic(
            op, inputs, attributes, dtype=dtype, shape=shape, version=self.opset
        )

    def reshape(self, x: Tensor, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        """Trace ``Reshape`` to a constant, or to sizes computed once for all that share ``like``.

        By itself torch computes every open size anew: a dozen operators a layer, which are a third
        of what a small model takes for one token.
        """
        known = [size if isinstance(size, int) else -1 for size in shape]
        known = known if like is None else known[2:]
        assert known.count(-1) < 2, f"{shape}: more than one open size"
        target = torch.tensor(known, dtype=torch.int64)
        if like is not None:
            first = self.trace("Shape", [like], torch.int64, (2,), start=0, end=2)
            target = self.trace("Concat", [first, target], torch.int64, (len(shape),), axis=0)
        return self.trace("Reshape", [x, target], x.dtype, shape)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Trace ``Gemm(transB=1)``, which reads the checkpoint's [N, K] layout without a copy."""
        inputs = [x, weight] if bias is None else [x, weight, bias]
        shape = (x.shape[0], weight.shape[0])
        return self.trace("Gemm", inputs, x.dtype, shape, transB=1)

    def best(self, scores: Tensor, share: Fraction) -> Tensor:
        """Trace ``TopK`` of a size that is computed from that of ``scores``."""
        count = self.trace("Shape", [scores], torch.int64, (1,), start=1, end=2)
        count = (count * share.numerator + (share.denominator - 1)) // share.denominator
        shape = (scores.shape[0], _share_of(share, scores.shape[1]))
        dtypes = (scores.dtype, torch.int64)
        _, index = torch.onnx.ops.symbolic_multi_out(
            "TopK", [scores, count], {"axis": 1}, dtypes=dtypes, shapes=(shape, shape),
            version=self.opset,
        )  # fmt: skip
        return index

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Trace ``GatherND`` within each sample."""
        shape = (*index.shape, *x.shape[2:])
        return self.trace("GatherND", [x, index[:, :, None]], x.dtype, shape, batch_dims=1)

    def put(self, x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """Trace ``ScatterND``."""
        places = torch.stack((_samples(index).expand_as(index), index), -1)
        return self.trace("ScatterND", [x, places, rows], x.dtype, x.shape)

    def fake_quantised(self, x: Tensor, scale: Tensor) -> Tensor:
        """Trace ``QuantizeLinear`` and back. Without an explicit zero point ONNX Runtime would not
        count from 0, which x86 wants of one side of a product, and leave the rounding unfused.
        """
        zero = torch.zeros((), dtype=torch.int8, device=x.device)
        values = self.trace("QuantizeLinear", [x, scale, zero], torch.int8, x.shape)
        return self.trace("DequantizeLinear", [values, scale], x.dtype, x.shape)

    def restored(
        self, weight: Tensor, scale: Tensor, block: int | None, zero: Tensor | None = None
    ) -> Tensor:
        """Trace ``DequantizeLinear``, which engines fuse into the product behind it."""
        attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
        inputs = [weight, scale] if zero is None else [weight, scale, zero]
        return self.trace("DequantizeLinear", inputs, scale.dtype, weight.shape, **attributes)

    def stored(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Trace ``QuantizeLinear`` along the heads; zero points make its integers signed."""
        zero = torch.zeros(scale.shape, dtype=torch.int8, device=rows.device)
        return self.trace("QuantizeLinear", [rows, scale, zero], torch.int8, rows.shape, axis=1)

    def read(self, cache: Tensor, scale: Tensor) -> Tensor:
        """Trace ``DequantizeLinear`` along the heads."""
        return self.trace("DequantizeLinear", [cache, scale], scale.dtype, cache.shape, axis=1)


class Llm(Onnx):
    """ONNX operators of opset 23 and 24: fused attention over an aliased cache."""

    name = "llm"
    opset = 24

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Trace ``RMSNormalization`` with FP32 statistics (stash_type 1).

        Rows wider than the weight are normalised in their own type: the operator may take two
        types, few engines do.
        """
        inputs = [x, weight.to(x.dtype)]
        attributes = {"axis": -1, "epsilon": eps, "stash_type": 1}
        out = self.trace("RMSNormalization", inputs, x.dtype, x.shape, **attributes)
        return out.to(weight.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Trace ``RotaryEmbedding`` over cosines already gathered for these positions."""
        return self.trace("RotaryEmbedding", [x, cos, sin], x.dtype, x.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Trace ``Attention`` with a boolean mask only: every engine agrees on that form."""
        inputs = [q, k, v] if visible is None else [q, k, v, visible]
        return self.trace("Attention", inputs, q.dtype, q.shape)

    def scatter(self, cache: Tensor, rows: Tensor, write_index: Tensor) -> Tensor:
        """Trace ``TensorScatter``: in place where input and output share a buffer."""
        inputs = [cache, rows, write_index]
        return self.trace("TensorScatter", inputs, cache.dtype, cache.shape, axis=-2)


class LlmConditional(Llm):
    """``Llm`` for ONNX Runtime on a CPU: attention in one form for many new rows, one for a few.

    ``in_order``: the rows of every call, and the slots before them, are in the order in which they
    see each other, so that what a causal mask hides need not be computed.
    """

    def __init__(self, in_order: bool):
        self.in_order = in_order
        self.name = "llm branched, in order" if in_order else "llm branched"

    def gated_attention(
        self, q: Tensor, k: Tensor, v: Tensor, view: View, gate: Gate | None
    ) -> Tensor:
        """Trace ``CONDITIONAL_ATTENTION``, unless both forms would be the same."""
        visible = view.visible
        gates: list[Tensor] = []
        if gate is not None and gate.renorm:
            visible = gate.masked(visible)
        elif gate is not None:
            gates = [gate.value] if gate.sink is None else [gate.value, gate.sink]
        if not gates and not self.in_order:
            return self.attend(q, k, v, visible)
        inputs = [q, k, v, visible, view.write_index, *gates]
        attributes = {
            "in_order": int(self.in_order),
            "heads": q.shape[1],
            "groups": k.shape[1],
            "width": q.shape[3],
        }
        return torch.onnx.ops.symbolic(
            CONDITIONAL_ATTENTION, inputs, attributes, dtype=q.dtype, shape=q.shape, version=1
        )


class LlmRows(Llm):
    """``Llm`` for engines over an INT8 cache: TensorRT updates caches of floats only in place.

    New rows are returned. In the call that brings them they are put among the old ones where the
    integers have become floats, which attention needs whole anyway.
    """

    name = "llm rows"
    returns_new_rows = True

    def view(self, order: Tensor, slot_order: Tensor, write_index: Tensor) -> View:
        """Return the base's view, and which new row each slot holds."""
        slot = torch.arange(slot_order.shape[1], device=order.device) - write_index[0]
        fresh = (slot >= 0) & (slot < order.shape[1])
        return View(write_index, _sees(order, slot_order), torch.where(fresh, slot, -1))

    def keep(self, cache: Tensor, rows: Tensor, scale: Tensor | None, view: View) -> Tensor:
        """Return the new rows (B, G, Q, d) INT8."""
        assert scale is not None
        return self.stored(rows, scale)

    def append(
        self, cache: Tensor, rows: Tensor, scale: Tensor | None, view: View
    ) -> tuple[Tensor, Tensor]:
        """Append as its base does; return the new rows (B, G, Q, d) INT8."""
        assert scale is not None
        assert view.window is not None
        kept = self.stored(rows, scale)
        spread = torch.index_select(self.read(kept, scale), 2, view.window.clamp_min(0))
        fresh = (view.window >= 0)[None, None, :, None]
        return kept, torch.where(fresh, spread, self.read(cache, scale))


class Portable(Onnx):
    """Basic operators only. The cache is read, never written: new rows are returned."""

    name = "portable"
    returns_new_rows = True
    opset = 20

    def view(self, order: Tensor, slot_order: Tensor, write_index: Tensor) -> View:
        """Return a view of old slots and new rows apart.

        Slots about to be overwritten still hold stale rows and are hidden; what ``slot_order``
        says about them belongs to the new rows.
        """
        new, slots = order.shape[1], slot_order.shape[1]
        start = write_index[:, None]
        window = start + torch.arange(new, device=order.device)
        slot = torch.arange(slots, device=order.device)[None]
        stale = (slot >= start) & (slot < start + new)
        old = _sees(order, slot_order) & ~stale[:, None, None, :]
        return View(
            write_index,
            torch.cat((old, _sees(order, torch.gather(slot_order, 1, window))), -1),
            window,
        )

    def keep(self, cache: Tensor, rows: Tensor, scale: Tensor | None, view: View) -> Tensor:
        """Return the new rows (B, G, Q, d) as they are to be cached."""
        return rows if scale is None else self.stored(rows, scale)

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
        """Attend to the old slots and the new rows in one softmax, without joining them.

        Returns the output, and k, v as they came, or with ``scales`` as they are to be cached.
        """
        assert view.window is not None
        keys, values = cache
        fresh = k, v
        if scales is not None:
            fresh = self.stored(k, scales[0]), self.stored(v, scales[1])
            k, v = self.read(fresh[0], scales[0]), self.read(fresh[1], scales[1])
            keys, values = self.read(keys, scales[0]), self.read(values, scales[1])
        slots = keys.shape[2]
        visible, seen_old, seen_new = view.visible, values, v
        if gate is not None:
            new = Gate(
                torch.gather(gate.value, 1, view.window),
                None if gate.sink is None else torch.gather(gate.sink, 1, view.window),
                gate.renorm,
            )
            if gate.renorm:
                open_ = torch.cat((gate.value, new.value), -1) > 0
                visible = visible & open_[:, None, None, :]
            else:
                # A sink opens only for text, and text comes after the image: the first visual
                # value is always in an old slot.
                first = gate.first_visual(values)
                seen_old, seen_new = gate.values(values, first), new.values(v, first)

        grouped = _grouped(q, k)
        scores = torch.cat((grouped @ keys.transpose(-1, -2), grouped @ k.transpose(-1, -2)), -1)
        probs = _softmax(scores, visible, q.shape, k.shape[1]).to(q.dtype)
        out = probs[..., :slots] @ seen_old + probs[..., slots:] @ seen_new
        return out.reshape(q.shape), *fresh


def _share_of(share: Fraction, rows: int) -> int:
    """Return a share of so many rows, rounded up; a size may be a symbol."""
    return (rows * share.numerator + (share.denominator - 1)) // share.denominator


def _samples(index: Tensor) -> Tensor:
    """Return the number (B, 1) of each sample of ``index`` (B, k)."""
    return torch.arange(index.shape[0], device=index.device)[:, None]


def _sees(order: Tensor, key_order: Tensor) -> Tensor:
    """Return the mask (B, 1, Q, S) of orders (B, Q) and (B, S)."""
    return key_order[:, None, None, :] <= order[:, None, :, None]


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """Return (B, G, H/G*Q, d), scaled, for (B, H, Q, d): queries of one group share its keys."""
    batch, heads, rows, width = q.shape
    groups = k.shape[1]
    return (q * width**-0.5).reshape(batch, groups, (heads // groups) * rows, width)


def _softmax(scores: Tensor, visible: Tensor | None, q_shape: torch.Size, groups: int) -> Tensor:
    """Return the FP32 softmax of (B, G, H/G*Q, S) scores under a (B, 1, Q, S) mask."""
    wide = scores.float()
    if visible is None:
        return wide.softmax(-1)
    batch, heads, rows, _ = q_shape
    split = wide.reshape(batch, groups, heads // groups, rows, scores.shape[-1])
    split = torch.where(visible[:, :, None], split, SOFTMAX_FLOOR)
    return split.softmax(-1).reshape(scores.shape)
