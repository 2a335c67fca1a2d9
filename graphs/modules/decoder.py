"""One decoder stage: take Q new rows, append them to the stage's cache, return them updated.

The module refuses to know what a prefix or an image is. Parameters carry the checkpoint's own
names (``model.layers.7.self_attn.q_proj.weight``), whichever stage a layer lands in.

A stage is composed of pieces (head, layers, tail) through a ``call`` argument: eagerly that is the
piece itself, in export it notes one call of a traced piece, so that thirty alike layers are traced
once (``compile/export/stitch.py``). A piece's ``kind`` holds all that its trace depends on besides
shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..caches import ahead_name, ahead_of, cache_names
from ..contract import BY_LAYER, PADDING_ORDER, injected_of, row_readings
from ..parts import StagePart
from ..plan.plan import StagePlan
from ..plan.routing import Routing
from ..precision import NO_FALLBACK, Fp32Fallback
from ..text_config import TextConfig
from .layer import Ahead, Cache, DecoderLayer, Linear, Norm
from .ops import Eager, Scales
from .rope import Rotary
from .routers.router import Rivals

Call = Callable[..., Any]


class StageOutput(NamedTuple):
    """Result of a stage; ``logits`` and ``readings`` only where the contract has them."""

    rows: Tensor  # (B, Q, D)
    queries: Tensor  # (layers, B, H, d), rotated, of the last row
    logits: Tensor | None  # (B, V) float32, last row
    readings: dict[str, Tensor]  # what the edge behind reads of the rows, (B, Q, ...) each
    caches: list[Cache]
    ahead: Tensor | None = None  # the cache of a layer ahead

    @property
    def singles(self) -> list[Tensor]:
        """All but the caches, in the order of the contract."""
        logits = [] if self.logits is None else [self.logits]
        return [self.rows, self.queries, *logits, *self.readings.values()]

    @property
    def flat_caches(self) -> list[Tensor]:
        """The caches, in the order of the contract."""
        ahead = [] if self.ahead is None else [self.ahead]
        return [*(value for pair in self.caches for value in pair), *ahead]


def direct(piece: nn.Module, *args: Tensor | None) -> Any:
    """Call ``piece``: the eager ``call``."""
    return piece(*args)


class Inject(nn.Module):
    """Features added to the visual rows at the input of a layer."""

    kind = ()

    def forward(self, rows: Tensor, features: Tensor) -> Tensor:
        """Return (B, Q, D) for rows and features (B, Q, D), zeros where a row gets none."""
        return rows + features


class Head(Rotary):
    """Inputs that all layers of a stage share: rotary turns, visibility, gates and gains, and what
    rows that compete (``Routing.competes``) know of each other.
    """

    def __init__(self, text: TextConfig, ops: Eager, routing: Routing | None = None):
        super().__init__(text)
        self.ops = ops
        self.kind = (text, ops.name)
        self.rivals = None
        if routing is not None and routing.competes:
            self.kind += (routing,)
            self.rivals = Rivals(routing, text.max_positions)

    def forward(  # type: ignore[override]
        self, rows, positions, order, slot_order, write_index, gates, row_gain=None
    ) -> tuple[Tensor, ...]:
        """Return cos, sin (B, Q, d/2), visible, perhaps window, then ``layer_controls``; where rows
        compete at last ``real`` and ``allowed`` of ``Router.forward``.
        """
        cos, sin = super().forward(rows, positions)
        view = self.ops.view(order, slot_order, write_index)
        window = () if view.window is None else (view.window,)
        given = [control for control in (gates, row_gain) if control is not None]
        split = [each for control in given for each in control.flatten(0, 1).unbind(0)]
        if self.rivals is None:
            return (cos, sin, view.visible, *window, *split)
        real = order < PADDING_ORDER
        return (cos, sin, view.visible, *window, *split, real, self.rivals(real))


def layer_controls(
    layer: int, gated: Sequence[int], gained: Sequence[int], controls: Sequence[Any]
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return value and sink gate, and gains of attention and MLP, of one layer; None where it has
    none.

    ``controls``: two for each of the ``gated`` layers, then two for each of the ``gained`` ones.
    """

    def pair(layers: Sequence[int], first: int) -> tuple[Any, Any]:
        if layer not in layers:
            return None, None
        at = first + 2 * layers.index(layer)
        return controls[at], controls[at + 1]

    return pair(gated, 0), pair(gained, 2 * len(gated))


