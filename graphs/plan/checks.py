"""The rules of a plan's parts: whether their fields fit each other, and what this version runs.

Errors are ``PlanError`` and name the field, what was found, what was expected and what to write
instead. ``plan.py`` checks the whole.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ..errors import PlanError
from ..fields import Words, check_word, is_int, is_number, reject
from ..selectors.registry import EDGE_SELECTORS, ENTRY_SELECTORS
from .stages import (
    CLASSES,
    FROZEN_ROWS,
    MAX_KEEP,
    MODES,
    NORMS,
    OPS,
    PARTS,
    POSITIONS,
    REMOVED,
    Edge,
    Entry,
    Frozen,
    Probe,
    Stage,
)

MAX_NAME = 100
"""Longest name of a plan: it becomes part of a directory's."""

LATER = {
    "absent": "Absent vision is a stage with visual_tokens: 0.",
    **dict.fromkeys(
        ("frozen", "attn_frozen", "mlp_frozen"),
        "Rows are frozen by the stage's frozen: [{rows: visual, part: mlp, layers: [1]}].",
    ),
    "cross": "cross is planned, but not supported yet.",
    "inject": "Visual rows that come in late pass earlier stages by: visual_tokens: 0, op: carry.",
}
"""Modes and operations that this version does not run, and what to say of them."""

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._+-]{{0,{MAX_NAME - 1}}}")


def require(condition: bool, field: str, found: Any, expected: str, fix: str) -> None:
    """Raise the ``PlanError`` about ``field`` unless ``condition`` holds."""
    if not condition:
        reject(field, found, expected, PlanError, fix)


def is_count(value: Any, least: int = 1) -> bool:
    """Return whether ``value`` counts something: positions and orders are int32 tensors."""
    return is_int(value) and least <= value < 2**31


def check_flags(part: Any, prefix: str, *names: str) -> None:
    """Refuse fields of ``part`` that are neither true nor false."""
    for name in names:
        value = getattr(part, name)
        require(
            isinstance(value, bool), prefix + name, value, "true or false", "Write one of them."
        )


def check_labels(name: Any, note: Any) -> None:
    """Refuse a name that cannot become a directory's, and a note that is not one line."""
    wanted = f"1 to {MAX_NAME} letters, digits or any of . _ + -"
    fits = isinstance(name, str) and _NAME.fullmatch(name) is not None
    require(fits, "name", name, wanted, "Rename the plan.")
    fits = isinstance(note, str) and note.isprintable() and len(note) <= 500
    require(fits, "note", note, "one printable line of up to 500 characters", "Shorten it.")


def check_entry(entry: Entry, visual_tokens: int) -> None:
    """Refuse an entry that no selector of this version can make of N ``visual_tokens``."""
    fix = "Write selector and keep."
    require(isinstance(entry, Entry), "entry", entry, "a selector and what it keeps", fix)
    names = tuple(ENTRY_SELECTORS)
    check_word("entry.selector", entry.selector, names, PlanError, "Write one of them.")
    fits = is_count(entry.keep) and entry.keep <= visual_tokens
    require(fits, "entry.keep", entry.keep, f"1 to {visual_tokens}", "Keep fewer of an image.")
    check_word("entry.positions", entry.positions, POSITIONS, PlanError, "Write one of them.")
    if ENTRY_SELECTORS[entry.selector].needs_renumbering:
        wanted = f"renumbered, as not every row of {entry.selector} has a place of its own"
        fits = entry.positions == "renumbered"
        require(fits, "entry.positions", entry.positions, wanted, "Write renumbered.")
    fix = "Write the first layer that sees an image."
    require(is_count(entry.layer, 0), "entry.layer", entry.layer, "an integer >= 0", fix)
    selector, free = ENTRY_SELECTORS[entry.selector], Entry("", 0)
    for name in ("targets", "removes"):
        value, wanted = getattr(entry, name), f"none, as {entry.selector} knows no classes"
        fits = name in selector.takes or value == getattr(free, name)
        require(fits, f"entry.{name}", value, wanted, "Remove it.")
    if selector.takes:
        wanted = "ids of the vocabulary, ascending"
        fits = isinstance(entry.targets, tuple) and len(entry.targets) > 0
        fits = fits and all(is_count(target, 0) for target in entry.targets)
        fits = fits and list(entry.targets) == sorted({*entry.targets})
        require(fits, "entry.targets", entry.targets, wanted, "Name one or more.")
        check_word("entry.removes", entry.removes, REMOVED, PlanError, "Write one of them.")
        wanted = "original, as the rows that leave leave holes"
        fits = entry.positions == "original"
        require(fits, "entry.positions", entry.positions, wanted, "Remove it.")
        fits = entry.removes != "none" or entry.keep == visual_tokens
        wanted = f"{visual_tokens}: with removes: none all rows enter"
        require(fits, "entry.keep", entry.keep, wanted, f"Write {visual_tokens}.")
        # The released code slices the unpruned rows of an image that has not entered yet.
        wanted = "0 where rows are told apart by targets"
        require(entry.layer == 0, "entry.layer", entry.layer, wanted, "Remove one of the two.")


