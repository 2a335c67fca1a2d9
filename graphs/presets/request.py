"""A named plan and what was asked of it: options with their types, and the plan that results.

It knows no preset: those stand in ``static_presets.py`` and ``probing_presets.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from ..errors import PlanError
from ..plan.checks import MAX_NAME
from ..plan.plan import StagePlan
from ..plan.stages import Edge, Mode, Norm, Probe, Score, Stage

UNCALIBRATED = "uncalibrated defaults"
"""How the note of a plan begins whose numbers nobody measured on this model."""

TEMPLATES = ("7b", "13b")
"""Whose rule layer 0 follows."""


@dataclass(frozen=True)
class Request:
    """What was asked for, typed access to it, and the plan that comes of it."""

    preset: str
    known: Mapping[str, str]  # the preset's options, and what each of them is
    layers: int
    visual_tokens: int
    options: Mapping[str, Any]  # those that were given

    def integer(self, option: str, default: int) -> int:
        """An integer."""
        value = self.options.get(option, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.reject(option, value, "an integer")
        return value

    def share(self, option: str, default: float) -> float:
        """A number from 0 to 1."""
        value = self.options.get(option, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            self.reject(option, value, "a number from 0 to 1")
        return value

    def number(self, option: str, default: float, low: float, high: float) -> float:
        """A number from ``low`` to ``high``."""
        value = self.options.get(option, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            self.reject(option, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def switch(self, option: str, default: bool) -> bool:
        """True or false."""
        value = self.options.get(option, default)
        if not isinstance(value, bool):
            self.reject(option, value, "true or false")
        return value

    def integers(self, option: str, default: tuple[int, ...], low: int, high: int) -> list[int]:
        """Integers from ``low`` to ``high``, ascending."""
        value = self.options.get(option, default)
        fits = isinstance(value, (tuple, list)) and bool(value)
        if not fits or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            self.reject(option, value, "integers")
        if list(value) != sorted(set(value)) or not low <= value[0] <= value[-1] <= high:
            self.reject(option, value, f"integers from {low} to {high}, ascending")
        return list(value)

    def without(self, reason: str, *options: str) -> None:
        """Refuse options that ``reason`` leaves without a meaning."""
        for option in options:
            if option in self.options:
                given = f"{option}={_as_word(self.options[option])}"
                raise PlanError(
                    f"{self.preset}: found {given} beside {reason}, expected one of the two. "
                    f"Remove {option}."
                )

    def word(self, option: str, known: tuple[str, ...]) -> str:
        """One of the ``known`` words; the first of them where none was given."""
        value = self.options.get(option, known[0])
        if value not in known:
            self.reject(option, value, f"one of {', '.join(known)}")
        return value

    def reject(self, option: str, value: Any, expected: str) -> NoReturn:
        """Raise the ``PlanError`` of a value that does not do."""
        origin = "" if option in self.options else f" (the default for {self.layers} layers)"
        raise PlanError(
            f"{self.preset}: found {option}={value!r}{origin}, expected {expected}. "
            f"Write {self.preset}:{option}=... with such a value."
        )

    def plan(
        self,
        counts: list[tuple[int, int]],
        score: Score = "value_norm",
        shallow: tuple[Mode, ...] = (),
        norm: Norm = "gated",
    ) -> StagePlan:
        """A plan from (stop layer, visual tokens) of each stage, ``shallow`` its first modes."""
        stages: list[Stage] = []
        edges: list[Edge] = []
        start = 0
        for stop, count in counts:
            head = () if stages else shallow
            dense = repeat_mode("dense", stop - start - len(head))
            if stages:
                edges.append(Edge("select", score, count) if count else Edge("drop"))
            stages.append(Stage((start, stop), count, head + dense, norm if head else "gated"))
            start = stop
        return self._named(tuple(stages), tuple(edges))

    def probing(
        self,
        ends: list[int],
        probe: Probe | None,
        shallow: tuple[Mode, ...],
        decode_sees: bool = False,
    ) -> StagePlan:
        """A plan that decides per prompt; ``ends``: the last layer of every stage but the last."""
        stages: list[Stage] = []
        ends = ends if probe else []
        for start, stop in pairwise([0, *(end + 1 for end in ends), self.layers]):
            head = () if stages else shallow
            modes = head + repeat_mode("dense", stop - start - len(head))
            stages.append(Stage((start, stop), self.visual_tokens, modes))
        edges = (Edge("probe"),) * len(ends)
        return self._named(
            tuple(stages), edges, probe=probe, decode_sees_shallow_vision=decode_sees
        )

    def _named(self, stages: tuple[Stage, ...], edges: tuple[Edge, ...], **more: Any) -> StagePlan:
        """The plan, called after what was asked for."""
        changed = {key: self.options[key] for key in self.known if key in self.options}
        words = [self.preset, *(f"{key}{_as_word(value)}" for key, value in changed.items())]
        return StagePlan(
            name=_short("-".join(words)),
            layers=self.layers,
            visual_tokens=self.visual_tokens,
            stages=stages,
            edges=edges,
            note=self._note(set(changed)),
            **more,
        )

    def _note(self, given: set[str]) -> str:
        if "cosine" in self.known:
            by_hand = bool(given & {"cosine", "contribution", "exit_cosine"})
            return (
                "thresholds chosen by hand" if by_hand else f"{UNCALIBRATED}: as published for 7B"
            )
        left = [key for key in self.known if key not in given | {"norm", "template"}]
        if not self.known:
            return ""
        return f"{UNCALIBRATED}: {', '.join(left)}" if left else "chosen by hand, not calibrated"


def _short(name: str) -> str:
    """A name that a directory can have; two that are cut still differ."""
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9]}-{digest}"


def _as_word(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "-".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def repeat_mode(mode: Mode, times: int) -> tuple[Mode, ...]:
    """``mode`` for so many layers."""
    return (mode,) * times


@dataclass(frozen=True)
class Preset:
    """One named plan: what it does, the options it takes (name -> one line), and how to make it."""

    summary: str
    options: Mapping[str, str]
    build: Callable[[Request], StagePlan]
