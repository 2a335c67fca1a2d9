"""Presets that keep fewer visual tokens at each of a few layers: published layers and counts.

Layers are those of 32, counts those of the tokens that enter; other models, and other entries, take
them in proportion.

Source: docs/methods.md, "SparseVLM", "V2Drop" and "TOPS".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..errors import PlanError
from ..plan.plan import StagePlan
from ..plan.stages import MAX_KEEP, Entry
from .request import Options, Preset, Request, option, steps

PUBLISHED_LAYERS = 32

TIMES = tuple(1.02**power for power in range(-240, 340))
"""Factors of the counts that a comparison tries: 0.009 to 820."""


def scaled_counts(counts: tuple[int, ...], of: int, times: float, entering: int) -> tuple[int, ...]:
    """Return so many times counts published for ``of`` tokens, where ``entering`` enter."""
    most = min(entering, MAX_KEEP)
    return tuple(min(most, max(1, int(times * count * entering / of))) for count in counts)


@dataclass(frozen=True)
class _Narrowing(Preset):
    """A selection before each of some layers."""

    score: ClassVar[str]
    starts: ClassVar[tuple[int, ...]]
    """Layers that see fewer tokens than the one before, as published."""
    counts: ClassVar[tuple[int, ...]]
    """Tokens from each of them on, as published."""
    of: ClassVar[int] = 576
    """Tokens that enter there."""

    before: tuple[int, ...] = option("layers before which tokens are dropped, such as 3-17-22")
    keep: tuple[int, ...] = option("tokens kept at each of them, such as 288-144-1")

    @classmethod
    def scaled(cls, times: float, entering: int) -> tuple[int, ...]:
        """Return so many times the published counts, of tokens of which so many enter."""
        return scaled_counts(cls.counts, cls.of, times, entering)

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move all counts alike."""
        yield [{"keep": cls.scaled(times, visual_tokens)} for times in TIMES]

    def narrowed(self, ask: Request, entering: int, entry: Entry | None) -> StagePlan:
        """Return the plan that ``entering`` tokens of an image enter."""
        if ask.layers <= len(self.starts):
            raise PlanError(
                f"{self.name}: found a decoder of {ask.layers} layers, expected "
                f"{len(self.starts) + 1} or more. Use the preset fastv."
            )
        starts: list[int] = []
        for layer in self.starts:  # one layer or more between them, however few there are
            near = layer * ask.layers // PUBLISHED_LAYERS
            starts.append(max(near, starts[-1] + 1 if starts else 1))
        before = ask.integers("before", tuple(starts), 1, ask.layers - 1)
        limit = min(entering, MAX_KEEP)
        keep = ask.option("keep", self.scaled(1, entering))
        falls = list(keep) == sorted(keep, reverse=True)
        if len(keep) != len(before) or not falls or not 1 <= keep[-1] <= keep[0] <= limit:
            wanted = f"{len(before)} counts from {limit} to 1, none larger than the one before"
            ask.reject("keep", keep, wanted)
        stops, tokens = (*before, ask.layers), (entering, *keep)
        return ask.plan(list(zip(stops, tokens, strict=True)), self.score, entry=entry)

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of one stage more than there are selections."""
        return self.narrowed(ask, ask.visual_tokens, ask.entry)


@dataclass(frozen=True)
class SparseVLM(_Narrowing):
    """SparseVLM's published schedule for a mean of 192 tokens, without its merged tokens."""

    name = "sparsevlm"
    summary = "three selections by the question's rows that attend most to the image"
    score = "sparsevlm"
    starts, counts = (3, 7, 16), (300, 200, 110)


@dataclass(frozen=True)
class V2Drop(_Narrowing):
    """V2Drop: tokens that a layer changes least are dropped."""

    name = "v2drop"
    summary = "three selections by how far a layer moved a token, whatever is asked"
    score = "v2drop"
    starts, counts = (3, 17, 22), (288, 144, 1)


@dataclass(frozen=True)
class Tops(_Narrowing):
    """TOPS's schedule for a mean of 64 tokens; SCOPE stands for its first stage."""

    name = "tops"
    summary = "SCOPE's choice enters, and two selections by attention narrow it down"
    score = "attention"
    starts, counts, of = (12, 24), (64, 16), 128

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move what enters, of which shares go on; where all enter, the counts behind."""
        yield [{"entry": f"scope-{keep}"} for keep in steps(1, visual_tokens, 192)]
        for way in super().ways(layers, visual_tokens):
            yield [{"entry": f"scope-{visual_tokens}", **options} for options in way]

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of three stages."""
        entry = ask.entry or Entry("scope", max(1, 2 * ask.offered // 9))
        return self.narrowed(ask, entry.keep, entry)