def check_stage(at: str, stage: Stage, start: int, first: bool) -> None:
    """Refuse a stage that does not begin at layer ``start`` or contradicts itself."""
    layers, fix = stage.layers, f"Start at layer {start}."
    pair = isinstance(layers, tuple) and len(layers) == 2 and all(map(is_int, layers))
    require(pair, f"{at}.layers", layers, "[start, stop]", fix)
    wanted = f"[{start}, stop] with stop > {start}, no gap and no overlap"
    fits = layers[0] == start < layers[1]
    require(fits, f"{at}.layers", list(layers), wanted, fix)
    tokens = stage.visual_tokens
    require(is_count(tokens, 0), f"{at}.visual_tokens", tokens, "an integer >= 0", "0 means none.")
    found: Any = stage.modes
    if isinstance(found, tuple):
        found = Words(f"{len(found)} modes")
    wanted = f"{stage.depth}, one for each of layers {layers[0]} to {layers[1] - 1}"
    fits = isinstance(stage.modes, tuple) and len(stage.modes) == stage.depth
    require(fits, f"{at}.modes", found, wanted, "Add or remove modes.")
    for i, mode in enumerate(stage.modes):
        field = f"{at}.modes[{i}]"
        check_word(field, mode, MODES, PlanError, "Write one of them.", LATER)
        # One call carries visual and text rows together there, and a gate cannot tell them
        # apart: it holds for a call. With 0 visual tokens there is nothing to gate at all.
        fix = "Write dense; the text-blind layers come before the first edge."
        fits = mode == "dense" or (first and tokens > 0)
        wanted = "dense in every stage after the first, and where vision passes by"
        require(fits, field, mode, wanted, fix)
    check_word(f"{at}.norm", stage.norm, NORMS, PlanError, "Write one of them.")
    if stage.norm == "renorm":
        fits = bool(stage.gated_layers)
        require(fits, f"{at}.norm", "renorm", "gated", "No layer of this stage masks anything.")
        if "sink" in stage.modes:
            # Masked before the softmax, no mass is removed that a sink could take.
            field = f"{at}.modes[{stage.modes.index('sink')}]"
            wanted = "no sink where norm is renorm"
            require(False, field, "sink", wanted, "Write text_blind_novv.")
    check_dropped(at, stage)
    check_frozen(at, stage, first)


def check_dropped(at: str, stage: Stage) -> None:
    """Refuse halves of layers that the stage does not have, or without which nothing is left."""
    (start, stop), last = stage.layers, stage.layers[1] - 1
    for name in ("drop_attention", "drop_mlp"):
        layers = getattr(stage, name)
        fits = isinstance(layers, tuple) and all(map(is_int, layers))
        fits = fits and list(layers) == sorted({*layers})
        fits = fits and all(start <= layer < stop for layer in layers)
        wanted = f"layers of {start} to {last}, ascending"
        require(fits, f"{at}.{name}", layers, wanted, "Drop the stage's own layers.")
    for layer in stage.gated_layers:
        field, mode = f"{at}.modes[{layer - start}]", stage.modes[layer - start]
        wanted = f"dense: layer {layer} has no attention that could be blind"
        require(layer not in stage.drop_attention, field, mode, wanted, "Write dense.")
    wanted = f"at most {stage.depth - 1} of layers {start} to {last}, so that one attends"
    fits = len(stage.attention_layers) > 0
    fix = "Keep the attention of one, or move the edges."
    require(fits, f"{at}.drop_attention", stage.drop_attention, wanted, fix)