class LastQueries(nn.Module):
    """The last row's query in every layer: with the caches it says what that row looked at.

    Selections and probes read it; where nothing does, it costs a copy of one row per layer.
    """

    kind = ()

    def forward(self, *queries: Tensor) -> Tensor:
        """Return (layers, B, H, d) for (B, H, Q, d) of each layer."""
        return torch.stack([query[:, :, -1] for query in queries])


class Change(nn.Module):
    """Lengths of what a layer did to each row, in FP32."""

    kind = ()

    def forward(self, before: Tensor, after: Tensor, query: Tensor) -> Tensor:
        """Return (B, Q) for rows (B, Q, D) before and after; ``query`` is left alone."""
        return (after.float() - before.float()).pow(2).sum(-1).sqrt()


class RowQueries(nn.Module):
    """A layer's query of every row, row by row."""

    kind = ()

    def forward(self, before: Tensor, after: Tensor, query: Tensor) -> Tensor:
        """Return (B, Q, H, d) for queries (B, H, Q, d); the rows are left alone."""
        return query.transpose(1, 2)


ROW_PIECES: dict[str, type[nn.Module]] = {"change": Change, "text_queries": RowQueries}
"""Modules that hand out ``selectors.edge.ROW_READINGS`` of the last layer before an edge."""


class Logits(nn.Module):
    """Final norm and head, of the last row only."""

    def __init__(self, norm: Norm, head: Linear):
        super().__init__()
        self.norm, self.head = norm, head
        self.kind = (norm.eps, head.ops.name)

    def forward(self, rows: Tensor) -> Tensor:
        """Return (B, V) float32 for (B, Q, D)."""
        return self.head(self.norm(rows[:, -1])).float()


class Body(nn.Module):
    """Holds layers under their absolute index, so that parameter names match the checkpoint.

    ``layers``: by index, what else each is made of (``DecoderLayer``).
    """

    def __init__(self, text: TextConfig, ops: Eager, layers: dict[int, tuple], last: bool = False):
        super().__init__()
        self.layers = nn.ModuleDict(
            {str(index): DecoderLayer(text, ops, *kind) for index, kind in layers.items()}
        )
        if last:
            self.norm = Norm(ops, text.hidden, text.rms_eps)


