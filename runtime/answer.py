"""The answer to a question: the text, and its cost."""

from __future__ import annotations

import html
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from ..graphs.chain.rows import Prefilled, last_layers
from ..graphs.contract import INVISIBLE
from ..graphs.plan.cost import Geometry, Load, cost_of, loads_as_run
from ..graphs.plan.plan import StagePlan
from .image.overlay import Grid, dimmed, image_uri, seen

DECODED: MutableMapping[str, Any] = WeakValueDictionary()
"""Images by key (``opened_image.OpenedImage``) for as long as somebody holds them: an answer does
not, for programs keep answers by the thousand."""

_FINISHES = {
    "eos": "the model ended it",
    "stop": "a stop string came",
    "length": "max_tokens was reached",
}


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

    trigger, exit: last layer with all visual tokens that entered, last layer with any.
    ``visual_tokens``: of all images, before any selection; ``kept``: positions of those left by the
    last selection, be it the entry's (None where none took place); ``kept_at_edges``: of those left
    by each selection within the decoder. ``visual_tokens_per_layer``:
    rows that ran, padding included. ``visual_flops``: their FLOPs in the prefill, as the graphs run
    it, and ``dense_visual_flops`` without pruning.
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
    kept_at_edges: tuple[tuple[int, ...], ...] = ()


def plan_facts(
    plan: StagePlan,
    geometry: Geometry,
    done: Prefilled,
    visual_tokens: int,
    prompt_rows: int,
    entered: Sequence[int],
) -> PlanFacts:
    """Return the facts of one prompt, from its prefill; ``entered``: positions of visual rows."""
    trigger, exit_ = last_layers(plan, done)
    kept = None if plan.entry is None or not entered else tuple(entered)
    at_edges = tuple(tuple(int(at) for at in orders[0] if at != INVISIBLE) for orders in done.kept)
    if at_edges:
        kept = at_edges[-1]
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
        visual_flops=_visual_flops(loads_as_run(plan, layers), geometry),
        dense_visual_flops=_visual_flops([Load("dense", visual_tokens)] * plan.layers, geometry),
        called=called,
        deviations=_deviations(called, trigger, exit_, layers),
        kept_at_edges=at_edges,
    )


def _visual_flops(loads: Sequence[Load], geometry: Geometry) -> int:
    """Count the visual rows of every layer, as graphs run them."""
    return round(2 * cost_of(loads, geometry).visual_macs)


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
class ShownTokens:
    """The visual tokens of an image of a prompt: its key, and their places in the image.

    positions, patches: (K0,) of the rows that entered; count: N. A class row has the patch -1.
    """

    key: str
    positions: np.ndarray
    patches: np.ndarray
    count: int
    grid: Grid

    def kept(self, kept: tuple[int, ...] | None) -> np.ndarray:
        """Return which (rows, columns) of the image are of tokens that were ``kept``; None: all."""
        here = self.patches >= 0
        if kept is not None:
            here &= np.isin(self.positions, kept)
        tokens = np.zeros(self.count, bool)
        tokens[self.patches[here]] = True
        return self.grid.cells(tokens)


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability, and those of the most likely tokens in its place."""

    token: int
    text: str
    logprob: float
    likely: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, repr=False)
class Answer:
    """An answer; ``str(answer)`` is its text, and a notebook shows it beside what it came from.

    ``finish``: "eos" (the model ended it, or a schema left nothing to add), "stop" (a stop string)
    or "length" (max_tokens). ``logprobs``: of its tokens, where they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    timings: Timings
    plan: PlanFacts
    shown: tuple[ShownTokens, ...] = field(default=(), compare=False)
    logprobs: tuple[TokenLogprob, ...] | None = None

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Answer {self.text!r}: {self._summary()}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON form."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        del facts["shown"], facts["logprobs"]
        if self.logprobs is not None:
            facts["logprobs"] = [asdict(token) for token in self.logprobs]
        return {
            name: asdict(value) if name in ("timings", "plan") else value
            for name, value in facts.items()
        }

    def _summary(self) -> str:
        """Say in some words how the answer came about."""
        times, plan = self.timings, self.plan
        words = [] if self.text else ["an empty answer"]
        count = len(self.tokens)
        words += [f"{count} token{'s' * (count != 1)}", _FINISHES.get(self.finish, self.finish)]
        if plan.kept is not None:
            words.append(f"{plan.plan} kept {len(plan.kept)} of {plan.visual_tokens} visual tokens")
        return ", ".join([*words, f"{times.first_token_ms:.0f} ms to the first"])

    def _repr_html_(self) -> str:
        """Return what a notebook shows: images dark where no kept token is, text and summary."""
        parts = []
        for place in self.shown:
            image = DECODED.get(place.key)
            if image is not None:
                sight = seen(image.image, image.preprocessing, place.grid)
                drawn = dimmed(sight, place.kept(self.plan.kept), place.grid.extent)
                parts.append(f'<img src="{image_uri(drawn)}" style="max-height: 20em">')
        text = html.escape(self.text) or "<i>(empty)</i>"
        parts.append(f'<div style="white-space: pre-wrap">{text}</div>')
        return "\n".join([*parts, f"<small>{html.escape(self._summary())}</small>"])
