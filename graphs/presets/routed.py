"""Presets of routed depth: all visual tokens in all layers, of which each row runs some.

Their weights come with the checkpoint: routers are trained for a model.

Source: docs/methods.md, "Routed depth".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..plan.plan import StagePlan
from ..plan.routing import FINEST, Routing, RoutingForm
from .request import Options, Preset, Request, option


@dataclass(frozen=True)
class _Routed(Preset):
    """One stage of dense layers with routers of the preset's name."""

    needs_weights = True

    form: RoutingForm = option("exact, or capacity: gather a share of the rows (exact)")

    def routing(self, ask: Request) -> Routing:
        """Return the routing that was asked for."""
        raise NotImplementedError

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of one stage."""
        return ask.plan([(ask.layers, ask.visual_tokens)], routing=self.routing(ask))


@dataclass(frozen=True)
class _RowByRow(_Routed):
    """Routers that read one row each."""

    name: ClassVar[str]

    share: float = option("of a call's rows, the most that run, in the capacity form (0.75)")

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move the share that runs: what the exact form saves is known to a prompt alone."""
        yield [{"form": "capacity", "share": percent / 100} for percent in range(100, 4, -1)]

    def routing(self, ask: Request) -> Routing:
        """Return the routing that was asked for; a share alone asks for the capacity form."""
        form = ask.option("form", "exact" if self.share is None else "capacity")
        if form == "exact":
            ask.without("form=exact, in which every row is computed", "share")
            return Routing(self.name, form)
        return Routing(self.name, form, share=ask.number("share", 0.75, 1 / FINEST, 1))


@dataclass(frozen=True)
class SkipGpt(_RowByRow):
    """SkipGPT, of its own repository."""

    name = "skipgpt"
    summary = "routers let each row skip attention, MLP or both (weights: the checkpoint's)"


@dataclass(frozen=True)
class SkipGptLrm(_RowByRow):
    """SkipGPT as LRM-Pruning has it."""

    name = "skipgpt-lrm"
    summary = "the same with routers of one linear layer, as in LRM-Pruning"


@dataclass(frozen=True)
class Dllm(_RowByRow):
    """D-LLM, as LRM-Pruning has it."""

    name = "dllm"
    summary = "a router lets each row skip a whole layer (weights: the checkpoint's)"


@dataclass(frozen=True)
class Mod(_Routed):
    """MoD with routers for attention and MLP, as LRM-Pruning has it."""

    name = "mod"
    summary = "in each layer but the first and last, a share of the prompt's rows run, scaled"

    sparsity: float = option("part of a prompt's rows that skip each sublayer (0.25)")

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move the sparsity."""
        sparsities = [percent / 100 for percent in range(96)]
        yield [{"sparsity": sparsity, "form": "capacity"} for sparsity in sparsities]

    def routing(self, ask: Request) -> Routing:
        """Return the routing that was asked for; its capacity is what the sparsity leaves."""
        sparsity = ask.number("sparsity", 0.25, 0, 1 - 1 / FINEST)
        return Routing(self.name, ask.option("form", "exact"), sparsity=sparsity)
