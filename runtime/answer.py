"""The answer to a question: the text, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..graphs.chain.chain import Prefilled, last_layers
from ..graphs.contract import INVISIBLE
from ..graphs.plan.cost import Geometry, Load, cost_of
from ..graphs.plan.plan import StagePlan


@dataclass(frozen=True)
class Timings:
    """Milliseconds. ``first_token_ms`` counts from the call to the first token, images included.

    ``graphs_ms`` is the time inside each graph until the first token; an image that was opened
    before costs nothing here.
    """

    preprocess_ms: float
    graphs_ms: dict[str, float]
    first_token_ms: float
    per_token_ms: float | None  # mean over the tokens after the first; None with one token
    total_ms: float


@dataclass(frozen=True)
class Called:
    """The decisions of this prompt's probes, had every layer been followed by an edge.

    trigger: layer that selects; kept: tokens it keeps; exit: layer that lets vision leave. None:
    it did not happen.
    """

    trigger: int | None
    kept: int | None
    exit: int | None


@dataclass(frozen=True)
class PlanFacts:
    """The plan's treatment of this prompt.

    trigger, exit: last layer with all visual tokens, last layer with any. ``visual_tokens``: of all
    images, as they entered; ``kept``: their positions after the last selection (None where none
    took place). ``visual_tokens_per_layer``: rows that ran, padding included. ``visual_flops``:
    their FLOPs in the prefill, as the graphs run it, and ``dense_visual_flops`` without pruning.
    ``called``: in plans that decide per prompt; ``deviations``: where the plan did otherwise.
    """

    plan: str
    trigger: int
    exit: int
    visual_tokens: int
    prompt_rows: int
    kept: tuple[int, ...] | None
    visual_tokens_per_layer: tuple[int, ...] = ()
    visual_flops: int = 0
    dense_visual_flops: int = 0
    called: Called | None = None
    deviations: tuple[str, ...] = ()


def plan_facts(
    plan: StagePlan, geometry: Geometry, done: Prefilled, visual_tokens: int, prompt_rows: int
) -> PlanFacts:
    """Return the facts of one prompt, from its prefill."""
    trigger, exit_ = last_layers(plan, done)
    kept = None
    if done.kept:
        kept = tuple(int(at) for at in done.kept[-1].order[0] if at != INVISIBLE)
    layers = [
        count
        for stage, count in zip(plan.stages, done.visual_tokens, strict=True)
        for _ in range(stage.depth)
    ]
    called = None
    if done.decision is not None:
        decision = done.decision
        count = None if decision.kept is None else len(decision.kept)
        called = Called(decision.trigger, count, decision.exit)
    return PlanFacts(
        plan=plan.name,
        trigger=trigger,
        exit=exit_,
        visual_tokens=visual_tokens,
        prompt_rows=prompt_rows,
        kept=kept,
        visual_tokens_per_layer=tuple(layers),
        visual_flops=_visual_flops(layers, geometry),
        dense_visual_flops=_visual_flops([visual_tokens] * plan.layers, geometry),
        called=called,
        deviations=_deviations(called, trigger, exit_, layers),
    )


def _visual_flops(layers: Sequence[int], geometry: Geometry) -> int:
    """Count every layer as a dense one with its visual rows: gates skip no work."""
    return round(2 * cost_of([Load("dense", n) for n in layers], geometry).visual_macs)


def _deviations(
    called: Called | None, trigger: int, exit_: int, layers: Sequence[int]
) -> tuple[str, ...]:
    """Return a phrase for each thing that was not done as the probes called for."""
    if called is None or called.trigger is None or called.kept is None:
        return ()
    out = []
    if trigger != called.trigger:
        out.append(f"selected after layer {trigger}, called for after {called.trigger}")
    rows = layers[trigger + 1] if trigger + 1 < len(layers) else called.kept
    if rows > called.kept:
        out.append(f"{called.kept} tokens padded to {rows} rows")
    # With no token kept, vision leaves with the selection, whatever is called for later.
    if called.kept and called.exit is not None and exit_ != called.exit:
        out.append(f"vision left after layer {exit_}, called for after {called.exit}")
    return tuple(out)


@dataclass(frozen=True)
class Answer:
    """An answer; ``str(answer)`` is its text.

    ``finish``: "eos" (the model ended it), "stop" (a stop string) or "length" (max_tokens).
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    timings: Timings
    plan: PlanFacts = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON form."""
        return asdict(self)