class DecoderStage(nn.Module):
    """A stage of ``plan`` over a Llama-shaped decoder, or the part of its layers in one graph."""

    def __init__(
        self,
        text: TextConfig,
        plan: StagePlan,
        part: StagePart,
        ops: Eager,
        fallback: Fp32Fallback = NO_FALLBACK,
    ):
        super().__init__()
        stage = plan.stages[part.stage]
        self.returns_new_rows = ops.returns_new_rows
        self.layers, self.attending = part.layers, part.attention_layers(plan)
        self.gated, self.gained = part.gated_layers(plan), part.gained_layers(plan)
        last = part.ends(plan) and part.stage == len(plan.stages) - 1
        modes = dict(enumerate(stage.modes, start=stage.layers[0]))
        kinds = {
            layer: (
                modes[layer],
                stage.norm,
                fallback.shifts(layer),
                plan.routing_of(layer),
                stage.parts_of(layer),
            )
            for layer in range(*part.layers)
            if stage.parts_of(layer)
        }
        self.model = Body(text, ops, kinds, last)
        self.ahead = ahead_of(plan, part.stage) if part.ends(plan) else None
        if self.ahead is not None:
            self.model.layers[str(self.ahead)] = Ahead(text, ops)
        self.head = Head(text, ops, plan.routing)
        self.inject = Inject()
        self.last_queries = LastQueries()
        wanted = row_readings(plan, part.stage) if part.ends(plan) else ()
        self.readings = nn.ModuleDict({name: ROW_PIECES[name]() for name in wanted})
        if last:
            self.lm_head = Linear(ops, text.hidden, text.vocab, bias=False)

    def compose(
        self,
        call: Call,
        rows: Any,
        positions: Any,
        order: Any,
        slot_order: Any,
        write_index: Any,
        gates: Any,
        row_gain: Any,
        caches: Sequence[tuple[Any, Any]],
        inject: Mapping[int, Any] = MappingProxyType({}),
        ahead: Any = None,
    ) -> StageOutput:
        """Run the stage as calls of its pieces; shapes and meanings: ``contract.stage_spec``.

        ``inject``: what is added to the rows, by layer; nothing where a layer is not in it.
        ``ahead``: the cache of the layer ahead, where there is one and new rows are put into it.
        """
        placed = (positions, order, slot_order, write_index)
        shared = list(call(self.head, rows, *placed, gates, row_gain))
        cos, sin, visible = shared[:3]
        window = shared[3] if self.returns_new_rows else None
        controls = shared[4 if self.returns_new_rows else 3 :]
        rivals: Sequence[Any] = ()
        if self.head.rivals is not None:
            controls, rivals = controls[:-2], controls[-2:]
        grown, queries = [], []
        waiting = iter(caches)
        before, query = rows, None
        for number in range(*self.layers):
            if number in inject:
                rows = call(self.inject, rows, inject[number])
            if str(number) not in self.model.layers:
                continue  # dropped whole
            layer = self.model.layers[str(number)]
            cache = next(waiting) if layer.attends else (None, None)
            gates, gains = layer_controls(number, self.gated, self.gained, controls)
            known = rivals if layer.routers else ()
            before = rows
            given = (rows, cos, sin, write_index, visible, window, *gates, *cache, *gains, *known)
            rows, *attended = call(layer, *given)
            if attended:
                query, key, value = attended
                grown.append((key, value))
                queries.append(query)
        logits = None
        if hasattr(self, "lm_head"):
            logits = call(Logits(self.model.norm, self.lm_head), rows)
        readings = {n: call(piece, before, rows, query) for n, piece in self.readings.items()}
        if self.ahead is not None:
            piece = self.model.layers[str(self.ahead)]
            query, ahead = call(piece, rows, cos, sin, write_index, visible, window, ahead)
            queries.append(query)
        last = call(self.last_queries, *queries)
        return StageOutput(rows, last, logits, readings, grown, ahead)

    def compose_named(self, call: Call, inputs: Mapping[str, Any]) -> StageOutput:
        """Run the stage as ``compose`` does, for inputs by their names in the contract."""
        caches = [(inputs[key], inputs[value]) for key, value in cache_names(self.attending)]
        names = ("rows", "positions", "order", "slot_order", "write_index", *BY_LAYER)
        given = {name: inputs.get(name) for name in names}
        ahead = None if self.ahead is None else inputs.get(ahead_name(self.ahead))
        inject = injected_of(inputs)
        return self.compose(call, **given, caches=caches, inject=inject, ahead=ahead)

    def scales_of(self, layer: int) -> Scales | None:
        """Return the scales of one layer's cache, one ahead having keys alone; None where it is
        float.
        """
        attention = self.model.layers[str(layer)].self_attn
        if layer == self.ahead:
            return None if attention.key_scale is None else (attention.key_scale, None)
        return attention.scales

    def forward(self, *inputs: Any) -> StageOutput:
        """Run eagerly; inputs as in ``compose``."""
        return self.compose(direct, *inputs)
