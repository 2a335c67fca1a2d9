"""Presets whose plan is the same for every prompt: t, K and e are numbers.

Source: docs/methods.md, "VisiPruner: static plans"; "FastV" and "PyramidDrop".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import PlanError
from ..plan.plan import StagePlan
from ..plan.stages import MAX_KEEP, Mode, Norm
from .request import Layer, Options, Preset, Request, Template, option, repeat_mode, steps


@dataclass(frozen=True)
class Dense(Preset):
    """The plan of the unpruned model."""

    name = "dense"
    summary = "the unpruned model"

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of one stage."""
        return ask.plan([(ask.layers, ask.visual_tokens)])


@dataclass(frozen=True)
class Depth(Preset):
    """A decoder with fewer layers, or halves of them; vision is as in the unpruned model.

    Which layers matter least is for a calibration to say: without options the eighth before the
    last layer goes.
    """

    name = "depth"
    summary = "whole layers, or the attention or MLP of some, left out for all rows"

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move the number of layers dropped before the last."""
        yield [{"drop": tuple(range(first, layers - 1))} for first in range(layers - 2, 0, -1)]

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of one stage."""
        return ask.plan([(ask.layers, ask.visual_tokens)])

    def default_drop(self, layers: int) -> tuple[int, ...]:
        """Return the layers that are left out where no option names any."""
        if {*self.given()} & {"drop", "drop_attention", "drop_mlp"}:
            return ()
        last = layers - 1
        return tuple(range(max(0, last - max(1, last // 8)), last))


@dataclass(frozen=True)
class VisiPruner(Preset):
    """VisiPruner with t, K and e that hold for every prompt."""

    name = "visipruner"
    joined = ("scope",)
    summary = "text-blind shallow layers, the top K visual tokens after layer t, none after layer e"

    shallow: Layer = option("first layer that is not text-blind, or false (3/16 of the depth)")
    t: int = option("last layer with all visual tokens (9/16 of the depth)")
    e: int = option("last layer with any visual tokens (27/32 of the depth)")
    keep: int = option("K, visual tokens kept after t (a ninth of them)")
    norm: Norm = option("gated or renorm: what happens to the attention taken away (gated)")
    template: Template = option("7b or 13b: the rule of layer 0 (7b)")

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move t; then K, too, within twice, three, four, and any number of times its default."""
        shallow, default = 3 * layers // 16, max(1, visual_tokens // 9)
        ends = range(27 * layers // 32)
        at = [{"t": t} if t >= shallow else {"t": t, "shallow": t} for t in ends]
        yield [*at]
        for times in (2, 3, 4, visual_tokens):
            low, high = max(1, default // times), min(default * times, visual_tokens, MAX_KEEP)
            yield [{**options, "keep": keep} for options in at for keep in steps(low, high)]

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of at most three stages."""
        last = ask.layers - 1
        e = ask.within("e", 27 * ask.layers // 32, 0, last, f"a layer from 0 to {last}")
        t_default = 9 * ask.layers // 16
        t = ask.within("t", t_default, 0, e - 1, f"a layer from 0 to {e - 1}, before e={e}")
        wanted = f"a layer from 0 to t={t}, which the selection reads"
        shallow = int(ask.within("shallow", 3 * ask.layers // 16, 0, t, wanted))
        limit = min(ask.visual_tokens, MAX_KEEP)
        keep_default = min(max(1, ask.visual_tokens // 9), MAX_KEEP)
        keep = ask.within("keep", keep_default, 1, limit, f"1 to {limit} tokens")
        norm = ask.option("norm", "gated")
        if norm == "renorm" and not shallow:
            ask.reject("norm", norm, "gated, as no layer is text-blind")
        modes: tuple[Mode, ...] = ()
        if shallow:
            # Masked before the softmax no mass is lost that a sink could take: what remains of the
            # sink rule is that visual rows see the prefix only (docs/methods.md, "Gated and
            # renormalised masks").
            sink: Mode = "text_blind_novv" if norm == "renorm" else "sink"
            first: Mode = "sink_half" if self.template == "13b" else sink
            modes = (first, *repeat_mode("text_blind", shallow - 1))
        counts = [(t + 1, ask.visual_tokens), (e + 1, keep), (ask.layers, 0)]
        return ask.plan(counts if e < last else counts[:2], "value_norm", modes, norm)


@dataclass(frozen=True)
class FastV(Preset):
    """FastV: one selection by attention in an early layer."""

    name = "fastv"
    summary = "after k layers, keep a share 1-r of the visual tokens by attention"

    k: int = option("layers with all visual tokens (3)")
    r: float = option("share of the visual tokens to remove, 0 to 1 (0.75)")

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move r; where that does not do, select earlier."""
        for k in range(min(3, layers - 1), 0, -1):
            yield [{"k": k, "r": percent / 100} for percent in range(1, 96)]

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of two stages."""
        k = ask.within("k", 3, 1, ask.layers - 1, f"1 to {ask.layers - 1} layers")
        r = ask.number("r", 0.75, 0, 1)
        keep = _rounded((1 - r) * ask.visual_tokens)
        if not 1 <= keep <= MAX_KEEP:
            ask.reject("r", r, f"a share that leaves 1 to {MAX_KEEP} of {ask.visual_tokens} tokens")
        return ask.plan([(k, ask.visual_tokens), (ask.layers, keep)], "attention")


@dataclass(frozen=True)
class PyramidDrop(Preset):
    """PyramidDrop: a selection by attention after each quarter of the depth."""

    name = "pyramiddrop"
    summary = "after each quarter of the depth, keep a share of the visual tokens by attention"

    ratio: float = option("share kept at each of the three edges, 0 to 1 (0.5)")

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move the ratio."""
        yield [{"ratio": percent / 100} for percent in range(1, 100)]

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of four stages."""
        ratio = ask.number("ratio", 0.5, 0, 1)
        if ask.layers < 4:
            raise PlanError(
                f"pyramiddrop: found a decoder of {ask.layers} layers, expected 4 or more. "
                "Use the preset fastv."
            )
        counts, count = [], ask.visual_tokens
        wanted = f"a share that leaves 1 to {MAX_KEEP} tokens at every edge"
        for quarter in range(1, 5):
            counts.append((quarter * ask.layers // 4, count))
            count = _rounded(ratio * count)
            if quarter < 4 and not 1 <= count <= MAX_KEEP:
                ask.reject("ratio", ratio, wanted)
        return ask.plan(counts, "attention")


@dataclass(frozen=True)
class ExitOnly(Preset):
    """All visual tokens leave at once."""

    name = "exit-only"
    summary = "all visual tokens up to layer e, none after it"

    e: int = option("last layer with any visual tokens (27/32 of the depth)")

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move e."""
        yield [{"e": e} for e in range(layers - 1)]

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of two stages; by default there is an exit, however few the layers."""
        last = ask.layers - 1
        default = max(0, min(27 * ask.layers // 32, last - 1))
        e = ask.within("e", default, 0, last, f"a layer from 0 to {last}")
        counts = [(e + 1, ask.visual_tokens), (ask.layers, 0)]
        return ask.plan(counts if e < last else counts[:1])


def _rounded(count: float) -> int:
    return int(count + 0.5)
