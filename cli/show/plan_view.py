"""Plans on the terminal: which one, for which decoder, its stages and costs; the list of presets.

No weights are read. ``plan_json`` computes through ``graphs/plan/cost.py``; ``plan_table`` lays its
result out.

Source: docs/design.md, "The plan"; formulas: docs/methods.md, "Cost accounting".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...compile.checkpoint.known_models import model_config
from ...compile.planfile import modes_text, resolve_plan
from ...graphs.errors import PlanError
from ...graphs.families.family import Size
from ...graphs.fields import to_json
from ...graphs.plan.cost import (
    FP16_BYTES,
    Accounting,
    Cost,
    Geometry,
    Outcome,
    dense_cost,
    plan_cost,
    reduction_percent,
    total_cost,
)
from ...graphs.plan.plan import StagePlan
from ...graphs.plan.stages import Edge
from ...graphs.presets.presets import PRESETS
from ...graphs.presets.request import UNCALIBRATED

_TOTALS = {
    "visual_macs": "MACs, visual rows only",
    "prefill_macs": "MACs, whole prefill",
    "mean_visual_tokens": "visual tokens per layer",
    "visual_kv_bytes": "cache, visual rows",
    "kv_bytes": "cache, all rows",
    "decode_read_bytes": "read per decode step",
}

_ACCOUNTINGS = {
    "modes": "each layer by its mode",
    "paper": "the paper's: no attention term in the stage with text-blind layers",
    "graphs": "as the graphs run: gates zero values, but skip no work",
}


def plan_label(plan: StagePlan) -> str | None:
    """Return what to know before trusting the numbers; None for measured and dense plans."""
    if plan.calibrated or plan.is_dense:
        return None
    return UNCALIBRATED if plan.note.startswith(UNCALIBRATED) else "not calibrated"


def plan_json(
    plan: StagePlan,
    geometry: Geometry,
    prefix: int = 35,
    text: int = 40,
    *,
    accounting: Accounting = "modes",
    outcome: Outcome | None = None,
    kv_element_bytes: float = FP16_BYTES,
    weight_element_bytes: float = FP16_BYTES,
) -> dict[str, Any]:
    """Compute stages and totals for a prompt of ``prefix`` rows, one image and ``text`` rows.

    MACs are of the prefill (times 2 for FLOPs), bytes are plain numbers, reductions are per cent
    of the dense model. Stage MACs leave out the output projection, totals include it.
    """
    sizes = {"kv_element_bytes": kv_element_bytes, "weight_element_bytes": weight_element_bytes}
    cost = plan_cost(plan, geometry, prefix, text, accounting=accounting, outcome=outcome, **sizes)
    dense = dense_cost(plan, geometry, prefix, text, **sizes)
    edges = [_edge_text(edge) for edge in plan.edges]
    stages = []
    for stage, edge in zip(plan.stages, [*edges, None], strict=True):
        loads = cost.loads[slice(*stage.layers)]
        stages.append(
            {
                "layers": list(stage.layers),
                "visual_tokens": _mean([item.load.visual_tokens for item in loads]),
                "modes": modes_text(stage.modes),
                "norm": stage.norm if stage.gated_layers else None,
                "frozen": to_json(stage.frozen),
                "drop_attention": list(stage.drop_attention),
                "drop_mlp": list(stage.drop_mlp),
                "edge": edge,
                "prefill_macs": total_cost(loads, "prefill_macs"),
                "visual_macs": total_cost(loads, "visual_macs"),
                "visual_kv_bytes": total_cost(loads, "visual_kv_bytes"),
                "kv_bytes": total_cost(loads, "kv_bytes"),
            }
        )
    return {
        "name": plan.name,
        "hash": plan.hash,
        "label": plan_label(plan),
        "note": plan.note,
        "kind": plan.kind,
        "trigger": outcome.trigger if outcome else plan.trigger,
        "keep": outcome.kept if outcome else plan.keep,
        "exit": outcome.exit if outcome else plan.exit,
        "prefix_rows": prefix,
        "visual_tokens": plan.visual_tokens,
        "text_rows": text,
        "entry": to_json(plan.entry) if plan.entry else None,
        "accounting": accounting,
        "stages": stages,
        "totals": _totals(cost),
        "dense": _totals(dense),
        "reduction_percent": {
            field: reduction_percent(getattr(cost, field), getattr(dense, field))
            for field in _TOTALS
        },
    }


def plan_table(facts: dict[str, Any], plan: StagePlan, outcome: Outcome | None) -> RenderableType:
    """Lay out ``plan_json`` of ``plan``: a row for each stage, totals beside the dense model."""
    parts: list[RenderableType] = [_title(facts)]
    if plan.entry is not None:
        parts.append(Text(plan.entry.summary(plan.visual_tokens)))
    if plan.routing is not None:
        parts.append(Text(plan.routing.summary))
    parts.append(_stage_table(facts))
    parts += [Text(line) for line in left_out(plan)]
    parts.append(_total_table(facts))
    rows = f"{facts['prefix_rows']} prefix + {facts['visual_tokens']} visual + {facts['text_rows']}"
    parts.append(
        Text(f"For {rows} text rows. Accounting: {_ACCOUNTINGS[facts['accounting']]}.", style="dim")
    )
    if plan.probe is not None:
        parts.append(Text(_decision(plan, outcome), style="dim"))
    return Group(*parts)


def left_out(plan: StagePlan) -> list[str]:
    """Say which layers are left out, and which rows are frozen where, a line each."""
    dropped: dict[str, list[int]] = {}
    frozen: dict[str, list[int]] = {}
    for part, layer in plan.dropped:
        dropped.setdefault(part, []).append(layer)
    for stage in plan.stages:
        for item in stage.frozen:
            frozen.setdefault(f"{item.part}, {item.rows} rows", []).extend(item.layers)
    return [
        f"{what}{name}: layers {', '.join(map(str, layers))}"
        for what, found in (("left out, ", dropped), ("frozen, ", frozen))
        for name, layers in found.items()
    ]


def _decision(plan: StagePlan, outcome: Outcome | None) -> str:
    """Say for which prompts the numbers of a plan that decides per prompt hold."""
    if outcome is None:
        return (
            "Every prompt decides for itself; the numbers are for one that never selects. For "
            "others add --trigger, --kept and --exit."
        )
    return (
        f"For prompts that select after layer {outcome.trigger}, keep {outcome.kept:g} and drop "
        f"them after layer {outcome.exit}."
    )


def _mean(counts: list[float]) -> float:
    mean = sum(counts) / len(counts)
    return int(mean) if mean == int(mean) else round(mean, 2)


def _title(facts: dict[str, Any]) -> Text:
    title = Text.assemble(("plan ", "dim"), (facts["name"], "bold"), f" {facts['hash'][:12]}")
    label = facts["label"] or ""
    # The note of a preset says the label already.
    for line in ("" if label in facts["note"] else label, facts["note"]):
        if line:
            title.append(f"\n{line}", style="yellow" if label else "")
    return title


def _stage_table(facts: dict[str, Any]) -> Table:
    table = Table("stage", "layers", "visual tokens", "modes", "MACs", "visual cache", "then")
    for column in (0, 1, 2, 4, 5):
        table.columns[column].justify = "right"
    for index, stage in enumerate(facts["stages"]):
        start, stop = stage["layers"]
        norm = " (renorm)" if stage["norm"] == "renorm" else ""
        table.add_row(
            str(index),
            f"{start}-{stop - 1}" if stop - start > 1 else str(start),
            str(stage["visual_tokens"]),
            stage["modes"] + norm,
            _macs(stage["prefill_macs"]),
            _mebibytes(stage["visual_kv_bytes"]),
            stage["edge"] or "",
        )
    return table


def _total_table(facts: dict[str, Any]) -> Table:
    table = Table("", "plan", "dense", "saved")
    for column in table.columns[1:]:
        column.justify = "right"
    for field, title in _TOTALS.items():
        show = _macs if "macs" in field else _mebibytes if "bytes" in field else "{:.2f}".format
        plan, dense = (show(facts[kind][field]) for kind in ("totals", "dense"))
        table.add_row(title, plan, dense, f"{facts['reduction_percent'][field]:.2f} %")
    return table


def _totals(cost: Cost) -> dict[str, float]:
    return {field: getattr(cost, field) for field in _TOTALS}


def _edge_text(edge: Edge) -> str:
    return f"select {edge.keep} by {edge.score}" if edge.op == "select" else str(edge.op)


def _macs(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.2f} MiB"


def plan_cost_facts(
    plan: str,
    model: str,
    layers: int | None = None,
    visual_tokens: int | None = None,
    image_tokens: int | None = None,
    canvas: Size | None = None,
) -> tuple[StagePlan, Geometry]:
    """Return the plan that ``plan`` names, and the sizes of the decoder it is for.

    Args:
        plan: a preset with or without options, or a file.
        model: ``demo``, a name of ``KNOWN_MODELS`` or a folder with a ``config.json``.
        layers: instead of the model's depth.
        visual_tokens: instead of the model's tokens per image.
        image_tokens: the most of an image, as ``open_checkpoint`` takes it.
        canvas: likewise.

    Raises:
        ModelError: an unknown model, or a config that is not supported.
        PlanError: see ``resolve_plan``.
    """
    config = model_config(model, image_tokens, canvas)
    geometry = Geometry.of(config.text)
    geometry = replace(geometry, layers=layers or geometry.layers)
    tokens = visual_tokens or config.visual_tokens
    return resolve_plan(plan, geometry.layers, tokens), geometry


def outcome_of(
    plan: StagePlan, trigger: int | None, kept: float | None, exit_: int | None
) -> Outcome | None:
    """Return the outcome that three options give for a plan that decides per prompt, or None.

    Raises:
        PlanError: some of them without the others, or a plan that cannot end so.
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
    """Return the presets with their options, as JSON."""
    return {
        name: {"summary": preset.summary, "options": preset.options()}
        for name, preset in PRESETS.items()
    }


def preset_table() -> Table:
    """Tabulate the presets with their options."""
    table = Table("preset", "what it does", "options")
    for name, preset in PRESETS.items():
        options = "\n".join(f"{option}: {about}" for option, about in preset.options().items())
        table.add_row(name, preset.summary, options)
    return table
