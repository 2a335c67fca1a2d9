"""Which plan for which decoder, without reading any weights; and the list of presets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from ...compile.checkpoint.known_models import model_config
from ...compile.planfile import resolve_plan
from ...graphs.errors import PlanError
from ...graphs.plan.cost import Geometry, Outcome
from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import LATER, PRESETS


def plan_cost_facts(
    plan: str, model: str, layers: int | None = None, visual_tokens: int | None = None
) -> tuple[StagePlan, Geometry]:
    """The plan that ``plan`` names, and the sizes of the decoder it is for.

    Args:
        plan: a preset with or without options, or a file.
        model: ``demo``, a name of ``recipes.GEOMETRIES`` or a folder with a ``config.json``.
        layers: instead of the model's depth.
        visual_tokens: instead of the model's tokens per image.

    Raises:
        ModelError: an unknown model, or a config that is not supported.
        PlanError: see ``resolve_plan``.
    """
    config = model_config(model)
    geometry = Geometry.of(config.text)
    geometry = replace(geometry, layers=layers or geometry.layers)
    tokens = visual_tokens or config.visual_tokens
    return resolve_plan(plan, geometry.layers, tokens), geometry


def outcome_of(
    plan: StagePlan, trigger: int | None, kept: float | None, exit_: int | None
) -> Outcome | None:
    """The outcome that three options give for a plan that decides per prompt; None without any.

    Raises:
        PlanError: some of them without the others, or for a plan that cannot end so.
    """
    given = (trigger, kept, exit_)
    if all(value is None for value in given):
        return None
    if trigger is None or kept is None or exit_ is None:
        raise PlanError(
            "found some of --trigger, --kept and --exit, expected all of them: a prompt's cost "
            "follows from the three. Write such as --trigger 14 --kept 10.3 --exit 23."
        )
    outcome = Outcome(trigger, kept, exit_)
    outcome.check(plan)
    return outcome


def preset_facts() -> dict[str, Any]:
    """The presets with their options, as JSON."""
    return {
        name: {"summary": preset.summary, "options": preset.options}
        for name, preset in PRESETS.items()
    }


def preset_table() -> Table:
    """The same for people."""
    later = ", ".join(LATER)
    table = Table("preset", "what it does", "options", caption=f"Planned: {later}")
    for name, preset in PRESETS.items():
        options = "\n".join(f"{option}: {about}" for option, about in preset.options.items())
        table.add_row(name, preset.summary, escape(options))
    return table