def check_frozen(at: str, stage: Stage, first: bool) -> None:
    """Refuse frozen rows of layers outside the stage, or of rows that it does not have.

    ``first``: whether the stage is the plan's first.
    """
    fits = isinstance(stage.frozen, tuple) and all(isinstance(f, Frozen) for f in stage.frozen)
    fix = "Write rows, part and layers of each."
    require(fits, f"{at}.frozen", stage.frozen, "a list of frozen rows", fix)
    taken: set[tuple[str, str, int]] = set()
    for i, frozen in enumerate(stage.frozen):
        field, (start, stop) = f"{at}.frozen[{i}]", stage.layers
        check_word(f"{field}.rows", frozen.rows, FROZEN_ROWS, PlanError, "Write one of them.")
        check_word(f"{field}.part", frozen.part, PARTS, PlanError, "Write one of them.")
        layers = frozen.layers
        fits = isinstance(layers, tuple) and len(layers) > 0 and all(map(is_int, layers))
        fits = (
            fits and list(layers) == sorted({*layers}) and start <= layers[0] <= layers[-1] < stop
        )
        wanted = f"layers of {start} to {stop - 1}, ascending"
        require(fits, f"{field}.layers", layers, wanted, "Freeze rows in the stage's own layers.")
        missing = {*layers} & {*getattr(stage, f"drop_{frozen.part}")}
        wanted, fix = f"layers with {frozen.part}", "Remove those that are dropped."
        require(not missing, f"{field}.layers", layers, wanted, fix)
        again = taken & {(frozen.rows, frozen.part, layer) for layer in layers}
        found = Words("a layer twice") if again else Words("each once")
        require(not again, field, found, "each half of a layer once", "Remove one.")
        taken |= {(frozen.rows, frozen.part, layer) for layer in layers}
        if frozen.rows in CLASSES:
            # Classes are known of the rows that enter, and not carried over edges.
            wanted = "visual or prefix in every stage after the first"
            require(first, f"{field}.rows", frozen.rows, wanted, "Move it to the first stage.")
        if frozen.rows != "prefix":
            wanted, fix = "prefix where no visual token is", "Remove it."
            require(stage.visual_tokens > 0, f"{field}.rows", frozen.rows, wanted, fix)


