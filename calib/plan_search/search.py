"""Which candidates are worth a measurement, one measurement after the other.

Measuring takes a bundle each, so of hundreds of candidates a dozen are measured: first coarsely
over all t, then where the measured front is steepest. What a plan may lose has no say in it, so a
looser budget chooses from the same measurements and is never worse off. What a plan may cost has:
dearer ones are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...graphs.plan.plan import StagePlan
from .agreement import Agreement
from .candidates import Candidate, Pricing, front, knee, plan_candidates, published_candidate
from .dynamics import Dynamics

NO_GOOD = 0.25
"""Plans that lose more are all alike: nobody wants to know by how much."""

Measure = Callable[[StagePlan], Agreement]

CLOSE_COST = 0.01
"""Plans whose costs differ by less are not worth telling apart by a measurement."""


@dataclass(frozen=True)
class Tried:
    """A candidate that was measured."""

    candidate: Candidate
    measured: Agreement
    held_out: Agreement | None = None
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, without ``front``."""
        one = self.candidate
        return {
            "text": one.text,
            "s": one.shallow,
            "t": one.t,
            "keep": one.keep,
            "e": one.e,
            "cost": one.cost,
            "visual_flops": one.visual_flops,
            "predicted": one.predicted,
            "measured": self.measured.to_dict(),
            "held_out": self.held_out and self.held_out.to_dict(),
            "verdict": self.verdict,
        }


def measure_some(
    dynamics: Dynamics, pricing: Pricing, measure: Measure, most: int, limit: float = 1.0
) -> list[Tried]:
    """Up to ``most`` candidates measured, none dearer than ``limit``, by cost ascending.

    First the uncalibrated preset, whatever it costs, to compare with; and the knees of evenly
    spread t. Then, again and again, one between those neighbours on the measured front between
    which most is lost.
    """
    by_t = [
        tuple(one for one in of_t if one.cost <= limit)
        for of_t in plan_candidates(dynamics, pricing).values()
    ]
    pool = {one.text: one for of_t in by_t for one in of_t}
    tried: list[Tried] = []

    def take(one: Candidate) -> None:
        pool.pop(one.text, None)
        tried.append(Tried(one, measure(pricing.plan(one))))

    usual = published_candidate(dynamics, pricing)
    if usual is not None and most:
        take(usual)
    knees = [knee(of_t) for of_t in by_t if of_t]
    for one in _spaced(knees, min(-(-most // 3), most - len(tried))):
        take(one)
    while len(tried) < most:
        found = _between(best_of(tried), list(pool.values()))
        if found is None:
            break
        take(found)
    return sorted(tried, key=lambda one: (one.candidate.cost, one.candidate.text))


def _between(best: Sequence[Tried], pool: Sequence[Candidate]) -> Candidate | None:
    """What to measure next: the most promising near the middle of the largest step in ``best``.

    The first step is that from a plan which costs nothing and is no good. A step's size is its
    width in cost by its height in the logarithm of what is lost: from 2 % to 1 % is as high as from
    20 % to 10 %.
    """
    points = [(0.0, NO_GOOD), *((one.candidate.cost, _loss(one)) for one in best)]

    def size(step: tuple[tuple[float, float], tuple[float, float]]) -> float:
        (start, more), (stop, less) = step
        return (stop - start) * math.log(more / less)

    for (start, _), (stop, _) in sorted(pairwise(points), key=size, reverse=True):
        inside = [one for one in pool if start + CLOSE_COST < one.cost < stop - CLOSE_COST]
        centre, quarter = (start + stop) / 2, (stop - start) / 4
        middle = [one for one in inside if abs(one.cost - centre) <= quarter]
        if inside:
            return min(middle or inside, key=lambda one: (one.predicted, one.cost))
    return None


def _loss(one: Tried) -> float:
    """Share of tokens that disagree, as if half a token more did: a logarithm needs something."""
    tokens = one.measured.tokens
    return min((tokens.total - tokens.right + 0.5) / (tokens.total + 1), NO_GOOD)


def best_of(tried: Sequence[Tried]) -> list[Tried]:
    """Those that no other beats by cost and measured agreement, by cost ascending."""
    by_candidate = {one.candidate: one for one in tried}
    best = front(by_candidate, lambda one: by_candidate[one].measured.tokens.share)
    return [by_candidate[one] for one in best]


def _spaced(values: Sequence[Candidate], most: int) -> list[Candidate]:
    """``most`` of ``values``, ends included, evenly spread."""
    if len(values) <= most:
        return list(values)
    if most < 2:
        return list(values[len(values) // 2 :][:most])
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
