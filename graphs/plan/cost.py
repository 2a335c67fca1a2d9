"""Cost of a plan: multiply-accumulates, cache bytes and bytes read per decode step.

Plain arithmetic over a plan and five sizes of a decoder; nothing here is measured. Multiply MACs
by 2 for FLOPs. A layer with X text rows (P before the image, T after it) and n visual rows costs

    q * 2 d w + kv * 2 d w_kv + 2 pairs * w + 3 mlp * d m       d hidden, m MLP, w query width

    kind of layer        q, mlp rows   k, v rows   pairs
    dense                X + n         X + n       (X + n)^2
    text_blind           X + n         X + n       (X + n)^2 - T n
    text_blind_novv      X + n         X           (X + n)^2 - T n - n^2
    no_attention         X + n         X + n       (X + n)^2 - T n - n^2

Halves that a plan drops cost nothing. Rows whose attention is frozen have no query, only keys and
values; those whose MLP is, no MLP. How many rows a selector will match is not known: they count as
rows that are not frozen. Of rows that routers pick, the picked part alone has queries, pairs and an
MLP; the routers' own products, up to d^2 / 2 a row and layer where they have a hidden layer, are
left out.

``sink`` and ``sink_half`` count as ``text_blind``, as in docs/methods.md, "Cost accounting": what
they save beyond it is under 0.1 points of a 32-layer decoder. Visual-only figures, which papers
call FLOPs, count the visual rows' own projections, MLP and n^2 pairs.

Accountings:
    modes   each layer by its mode, as above: what the method needs at best. The default.
    paper   the VisiPruner paper's: no layer of a stage with text-blind layers has attention.
    graphs  what our graphs execute today: gates and gains are factors and skip nothing, so all are
            dense, but for visual rows that no layer of a stage changes.

Source: docs/methods.md, "Cost accounting" and "Published cost figures", whose printed digits are
this module's tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..errors import PlanError
from .plan import StagePlan
from .stages import Part

Accounting = Literal["modes", "paper", "graphs"]
ACCOUNTINGS: tuple[str, ...] = get_args(Accounting)

FP16_BYTES = 2
PREFIX_ROWS, TEXT_ROWS = 35, 40
"""Rows before the image (BOS, system prompt, ``USER: ``) and after it in LLaVA-1.5's prompt with a
short question."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Llama-shaped decoder. ``None`` widths equal ``hidden``."""

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    kv_width: int | None = None  # key-value heads times head size
    query_width: int | None = None  # heads times head size

    @classmethod
    def of(cls, text: Any) -> Geometry:
        """Return the sizes of a decoder's config (``graphs.config.TextConfig``, or the like)."""
        return cls(
            layers=text.layers,
            hidden=text.hidden,
            intermediate=text.intermediate,
            vocab=text.vocab,
            kv_width=text.kv_heads * text.head_dim,
            query_width=text.heads * text.head_dim,
        )

    @property
    def widths(self) -> tuple[int, int]:
        """(query width, key-value width)."""
        kv = self.hidden if self.kv_width is None else self.kv_width
        return self.hidden if self.query_width is None else self.query_width, kv

    def layer_macs(
        self, rows: float, keys: float, pairs: float, mlp_rows: float | None = None
    ) -> float:
        """Return the multiply-accumulates of one layer.

        Args:
            rows: rows with queries.
            keys: rows with keys and values.
            pairs: (query, key) pairs that attend.
            mlp_rows: rows that go through the MLP; by default those with queries.
        """
        query, kv = self.widths
        mlp_rows = rows if mlp_rows is None else mlp_rows
        mlp = 3 * mlp_rows * self.hidden * self.intermediate
        return 2 * self.hidden * (rows * query + keys * kv) + 2 * pairs * query + mlp

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linear layers."""
        return int(self.layer_macs(1, 1, 0))

    def part_weights(self, part: Part) -> int:
        """Weights of one half of a layer."""
        rows, mlp_rows = (1, 0) if part == "attention" else (0, 1)
        return int(self.layer_macs(rows, rows, 0, mlp_rows))

    @property
    def head_weights(self) -> int:
        """Weights of the output projection."""
        return self.hidden * self.vocab

    @property
    def matmul_weights(self) -> int:
        """Weights that one decode step multiplies by: all layers and the output projection."""
        return self.layers * self.layer_weights + self.head_weights


LLAVA_7B = Geometry(layers=32, hidden=4096, intermediate=11008, vocab=32000)
LLAVA_13B = Geometry(layers=40, hidden=5120, intermediate=13824, vocab=32000)


@dataclass(frozen=True)
class Load:
    """``count`` layers of one kind with ``visual_tokens`` each; both may be averages.

    ``share``: the part of the rows, of text as of vision, that ask and have an MLP.
    """

    kind: str  # a plan's mode, or no_attention
    visual_tokens: float
    count: float = 1
    share: float = 1
    dropped: tuple[Part, ...] = ()  # halves that do not run
    frozen: tuple[tuple[str, str], ...] = ()  # (rows, half) that get no update
    begins_next: bool = False  # queries and keys of the next layer as well, for the edge's score


@dataclass(frozen=True)
class Outcome:
    """Outcome of a prompt under a plan that decides per prompt; it may be an average.

    trigger, exit: last layer with all visual tokens, last layer with any; kept: tokens between.
    """

    trigger: int
    kept: float
    exit: int

    def check(self, plan: StagePlan) -> None:
        """Raise PlanError unless ``plan`` may end so."""
        if plan.probe is None:
            raise PlanError(
                f"found an outcome for plan '{plan.name}', expected none: it fixes t, K and e "
                "itself. Leave out --trigger, --kept and --exit, or take visipruner-code."
            )
        last, first = plan.layers - 1, plan.probe.first
        if not first <= self.trigger <= self.exit <= last:
            raise PlanError(
                f"found trigger={self.trigger} and exit={self.exit}, expected layers from "
                f"{first} (the first that plan '{plan.name}' probes) to {last}, the exit not "
                "before the trigger. Write such layers."
            )
        if not 0 <= self.kept <= plan.visual_tokens:
            raise PlanError(
                f"found kept={self.kept:g}, expected 0 to {plan.visual_tokens}, what an image "
                "has. Write such a number."
            )

    def visual_tokens_in(self, layer: int, offered: int) -> float:
        """Return the visual tokens that run through ``layer``."""
        if layer <= self.trigger:
            return offered
        return self.kept if layer <= self.exit else 0


@dataclass(frozen=True)
class LoadCost:
    """Cost of one ``Load``, for all its layers together."""

    load: Load
    visual_macs: float
    prefill_macs: float
    visual_kv_bytes: float
    kv_bytes: float  # of all rows


@dataclass(frozen=True)
class Cost:
    """Cost of a decoder's prefill and of its decode steps; sums over ``loads``."""

    loads: tuple[LoadCost, ...]
    head_macs: int  # output projection of the last row
    weight_bytes: float  # read by every decode step
    accounting: str = "modes"

    @property
    def visual_macs(self) -> float:
        """MACs of the visual rows alone (the papers' figure)."""
        return sum(item.visual_macs for item in self.loads)

    @property
    def prefill_macs(self) -> float:
        """MACs of the whole prefill: every row, and the output projection once."""
        return sum(item.prefill_macs for item in self.loads) + self.head_macs

    @property
    def mean_visual_tokens(self) -> float:
        """Visual tokens per layer."""
        tokens = sum(item.load.visual_tokens * item.load.count for item in self.loads)
        return tokens / sum(item.load.count for item in self.loads)

    @property
    def visual_kv_bytes(self) -> float:
        """Cache bytes of visual rows."""
        return sum(item.visual_kv_bytes for item in self.loads)

    @property
    def kv_bytes(self) -> float:
        """Cache bytes of all rows after the prefill."""
        return sum(item.kv_bytes for item in self.loads)

    @property
    def decode_read_bytes(self) -> float:
        """Bytes that the first decode step reads: all weights once, all cached rows once."""
        return self.weight_bytes + self.kv_bytes


