"""ViCA: visual rows serve keys and values to a few layers, as they came; text is all that runs.

Source: docs/methods.md, "ViCA".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from ..errors import PlanError
from ..plan.plan import StagePlan
from ..plan.stages import Edge, Entry, Frozen, Stage
from .request import Options, Preset, Request, as_word, option, repeat_mode

PrefixRule = Literal["frozen", "updated"]

PUBLISHED: dict[int, tuple[tuple[int, ...], PrefixRule]] = {
    32: ((0, 1, 7, 8, 9, 10, 11, 14), "frozen"),
    40: ((0, 6, 8, 9, 10, 13, 14, 16), "updated"),
}
"""Layers with vision, and the rule for the prefix, that LLaVA-1.5 7B and 13B were trained with, by
depth. MobileLLaMA-2.7B is as deep as the 7B and was trained with others (docs/methods.md)."""


@dataclass(frozen=True)
class ViCA(Preset):
    """Layers with vision as a model was trained with them."""

    name = "vica"
    summary = "visual rows serve keys and values to some layers, and nothing else runs for them"
    needs_weights = True

    layers: tuple[int, ...] = option("layers that see vision (as published, of 32 and 40 layers)")
    prefix: PrefixRule = option(
        "frozen: text before an image gets no update by attention (of 32 layers), or updated (40)"
    )

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move the number of layers with vision: in the first half, where most published ones are,
        then anywhere.
        """
        for stop in (layers // 2, layers):
            counts = range(1, stop + 1)
            yield [
                {"layers": tuple(at * stop // count for at in range(count)), "prefix": "frozen"}
                for count in counts
            ]

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of a stage for each run of layers with or without vision."""
        seeing, rule = self._trained_with(ask)
        runs = [[*own] for _, own in groupby(range(ask.layers), seeing.__contains__)]
        stages = [self._stage(tuple(run), ask, run[0] in seeing, rule) for run in runs]
        edges = [Edge("carry" if run[-1] < seeing[-1] else "drop") for run in runs[:-1]]
        return ask.staged(stages, edges, entry=self._entry(ask, seeing[0]))

    def _trained_with(self, ask: Request) -> tuple[tuple[int, ...], PrefixRule]:
        """Return the layers with vision and the rule for the prefix: given, or published."""
        published, usual = PUBLISHED.get(ask.layers, (None, None))
        layers = published if self.layers is None else self.layers
        rule = self.prefix or (usual if layers == published else None)
        if layers is None or rule is None:
            lacking = [word for word in ("layers", "prefix") if word not in self.given()]
            examples = "; ".join(
                f"{depth} layers: {self.name}:layers={as_word(trained)},prefix={own}"
                for depth, (trained, own) in PUBLISHED.items()
            )
            raise PlanError(
                f"{self.name}: found no {' and no '.join(lacking)}, expected what this model of "
                f"{ask.layers} layers was trained with. Published are, for {examples}. Write both."
            )
        return ask.integers("layers", layers, 0, ask.layers - 1), rule

    def _stage(self, run: tuple[int, ...], ask: Request, sees: bool, rule: PrefixRule) -> Stage:
        """Return the stage of consecutive layers."""
        frozen = [Frozen("visual", "attention", run), Frozen("visual", "mlp", run)] if sees else []
        if rule == "frozen":
            frozen.append(Frozen("prefix", "attention", run))
        tokens = ask.visual_tokens if sees else 0
        modes = repeat_mode("dense", len(run))
        return Stage((run[0], run[-1] + 1), tokens, modes, frozen=tuple(frozen))

    @staticmethod
    def _entry(ask: Request, first: int) -> Entry | None:
        """Return what enters, before the first layer with vision."""
        if ask.entry is not None and ask.entry.layer not in (0, first):
            ask.reject("entry", ask.entry.text, f"no layer, or {first}, the first with vision")
        return ask.entry and replace(ask.entry, layer=first)
