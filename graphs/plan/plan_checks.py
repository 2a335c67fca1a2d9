"""Whether a plan's fields fit each other, and what this version runs: checked on construction.

Errors are ``PlanError`` and name the field, what was found, what was expected and what to write
instead.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from .plan_fields import Words, check_word, is_int, is_number, is_tuple_of, reject_field
from .stages import MAX_KEEP, MODES, NORMS, OPS, SCORES, Edge, Probe, Stage

if TYPE_CHECKING:
    from .plan import StagePlan

MAX_NAME = 100
"""Longest name of a plan: it becomes part of a directory's."""

LATER_MODES = ("frozen", "attn_frozen", "mlp_frozen", "cross")
LATER_OPS = ("inject",)

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._+-]{{0,{MAX_NAME - 1}}}")


def check_plan(plan: StagePlan) -> None:
    """Refuse a plan that contradicts itself, from the whole to its parts.

    Raises:
        PlanError: the first field that is wrong.
    """
    if not isinstance(plan.name, str) or not _NAME.fullmatch(plan.name):
        # The name becomes part of a directory's name.
        wanted = f"1 to {MAX_NAME} letters, digits or any of . _ + -"
        reject_field("name", plan.name, wanted, "Rename the plan.")
    if not isinstance(plan.note, str) or not (plan.note.isprintable() and len(plan.note) <= 500):
        reject_field("note", plan.note, "one printable line of up to 500 characters", "Shorten it.")
    for field in ("decode_sees_shallow_vision", "calibrated"):
        if not isinstance(getattr(plan, field), bool):
            reject_field(field, getattr(plan, field), "true or false", "Write one of them.")
    for field in ("layers", "visual_tokens"):
        if not is_int(getattr(plan, field)) or getattr(plan, field) < 1:
            reject_field(
                field, getattr(plan, field), "a positive integer", "Take it from the model."
            )
    if not is_tuple_of(plan.stages, Stage) or not plan.stages:
        reject_field("stages", plan.stages, "one stage or more", "The dense plan has exactly one.")
    if not is_tuple_of(plan.edges, Edge) or len(plan.edges) != len(plan.stages) - 1:
        found = Words(f"{len(plan.edges)} edges") if isinstance(plan.edges, tuple) else plan.edges
        wanted = f"{len(plan.stages) - 1}, one between each two stages"
        reject_field("edges", found, wanted, "Add or remove an edge.")
    start = 0
    for i, stage in enumerate(plan.stages):
        _check_stage(f"stages[{i}]", stage, start, first=i == 0)
        start = stage.layers[1]
    if start != plan.layers:
        field, last = f"stages[{len(plan.stages) - 1}].layers", plan.stages[-1].layers
        fix = f"Write [{last[0]}, {plan.layers}]."
        reject_field(field, list(last), f"the last stage to stop at layers={plan.layers}", fix)
    if plan.stages[0].visual_tokens != plan.visual_tokens:
        reject_field(
            "stages[0].visual_tokens",
            plan.stages[0].visual_tokens,
            f"all visual_tokens={plan.visual_tokens} of an image",
            "Pruning before the decoder and late injection are not supported yet.",
        )
    for i, edge in enumerate(plan.edges):
        _check_edge(i, edge, plan.stages[i], plan.stages[i + 1])
    _check_probe(plan)


def _check_stage(at: str, stage: Stage, start: int, first: bool) -> None:
    layers = stage.layers
    if not (isinstance(layers, tuple) and len(layers) == 2 and all(map(is_int, layers))):
        reject_field(f"{at}.layers", layers, "[start, stop]", f"Start at layer {start}.")
    if layers[0] != start or layers[1] <= start:
        wanted = f"[{start}, stop] with stop > {start}, no gap and no overlap"
        reject_field(f"{at}.layers", list(layers), wanted, f"Start at layer {start}.")
    if not is_int(stage.visual_tokens) or stage.visual_tokens < 0:
        reject_field(f"{at}.visual_tokens", stage.visual_tokens, "an integer >= 0", "0 means none.")
    if not isinstance(stage.modes, tuple) or len(stage.modes) != stage.depth:
        found = (
            Words(f"{len(stage.modes)} modes") if isinstance(stage.modes, tuple) else stage.modes
        )
        wanted = f"{stage.depth}, one for each of layers {layers[0]} to {layers[1] - 1}"
        reject_field(f"{at}.modes", found, wanted, "Add or remove modes.")
    for i, mode in enumerate(stage.modes):
        check_word(f"{at}.modes[{i}]", mode, MODES, LATER_MODES)
        if mode != "dense" and not first:
            # One call carries visual and text rows together there, and a gate cannot tell them
            # apart: it holds for a call. With 0 visual tokens there is nothing to gate at all.
            fix = "Write dense; the text-blind layers come before the first edge."
            reject_field(f"{at}.modes[{i}]", mode, "dense in every stage after the first", fix)
    check_word(f"{at}.norm", stage.norm, NORMS)
    if stage.norm == "renorm" and not stage.gated_layers:
        reject_field(f"{at}.norm", "renorm", "gated", "No layer of this stage masks anything.")
    if stage.norm == "renorm" and "sink" in stage.modes:
        # Masked before the softmax, no mass is removed that a sink could take.
        field = f"{at}.modes[{stage.modes.index('sink')}]"
        reject_field(field, "sink", "no sink where norm is renorm", "Write text_blind_novv.")


