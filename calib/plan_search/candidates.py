"""Static plans that dynamics suggest, with what each costs and what it is predicted to cut off.

    t       quantiles of the trigger layer at several thresholds, and evenly spread layers
    K       quantiles of the tokens kept, and what holds most of the contributions, rounded up
    e       quantiles of the exit layer by both rules, and of the last layer that is not quiet
    s       0: no layer is text-blind. Gates zero values but skip no work, so s saves nothing in
            the graphs as they run; what it costs is measured apart

For each t only those K and e count that no others beat in cost and in what is cut off. The
prediction ranks plans before they are measured and decides nothing: it adds up what a dense model
takes from the tokens that a plan would not have, and cannot know what is still needed. Hence no t
is left out for it. Plans with an entry: ``entry_candidates.py``.

Source: fixed numbers from quantiles: docs/methods.md, "VisiPruner: static plans".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from ...compile.planfile import resolve_plan
from ...graphs.errors import PlanError
from ...graphs.plan.call_cost import COUNTS, decoder_work, question_calls, total_work
from ...graphs.plan.cost import PREFIX_ROWS, TEXT_ROWS, Geometry, Load, cost_of
from ...graphs.plan.plan import StagePlan
from ...graphs.plan.stages import MAX_KEEP, Entry, Probe
from ...graphs.presets.presets import preset
from .agreement import Agreement
from .dynamics import COSINES, PUBLISHED, Dynamics, quantile

T = TypeVar("T")

PROMPT_SHARES = (0.5, 0.75, 0.9, 1.0)
"""Quantiles over prompts."""

MASSES = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Shares of a layer's contributions that K tokens should hold, in the median prompt."""

MOST_TRIGGERS = 16
"""Layers tried as t."""

KNEE_SLACK = 0.02
"""A knee may cut off so much more than the best plan of its t: what it saves is worth more."""


@dataclass(frozen=True)
class Candidate:
    """A plan that may be measured.

    Attributes:
        text: as typed.
        shallow, t, keep, e: s, t, K (None where nothing is selected) and e.
        cost: visual FLOPs as the graphs run them, dense = 1.
        visual_flops: the same, not relative.
        predicted: share of the visual tokens' influence that is cut off (``cut_off``); with an
            entry the share of tokens that may be lost, None where nothing is known yet.
        entry: what enters; None: all visual tokens.
    """

    text: str
    shallow: int
    t: int
    keep: int | None
    e: int
    cost: float
    visual_flops: float
    predicted: float | None
    entry: Entry | None = None

    def at(self, visual_flops: float) -> Candidate:
        """Return the same with other costs."""
        cost = self.cost * visual_flops / self.visual_flops
        return replace(self, cost=cost, visual_flops=visual_flops)

    @property
    def is_entry_alone(self) -> bool:
        """True for a plan in which all layers see what enters."""
        return self.entry is not None and self.text.startswith(f"{self.entry.selector}:")


