"""The table under an answer: where the time went, and what the plan saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...graphs.parts import (
    ENTRY,
    OF_LAYERS,
    PROBE,
    PROJECT,
    VISION,
    serves_alone,
    stage_of,
)
from ...graphs.plan.cost import Cost, Geometry, Load, cost_of, loads_as_run, reduction_percent
from ...graphs.vision_contract import projects_later

if TYPE_CHECKING:
    from ...graphs.bundle import Manifest
    from ...runtime.answer import Answer, PlanFacts


def savings(manifest: Manifest, facts: PlanFacts) -> dict[str, Any] | None:
    """Return the per cent that the plan saved against the dense model; None without images.

    ``visual_flops_percent`` and ``kv_bytes_percent`` are as the graphs run;
    ``visual_flops_percent_of_method`` is what it would be if masked attention were skipped, too.
    """
    if not facts.visual_tokens:
        return None
    prefix = len(manifest.prefix.ids) if manifest.prefix else 0
    text = facts.prompt_rows - facts.visual_tokens - prefix
    geometry = Geometry.of(manifest.config.text)
    dense = cost_of([Load("dense", facts.visual_tokens)] * geometry.layers, geometry, prefix, text)

    def cost(accounting) -> Cost:
        loads = loads_as_run(manifest.plan, facts.visual_tokens_per_layer, accounting)
        return cost_of(loads, geometry, prefix, text)

    graphs, method = cost("graphs"), cost("modes")
    return {
        "visual_flops_percent": reduction_percent(graphs.visual_macs, dense.visual_macs),
        "visual_flops_percent_of_method": reduction_percent(method.visual_macs, dense.visual_macs),
        "kv_bytes_percent": reduction_percent(graphs.kv_bytes, dense.kv_bytes),
    }


def answer_facts(answer: Answer, manifest: Manifest) -> dict[str, Any]:
    """Return the answer as JSON, with the model's name and the savings."""
    facts = answer.plan
    return {
        **answer.to_dict(),
        "model": manifest.model,
        "precision": manifest.precision,
        "savings": savings(manifest, facts),
    }


def answer_table(answer: Answer, manifest: Manifest) -> RenderableType:
    """Tabulate the timings, and describe what the plan did."""
    timings, facts = answer.timings, answer.plan
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    if facts.visual_tokens:
        table.add_row("preprocess", _ms(timings.preprocess_ms), "")
    # In the order of the chain; what did not run had been paid for.
    first, *others = manifest.graphs
    for name in (first, ENTRY, *others):
        if name in timings.graphs_ms:
            table.add_row(name, _ms(timings.graphs_ms[name]), _what(name, manifest, facts))
    table.add_row("first token", _ms(timings.first_token_ms), "from the question to here")
    if timings.per_token_ms is not None:
        count = f"mean of {len(answer.tokens) - 1}"
        table.add_row("each later token", _ms(timings.per_token_ms), count)
    table.add_row("total", _ms(timings.total_ms), f"finish: {answer.finish}")
    lines = [Text(line, style="dim") for line in _plan_lines(answer, manifest)]
    return Group(table, *lines)


def _plan_lines(answer: Answer, manifest: Manifest) -> list[str]:
    facts = answer.plan
    saved = savings(manifest, facts)
    if saved is None:
        return [f"plan {facts.plan}: no image, nothing to prune"]
    if manifest.plan.is_dense:
        return [f"plan {facts.plan}: all {facts.visual_tokens} visual tokens in every layer"]
    kept = f"{len(facts.kept)} kept, " if facts.kept is not None else ""
    last = manifest.plan.layers - 1
    after = "to the end" if facts.exit == last else f"none after layer {facts.exit} of 0 to {last}"
    flops, method, kv = (f"{percent:.1f}" for percent in saved.values())
    skipped = "" if method == flops else f" ({method} % if masked attention were skipped)"
    if facts.called is not None:
        kept = f"{kept}selected after layer {facts.trigger}, " if kept else "none selected, "
    return [
        f"plan {facts.plan}: {facts.visual_tokens} visual tokens in, {kept}{after}",
        *(f"not as the probes called for: {deviation}" for deviation in facts.deviations),
        f"against dense: {flops} % less visual computing{skipped}, {kv} % less cache",
    ]


def _what(name: str, manifest: Manifest, facts: PlanFacts) -> str:
    """Describe a graph, and the visual rows a stage had."""
    plan = manifest.plan
    if name == VISION:
        return (
            "vision encoder"
            if projects_later(manifest.config, plan)
            else "vision encoder and projector"
        )
    if name == PROJECT:
        return "projector"
    if name == ENTRY:
        assert plan.entry is not None
        return plan.entry.summary(plan.visual_tokens)
    if not name.startswith(OF_LAYERS):
        return "selection" if name.startswith("select") else "probes" if name == PROBE else ""
    start, stop = plan.stages[stage_of(name)].layers
    layers = f"layers {start} to {stop - 1}" if stop - start > 1 else f"layer {start}"
    if serves_alone(name):
        return f"{layers}, keys and values of visual tokens"
    if not facts.visual_tokens:
        return layers
    return f"{layers}, {facts.visual_tokens_per_layer[start]} visual tokens"


def _ms(value: float) -> str:
    return f"{value:.1f} ms"