def _check_edge(index: int, edge: Edge, before: Stage, after: Stage) -> None:
    at, after_field = f"edges[{index}]", f"stages[{index + 1}].visual_tokens"
    check_word(f"{at}.op", edge.op, OPS, LATER_OPS)
    if before.visual_tokens == 0:
        reject_field(
            f"{at}.op", edge.op, "no edge after the vision has left", "Merge the two stages."
        )
    if edge.op != "select":
        for key in ("score", "keep"):
            if getattr(edge, key) is not None:
                reject_field(
                    f"{at}.{key}", getattr(edge, key), f"none at a {edge.op}", "Remove it."
                )
        # A prompt whose probe finds nothing takes all its visual tokens along.
        room = 0 if edge.op == "drop" else before.visual_tokens
        if after.visual_tokens != room:
            wanted = f"{room} after the {edge.op} of {at}"
            reject_field(after_field, after.visual_tokens, wanted, f"Write {room}.")
        return
    check_word(f"{at}.score", edge.score, SCORES)
    limit = min(before.visual_tokens, MAX_KEEP)
    if not is_int(edge.keep) or not 1 <= edge.keep <= limit:  # type: ignore[operator]
        wanted = f"1 to {limit}: what the stage before has, and at most {MAX_KEEP}"
        reject_field(f"{at}.keep", edge.keep, wanted, "To keep none, write op: drop.")
    if after.visual_tokens != edge.keep:
        wanted = f"{at}.keep={edge.keep}"
        reject_field(after_field, after.visual_tokens, wanted, f"Write {edge.keep}.")
    if before.modes[-1] != "dense":
        # The last text row attends to no visual token there, so every score would be zero.
        field = f"stages[{index}].modes[{before.depth - 1}]"
        wanted = f"dense: {at} scores the visual tokens in this layer, and text must see them"
        reject_field(field, before.modes[-1], wanted, "Move the edge behind a dense layer.")


def _check_probe(plan: StagePlan) -> None:
    """The numbers of ``plan.probe``, and that edges and probe belong together."""
    probe = plan.probe
    for i, edge in enumerate(plan.edges):
        if probe is None and edge.op == "probe":
            fix = "Add probe: with first, cosine and contribution, or write select or drop."
            reject_field(f"edges[{i}].op", "probe", "select or drop in a plan without a probe", fix)
        if probe is not None and edge.op != "probe":
            fix = "Write op: probe, or remove the probe."
            reject_field(f"edges[{i}].op", edge.op, "probe, as the plan decides per prompt", fix)
    if probe is None:
        return
    if not isinstance(probe, Probe):
        reject_field(
            "probe", probe, "the numbers of a probe", "Write first, cosine and contribution."
        )
    if not plan.edges:
        found = Words("one")
        reject_field("probe", found, "none in a plan without edges", "Add an edge, or remove it.")
    blind = max(plan.stages[0].gated_layers, default=-1) + 1
    stop = plan.stages[0].layers[1]
    if not is_int(probe.first) or not blind <= probe.first < stop:
        wanted = f"{blind} to {stop - 1}: a layer of the first stage from which on all are dense"
        reject_field("probe.first", probe.first, wanted, "Move it, or the first edge.")
    for name, low, high in (
        ("cosine", -1.0, 1.0),
        ("contribution", 0.0, math.inf),
        ("exit_cosine", -1.0, 1.0),
    ):
        value = getattr(probe, name)
        if value is None and name == "exit_cosine":
            continue
        if not is_number(value) or not low <= value <= high:
            wanted = f"a number from {low:g} to {high:g}"
            reject_field(f"probe.{name}", value, wanted, "Write one.")
    for name in ("strict", "consecutive"):
        if not isinstance(getattr(probe, name), bool):
            reject_field(
                f"probe.{name}", getattr(probe, name), "true or false", "Write one of them."
            )
    if not is_int(probe.exit_layers) or probe.exit_layers < 1:
        reject_field("probe.exit_layers", probe.exit_layers, "a positive integer", "Write 2.")
    sizes = probe.buckets
    ascending = isinstance(sizes, tuple) and all(map(is_int, sizes))
    if not ascending or list(sizes) != sorted(set(sizes)) or any(size < 1 for size in sizes):
        reject_field(
            "probe.buckets", sizes, "positive integers, ascending", "Sort them, each once."
        )
    if sizes and sizes[-1] > plan.visual_tokens:
        wanted = f"at most {plan.visual_tokens}, all that an image has"
        reject_field("probe.buckets", sizes[-1], wanted, f"End with {plan.visual_tokens}.")
