"""Presets that decide per prompt: a probe in the layers' attention finds t, K and e.

Source: docs/methods.md, "VisiPruner: paper and code" and "VisiPruner: plans per prompt".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ..plan.plan import StagePlan
from ..plan.stages import Mode, Probe
from .request import Layer, Preset, Request, Template, option, repeat_mode

ExitRule = Literal["cumulative", "consecutive"]

BOUNDARIES = (8, 10, 12, 14, 16, 18, 20, 23, 27)
"""Last layers of the stages of an adaptive plan, for 32 layers; others in proportion. Triggers
fall around the middle, and a stage of two layers wastes 3 % of the visual work at most
(docs/methods.md, "VisiPruner: plans per prompt"); exits fall late and cost little."""

BUCKET_SHARES = (72, 36, 18, 9, 4, 1)
"""Buckets of an adaptive plan are N divided by these: 8, 16, 32, 64, 144 and all of 576. The
published mean of K is 10; with all N as the largest, no token that counts is ever left out."""

_TRIGGER_OPTIONS = ("boundaries", "buckets", "cosine", "contribution")
_EXIT_OPTIONS = ("exit_cosine", "exit_layers", "exit_rule")


@dataclass(frozen=True, kw_only=True)
class _Probing(Preset):
    """Options of every preset with a probe; those of the subclass come first."""

    measurable = ("cosine", "contribution", "exit_cosine")

    middle: bool = option("true or false: whether tokens are selected (true)")
    deep: bool = option("true or false: whether the selected tokens may leave (true)")
    cosine: float = option("below it in some token, a layer selects (0.995)")
    contribution: float = option("tokens above this L2 norm stay (0.2)")
    exit_cosine: float = option("not below it in any token, a layer is quiet (0.999)")
    exit_layers: int = option("quiet layers until vision leaves (2)")
    exit_rule: ExitRule = option("cumulative or consecutive: which quiet layers count together")

    def text_blind(self, ask: Request, default: int, gap: int) -> tuple[int, int]:
        """Return the number of text-blind layers and the first layer that is probed."""
        # What the last layer's probe finds can change nothing.
        last = ask.layers - 2
        off = ask.option("shallow", default) is False
        middle = default if off else ask.option("shallow", default)
        if not 0 <= middle <= last:
            ask.reject("shallow", middle, f"a layer from 0 to {last}")
        shallow = 0 if off else middle
        wanted = f"a layer from shallow={shallow} to {last}, the last but one"
        return shallow, ask.within("probe", min(middle + gap, last), shallow, last, wanted)

    def thresholds(self, ask: Request, first: int, rule: ExitRule = "cumulative") -> Probe | None:
        """Return the released scripts' numbers unless others are given; None without a middle."""
        if self.middle is False:
            # Without selected tokens none can leave: the released code runs so, too.
            ask.without("middle=false", "probe", *_TRIGGER_OPTIONS, *_EXIT_OPTIONS)
            return None
        if self.deep is False:
            ask.without("deep=false", *_EXIT_OPTIONS)
        exit_cosine = ask.number("exit_cosine", 0.999, -1, 1)
        return Probe(
            first,
            cosine=ask.number("cosine", 0.995, -1, 1),
            contribution=ask.number("contribution", 0.2, 0, 1e9),
            exit_cosine=None if self.deep is False else exit_cosine,
            exit_layers=ask.within("exit_layers", 2, 1, math.inf, "1 or more"),
            consecutive=ask.option("exit_rule", rule) == "consecutive",
        )


@dataclass(frozen=True)
class VisiPrunerCode(_Probing):
    """VisiPruner's released code."""

    name = "visipruner-code"
    summary = "VisiPruner as its released code runs: every layer's probe decides, per prompt"

    shallow: Layer = option(
        "first layer that is not text-blind, or false (6, less in short decoders)"
    )
    probe: int = option("first layer whose probe counts (the one after shallow)")
    template: Template = option("7b or 13b: the rule of layer 0 (13b in a decoder of 40 layers)")

    def build(self, ask: Request) -> StagePlan:
        """Return a plan with an edge after each probed layer."""
        # The code compares with < and with > around one number, which leaves a dense layer between.
        shallow, first = self.text_blind(ask, min(6, 3 * ask.layers // 16), gap=1)
        template = ask.option("template", "7b" if ask.layers != 40 else "13b")
        modes = _shallow_modes(template, shallow)
        ends = tuple(range(first, ask.layers - 1))
        probe = self.thresholds(ask, first)
        # Where all rows are still there, the code gathers them again instead of dropping vision.
        probe = probe and replace(probe, whole_leaves=False)
        return ask.probing(ends, probe, modes, decode_sees=True)


@dataclass(frozen=True)
class VisiPrunerPaper(_Probing):
    """VisiPruner's paper."""

    name = "visipruner-paper"
    summary = "VisiPruner as its paper describes it: every layer's probe decides, per prompt"

    shallow: Layer = option(
        "first layer that is not text-blind, or false (7, less in short decoders)"
    )
    probe: int = option("first layer whose probe counts (shallow)")

    def build(self, ask: Request) -> StagePlan:
        """Return a plan with an edge after each probed layer."""
        shallow, first = self.text_blind(ask, min(7, 3 * ask.layers // 16 + 1), gap=0)
        modes = _shallow_modes("7b", shallow, "text_blind_novv")
        probe = self.thresholds(ask, first, "consecutive")
        ends = tuple(range(first, ask.layers - 1))
        return ask.probing(ends, probe and replace(probe, strict=False), modes)


@dataclass(frozen=True)
class VisiPrunerAdaptive(_Probing):
    """VisiPruner with few stages, whose probe acts late."""

    name = "visipruner-adaptive"
    summary = "the probe decides per prompt, and acts at the nearest later boundary of a few"

    shallow: Layer = option("first layer that is not text-blind, or false (3/16 of the depth)")
    probe: int = option("first layer whose probe counts (the one after shallow)")
    template: Template = option("7b or 13b: the rule of layer 0 (7b)")
    boundaries: tuple[int, ...] = option(
        "last layers of stages, such as 8-10-12 (9 of them in 32 layers)"
    )
    buckets: tuple[int, ...] = option(
        "rows that a selection is padded to, such as 8-16-576 (6 of them)"
    )

    def build(self, ask: Request) -> StagePlan:
        """Return a plan with an edge after each of the boundaries."""
        shallow, first = self.text_blind(ask, 3 * ask.layers // 16, gap=1)
        modes = _shallow_modes(ask.option("template", "7b"), shallow)
        last = ask.layers - 2
        near = {min(max(end * ask.layers // 32, first), last) for end in BOUNDARIES}
        ends = ask.integers("boundaries", tuple(sorted(near)), first, last)
        sizes = {max(1, ask.visual_tokens // share) for share in BUCKET_SHARES}
        buckets = ask.integers("buckets", tuple(sorted(sizes)), 1, ask.visual_tokens)
        probe = self.thresholds(ask, first)
        return ask.probing(ends, probe and replace(probe, buckets=buckets), modes)


def _shallow_modes(template: Template, count: int, others: Mode = "text_blind") -> tuple[Mode, ...]:
    """Return the modes of ``count`` text-blind layers, the first by the template's rule."""
    first: Mode = "sink_half" if template == "13b" else "sink"
    return (first, *repeat_mode(others, count - 1)) if count else ()
