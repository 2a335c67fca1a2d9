"""The plan that the data supports: candidates measured, and confirmed on samples held out.

``Choice.to_dict`` is what a calibration keeps (``choice``; {} where the plan was given, not
chosen). Shares are of 1, not per cent.

    budget        {"lose": 0.01} or {"cost": 0.5}
    agreement     what "lose" counts: "tokens" (teacher-forced, see calib/plan_search/agreement.py)
    cost          what "cost" counts: "visual FLOPs as the graphs run them, dense = 1"
    max_tokens    longest answer that was compared
    precision     of the bundles that were measured: "fp32", or a recipe's name; the dense answers
                  that they are compared with are those of FP32
    rounding      quantised precisions only: the dense plan in it, on the choosing samples: an
                  Agreement, see below
    shipped       quantised precisions only: the chosen plan with its own ranges, which rest on all
                  samples: {"samples": "held_out" or "choosing", and an Agreement}
    samples       {"choosing": n, "held_out": n}
    plan          the chosen plan, StagePlan.to_dict()
    text          the same as one can type it: "visipruner:shallow=false,t=4,e=6,keep=16", "dense"
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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...graphs.errors import PlanError
from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import preset
from .agreement import Agreement
from .candidates import Pricing
from .dynamics import Dynamics
from .rationale import rationale_for, warnings_for
from .search import CLOSE_COST, Measure, Tried, best_of, measure_some

DEFAULT_CANDIDATES = 12
NEAR_MISS = 3
"""A plan that misses the budget by up to so many times what the budget allows is a near miss."""


@dataclass(frozen=True)
class Budget:
    """What a plan may lose (share of tokens that disagree), or cost (share of dense visual FLOPs).

    Raises:
        PlanError: both, neither, or no share.
    """

    lose: float | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        if (self.lose is None) == (self.cost is None):
            raise PlanError(
                f"budget: found lose={self.lose} and cost={self.cost}, expected one of the two. "
                "Type --lose 1% or --cost 50%."
            )
        if self.lose is not None and not 0 <= self.lose < 1:
            raise PlanError(f"lose: found {self.lose:g}, expected 0 % to below 100 %. Type 1%.")
        if self.cost is not None and not 0 < self.cost <= 1:
            raise PlanError(f"cost: found {self.cost:g}, expected above 0 % to 100 %. Type 50%.")

    def keeps(self, cost: float, measured: Agreement) -> bool:
        """Whether a plan is within the budget."""
        if self.cost is not None:
            return cost <= self.cost + 1e-9
        assert self.lose is not None
        return measured.tokens.share >= 1 - self.lose - 1e-9

    def to_dict(self) -> dict[str, float]:
        """Plain JSON form."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Choice:
    """The plan, why, and what else was tried; see the module."""

    budget: Budget
    plan: StagePlan
    text: str
    tried: tuple[Tried, ...]  # by cost
    chosen: int | None
    rationale: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether a pruned plan kept the budget."""
        return self.chosen is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, but for what only those know who measured: ``max_tokens``,
        ``precision``, ``rounding`` and ``shipped``.
        """
        best = {one.candidate for one in best_of(self.tried)}
        held = next((one.held_out for one in self.tried if one.held_out), None)
        return {
            "budget": self.budget.to_dict(),
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
            "candidates": [{**one.to_dict(), "front": one.candidate in best} for one in self.tried],
        }


