"""What one call of a graph does: operations, and bytes that must move at least once.

Plain arithmetic over shapes, as ``cost.py``, but for the calls that really take place: a picture,
a question and every later token are calls of their own, each over the slots its stage has then.
Masks and gates skip no work, so rows meet every slot. Operations are FLOPs (two for each
multiply-accumulate); norms, activations and softmax are left out, which is under 1 % of a
decoder's. Bytes are the weights once and the cache once; activations are not counted.

    layer, Q rows, S slots     2 Q L + 4 Q S w      L = 2 d (w + w_kv) + 3 d m    docs/methods.md,
    "Cost accounting" head, the last row         2 d V
    tower layer, T tokens      2 T (4 h^2 + 2 h m) + 4 T^2 h
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..config import ModelConfig
from ..contract import PROBE, stage_of
from ..quantization import SCALE_BLOCK
from .cost import Geometry
from .plan import StagePlan

VISION = "vision"

WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "w8": 1.0, "w4": 0.5 + 2 / SCALE_BLOCK}
"""Bytes of one weight of a linear layer by precision, INT4's scales included."""

CACHE_BYTES = {"fp32": 4.0}
"""Bytes of one cached number where they are not 2."""


ENCODER_FLOAT = ("w8", "w4")
"""Precisions that leave the tower in float."""


@dataclass(frozen=True)
class GraphCall:
    """One call of a graph: ``rows`` of hidden states go in, its cache has ``slots``.

    ``rows`` is 0 for graphs that take none: the tower, and what reads a cache only.
    """

    graph: str
    rows: int
    slots: int


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes that must be read or written at least once."""

    flops: float = 0.0
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0

    @property
    def nbytes(self) -> float:
        """All bytes."""
        return self.weight_bytes + self.cache_bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
        )


@dataclass(frozen=True)
class Sizes:
    """Bytes of one weight of the decoder, of one cached number, and of one weight of the tower."""

    weight: float
    cache: float
    encoder: float

    @classmethod
    def of(cls, precision: str) -> Sizes:
        """Those of a precision's name, whatever stands behind its colon."""
        base = precision.partition(":")[0].partition("+")[0]
        weight = WEIGHT_BYTES[base]
        encoder = WEIGHT_BYTES["fp16"] if base in ENCODER_FLOAT else weight
        cache = 1.0 if "cache=int8" in precision else CACHE_BYTES.get(base, 2.0)
        return cls(weight, cache, encoder)


def work_of(call: GraphCall, config: ModelConfig, plan: StagePlan, sizes: Sizes) -> Work:
    """The work of one call; ``call.graph`` is a stage, a selection, the probe or ``vision``."""
    if call.graph == VISION:
        return vision_work(config, sizes)
    geometry = Geometry.of(config.text)
    if call.graph == PROBE or call.graph.startswith("select"):
        return _reading(geometry, call.slots, sizes)
    index = stage_of(call.graph)
    last = index == len(plan.stages) - 1
    return stage_work(geometry, plan.stages[index].depth, call, sizes, head=last)


def stage_work(
    geometry: Geometry, depth: int, call: GraphCall, sizes: Sizes, *, head: bool
) -> Work:
    """``depth`` decoder layers; with ``head``, also the output projection of the last row."""
    d, m = geometry.hidden, geometry.intermediate
    query, kv = geometry.widths
    linear = 2 * d * (query + kv) + 3 * d * m
    output = d * geometry.vocab if head else 0
    return Work(
        flops=depth * (2 * call.rows * linear + 4 * call.rows * call.slots * query) + 2 * output,
        weight_bytes=(depth * linear + output) * sizes.weight,
        cache_bytes=depth * 2 * kv * (call.slots + call.rows) * sizes.cache,
    )


def vision_work(config: ModelConfig, sizes: Sizes) -> Work:
    """Tower up to the deepest hidden state that is read, and projector, for one picture."""
    vision, tokens = config.vision, config.vision.tokens
    h, d = vision.hidden, config.text.hidden
    layer = 4 * h * h + 2 * h * vision.intermediate
    patch = vision.channels * vision.patch_size**2 * h
    projector = h * len(config.feature_layers) * d + d * d
    depth = encoder_depth(config)
    return Work(
        flops=2 * vision.patches * patch
        + depth * (2 * tokens * layer + 4 * tokens * tokens * h)
        + 2 * config.visual_tokens * projector,
        weight_bytes=(patch + depth * layer + projector) * sizes.encoder,
    )


def _reading(geometry: Geometry, slots: int, sizes: Sizes) -> Work:
    """A selection or a probe: one query against one layer's keys and values."""
    query, kv = geometry.widths
    return Work(flops=4 * slots * query, cache_bytes=2 * kv * slots * sizes.cache)


Slots = Callable[[int, int], int]
"""(stage, rows that it holds) -> slots that its cache has then."""


def question_calls(
    plan: StagePlan, *, prefix: int, visual: int, text: int, slots: Slots, cached: bool = False
) -> list[GraphCall]:
    """Calls of one question about one picture, the tower included, up to the first token.

    ``prefix`` rows are held already; ``visual`` is N; ``cached``: the picture was seen before. A
    plan that decides per prompt is taken as if nothing triggered.
    """
    calls = []
    if visual and not cached:
        calls += [GraphCall(VISION, 0, 0), GraphCall("stage0", visual, slots(0, prefix + visual))]
    held = prefix + visual + text
    calls.append(GraphCall("stage0", text, slots(0, held)))
    for index, edge in enumerate(plan.edges):
        if edge.op == "select" and visual:
            calls.append(GraphCall(f"select{index}", 0, slots(index, held)))
        kept = min(visual, plan.stages[index + 1].visual_tokens)
        held = prefix + kept + text
        calls.append(GraphCall(f"stage{index + 1}", kept + text, slots(index + 1, held)))
    return calls


def token_calls(
    plan: StagePlan, *, prefix: int, visual: int, text: int, slots: Slots
) -> list[GraphCall]:
    """Calls of one later token, ``text`` counting the answer so far."""
    return [
        GraphCall(
            f"stage{index}",
            1,
            slots(index, prefix + min(visual, stage.visual_tokens) + text + 1),
        )
        for index, stage in enumerate(plan.stages)
    ]


def layers_of(call: GraphCall, config: ModelConfig, plan: StagePlan) -> int:
    """Decoder or tower layers that one call runs; a selection or a probe counts as one."""
    if call.graph == VISION:
        return encoder_depth(config)
    return plan.stages[stage_of(call.graph)].depth if call.graph.startswith("stage") else 1


def encoder_depth(config: ModelConfig) -> int:
    """Tower layers up to the deepest hidden state that is read; state 0 is the embedding."""
    states = config.feature_layers
    return max(i if i >= 0 else config.vision.layers + 1 + i for i in states)


def total_work(works: Iterable[Work]) -> Work:
    """Their sum."""
    return sum(works, Work())
