"""The lowerings to ONNX: what all share, and operators of opset 24, which ONNX Runtime >= 1.25 and
TensorRT >= 10.15 fuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from .ops import Eager, Gate, Scales, View, samples, sees, share_of

CONDITIONAL_ATTENTION = "visistage::BranchedAttention"
"""No operator of ONNX: what ``compile/export/branched_attention.py`` writes out. Takes q (B, H, Q,
d), k and v (B, G, S, d), visible (B, 1, Q, S), write_index (B,), and in a text-blind layer the
value gate and perhaps the sink gate, (B, S) each."""

APPENDED_ATTENTION = "visistage::AppendedAttention"
"""The same of rows that are appended first: takes q (B, H, Q, d), new k and v (B, G, Q, d), both
caches (B, G, S, d), visible and write_index; also returns the caches."""


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
        shape = (scores.shape[0], share_of(share, scores.shape[1]))
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
        places = torch.stack((samples(index).expand_as(index), index), -1)
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
    see each other, so that what a causal mask hides need not be computed. ``whole``: every row of a
    call asks, and none is left out.
    """

    def __init__(self, in_order: bool, whole: bool = True):
        self.in_order, self.whole = in_order, whole
        self.name = f"llm branched{', in order' * in_order}{', whole' * whole}"

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
        """Trace ``APPENDED_ATTENTION`` over float caches of which nothing is hidden."""
        if gate is not None or scales is not None or not self.whole:
            return super().cached_attention(q, k, v, cache, view, gate, scales)
        inputs = [q, k, v, *cache, view.visible, view.write_index]
        shapes = (q.shape, cache[0].shape, cache[1].shape)
        out, keys, values = torch.onnx.ops.symbolic_multi_out(
            APPENDED_ATTENTION, inputs, self._facts(q, k), dtypes=(q.dtype,) * 3, shapes=shapes,
            version=1,
        )  # fmt: skip
        return out, keys, values

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
        facts = self._facts(q, k)
        return torch.onnx.ops.symbolic(
            CONDITIONAL_ATTENTION, inputs, facts, dtype=q.dtype, shape=q.shape, version=1
        )

    def _facts(self, q: Tensor, k: Tensor) -> dict[str, int]:
        """Return what the written form depends on besides its inputs."""
        sizes = {"heads": q.shape[1], "groups": k.shape[1], "width": q.shape[3]}
        return {"in_order": int(self.in_order), **sizes}


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
        return View(write_index, sees(order, slot_order), torch.where(fresh, slot, -1))

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