@dataclass(frozen=True)
class Tried:
    """A candidate that was measured.

    second, second_flops: of a second question about the same image (``Pricing.second_question``).
    """

    candidate: Candidate
    measured: Agreement
    second: float
    second_flops: float
    held_out: Agreement | None = None
    verdict: str = ""

    @property
    def loss(self) -> float:
        """The share of tokens that disagree and half a token more, which keeps it above 0."""
        tokens = self.measured.tokens
        return (tokens.total - tokens.right + 0.5) / (tokens.total + 1)

    @property
    def flops(self) -> float:
        """FLOPs of two questions about one image: of vision in the first, all of the second."""
        return self.candidate.visual_flops + self.second_flops

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, without ``front``."""
        candidate = {"s" if k == "shallow" else k: v for k, v in vars(self.candidate).items()}
        return {
            **candidate,
            "entry": self.candidate.entry and self.candidate.entry.text,
            "second": self.second,
            "second_flops": self.second_flops,
            "measured": self.measured.to_dict(),
            "held_out": self.held_out and self.held_out.to_dict(),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Pricing:
    """The cost of plans in one model, as graphs run them: all layers dense.

    geometry: its decoder. visual_tokens: N of the largest image, what plans are made for. prefix,
    text: rows before an image, and of a question. usual: N of the image that is paid for; 0: of the
    largest.
    """

    geometry: Geometry
    visual_tokens: int
    prefix: int = PREFIX_ROWS
    text: int = TEXT_ROWS
    usual: int = 0

    @property
    def image(self) -> int:
        """N of the image that is paid for."""
        return self.usual or self.visual_tokens

    def flops(self, t: int, keep: int | None, e: int, entry: Entry | None = None) -> float:
        """Return the visual FLOPs of a plan; text rows are not in it."""
        entering = self.image if entry is None else entry.keep
        counts = [(entering, t + 1), (keep or 0, e - t)]
        loads = [Load("dense", min(tokens, self.image), layers) for tokens, layers in counts]
        return 2 * cost_of(loads, self.geometry).visual_macs

    def candidate(
        self,
        text: str,
        t: int,
        keep: int | None,
        e: int,
        *,
        shallow: int = 0,
        entry: Entry | None = None,
        predicted: float | None,
    ) -> Candidate:
        """Return a plan with its costs."""
        flops = self.flops(t, keep, e, entry)
        last = self.geometry.layers - 1
        cost = flops / self.flops(last, None, last)
        return Candidate(text, shallow, t, keep, e, cost, flops, predicted, entry)

    def second_question(self, plan: StagePlan) -> tuple[float, float]:
        """Return what a second question about a cached image takes: dense = 1, and FLOPs.

        All rows of the decoder are in it: visual ones run again behind a selection that looks at
        the question.
        """
        dense = preset("dense", self.geometry.layers, self.visual_tokens)
        flops, all_flops = (
            total_work(
                decoder_work(call, self.geometry, asked, COUNTS)
                for call in question_calls(
                    asked,
                    prefix=self.prefix,
                    visual=self.image,
                    text=self.text,
                    slots=lambda _, rows: rows,
                    cached=True,
                )
            ).flops
            for asked in (plan, dense)
        )
        return flops / all_flops, flops

    def plan(self, candidate: Candidate) -> StagePlan:
        """Return the plan of a candidate."""
        return resolve_plan(candidate.text, self.geometry.layers, self.visual_tokens)


def published_candidate(dynamics: Dynamics, pricing: Pricing) -> Candidate | None:
    """Return the preset whose numbers follow from the depth alone; None where it cannot be.

    Its prediction leaves out what text-blind layers cost.
    """
    try:
        plan = preset("visipruner", pricing.geometry.layers, pricing.visual_tokens)
    except PlanError:
        return None
    t, keep, e = plan.trigger, plan.keep, plan.exit
    assert t is not None
    assert keep is not None
    assert e is not None
    return pricing.candidate(
        "visipruner",
        t,
        keep,
        e,
        shallow=len(plan.stages[0].gated_layers),
        predicted=float(cut_off(dynamics, t, [keep])[1, e]),
    )


def plan_candidates(dynamics: Dynamics, pricing: Pricing) -> dict[int, tuple[Candidate, ...]]:
    """Return by t, ascending, those that no other of the same t beats by cost and prediction."""
    assert dynamics.layers == pricing.geometry.layers, (dynamics.layers, pricing.geometry.layers)
    exits = exit_layers(dynamics)
    found = {}
    for t in trigger_layers(dynamics):
        keeps = keep_counts(dynamics, t, pricing.image)
        cut = cut_off(dynamics, t, keeps)
        of_t = [pricing.candidate(f"exit-only:e={t}", t, None, t, predicted=float(cut[0, t]))]
        for row, keep in enumerate(keeps, start=1):
            for e in exits:
                if e > t:
                    text = f"visipruner:shallow=0,t={t},e={e},keep={keep}"
                    predicted = float(cut[row, e])
                    of_t.append(pricing.candidate(text, t, keep, e, predicted=predicted))
        found[t] = front(of_t, lambda candidate: -(candidate.predicted or 0))
    return found


def knee(of_t: Sequence[Candidate]) -> Candidate:
    """Return the cheapest of one t whose predicted loss is within ``KNEE_SLACK`` of the best."""
    limit = (of_t[-1].predicted or 0) + KNEE_SLACK
    return next(candidate for candidate in of_t if (candidate.predicted or 0) <= limit)


def trigger_layers(dynamics: Dynamics) -> list[int]:
    """Return values of t to try, ascending; all but the last layer where there are few.

    Besides quantiles some evenly spread layers: where all probes fire at once, the quantiles are
    one layer.
    """
    fired = [
        [decision.trigger for decision in dynamics.decide(Probe(dynamics.first, cosine, 0.0))]
        for cosine in COSINES
    ]
    layers = _quantiles(fired) | set(spaced(range(dynamics.layers), MOST_TRIGGERS // 2))
    return spaced(sorted(layers - {dynamics.layers - 1}), MOST_TRIGGERS)


def keep_counts(dynamics: Dynamics, t: int, visual_tokens: int) -> list[int]:
    """Return values of K to try after layer ``t``, ascending, below N, rounded by ``friendly``."""
    counts = _quantiles(
        [int((reading.norm[t] > level).sum()) for reading in dynamics.readings]
        for level in dynamics.contribution_thresholds()
    )
    ranks = range(1, dynamics.visual_tokens[1] + 1)
    held = np.median(dynamics.mass(ranks)[:, t], axis=0)
    counts |= {int(np.argmax(held >= mass)) + 1 for mass in MASSES if held[-1] >= mass}
    limit = min(visual_tokens - 1, MAX_KEEP)
    return sorted({min(friendly(count), limit) for count in counts if count} - {0})


def exit_layers(dynamics: Dynamics) -> list[int]:
    """Return values of e to try, ascending; the last layer, where nothing leaves, is among them."""
    last = dynamics.layers - 1
    loud = [
        [int(max(np.flatnonzero(row < cosine), default=0)) for row in dynamics.lowest]
        for cosine in COSINES
    ]
    probes = [
        replace(PUBLISHED, first=dynamics.first, cosine=cosine, exit_cosine=quiet, consecutive=rule)
        for cosine in COSINES
        for quiet in COSINES
        for rule in (False, True)
    ]
    left = [[decision.exit for decision in dynamics.decide(probe)] for probe in probes]
    return sorted(_quantiles([*loud, *left]) | {last})


def cut_off(dynamics: Dynamics, t: int, keeps: Sequence[int]) -> np.ndarray:
    """Return (1 + len(keeps), L): the share of the visual tokens' influence that a plan cuts off.

    Of all tokens in all layers of the dense run, the part of those that a layer would no longer
    have: by K (first none, then ``keeps``) and e; mean over prompts. Only e >= t means something.
    A layer weighs by the square of the layers from it on: what is missing early is carried through
    all of them, and late readings change little of an answer that is already there.
    """
    weight = np.arange(dynamics.layers, 0, -1.0)[:, None] ** 2
    cuts = []
    for reading, influence in zip(dynamics.readings, dynamics.influence, strict=True):
        order = np.argsort(-reading.norm[t], kind="stable")
        sums = np.cumsum(influence[:, order] * weight, axis=1)
        total = sums[:, -1]
        at = np.minimum(keeps, len(order)).astype(np.int64) - 1
        held = np.concatenate([np.zeros((1, len(total))), sums[:, at].T])
        held[:, : t + 1] = 0
        cut = total[t + 1 :].sum() - np.cumsum(held, axis=1)
        cuts.append(cut / max(total.sum(), 1e-30))
    return np.mean(cuts, axis=0)


def friendly(count: int) -> int:
    """Return the least number not below ``count`` of the form 2^i or 3 * 2^i."""
    power = 1 << (count - 1).bit_length()
    return power if count > power * 3 // 4 or power < 4 else power * 3 // 4


def front(found: Iterable[Candidate], merit: Callable[[Candidate], float]) -> tuple[Candidate, ...]:
    """Return those that no other beats by cost and merit, by cost ascending."""
    best: list[Candidate] = []
    for candidate in sorted(
        found, key=lambda candidate: (candidate.cost, -merit(candidate), candidate.text)
    ):
        if not best or merit(candidate) > merit(best[-1]):
            best.append(candidate)
    return tuple(best)


def _quantiles(many: Iterable[Sequence[int | None]]) -> set[int]:
    """Return the quantiles ``PROMPT_SHARES`` of each; those that are censored name nothing."""
    points = (quantile(values, share) for values in many for share in PROMPT_SHARES)
    return {int(point) for point in points if point is not None}


def spaced(values: Sequence[T], most: int) -> list[T]:
    """Return ``most`` of ``values``, ends included, evenly spread; of one, the middle."""
    if len(values) <= most:
        return list(values)
    if most < 2:
        return list(values[len(values) // 2 :][:most])
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
