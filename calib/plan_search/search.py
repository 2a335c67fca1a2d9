"""The order in which plans are measured: few of hundreds.

First coarsely over all t and all selectors, then where the measured front is steepest, in turns
with and without an entry. What a plan may lose does not affect which are measured; what it may cost
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from ...graphs.plan.plan import StagePlan
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
from .depth_candidates import depth_candidates
from .dynamics import Dynamics
from .entry_candidates import entry_candidates, first_entries
from .goal import SelectionGoal

Measure = Callable[[StagePlan], Agreement]

NO_GOOD = 0.25
"""Plans that lose more are all alike."""

CLOSE_COST = 0.01
"""Plans whose costs differ by less are not worth telling apart by a measurement."""


def measure_some(
    dynamics: Dynamics, pricing: Pricing, measure: Measure, goal: SelectionGoal
) -> list[Tried]:
    """Measure up to ``goal.most`` candidates, none dearer than its cost; return them by cost.

    First the uncalibrated preset, whatever it costs, to compare with; each selector alone; fewer
    layers, where they are asked for; and the knees of evenly spread t. Then, again and again, one
    between those neighbours on the measured front between which most is lost.
    """
    most, limit = goal.most, goal.cost or 1.0
    by_t = [
        tuple(candidate for candidate in of_t if candidate.cost <= limit)
        for of_t in plan_candidates(dynamics, pricing).values()
    ]
    pool = {candidate.text: candidate for of_t in by_t for candidate in of_t}
    tried: list[Tried] = []

    def take(candidate: Candidate) -> None:
        pool.pop(candidate.text, None)
        plan = pricing.plan(candidate)
        tried.append(Tried(candidate, measure(plan), *pricing.second_question(plan)))

    def without_entry() -> list[Candidate]:
        return list(pool.values())

    def with_entry() -> list[Candidate]:
        found = entry_candidates(pricing, tried, goal.selectors)
        return [candidate for candidate in found if candidate.cost <= limit]

    usual = published_candidate(dynamics, pricing)
    seeds = [usual] if usual is not None else []
    seeds += first_entries(pricing, goal.selectors, limit)
    if goal.depth:
        seeds += [found for found in depth_candidates(dynamics, pricing) if found.cost <= limit]
    for candidate in seeds[:most]:
        take(candidate)
    knees = [knee(of_t) for of_t in by_t if of_t]
    share = -(-most // (4 if goal.selectors else 3))
    for candidate in spaced(knees, min(share, most - len(tried))):
        take(candidate)
    turns = [with_entry, without_entry]
    while len(tried) < most:
        best = best_of(tried)
        found = _between(best, turns[0]()) or _between(best, turns[1]())
        if found is None:
            break
        take(found)
        turns.reverse()
    return sorted(tried, key=lambda found: (found.candidate.cost, found.candidate.text))


def _between(best: Sequence[Tried], pool: Sequence[Candidate]) -> Candidate | None:
    """Choose what to measure next: the most promising near the middle of the largest step.

    The first step is that from a plan which costs nothing and is no good. A step's size is its
    width in cost by its height in the logarithm of what is lost: from 2 % to 1 % is as high as from
    20 % to 10 %.
    """
    points = [(0.0, NO_GOOD), *((found.candidate.cost, min(found.loss, NO_GOOD)) for found in best)]

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
                middle or inside, key=lambda candidate: (candidate.predicted or 0, candidate.cost)
            )
    return None


def best_of(tried: Sequence[Tried]) -> list[Tried]:
    """Return those that no other beats by cost and measured agreement, by cost ascending."""
    by_candidate = {found.candidate: found for found in tried}
    best = front(by_candidate, lambda candidate: by_candidate[candidate].measured.tokens.share)
    return [by_candidate[candidate] for candidate in best]
