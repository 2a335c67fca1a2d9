"""Thresholds for this model in place of the published ones, which were chosen for 32 layers.

In a decoder of eight layers each token weighs more: the published thresholds fire at once, before
text has read the image, and hardly any two layers are quiet enough to end. Three rules, each the
safest that still does something:

    cosine         the least that fires in time in nine of ten prompts: late selection loses little
    contribution   the largest whose tokens hold 95 % of the contributions in nine of ten prompts
    exit_cosine    the largest that lets vision leave before the last layer in half of the prompts

How far answers agree then is not predicted: ``visistage evaluate`` measures it. Source: what late
and early selection cost: docs/methods.md, "VisiPruner: static plans".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...graphs.plan.probing import Decision
from ...graphs.plan.stages import Probe
from .dynamics import PUBLISHED, Dynamics, quantile

THRESHOLDS = (0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.997, 0.999)

FIRES = 0.9
"""Share of prompts whose trigger must fire in time; the others keep all their tokens to the end."""

IN_TIME = 0.75
"""In time is within this part of the depth: what fires later saves little."""

HOLDS = 0.95
"""Share of the contributions in the trigger layer that kept tokens must hold."""

LEAVES = 0.5
"""Share of prompts in which vision must leave early for an exit to be worth its probes."""


@dataclass(frozen=True)
class Suggestion:
    """An adaptive plan as typed, and why."""

    plan: str
    reason: str


def suggest_thresholds(dynamics: Dynamics) -> Suggestion:
    """Suggest an adaptive plan by the rules above; the reason says where one finds no threshold."""
    base = replace(PUBLISHED, first=dynamics.first, exit_cosine=None)
    probe, about_cosine = _cosine(dynamics, base)
    probe, about_contribution = _contribution(dynamics, probe)
    probe, about_exit = _exit(dynamics, probe)
    names = ("cosine", "contribution", "exit_cosine")
    changed = [
        f"{name}={getattr(probe, name):g}"
        for name in names
        if getattr(probe, name) not in (None, getattr(PUBLISHED, name))
    ]
    if probe.exit_cosine is None:
        changed.append("deep=false")
    plan = ":".join(["visipruner-adaptive", *([",".join(changed)] if changed else [])])
    return Suggestion(plan, "; ".join((about_cosine, about_contribution, about_exit)))


def _cosine(dynamics: Dynamics, base: Probe) -> tuple[Probe, str]:
    deadline = max(int(IN_TIME * dynamics.layers) - 1, dynamics.first)

    def in_time(probe: Probe) -> float:
        return _share(
            [_no_later(decision.trigger, deadline) for decision in dynamics.decide(probe)]
        )

    tried = [replace(base, cosine=cosine) for cosine in THRESHOLDS]
    probe = next((probe for probe in tried if in_time(probe) >= FIRES), tried[-1])
    found = (
        f"cosine {probe.cosine:g} fires by layer {deadline} in {_percent(in_time(probe))} of the "
        f"prompts{_half(dynamics.decide(probe))}"
    )
    if probe.cosine != base.cosine:
        found += (
            f" (published {base.cosine:g}: {_percent(in_time(base))}{_half(dynamics.decide(base))})"
        )
    return probe, found


def _contribution(dynamics: Dynamics, base: Probe) -> tuple[Probe, str]:
    def held(probe: Probe) -> float:
        shares = [share for share in dynamics.mass_of(dynamics.decide(probe)) if share is not None]
        return quantile(shares, 1 - FIRES) or 0.0 if shares else 0.0

    tried = [
        replace(base, contribution=least) for least in reversed(dynamics.contribution_thresholds())
    ]
    probe = next((probe for probe in tried if held(probe) >= HOLDS), tried[-1])
    return probe, (
        f"tokens above {probe.contribution:g} hold {_percent(held(probe))} of the contributions "
        f"or more in {_percent(FIRES)} of the prompts that fire"
    )


def _exit(dynamics: Dynamics, base: Probe) -> tuple[Probe, str]:
    def leaves(exit_cosine: float) -> float:
        decisions = dynamics.decide(replace(base, exit_cosine=exit_cosine))
        return _share([_no_later(decision.exit, dynamics.layers - 2) for decision in decisions])

    found = next((cosine for cosine in reversed(THRESHOLDS) if leaves(cosine) >= LEAVES), None)
    if found is None:
        return base, f"no exit: vision would leave early in less than {_percent(LEAVES)} of them"
    text = f"with exit_cosine {found:g} vision leaves early in {_percent(leaves(found))} of them"
    published = PUBLISHED.exit_cosine
    if published is not None and found != published:
        text += f" (published {published:g}: {_percent(leaves(published))})"
    return replace(base, exit_cosine=found), text


def _no_later(layer: int | None, deadline: int) -> bool:
    return layer is not None and layer <= deadline


def _half(decisions: Sequence[Decision]) -> str:
    layer = quantile([decision.trigger for decision in decisions], 0.5)
    return "" if layer is None else f", by layer {layer:.0f} in half of them"


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
