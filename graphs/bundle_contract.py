"""The contract of every graph of a bundle."""

from __future__ import annotations

from collections.abc import Sequence

from .config import ModelConfig
from .contract import GraphSpec, probe_spec, select_spec, serve_spec, stage_spec
from .errors import PlanError
from .fusion import check_injected
from .parts import (
    PROBE,
    PROJECT,
    VISION,
    StagePart,
    part_names,
    probed,
    serving_name,
    step_name,
)
from .plan.plan import StagePlan
from .precision import NO_FALLBACK, Fp32Fallback
from .quantization import CacheScheme
from .text_config import TextConfig
from .vision_contract import project_spec, projects_later, vision_spec


def graph_specs(
    config: ModelConfig,
    plan: StagePlan,
    dtype: str,
    parts: Sequence[StagePart],
    rows_back: bool,
    fallback: Fp32Fallback = NO_FALLBACK,
    cache: CacheScheme = "float",
    *,
    steps: bool = False,
) -> dict[str, GraphSpec]:
    """Return the contract of every graph of a bundle, in the order in which a prompt meets them.

    ``steps``: calls of one row have graphs of their own, with the contract of the others.
    """
    text = config.text
    check_injected(text.inject, plan)
    _check_axes(text, plan)
    specs = {VISION: vision_spec(config, plan, dtype, fallback)}
    if projects_later(config, plan):
        specs[PROJECT] = project_spec(config, plan, dtype, fallback)
    for name, part in zip(part_names(parts), parts, strict=True):
        if part.serves(plan):
            specs[serving_name(name)] = serve_spec(text, plan, part, dtype, fallback, cache)
        specs[name] = stage_spec(text, plan, part, dtype, rows_back, fallback, cache)
        if steps:
            specs[step_name(name)] = specs[name]
        if part.ends(plan) and probed(plan, part.stage):
            edge = plan.edges[part.stage]
            specs[f"select{part.stage}"] = select_spec(text, edge, dtype, fallback, cache)
    if plan.probe is not None:
        specs[PROBE] = probe_spec(text, dtype, cache)
    return specs


def _check_axes(text: TextConfig, plan: StagePlan) -> None:
    """Refuse a plan that moves rows which have a place on several axes."""
    moved = plan.positions != "original" or plan.span != plan.visual_tokens
    if moved and text.rope.axes > 1:
        raise PlanError(
            f"plan '{plan.name}' gives rows other positions, and those of this model stand at a "
            "time, a height and a width. Use positions=original, or another entry"
        )