def plan_loads(
    plan: StagePlan, accounting: Accounting = "modes", outcome: Outcome | None = None
) -> tuple[Load, ...]:
    """Return one ``Load`` per layer of ``plan``, its kind according to ``accounting``.

    A plan that decides per prompt is loaded as ``outcome`` says, without one as if no prompt ever
    triggered. In the paper's accounting its layers with all visual tokens count as one stage.
    """
    if accounting not in ACCOUNTINGS:
        raise ValueError(f"accounting {accounting!r}, expected one of {', '.join(ACCOUNTINGS)}")
    loads = []
    ahead = plan.layers_ahead
    for stage in plan.stages:
        for layer, mode in enumerate(stage.modes, start=stage.layers[0]):
            count: float = stage.visual_tokens
            if outcome is not None:
                count = outcome.visual_tokens_in(layer, plan.visual_tokens)
            blind = stage.gated_layers
            if outcome is not None and layer <= outcome.trigger:
                blind = plan.stages[0].gated_layers
            kind: str = mode
            if accounting == "graphs":
                kind = "dense"
            elif accounting == "paper" and blind:
                kind = "no_attention"
            frozen = tuple(
                (f.rows, f.part)
                for f in stage.frozen
                if layer in f.layers
                and (accounting != "graphs" or (stage.serves and f.rows == "visual"))
            )
            share, dropped = _share(plan, layer, accounting), stage.dropped_of(layer)
            next_ = accounting == "graphs" and layer + 1 in ahead
            loads.append(Load(kind, count, 1, share, dropped, frozen, begins_next=next_))
    return tuple(loads)


def loads_as_run(
    plan: StagePlan, visual_tokens: Sequence[float], accounting: Accounting = "graphs"
) -> list[Load]:
    """Return one ``Load`` per layer of graphs that ran with so many visual tokens in each."""
    loads = zip(plan_loads(plan, accounting), visual_tokens, strict=True)
    return [replace(load, visual_tokens=count) for load, count in loads]