def choose_plan(
    dynamics: Dynamics,
    pricing: Pricing,
    budget: Budget,
    measure: Measure,
    confirm: Measure | None = None,
    *,
    most: int = DEFAULT_CANDIDATES,
    text_blind: Sequence[dict[str, Any]] = (),
) -> Choice:
    """The cheapest plan within a budget of agreement, or the best within one of cost.

    Which plans are measured does not depend on what they may lose, so a looser budget never gives a
    costlier plan. What is best on the choosing samples must hold on those held out, too, else the
    next is taken; without any that does, the dense plan is, and the choice says so.

    Args:
        dynamics: of the dense model, on the choosing samples.
        pricing: what its plans cost.
        budget: what the plan may lose, or cost.
        measure: agreement of a plan with dense on the choosing samples; takes long.
        confirm: the same on samples that had no part in choosing; None: there are none.
        most: how many plans are measured.
        text_blind: rows of ``dynamics.to_dict``: what text-blind layers cost by themselves.
    """
    tried = measure_some(dynamics, pricing, measure, most, budget.cost or 1.0)
    order = _order(tried, budget)
    chosen: int | None = None
    confirmed = 0
    for index in order:
        one = tried[index]
        if confirm is not None:
            one = replace(one, held_out=confirm(pricing.plan(one.candidate)))
            confirmed += 1
        holds = _holds(one, budget)
        tried[index] = replace(one, verdict="chosen" if holds else _near_miss(one, budget))
        if holds:
            chosen = index
            break
    if chosen is None and order and budget.cost is not None:
        # A cost must be kept whatever luck there was in choosing.
        chosen = max(order, key=lambda index: _share(tried[index].held_out))
        tried[chosen] = replace(tried[chosen], verdict="chosen")
    tried = [_judged(one, budget, tried, chosen) for one in tried]
    taken = None if chosen is None else tried[chosen]
    text = "dense" if taken is None else taken.candidate.text
    if taken is None:
        plan = preset("dense", pricing.geometry.layers, pricing.visual_tokens)
    else:
        plan = pricing.plan(taken.candidate)
    samples = len(dynamics.readings)
    plan = replace(plan, calibrated=True, note=f"calibrated on {samples} prompts")
    return Choice(
        budget,
        plan,
        text,
        tuple(tried),
        chosen,
        rationale_for(dynamics, tried, taken, text_blind),
        warnings_for(budget.lose, tried, taken, confirmed),
    )


def _order(tried: Sequence[Tried], budget: Budget) -> list[int]:
    """Indices of those within the budget, in the order in which they would be taken."""

    def key(index: int) -> tuple[float, ...]:
        one = tried[index]
        merit = (-one.measured.tokens.share, one.measured.kl)
        cost = (one.candidate.cost,)
        return cost + merit if budget.cost is None else merit + cost

    fitting = [i for i, one in enumerate(tried) if budget.keeps(one.candidate.cost, one.measured)]
    return sorted(fitting, key=key)


def _holds(one: Tried, budget: Budget) -> bool:
    """Whether what was found on the choosing samples shows on those held out."""
    if one.held_out is None:
        return True
    if budget.cost is None:
        return budget.keeps(one.candidate.cost, one.held_out)
    # Nothing was promised about agreement, only that this is the best: luck must not have made it.
    return one.held_out.tokens.interval[1] >= one.measured.tokens.interval[0]


def _near_miss(one: Tried, budget: Budget) -> str:
    assert one.held_out is not None
    return f"near miss: {_percent(one.measured)}, but on held-out samples {_percent(one.held_out)}"


def _judged(one: Tried, budget: Budget, tried: Sequence[Tried], chosen: int | None) -> Tried:
    """With a verdict where one is due: cheaper than what was chosen, and nearly good enough."""
    if one.verdict or budget.lose is None:
        return one
    if chosen is not None and one.candidate.cost >= tried[chosen].candidate.cost:
        return one
    lost = 1 - one.measured.tokens.share
    if budget.lose < lost <= max(NEAR_MISS * budget.lose, CLOSE_COST):
        return replace(one, verdict=f"near miss: {_percent(one.measured)}")
    return one


def _percent(measured: Agreement) -> str:
    tokens = measured.tokens
    return f"{100 * tokens.share:.1f} % ({tokens.total - tokens.right} of {tokens.total} differ)"


def _share(measured: Agreement | None) -> float:
    return 0.0 if measured is None else measured.tokens.share
