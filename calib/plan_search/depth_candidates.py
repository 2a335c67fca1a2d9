"""Candidates without the layers that turn rows least.

A dense run shows how far each layer turns the rows of prompts (``Dynamics.blocks``). Those that do
least are left out together, one, two, four and so on; how much that loses is measured as for every
plan, so that one with fewer layers is chosen only where it is cheaper and keeps the budget.

Source: docs/methods.md, "Static depth".
"""

from __future__ import annotations

from ...graphs.plan.cost import plan_cost
from .candidates import Candidate, Pricing
from .dynamics import Dynamics

MOST = 1 / 4
"""The share of the layers that may be left out."""


def depth_candidates(dynamics: Dynamics, pricing: Pricing) -> list[Candidate]:
    """Return plans that leave out 1, 2, 4, ... layers, those that turn rows least."""
    blocks, layers = dynamics.blocks, pricing.geometry.layers
    least = sorted(range(len(blocks)), key=lambda layer: (blocks[layer], layer))
    counts = [1 << i for i in range(layers.bit_length()) if 1 << i <= layers * MOST]
    return [_without(pricing, sorted(least[:count]), blocks) for count in counts if blocks]


def _without(pricing: Pricing, dropped: list[int], blocks: tuple[float, ...]) -> Candidate:
    text = f"depth:drop={'-'.join(map(str, dropped))}"
    last = pricing.geometry.layers - 1
    predicted = sum(blocks[layer] for layer in dropped) / max(sum(blocks), 1e-30)
    dense = pricing.candidate(text, last, None, last, predicted=predicted)
    return dense.at(2 * plan_cost(pricing.plan(dense), pricing.geometry).visual_macs)