def _share(plan: StagePlan, layer: int, accounting: Accounting) -> float:
    """Return the part of the rows that run in a layer with routers, as far as the plan says it.

    Where each row decides for itself and all are computed, nothing is known to be saved.
    """
    routing = plan.routing_of(layer)
    if routing is None:
        return 1
    if routing.gathers:
        return float(routing.fraction)
    return 1 if routing.sparsity is None or accounting == "graphs" else 1 - routing.sparsity


def plan_cost(
    plan: StagePlan,
    geometry: Geometry,
    prefix: int = PREFIX_ROWS,
    text: int = TEXT_ROWS,
    *,
    accounting: Accounting = "modes",
    outcome: Outcome | None = None,
    **sizes: Any,
) -> Cost:
    """Return the cost of ``plan`` for one image between ``prefix`` and ``text`` text rows.

    Plan and geometry must have the same depth; ``resolve_plan`` has seen to that. ``outcome``: see
    ``plan_loads``; ``sizes``: see ``cost_of``.
    """
    assert plan.layers == geometry.layers, (plan.layers, geometry.layers)
    loads = plan_loads(plan, accounting, outcome)
    return cost_of(loads, geometry, prefix, text, accounting=accounting, **sizes)


def dense_cost(
    plan: StagePlan,
    geometry: Geometry,
    prefix: int = PREFIX_ROWS,
    text: int = TEXT_ROWS,
    **sizes: Any,
) -> Cost:
    """Return what the unpruned model costs under the same circumstances."""
    loads = [Load("dense", plan.visual_tokens)] * geometry.layers
    return cost_of(loads, geometry, prefix, text, **sizes)


def cost_of(
    loads: Iterable[Load],
    geometry: Geometry,
    prefix: int = PREFIX_ROWS,
    text: int = TEXT_ROWS,
    *,
    kv_element_bytes: float = FP16_BYTES,
    weight_element_bytes: float = FP16_BYTES,
    accounting: str = "modes",
) -> Cost:
    """Return the cost of a mix of layers, such as a published average of 10.3 tokens."""
    loads = tuple(loads)
    unread = 0.0
    for load in loads:
        unread += load.count * sum(geometry.part_weights(part) for part in load.dropped)
    return Cost(
        tuple(_load_cost(load, geometry, prefix, text, kv_element_bytes) for load in loads),
        head_macs=geometry.head_weights,
        weight_bytes=(geometry.matmul_weights - unread) * weight_element_bytes,
        accounting=accounting,
    )


def reduction_percent(value: float, dense: float) -> float:
    """Return how much less ``value`` is than ``dense``, in per cent of ``dense``."""
    return 100 * (1 - value / dense)


def total_cost(costs: Sequence[LoadCost], field: str) -> float:
    """Sum of one field over some layers."""
    return sum(getattr(item, field) for item in costs)


def _load_cost(load: Load, geometry: Geometry, prefix: int, text: int, bytes_: float) -> LoadCost:
    n, x = load.visual_tokens, prefix + text
    pairs, visual_pairs, visual_keys = (x + n) ** 2, n * n, n
    if load.kind != "dense":
        pairs -= text * n
    if load.kind in ("text_blind_novv", "no_attention"):
        pairs, visual_pairs = pairs - n * n, 0
    if load.kind == "text_blind_novv":
        visual_keys = 0  # unread

    # Rows of each kind that have queries, and that go through the MLP.
    rows = {"visual": n, "prefix": prefix, "text": text}
    asking, visual_asking = _running(load, "attention", rows)
    mlp, visual_mlp = _running(load, "mlp", rows)
    if asking < x + n:  # every row that asks, asks all
        pairs = max(0, pairs - (x + n - asking) * (x + n))
        visual_pairs = visual_pairs if visual_asking else 0
    keys = x + visual_keys
    if "attention" in load.dropped:
        keys = visual_keys = pairs = 0
    cached, run = 2 * geometry.widths[1] * bytes_ * load.count, load.share
    own = geometry.layer_macs(
        run * visual_asking, visual_keys, run * visual_pairs, run * visual_mlp
    )
    every = geometry.layer_macs(run * asking, keys, run * pairs, run * mlp)
    more = 0.5 if load.begins_next else 0  # of the four projections, and of the cache
    own, every = (
        macs + more * geometry.layer_macs(count, count, 0, 0)
        for macs, count in ((own, n), (every, x + n))
    )
    return LoadCost(
        load,
        visual_macs=load.count * own,
        prefill_macs=load.count * every,
        visual_kv_bytes=(visual_keys + more * n) * cached,
        kv_bytes=(keys + more * (x + n)) * cached,
    )


def _running(load: Load, part: str, rows: dict[str, float]) -> tuple[float, float]:
    """Return how many rows one half of a layer updates, and how many visual ones."""
    if part in load.dropped:
        return 0, 0
    left = {kind: 0 if (kind, part) in load.frozen else count for kind, count in rows.items()}
    return sum(left.values()), left["visual"]
