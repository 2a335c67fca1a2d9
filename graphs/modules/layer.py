"""A decoder layer and its halves, in the operators of a lowering.

Parameters carry the checkpoint's own names (``self_attn.q_proj.weight``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..plan.routing import Routing
from ..text_config import TextConfig
from .ops import Eager, Gate, Scales, View
from .routers.route import Route, added, taken
from .routers.router import make_router

Cache = tuple[Tensor, Tensor]


class Linear(nn.Module):
    """A projection whose lowering is the ops' choice. x: (M, K) -> (M, N)."""

    def __init__(self, ops: Eager, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Return (M, N), scaled by ``scale``, for x: (M, K), already scaled by it."""
        bias = self.bias if self.bias is None or scale == 1.0 else self.bias * scale
        return self.ops.linear(x, self.weight, bias)


class Norm(nn.Module):
    """RMS norm. x: (M, D) -> (M, D), in the type of the weights."""

    def __init__(self, ops: Eager, width: int, eps: float):
        super().__init__()
        self.ops, self.eps = ops, eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (M, D) for x: (M, D)."""
        return self.ops.rms_norm(x, self.weight, self.eps)


class KeyValues(nn.Module):
    """Keys and values of rows in a layer; of a layer ahead keys alone. ``queries``: beside theirs,
    for who attends.
    """

    def __init__(self, text: TextConfig, ops: Eager, *, queries: bool = False, values: bool = True):
        super().__init__()
        self.text, self.ops = text, ops
        width, kv_width = text.heads * text.head_dim, text.kv_heads * text.head_dim
        if queries:
            self.q_proj = Linear(ops, text.hidden, width, text.attention_bias)
        self.k_proj = Linear(ops, text.hidden, kv_width, text.attention_bias)
        # Of an INT8 cache (``quantized.round_caches``), (G,) each.
        self.register_parameter("key_scale", None)
        if values:
            self.v_proj = Linear(ops, text.hidden, kv_width, text.attention_bias)
            self.register_parameter("value_scale", None)
        # Of each head, before it turns.
        norms = text.qk_norm
        self.q_norm = Norm(ops, text.head_dim, text.rms_eps) if norms and queries else None
        self.k_norm = Norm(ops, text.head_dim, text.rms_eps) if norms else None

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return rotated queries (B, H, Q, d); x: (B*Q, D); cos, sin: (B, Q, d/2)."""
        made = _heads(self.ops, self.q_proj(x), cos, self.text.head_dim, self.q_norm)
        return self.ops.rotate(made, cos, sin)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return rotated keys (B, G, Q, d); x: (B*Q, D); cos, sin: (B, Q, d/2)."""
        made = _heads(self.ops, self.k_proj(x), cos, self.text.head_dim, self.k_norm)
        return self.ops.rotate(made, cos, sin)

    def values(self, x: Tensor, cos: Tensor) -> Tensor:
        """Return values (B, G, Q, d); x: (B*Q, D); cos: (B, Q, d/2)."""
        return _heads(self.ops, self.v_proj(x), cos, self.text.head_dim)

    def cached(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Return keys, and values, (B, G, Q, d) each, as the layer's caches keep them."""
        made = [(self.keys(x, cos, sin), self.key_scale)]
        if hasattr(self, "v_proj"):
            made.append((self.values(x, cos), self.value_scale))
        return tuple(
            rows if scale is None else self.ops.stored(rows, scale) for rows, scale in made
        )


class Attention(KeyValues):
    """Grouped-query attention over the stage's cache. The update comes scaled by 2**-shift."""

    def __init__(self, text: TextConfig, ops: Eager, shift: int = 0):
        super().__init__(text, ops, queries=True)
        self.scale = 2.0**-shift
        self.o_proj = Linear(ops, text.heads * text.head_dim, text.hidden, text.output_bias)

    @property
    def scales(self) -> Scales | None:
        """Keys' and values'; None where the cache is float."""
        return None if self.key_scale is None else (self.key_scale, self.value_scale)

    def forward(
        self, x, cos, sin, cache: Cache, view: View, gate: Gate | None, route: Route | None = None
    ):
        """Return the update (B*q, D), rotated queries and caches; x: (B*Q, D); cos: (B, Q, d/2).

        q are the rows that ``route`` lets ask, by default all Q; all have keys and values.
        """
        width = self.text.head_dim
        asks, turns = taken(self.ops, x, route, cos), (cos, sin)
        if route is not None and route.picked is not None:
            visible = self.ops.take(view.visible[:, 0], route.picked)
            view = view._replace(visible=visible[:, None])
            turns = self.ops.take(cos, route.picked), self.ops.take(sin, route.picked)
        q = self.queries(asks, *turns)
        k, v = self.keys(x, cos, sin), self.values(x, cos)
        out, keys, values = self.ops.cached_attention(q, k, v, cache, view, gate, self.scales)
        shape = (turns[0].shape[0] * turns[0].shape[1], self.text.heads * width)
        out = self.ops.reshape(out.transpose(1, 2), shape)
        if self.scale != 1.0:
            out = out * self.scale
        return self.o_proj(out, self.scale), q, keys, values


class AheadAttention(KeyValues):
    """Queries and keys of a layer that is not run here, over a cache of keys alone."""

    def __init__(self, text: TextConfig, ops: Eager):
        super().__init__(text, ops, queries=True, values=False)

    def forward(self, x, cos, sin, key: Tensor | None, view: View) -> tuple[Tensor, Tensor]:
        """Return rotated queries (B, H, Q, d) and the cache; x: (B*Q, D); cos: (B, Q, d/2)."""
        q = self.queries(x, cos, sin)
        return q, self.ops.keep(key, self.keys(x, cos, sin), self.key_scale, view)


def _heads(
    ops: Eager, projected: Tensor, like: Tensor, width: int, norm: Norm | None = None
) -> Tensor:
    """Return (B, heads, Q, d) of projections (B*Q, heads*d), perhaps normalised by head; like:
    (B, Q, ...).
    """
    heads = projected.shape[-1] // width
    shape = (*like.shape[:2], heads, width)
    if norm is not None:
        projected = norm(ops.reshape(projected, (projected.shape[0] * heads, width)))
    return ops.reshape(projected, shape, like).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU. x: (M, D) -> (M, D), scaled by 2**-shift."""

    def __init__(self, text: TextConfig, ops: Eager, shift: int = 0):
        super().__init__()
        self.scale = 2.0**-shift
        self.gate_proj = Linear(ops, text.hidden, text.intermediate, text.mlp_bias)
        self.up_proj = Linear(ops, text.hidden, text.intermediate, text.mlp_bias)
        self.down_proj = Linear(ops, text.intermediate, text.hidden, text.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (M, D) for x: (M, D)."""
        gate = self.gate_proj(x)
        gate = gate * torch.sigmoid(gate)
        up = self.up_proj(x)
        if self.scale != 1.0:
            up = up * self.scale  # before the product, which is what overflows
        return self.down_proj(gate * up, self.scale)


HALVES = {
    "attention": ("input_layernorm", "self_attn"),
    "mlp": ("post_attention_layernorm", "mlp"),
}
"""Modules of the two halves of a layer, the attributes of ``DecoderLayer``."""


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals, as in Llama.

    ``mode`` and ``norm`` (``plan.Mode``, ``plan.Norm``) say how text sees vision here; ``shifts``
    are ``precision.Fp32Fallback.shifts``; ``routing`` gives it routers, whose gates multiply what
    the rows of a call get; ``parts`` (``plan.Part``) what of the layer runs. Rows may be of a wider
    type than the weights.
    """

    def __init__(
        self,
        text: TextConfig,
        ops: Eager,
        mode: str = "dense",
        norm: str = "gated",
        shifts: tuple[int, int] = (0, 0),
        routing: Routing | None = None,
        parts: tuple[str, ...] = tuple(HALVES),
    ):
        super().__init__()
        self.attends = "attention" in parts
        self.mode, self.norm, self.shifts = mode, norm, shifts
        self.ops = ops
        self.kind: tuple = (mode, norm, shifts, parts, text, ops.name)
        self.routers: tuple[str, ...] = ()
        if routing is not None:
            self.kind += (routing,)
            self.routers = routing.router.gates
            for name in dict.fromkeys(self.routers):  # under the names that checkpoints have
                self.add_module(name, make_router(ops, text.hidden, routing))
        self.self_attn = Attention(text, ops, shifts[0])
        self.mlp = MLP(text, ops, shifts[1])
        self.input_layernorm = Norm(ops, text.hidden, text.rms_eps)
        self.post_attention_layernorm = Norm(ops, text.hidden, text.rms_eps)
        for part in {*HALVES} - {*parts}:
            for module in HALVES[part]:
                setattr(self, module, None)

    def forward(
        self,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        write_index: Tensor | None,
        visible: Tensor | None,
        window: Tensor | None,
        value_gate: Tensor | None,
        sink_gate: Tensor | None,
        key: Tensor | None,
        value: Tensor | None,
        attention_gain: Tensor | None = None,
        mlp_gain: Tensor | None = None,
        real: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the rows (B, Q, D) and, where it attends, the rotated queries (B, H, Q, d) and
        the caches.

        The gains are (B, Q): factors of what attention and MLP add to each row. ``real``,
        ``allowed``: of ``Head``, where rows compete. Where only some rows run, the last row's query
        alone is returned. Where nothing is ``visible``, the layer leaves the rows as they are:
        their keys and values alone are returned (``served``).
        """
        if visible is None:
            return served(self, rows, cos, sin) if self.attends else ()
        assert write_index is not None
        (batch, count, _), width = cos.shape, rows.shape[-1]
        x = self.ops.reshape(rows, (batch * count, width))
        to_attention, to_mlp = self._routes(rows, real, allowed)
        attended: tuple[Tensor, ...] = ()
        if self.self_attn is not None:
            gate = None
            if value_gate is not None:
                sink = sink_gate if self.mode == "sink" else None
                gate = Gate(value_gate, sink, self.norm == "renorm")
            dtype = self.input_layernorm.weight.dtype  # of the weights; rows may be wider
            update, query, *grown = self.self_attn(
                self.input_layernorm(x),
                cos.to(dtype),
                sin.to(dtype),
                (key, value),
                View(write_index, visible, window),
                gate,
                to_attention,
            )
            update = self._gained(update, attention_gain)
            x = added(self.ops, x, update, self.shifts[0], to_attention, cos)
            if to_attention is not None and to_attention.picked is not None:
                query = query[:, :, :1]  # the last row is the first of those that run
            attended = (query, *grown)
        if self.mlp is not None:
            update = self.mlp(self.post_attention_layernorm(taken(self.ops, x, to_mlp, cos)))
            update = self._gained(update, mlp_gain)
            x = added(self.ops, x, update, self.shifts[1], to_mlp, cos)
        return (self.ops.reshape(x, (batch, count, width), cos), *attended)

    def _gained(self, update: Tensor, gain: Tensor | None) -> Tensor:
        """Return (B*Q, D) for an update (B*Q, D) and a gain (B, Q) of its rows."""
        if gain is None:
            return update
        return update * self.ops.reshape(gain, (gain.shape[0] * gain.shape[1], 1))

    def _routes(
        self, rows: Tensor, real: Tensor | None, allowed: Tensor | None
    ) -> tuple[Route | None, Route | None]:
        """Return the ways of rows (B, Q, D) through attention and MLP; None: all run as usual.

        Both follow from the rows as they enter the layer.
        """
        if not self.routers:
            return None, None
        routes = {
            name: self.get_submodule(name)(rows, real, allowed)
            for name in dict.fromkeys(self.routers)
        }
        attended, changed = (routes[name] for name in self.routers)
        return attended, changed


def served(
    layer: DecoderLayer | ServingLayer, rows: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    """Return keys and values of rows (B, Q, D) that a layer leaves as they are, (B, G, Q, d) each,
    as its caches keep them; cos, sin: (B, Q, d/2).
    """
    batch, count, _ = cos.shape
    x = layer.ops.reshape(rows, (batch * count, rows.shape[-1]))
    dtype = layer.input_layernorm.weight.dtype  # of the weights; rows may be wider
    return layer.self_attn.cached(layer.input_layernorm(x), cos.to(dtype), sin.to(dtype))


class ServingLayer(nn.Module):
    """The norm, keys and values of a layer, for rows that it leaves as they are."""

    def __init__(self, text: TextConfig, ops: Eager, *, values: bool = True):
        super().__init__()
        self.ops = ops
        self.kind = (text, ops.name, values)
        self.self_attn = KeyValues(text, ops, values=values)
        self.input_layernorm = Norm(ops, text.hidden, text.rms_eps)

    def forward(self, rows: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Return what ``served`` does."""
        return served(self, rows, cos, sin)


class Ahead(nn.Module):
    """The beginning of the layer behind a stage, by which the edge between them scores.

    Its norm, queries and keys alone; the next stage runs the whole layer over the rows that go on.
    """

    def __init__(self, text: TextConfig, ops: Eager):
        super().__init__()
        self.ops = ops
        self.kind = (text, ops.name)
        self.self_attn = AheadAttention(text, ops)
        self.input_layernorm = Norm(ops, text.hidden, text.rms_eps)

    def forward(
        self,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        write_index: Tensor,
        visible: Tensor,
        window: Tensor | None,
        key: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the rotated queries (B, H, Q, d) of rows (B, Q, D), and the cache, or what is new
        of one that is not given.
        """
        batch, count, _ = cos.shape
        x = self.ops.reshape(rows, (batch * count, rows.shape[-1]))
        dtype = self.input_layernorm.weight.dtype  # of the weights; rows may be wider
        view = View(write_index, visible, window)
        return self.self_attn(self.input_layernorm(x), cos.to(dtype), sin.to(dtype), key, view)
