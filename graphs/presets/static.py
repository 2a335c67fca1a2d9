"""Presets whose plan is the same for every prompt: t, K and e are numbers.

Source: docs/methods.md, "VisiPruner: static plans"; "FastV" and "PyramidDrop".
"""

from __future__ import annotations

from typing import Any

from ..errors import PlanError
from ..plan.plan import StagePlan
from ..plan.stages import MAX_KEEP, NORMS, Mode
from .request import TEMPLATES, Preset, Request, repeat_mode


def _dense(ask: Request) -> StagePlan:
    return ask.plan([(ask.layers, ask.visual_tokens)])


def _visipruner(ask: Request) -> StagePlan:
    last = ask.layers - 1
    off = ask.options.get("shallow") is False
    shallow = 0 if off else ask.integer("shallow", 3 * ask.layers // 16)
    t = ask.integer("t", 9 * ask.layers // 16)
    e = ask.integer("e", 27 * ask.layers // 32)
    keep = ask.integer("keep", min(max(1, ask.visual_tokens // 9), MAX_KEEP))
    norm: Any = ask.word("norm", NORMS)
    template = ask.word("template", TEMPLATES)
    if not 0 <= e <= last:
        ask.reject("e", e, f"a layer from 0 to {last}")
    if not 0 <= t < e:
        ask.reject("t", t, f"a layer from 0 to {e - 1}, before e={e}")
    if not 0 <= shallow <= t:
        ask.reject("shallow", shallow, f"a layer from 0 to t={t}, which the selection reads")
    limit = min(ask.visual_tokens, MAX_KEEP)
    if not 1 <= keep <= limit:
        ask.reject("keep", keep, f"1 to {limit} tokens")
    if norm == "renorm" and not shallow:
        ask.reject("norm", norm, "gated, as no layer is text-blind")
    modes: tuple[Mode, ...] = ()
    if shallow:
        # Masked before the softmax no mass is lost that a sink could take: what remains of the
        # sink rule is that visual rows see the prefix only (docs/methods.md, "Gated and
        # renormalised masks").
        sink: Mode = "text_blind_novv" if norm == "renorm" else "sink"
        first: Mode = "sink_half" if template == "13b" else sink
        modes = (first, *repeat_mode("text_blind", shallow - 1))
    counts = [(t + 1, ask.visual_tokens), (e + 1, keep), (ask.layers, 0)]
    return ask.plan(counts if e < last else counts[:2], "value_norm", modes, norm)


def _fastv(ask: Request) -> StagePlan:
    k, r = ask.integer("k", 3), ask.share("r", 0.75)
    if not 1 <= k < ask.layers:
        ask.reject("k", k, f"1 to {ask.layers - 1} layers")
    keep = _rounded((1 - r) * ask.visual_tokens)
    if not 1 <= keep <= MAX_KEEP:
        ask.reject("r", r, f"a share that leaves 1 to {MAX_KEEP} of {ask.visual_tokens} tokens")
    return ask.plan([(k, ask.visual_tokens), (ask.layers, keep)], "attention")


def _pyramiddrop(ask: Request) -> StagePlan:
    ratio = ask.share("ratio", 0.5)
    if ask.layers < 4:
        raise PlanError(
            f"pyramiddrop: found a decoder of {ask.layers} layers, expected 4 or more. "
            "Use the preset fastv."
        )
    counts, count = [], ask.visual_tokens
    for quarter in range(1, 5):
        counts.append((quarter * ask.layers // 4, count))
        count = _rounded(ratio * count)
        if quarter < 4 and not 1 <= count <= MAX_KEEP:
            ask.reject("ratio", ratio, f"a share that leaves 1 to {MAX_KEEP} tokens at every edge")
    return ask.plan(counts, "attention")


def _exit_only(ask: Request) -> StagePlan:
    # By default an exit there is, however few the layers.
    e = ask.integer("e", max(0, min(27 * ask.layers // 32, ask.layers - 2)))
    if not 0 <= e < ask.layers:
        ask.reject("e", e, f"a layer from 0 to {ask.layers - 1}")
    counts = [(e + 1, ask.visual_tokens), (ask.layers, 0)]
    return ask.plan(counts if e < ask.layers - 1 else counts[:1])


def _rounded(count: float) -> int:
    return int(count + 0.5)


DENSE = Preset("the unpruned model", {}, _dense)

VISIPRUNER = Preset(
    "text-blind shallow layers, the top K visual tokens after layer t, none after layer e",
    {
        "shallow": "first layer that is not text-blind, or false (3/16 of the depth)",
        "t": "last layer with all visual tokens (9/16 of the depth)",
        "e": "last layer with any visual tokens (27/32 of the depth)",
        "keep": "K, visual tokens kept after t (a ninth of them)",
        "norm": "gated or renorm: what happens to the attention taken away (gated)",
        "template": "7b or 13b: the rule of layer 0 (7b)",
    },
    _visipruner,
)

FASTV = Preset(
    "after k layers, keep a share 1-r of the visual tokens by attention",
    {
        "k": "layers with all visual tokens (3)",
        "r": "share of the visual tokens to remove, 0 to 1 (0.75)",
    },
    _fastv,
)

PYRAMIDDROP = Preset(
    "after each quarter of the depth, keep a share of the visual tokens by attention",
    {"ratio": "share kept at each of the three edges, 0 to 1 (0.5)"},
    _pyramiddrop,
)

EXIT_ONLY = Preset(
    "all visual tokens up to layer e, none after it",
    {"e": "last layer with any visual tokens (27/32 of the depth)"},
    _exit_only,
)
