"""EmbedLens: rows of an image told apart by the vocabulary, then removed, or left as they are.

Source: docs/methods.md, "EmbedLens".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..plan.plan import StagePlan
from ..plan.stages import Entry, Frozen, FrozenRows, Mode, Removed
from .request import Options, Preset, Request, option, repeat_mode

FREEZE = (0.5, 1.0, 1.5)
"""Halves of layers whose updates the paper leaves out: the MLP of layer 0, and all of layer 1."""


@dataclass(frozen=True)
class EmbedLens(Preset):
    """Matched rows do not enter; or, with ``freeze``, they enter and stay as they are."""

    name = "embedlens"
    summary = "visual rows near some words of the vocabulary are removed, or frozen in some layers"

    targets: tuple[int, ...] = option("ids of the vocabulary, such as 1141-26673 (none)")
    which: Literal["matched", "unmatched", "random"] = option(
        "matched, unmatched or random: rows that are removed, or frozen (matched)"
    )
    keep: int = option("rows of an image that there is room for, of those not removed (all)")
    freeze: tuple[float, ...] = option(
        "n: attention of layer n, n.5: its MLP; without targets of all rows (0.5-1-1.5, or none)"
    )
    method: Literal["vt"] = option("vt: text ignores vision in the layers of freeze, too (none)")
    exit: int = option("first layer without vision (the depth: none); entry: the first with it (0)")

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move the exit: which words to look for is not known of a model."""
        yield [{"exit": layer} for layer in range(min(2, layers), layers + 1)]

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of one stage, or of two where vision leaves."""
        stop = ask.within("exit", ask.layers, 1, ask.layers, f"a layer from 1 to {ask.layers}")
        late = self._late(ask, stop)
        freeze = self._freeze(ask, late, stop)
        entry = self._entry(ask, late, freezes=bool(freeze))
        rows: FrozenRows = "visual"
        if self.targets:
            rows = "unmatched" if self.which == "unmatched" else "matched"
        tokens = ask.offered if entry is None else entry.keep
        modes = self._modes(freeze, stop)
        counts = [(stop, tokens), (ask.layers, 0)][: 1 + (stop < ask.layers)]
        plan = ask.plan(counts, shallow=modes, entry=entry, decode_sees_shallow_vision=bool(modes))
        frozen = ask.left(tuple(_frozen(rows, freeze)))
        stages = list(plan.stages)
        stages[plan.entry_stage] = replace(stages[plan.entry_stage], frozen=frozen)
        return replace(plan, stages=tuple(stages))

    def _late(self, ask: Request, stop: int) -> int:
        """Return the first layer with vision."""
        text, last = self.entry or "0", 0 if self.targets else stop - 1
        late = int(text) if text.isdecimal() and len(text) < 10 else -1
        if not 0 <= late <= last:
            classes = ", as rows are told apart by targets in layer 0" if self.targets else ""
            ask.reject("entry", text, f"a layer from 0 to {last}{classes}")
        return late

    def _freeze(self, ask: Request, late: int, stop: int) -> tuple[float, ...]:
        """Return the halves of layers that are frozen, those with vision."""
        default = () if self.targets or late else tuple(at for at in FREEZE if at < stop)
        freeze = ask.option("freeze", default)
        halves = all(at * 2 == int(at * 2) for at in freeze)
        rising = list(freeze) == sorted(set(freeze))
        if not halves or not rising or (freeze and not late <= freeze[0] <= freeze[-1] < stop):
            wanted = f"layers and halves, such as 0.5-1-1.5, {late} to {stop - 0.5:g}, ascending"
            ask.reject("freeze", freeze, wanted)
        if not freeze:
            ask.without("no freeze", "method")
        return freeze

    def _entry(self, ask: Request, late: int, freezes: bool) -> Entry | None:
        """Return what enters, and where: without targets all rows."""
        if not self.targets:
            ask.without("no targets", "which", "keep")
            return Entry("uniform", ask.offered, layer=late) if late else None
        removes: Removed = self.which or "matched"
        if freezes:
            ask.without("freeze, with which all rows enter", "keep")
            if removes == "random":
                ask.reject("which", removes, "matched or unmatched beside freeze")
            removes = "none"
        keep = ask.within("keep", ask.offered, 1, ask.offered, f"1 to {ask.offered} rows")
        targets = ask.integers("targets", (), 0, 2**31 - 1)
        return Entry("embedlens", keep, targets=targets, removes=removes)

    def _modes(self, freeze: tuple[float, ...], stop: int) -> tuple[Mode, ...]:
        """Return what text sees: in layer 0 of the list the first token stands for all."""
        layers = [int(at) for at in freeze if at == int(at)]
        blind: Mode = "text_blind" if self.method == "vt" else "dense"
        modes = [*repeat_mode("dense", max(layers, default=-1) + 1)]
        for layer in layers:
            modes[layer] = blind if layer else "sink"
        return tuple(modes) if {*modes} - {"dense"} else ()


def _frozen(rows: FrozenRows, freeze: tuple[float, ...]) -> Iterator[Frozen]:
    """Yield the halves of layers in ``freeze`` as a stage lists them."""
    attention = tuple(int(at) for at in freeze if at == int(at))
    mlp = tuple(int(at) for at in freeze if at != int(at))
    if attention:
        yield Frozen(rows, "attention", attention)
    if mlp:
        yield Frozen(rows, "mlp", mlp)