def check_edge(
    index: int, edge: Edge, before: Stage, after: Stage, arriving: int, probing: bool
) -> None:
    """Refuse an edge that does not fit the stages on its sides.

    ``arriving``: visual tokens that come to the stage before, whether it takes them or not;
    ``probing``: the plan decides.
    """
    at, after_field = f"edges[{index}]", f"stages[{index + 1}].visual_tokens"
    check_word(f"{at}.op", edge.op, OPS, PlanError, "Write one of them.", LATER)
    wanted = "no edge after the vision has left"
    require(arriving > 0, f"{at}.op", edge.op, wanted, "Merge the two stages.")
    if edge.op == "carry":
        wanted = "a stage with visual tokens on one of its sides"
        fits = before.visual_tokens > 0 or after.visual_tokens > 0
        require(fits, f"{at}.op", edge.op, wanted, "Merge the two stages.")
    else:
        wanted = "carry, as the visual tokens pass the stage before by"
        require(before.visual_tokens > 0, f"{at}.op", edge.op, wanted, "Move the edge.")
    if edge.op == "select":
        limit = min(before.visual_tokens, MAX_KEEP)
        scores = tuple(EDGE_SELECTORS)
        check_word(f"{at}.score", edge.score, scores, PlanError, "Write one of them.")
        wanted = f"1 to {limit}: what the stage before has, and at most {MAX_KEEP}"
        fits = is_count(edge.keep) and edge.keep <= limit  # type: ignore[operator]
        require(fits, f"{at}.keep", edge.keep, wanted, "To keep none, write op: drop.")
        left, wanted = edge.keep, f"{at}.keep={edge.keep}"
    else:
        for key in ("score", "keep"):
            value = getattr(edge, key)
            require(value is None, f"{at}.{key}", value, f"none at a {edge.op}", "Remove it.")
        # A prompt whose probe finds nothing takes all its visual tokens along.
        left = 0 if edge.op == "drop" else arriving
        wanted = f"{left} after the {edge.op} of {at}"
    fits = after.visual_tokens == left
    if edge.op == "carry":
        fits |= after.visual_tokens == 0
        wanted += ", or 0 where they pass by"
    require(fits, after_field, after.visual_tokens, wanted, f"Write {left}.")
    if edge.op == "select" and not edge.question_blind:
        # Text rows attend to no visual token there, so every score would be zero.
        field = f"stages[{index}].modes[{before.depth - 1}]"
        wanted = f"dense: {at} scores the visual tokens in this layer, and text must see them"
        fits = before.modes[-1] == "dense"
        require(fits, field, before.modes[-1], wanted, "Move the edge behind a dense layer.")
    if edge.op == "select":
        # Nothing is attended to or changed there, so there is nothing to score by.
        ahead = edge.selector.next_layer
        scored = before.layers[1] - (not ahead)
        stage = after if ahead else before
        reads = {*edge.selector.reads}
        has = scored in stage.attention_layers
        has |= reads == {"change"} and scored in stage.mlp_layers
        wanted = f"layer {scored} with the attention by which {at} scores"
        field = f"stages[{index + ahead}].drop_attention"
        fix = "Keep that layer, or move the edge."
        require(has, field, stage.drop_attention, wanted, fix)
        field = f"stages[{index}].frozen"
        wanted = f"visual rows that some layer changes, by which {at} scores"
        fits = "change" not in reads or not before.serves
        require(fits, field, Words("all of them"), wanted, "Take another score.")
    if probing:
        fix = "Write op: probe, or remove the probe."
        wanted = "probe, as the plan decides per prompt"
    else:
        fix = "Add probe: with first, cosine and contribution, or write select or drop."
        wanted = "select, drop or carry in a plan without a probe"
    require((edge.op == "probe") == probing, f"{at}.op", edge.op, wanted, fix)


def check_probe(probe: Probe, first: Stage) -> None:
    """Refuse numbers of a probe that make no sense; ``first`` is the plan's first stage."""
    fix = "Write first, cosine and contribution."
    require(isinstance(probe, Probe), "probe", probe, "the numbers of a probe", fix)
    blind, stop = max(first.gated_layers, default=-1) + 1, first.layers[1]
    wanted = f"{blind} to {stop - 1}: a layer of the first stage from which on all are dense"
    fits = is_int(probe.first) and blind <= probe.first < stop
    require(fits, "probe.first", probe.first, wanted, "Move it, or the first edge.")
    for name, low in (("cosine", -1.0), ("contribution", 0.0), ("exit_cosine", -1.0)):
        value = getattr(probe, name)
        high = math.inf if name == "contribution" else 1.0
        fits = is_number(value) and low <= value <= high
        if not (fits or (value is None and name == "exit_cosine")):
            wanted = f"a number from {low:g} to {high:g}"
            reject(f"probe.{name}", value, wanted, PlanError, "Write one.")
    check_flags(probe, "probe.", "strict", "consecutive", "whole_leaves")
    layers = probe.exit_layers
    require(is_count(layers), "probe.exit_layers", layers, "a positive integer", "Write 2.")
    sizes = probe.buckets
    ascending = isinstance(sizes, tuple) and all(map(is_count, sizes))
    ascending = ascending and list(sizes) == sorted(set(sizes))
    wanted = "positive integers, ascending"
    require(ascending, "probe.buckets", sizes, wanted, "Sort them, each once.")
    entering = first.visual_tokens
    wanted = f"at most {entering}, all that an image has"
    largest = max(sizes, default=0)
    require(largest <= entering, "probe.buckets", largest, wanted, f"End with {entering}.")
