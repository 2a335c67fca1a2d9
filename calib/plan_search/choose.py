"""The plan that the data supports: candidates measured, and confirmed on samples held out.

Measuring takes a bundle each, so few of hundreds of candidates are measured (``search.py``). What a
plan may lose does not affect which, so a looser budget chooses from the same measurements and is
never worse off.

Cheapest is what takes fewest FLOPs for two questions about one image: a selection that looks at the
question makes the second dearer than the dense model's, an entry does not.

``Choice.to_dict`` is what a calibration keeps (``choice``; {} where the plan was given, not
chosen). Shares are of 1, not per cent.

    budget        {"lose": 0.01} or {"cost": 0.5}
    agreement     what "lose" counts: "tokens" (teacher-forced, see calib/plan_search/agreement.py)
    cost          what "cost" counts: "visual FLOPs as the graphs run them, dense = 1"
    question      {"prefix", "text"}: rows of the second question that is counted
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
    reasons       {"s", "t", "K", "e"}: a sentence each, of an entry alone "s" only; "entry" where
                  any was measured; "precision" where it is quantised
    warnings      sentences; what should be known before the choice is trusted
    chosen        index into candidates, or null for dense
    dense         {"first_ms", "second_ms"} of the dense model, as the candidates have them
    candidates    by cost, ascending; before there were entries without entry and second:
      text        as above
      entry       selector and count of what enters, "scope-64", or null
      s, t, keep, e
                  text-blind layers, last layer with all tokens, K, last layer with any
      cost        share of dense visual FLOPs
      visual_flops
      second      a second question about the same image, kept in every stage that no question
                  decides: share of the dense model's FLOPs for it
      second_flops
      first_ms, second_ms
                  to the first token, least of eight on this machine: a question about a new image,
                  and a second one about it; neither before they were measured
      predicted   share of the visual tokens' influence that the plan cuts off, from dynamics alone;
                  with an entry the share of tokens lost, estimated from other plans, or null
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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import preset
from .agreement import Agreement
from .candidates import Pricing, Tried
from .dynamics import Dynamics
from .goal import SelectionGoal
from .rationale import rationale_for, warnings_for
from .search import CLOSE_COST, Measure, best_of, measure_some

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
    question: dict[str, int]  # rows, as ``Pricing`` has them

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
            "question": self.question,
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
    tried = measure_some(dynamics, pricing, measure, goal)
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
            cheaper = taken is None or found.flops < taken.flops
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
        {"prefix": pricing.prefix, "text": pricing.text},
    )


def _order(tried: Sequence[Tried], goal: SelectionGoal) -> list[int]:
    """Return the indices of those within the budget, in the order in which they are taken."""

    def key(index: int) -> tuple[float, ...]:
        found = tried[index]
        merit = (-found.measured.tokens.share, found.measured.kl)
        cost = (found.flops,)
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
