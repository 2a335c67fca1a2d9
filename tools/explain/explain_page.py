"""Facts and images -> one HTML file; the only script that may run is its own, known by its hash."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...pages.page import render_page
from ...pages.units import percent
from ...runtime.image.overlay import Grid

TEMPLATE_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ShownImage:
    """One image of the prompt.

    uri, ghost: the image and its small grey copy. size: (width, height) in pixels. present: for
    each layer its tokens (N,) that are there. heat: data URIs by run ("plan", "dense") and layer.
    cropped: share of the original that the model does not see.
    """

    uri: str
    ghost: str
    size: tuple[int, int]
    grid: Grid
    present: Sequence[np.ndarray]
    heat: dict[str, list[str]]
    cropped: float


def render_explanation(facts: dict[str, Any], images: Sequence[ShownImage]) -> str:
    """Return the page's HTML."""
    script = (TEMPLATE_FOLDER / "page.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    masks = masks_of([layer["phase"] for layer in facts["layers"]], images)
    shown = {
        "facts": facts,
        "images": images,
        "outlined": [
            [outlines(image.grid.cells(tokens[index])) for tokens in masks.distinct]
            for index, image in enumerate(images)
        ],
        "masks": masks.of_layer,
        "captions": [_captions(layer, facts) for layer in facts["layers"]],
        "way": _way(facts),
        "runs": _runs(facts),
        "start": _start(facts),
        "top": _quarters(
            max(max(layer["part"], layer["dense_part"] or 0) for layer in facts["layers"])
        ),
        "script": script,
        "script_hash": f"sha256-{digest}",
    }
    return render_page(TEMPLATE_FOLDER, shown)


@dataclass(frozen=True)
class Masks:
    """Sets of kept tokens to outline. distinct: each by image; of_layer: its number or None."""

    distinct: list[list[np.ndarray]]
    of_layer: list[int | None]


def masks_of(phases: Sequence[str], images: Sequence[ShownImage]) -> Masks:
    """Choose what to outline in each layer: its tokens, or those that a selection will keep."""
    distinct: list[list[np.ndarray]] = []
    of_layer: list[int | None] = []
    coming: int | None = None
    for layer in reversed(range(len(phases))):
        if phases[layer] == "kept":
            tokens = [image.present[layer] for image in images]
            known = distinct and all(map(np.array_equal, distinct[-1], tokens))
            if not known:
                distinct.append(tokens)
            coming = len(distinct) - 1
        of_layer.insert(0, None if phases[layer] == "none" else coming)
    return Masks(distinct, of_layer)


def outlines(cells: np.ndarray) -> dict[str, str]:
    """Return SVG paths over kept cells (rows, columns): their border, and everything else."""
    rows, columns = cells.shape
    framed = np.pad(cells.astype(bool), 1)
    border, holes = [], [f"M0 0h{columns}v{rows}h-{columns}z"]
    for row, column in np.argwhere(cells):
        x, y = int(column), int(row)
        holes.append(f"M{x} {y}h1v1h-1z")
        sides = [(0, 1, f"M{x} {y}h1"), (2, 1, f"M{x} {y + 1}h1")]
        sides += [(1, 0, f"M{x} {y}v1"), (1, 2, f"M{x + 1} {y}v1")]
        border += [line for dy, dx, line in sides if not framed[row + dy, column + dx]]
    return {"border": "".join(border), "rest": "".join(holes)}


def _way(facts: dict[str, Any]) -> dict[str, Any]:
    """Say how many tokens enter, before which layer, and how many go on: ``16 of 144``, or ``72,
    then 36, then 18 of 144``. Empty where all enter in layer 0, and where all go on.
    """
    counts, offered = [layer["visual_tokens"] for layer in facts["layers"]], facts["visual_tokens"]
    first, *kept = dict.fromkeys(filter(None, counts)) or [offered]
    before = counts.index(first) if first in counts else 0
    return {
        "enters": f"{first} of {offered}" if before or first < offered else "",
        "first": before,
        "kept": f"{', then '.join(map(str, kept))} of {offered}" if kept else "",
    }


def _runs(facts: dict[str, Any]) -> str:
    """Say ``5 runs``, ``5 runs each`` or ``5 and 3 runs``."""
    own = facts["answer"]["timing"]["runs"]
    other = facts["dense"]["timing"]["runs"] if facts["dense"] else None
    if other is not None and other != own:
        return f"{own} and {other} runs"
    return f"{own} run{'s' if own > 1 else ''}{' each' if other else ''}"


def _quarters(part: float) -> float:
    """Return the least number of quarters that reaches ``part``: the uppermost tick."""
    return max(math.ceil(4 * part - 1e-6), 1) / 4


def _start(facts: dict[str, Any]) -> int:
    """Return the layer to open with: where tokens are selected, else where vision peaks."""
    if facts["kept"] and facts["plan"]["trigger"] < facts["plan"]["exit"]:
        return facts["plan"]["trigger"]
    return facts["fusion"]["peak"]


def _captions(layer: dict[str, Any], facts: dict[str, Any]) -> dict[str, str]:
    """Write one or two sentences on a layer, under the plan and in the unpruned model."""
    count, part = layer["visual_tokens"], percent(layer["part"])
    phase, mode = layer["phase"], layer["mode"]
    after = facts["layers"][layer["layer"] + 1 :]
    if phase == "blind" and mode == "sink":
        own = "Text ignores the image here: what attention it gets falls on one stand-in token."
    elif phase == "blind":
        own = "Text ignores the image here: the plan gates it away."
    elif phase == "none" and any(later["visual_tokens"] for later in after):
        own = "The image has not come in yet."
    elif phase == "none":
        own = "The image has left. What the answer needs is in the text by now."
    else:
        who = f"All {count} visual tokens are" if phase == "all" else f"{count} visual tokens are"
        own = f"{who} here and make up {part} of what the last word takes in."
        if mode == "sink_half":
            own += " Text ignores the first half of them."
    if layer["dropped"]:
        own += f" The plan leaves out {' and '.join(layer['dropped'])} here."
    following = after[:1]
    if following and phase == "none" and following[0]["visual_tokens"]:
        own += f" After this layer {following[0]['visual_tokens']} visual tokens come in."
    if following and phase not in ("none", "kept") and following[0]["phase"] == "kept":
        own += f" After this layer {following[0]['visual_tokens']} are kept."
    if following and phase != "none" and following[0]["phase"] == "none":
        own += " After this layer the image leaves."
    dense = f"All {facts['visual_tokens']} visual tokens make up {percent(layer['dense_part'])}."
    if layer["kept_mass"] is not None and phase in ("all", "kept"):
        dense += f" The kept ones carry {percent(layer['kept_mass'])} of their contributions."
    return {"plan": own, "dense": dense if layer["dense_part"] is not None else ""}
