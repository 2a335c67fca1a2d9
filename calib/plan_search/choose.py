"""The plan that the data supports: candidates measured, and confirmed on samples held out.

Measuring takes a bundle each, so of hundreds of candidates a dozen are measured: first coarsely
over all t, then where the measured front is steepest. What a plan may lose does not affect which,
so a looser budget chooses from the same measurements and is never worse off. What a plan may cost
does: dearer ones are not measured.

``Choice.to_dict`` is what a calibration keeps (``choice``; {} where the plan was given, not
chosen). Shares are of 1, not per cent.

    budget        {"lose": 0.01} or {"cost": 0.5}
    agreement     what "lose" counts: "tokens" (teacher-forced, see calib/plan_search/agreement.py)
    cost          what "cost" counts: "visual FLOPs as the graphs run them, dense = 1"
    max_tokens    longest answer that was compared
    precision     of the bundles that were measured: "fp32", or a QuantConfig's name; the dense
                  answers that they are compared with are those of FP32
    rounding      quantised precisions only: the dense plan in it, on the choosing samples: an
                  Agreement, see below
    shipped       quantised precisions only: the chosen plan with its own ranges, which rest on all
                  samples: {"samples": "held_out" or "choosing", and an Agreement}
    samples       {"choosing": n, "held_out": n}
    plan          the chosen plan, StagePlan.to_dict()
    text          the same as typed: "visipruner:shallow=false,t=4,e=6,keep=16", "dense"
    fits          whether a pruned plan kept the budget; false: dense was taken
    reasons       {"s", "t", "K", "e"}: a sentence each; "precision" where it is quantised
    warnings      sentences; what should be known before the choice is trusted
    chosen        index into candidates, or null for dense
    candidates    by cost, ascending:
      text, name  as above; the plan's name
      s, t, keep, e
                  text-blind layers, last layer with all tokens, K, last layer with any
      cost        share of dense visual FLOPs
      visual_flops
      predicted   share of the visual tokens' influence that the plan cuts off, from dynamics alone
      measured    on the choosing samples: an Agreement, see below
      held_out    the same on the samples held out, or null where it was not tried
      front       whether no other candidate is cheaper and agrees as well
      verdict     "chosen", "near miss: ...", or "" where there is nothing to say

    Agreement     {"prompts": n,
                   "tokens": {"right", "total", "share", "low", "high"},    low, high: Wilson 95 %
                   "answers": the same, of whole answers,
                   "kl": mean nats per token,
                   "divergences": {"0": n, ...}  prompts by the token at which they first differ}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import preset
from .agreement import Agreement
from .candidates import (
    Candidate,
    Pricing,
    Tried,
    front,
    knee,
    plan_candidates,
    published_candidate,
    spaced,
)
from .dynamics import Dynamics
from .goal import SelectionGoal
from .rationale import rationale_for, warnings_for

Measure = Callable[[StagePlan], Agreement]

NO_GOOD = 0.25
"""Plans that lose more are all alike."""

CLOSE_COST = 0.01
"""Plans whose costs differ by less are not worth telling apart by a measurement."""

NEAR_MISS = 3
"""A plan that misses the budget by up to so many times what the budget allows is a near miss."""


@dataclass(frozen=True)
class Choice:
    """The plan, why, and what else was tried; see the module."""

    goal: SelectionGoal
    plan: StagePlan
    text: str
    tried: tuple[Tried, ...]  # by cost
    chosen: int | None
    rationale: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True if a pruned plan kept the budget."""
        return self.chosen is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, without ``max_tokens``, ``precision``, ``rounding`` and ``shipped``."""
        best = {tried.candidate for tried in best_of(self.tried)}
        held = next((tried.held_out for tried in self.tried if tried.held_out), None)
        return {
            "budget": self.goal.budget,
            "agreement": "tokens",
            "cost": "visual FLOPs as the graphs run them, dense = 1",
            "samples": {
                "choosing": len(self.tried[0].measured.divergences) if self.tried else 0,
                "held_out": len(held.divergences) if held else 0,
            },
            "plan": self.plan.to_dict(),
            "text": self.text,
            "fits": self.fits,
            "reasons": self.rationale,
            "warnings": list(self.warnings),
            "chosen": self.chosen,
            "candidates": [
                {**tried.to_dict(), "front": tried.candidate in best} for tried in self.tried
            ],
        }


def choose_plan(
    dynamics: Dynamics,
    pricing: Pricing,
    goal: SelectionGoal,
    measure: Measure,
    confirm: Measure | None = None,
    *,
    text_blind: Sequence[dict[str, Any]] = (),
) -> Choice:
    """Choose the cheapest plan within a budget of agreement, or the best within one of cost.

    Which plans are measured does not depend on what they may lose, so a looser budget never gives a
    costlier plan. What is best on the choosing samples must hold on those held out, too, else the
    next is taken; without any that does, the dense plan is, and the choice says so.

    Args:
        dynamics: of the dense model, on the choosing samples.
        pricing: what its plans cost.
        goal: what the plan may lose, or cost, and how many plans are measured.
        measure: agreement of a plan with dense on the choosing samples; takes long.
        confirm: the same on samples that had no part in choosing; None: there are none.
        text_blind: rows of ``dynamics.to_dict``: what text-blind layers cost by themselves.
    """
    tried = measure_some(dynamics, pricing, measure, goal.most, goal.cost or 1.0)
    order = _order(tried, goal)
    chosen: int | None = None
    confirmed = 0
    for index in order:
        found = tried[index]
        if confirm is not None:
            found = replace(found, held_out=confirm(pricing.plan(found.candidate)))
            confirmed += 1
        if _holds(found, goal):
            chosen = index
            tried[index] = replace(found, verdict="chosen")
            break
        assert found.held_out is not None
        verdict = f"{_near_miss(found)}, but on held-out samples {_percent(found.held_out)}"
        tried[index] = replace(found, verdict=verdict)
    if chosen is None and order and goal.cost is not None:
        # A cost must be kept whatever luck there was in choosing.
        chosen = max(order, key=lambda index: _share(tried[index].held_out))
        tried[chosen] = replace(tried[chosen], verdict="chosen")
    taken = None if chosen is None else tried[chosen]
    if goal.lose is not None:
        limit = max(NEAR_MISS * goal.lose, CLOSE_COST)
        for index, found in enumerate(tried):
            cheaper = taken is None or found.candidate.cost < taken.candidate.cost
            near = goal.lose < 1 - found.measured.tokens.share <= limit
            if cheaper and near and not found.verdict:
                tried[index] = replace(found, verdict=_near_miss(found))
    if taken is None:
        plan = preset("dense", pricing.geometry.layers, pricing.visual_tokens)
    else:
        plan = pricing.plan(taken.candidate)
    note = f"calibrated on {len(dynamics.readings)} prompts"
    return Choice(
        goal,
        replace(plan, calibrated=True, note=note),
        "dense" if taken is None else taken.candidate.text,
        tuple(tried),
        chosen,
        rationale_for(dynamics, tried, taken, text_blind),
        warnings_for(goal.lose, tried, taken, confirmed),
    )


def _order(tried: Sequence[Tried], goal: SelectionGoal) -> list[int]:
    """Return the indices of those within the budget, in the order in which they are taken."""

    def key(index: int) -> tuple[float, ...]:
        found = tried[index]
        merit = (-found.measured.tokens.share, found.measured.kl)
        cost = (found.candidate.cost,)
        return cost + merit if goal.cost is None else merit + cost

    fitting = [
        i for i, found in enumerate(tried) if goal.keeps(found.candidate.cost, found.measured)
    ]
    return sorted(fitting, key=key)


def _holds(found: Tried, goal: SelectionGoal) -> bool:
    """Return whether a finding on the choosing samples shows on those held out."""
    if found.held_out is None:
        return True
    if goal.cost is None:
        return goal.keeps(found.candidate.cost, found.held_out)
    # Nothing was promised about agreement, only that this is the best: luck must not have made it.
    return found.held_out.tokens.interval[1] >= found.measured.tokens.interval[0]


def _share(measured: Agreement | None) -> float:
    return 0.0 if measured is None else measured.tokens.share


def _near_miss(found: Tried) -> str:
    return f"near miss: {_percent(found.measured)}"


def _percent(measured: Agreement) -> str:
    tokens = measured.tokens
    return f"{100 * tokens.share:.1f} % ({tokens.total - tokens.right} of {tokens.total} differ)"


def measure_some(
    dynamics: Dynamics, pricing: Pricing, measure: Measure, most: int, limit: float = 1.0
) -> list[Tried]:
    """Measure up to ``most`` candidates, none dearer than ``limit``; return them by cost ascending.

    First the uncalibrated preset, whatever it costs, to compare with; and the knees of evenly
    spread t. Then, again and again, one between those neighbours on the measured front between
    which most is lost.
    """
    by_t = [
        tuple(candidate for candidate in of_t if candidate.cost <= limit)
        for of_t in plan_candidates(dynamics, pricing).values()
    ]
    pool = {candidate.text: candidate for of_t in by_t for candidate in of_t}
    tried: list[Tried] = []

    def take(candidate: Candidate) -> None:
        pool.pop(candidate.text, None)
        tried.append(Tried(candidate, measure(pricing.plan(candidate))))

    usual = published_candidate(dynamics, pricing)
    if usual is not None and most:
        take(usual)
    knees = [knee(of_t) for of_t in by_t if of_t]
    for candidate in spaced(knees, min(-(-most // 3), most - len(tried))):
        take(candidate)
    while len(tried) < most:
        found = _between(best_of(tried), list(pool.values()))
        if found is None:
            break
        take(found)
    return sorted(tried, key=lambda found: (found.candidate.cost, found.candidate.text))


def _between(best: Sequence[Tried], pool: Sequence[Candidate]) -> Candidate | None:
    """Choose what to measure next: the most promising near the middle of the largest step.

    The first step is that from a plan which costs nothing and is no good. A step's size is its
    width in cost by its height in the logarithm of what is lost: from 2 % to 1 % is as high as from
    20 % to 10 %.
    """
    points = [(0.0, NO_GOOD), *((found.candidate.cost, _loss(found)) for found in best)]

    def size(step: tuple[tuple[float, float], tuple[float, float]]) -> float:
        (start, more), (stop, less) = step
        return (stop - start) * math.log(more / less)

    for (start, _), (stop, _) in sorted(pairwise(points), key=size, reverse=True):
        inside = [
            candidate
            for candidate in pool
            if start + CLOSE_COST < candidate.cost < stop - CLOSE_COST
        ]
        centre, quarter = (start + stop) / 2, (stop - start) / 4
        middle = [candidate for candidate in inside if abs(candidate.cost - centre) <= quarter]
        if inside:
            return min(
                middle or inside, key=lambda candidate: (candidate.predicted, candidate.cost)
            )
    return None


def _loss(found: Tried) -> float:
    """Return the share of tokens that disagree and half a token more, which keeps it above 0."""
    tokens = found.measured.tokens
    return min((tokens.total - tokens.right + 0.5) / (tokens.total + 1), NO_GOOD)


def best_of(tried: Sequence[Tried]) -> list[Tried]:
    """Return those that no other beats by cost and measured agreement, by cost ascending."""
    by_candidate = {found.candidate: found for found in tried}
    best = front(by_candidate, lambda candidate: by_candidate[candidate].measured.tokens.share)
    return [by_candidate[candidate] for candidate in best]
