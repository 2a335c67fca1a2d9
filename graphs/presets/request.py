"""A preset: a class whose fields are its options, and the plan that is made of them.

It knows no method: those are in ``static.py`` and ``per_prompt.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal, NoReturn, get_args

from ..errors import PlanError
from ..fields import reject
from ..plan.checks import MAX_NAME
from ..plan.plan import StagePlan
from ..plan.stages import POSITIONS, Edge, Entry, Frozen, Mode, Norm, Part, Probe, Stage
from ..selectors.registry import COUNTING_SELECTORS

UNCALIBRATED = "uncalibrated defaults"
"""First words of the note of a plan whose numbers were not measured on this model."""

Template = Literal["7b", "13b"]
"""Whose rule layer 0 follows."""

Options = dict[str, Any]
"""Options of a preset by name."""

ROUTING_OPTIONS = ("form", "share", "sparsity")
"""Options that a calibration has nothing to say about: routers were trained with them."""

COMMON = ("entry", "drop", "drop_attention", "drop_mlp")
"""Options that every preset has."""

Layer = int | Literal[False]
"""A layer where something ends, or false: it is left out."""


def option(text: str) -> Any:
    """Declare an option of a preset; it is None where it was not given."""
    return field(default=None, metadata={"text": text})


@dataclass(frozen=True)
class Preset:
    """One named plan. A subclass declares its options as fields, and builds the plan."""

    name: ClassVar[str]
    summary: ClassVar[str]
    measurable: ClassVar[tuple[str, ...]] = ()
    """Options that hold published thresholds, which a calibration may replace."""
    control: ClassVar[bool] = False
    """True for a control, which keeps rows without looking at them and is there to be beaten."""
    needs_weights: ClassVar[bool] = False
    """True where the checkpoint must hold weights that were trained for it: it is compared where it
    is named."""
    joined: ClassVar[tuple[str, ...]] = ()
    """Entry selectors that a comparison puts before it, besides comparing it alone."""

    entry: str | None = field(
        default=None,
        kw_only=True,
        metadata={
            "text": "selector and count of what enters of an image, such as scope-64, or "
            "scope-64-at8 where layer 8 is the first to see it (all of it)"
        },
    )

    drop: tuple[int, ...] | None = field(
        default=None, kw_only=True, metadata={"text": "layers to leave out, such as 20-21 (none)"}
    )
    drop_attention: tuple[int, ...] | None = field(
        default=None, kw_only=True, metadata={"text": "layers to leave the attention of out (none)"}
    )
    drop_mlp: tuple[int, ...] | None = field(
        default=None, kw_only=True, metadata={"text": "layers to leave the MLP of out (none)"}
    )

    def build(self, ask: Request) -> StagePlan:
        """Return the plan for the decoder that ``ask`` names."""
        raise NotImplementedError

    @property
    def selection(self) -> str | None:
        """The rows that enter, as ``entry`` has them; None where that option is a layer."""
        return self.entry if isinstance(self.entry, str) else None

    def default_drop(self, layers: int) -> tuple[int, ...]:
        """Return the layers that are left out where ``drop`` is not given."""
        return ()

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Yield lists of options, from which a comparison takes the plan of a given cost.

        The list nearest to what was published comes first, and the next one counts where none of
        the first comes near that cost. Without any, the preset has no plans to choose from.
        """
        yield from ()

    @classmethod
    def options(cls) -> dict[str, str]:
        """Return one line about each option, those that a subclass adds first."""
        own = sorted(fields(cls), key=lambda field: field.name not in cls.__annotations__)
        return {field.name: field.metadata["text"] for field in own}

    def given(self) -> dict[str, Any]:
        """Return the options that were given."""
        values = {name: getattr(self, name) for name in self.options()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Request:
    """A preset with its options, the sizes of a decoder, and the plan that comes of them.

    offered: N, visual tokens of an image.
    """

    preset: Preset
    layers: int
    offered: int

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that enter: all that a preset's edges have to do with."""
        return self.offered if self.entry is None else self.entry.keep

    @cached_property
    def entry(self) -> Entry | None:
        """The entry that was asked for by ``scope-64``, ``scope-64-renumbered`` or
        ``scope-64-at8``.
        """
        text = self.preset.selection
        if text is None:
            return None
        chosen, at, layer = text.partition("-at")
        selector, _, rest = chosen.partition("-")
        keep, _, positions = rest.partition("-")
        fits = selector in COUNTING_SELECTORS and positions in ("", *POSITIONS)
        count, late = _count(keep), _count(layer)
        fits &= not at or 1 <= late < self.layers
        if not fits or not 1 <= count <= self.offered:
            names = ", ".join(COUNTING_SELECTORS)
            self.reject(
                "entry",
                text,
                f"a selector ({names}) and 1 to {self.offered} tokens, such as scope-64 or "
                "scope-64-renumbered, and behind it perhaps the first layer that sees them, "
                f"from 1 to {self.layers - 1}, such as scope-64-at8",
            )
        return Entry(selector, count, positions or "original", late)  # type: ignore[arg-type]

    def dropped(self, part: Part) -> frozenset[int]:
        """Return the layers that are asked to run without attention, or without their MLP."""
        layers = {*self.preset.default_drop(self.layers)}
        for name in ("drop", f"drop_{part}"):
            if name in self.preset.given():
                layers |= {*self.integers(name, (), 0, self.layers - 1)}
        return frozenset(layers)

    def option(self, name: str, default: Any) -> Any:
        """Return the value of an option, or its default here."""
        return self.preset.given().get(name, default)

    def within(self, name: str, default: Any, low: float, high: float, expected: str) -> Any:
        """Return the value of an option, which must be from ``low`` to ``high``."""
        value = self.option(name, default)
        if not low <= value <= high:
            self.reject(name, value, expected)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return a number from ``low`` to ``high``."""
        return self.within(name, default, low, high, f"a number from {low:g} to {high:g}")

    def integers(self, name: str, default: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
        """Return integers from ``low`` to ``high``, ascending."""
        value = self.option(name, default)
        if (
            not value
            or list(value) != sorted(set(value))
            or not low <= value[0] <= value[-1] <= high
        ):
            self.reject(name, value, f"integers from {low} to {high}, ascending")
        return value

    def without(self, reason: str, *names: str) -> None:
        """Refuse options that ``reason`` leaves without a meaning."""
        for name in names:
            if name in self.preset.given():
                found = f"{name}={as_word(self.preset.given()[name])}"
                raise PlanError(
                    f"{self.preset.name}: found {found} beside {reason}, expected one of the two. "
                    f"Remove {name}."
                )

    def reject(self, name: str, value: Any, expected: str) -> NoReturn:
        """Raise the ``PlanError`` of a value that does not do."""
        preset = self.preset.name
        origin = "" if name in self.preset.given() else f" (the default for {self.layers} layers)"
        remedy = f"Write {preset}:{name}=... with such a value."
        reject(f"{preset}: {name}{origin}", value, expected, PlanError, remedy)

    def plan(
        self,
        counts: list[tuple[int, int]],
        score: str = "value_norm",
        shallow: tuple[Mode, ...] = (),
        norm: Norm = "gated",
        late: int = 0,
        **more: Any,
    ) -> StagePlan:
        """Return a plan from (stop layer, visual tokens) of each stage.

        ``shallow`` are the modes of its first layers; the others are dense. ``more``: other fields
        of the plan. ``late``: the first layer that visual tokens enter, if the entry does not say.
        """
        if "entry" not in more:
            more["entry"] = self.entry
        entry: Entry | None = more["entry"]
        late = late if entry is None else entry.layer
        if entry is not None and late and (shallow or late >= counts[0][0]):
            self.reject("entry", entry.text, self._too_late(counts[0][0], bool(shallow)))
        stages: list[Stage] = []
        edges: list[Edge] = []
        start = 0
        for stop, count in [(late, 0), *counts] if late else counts:
            head = () if stages else shallow
            dense = repeat_mode("dense", stop - start - len(head))
            if stages and not stages[-1].visual_tokens:
                edges.append(Edge("carry"))
            elif stages:
                edges.append(Edge("select", score, count) if count else Edge("drop"))
            stages.append(Stage((start, stop), count, head + dense, norm if head else "gated"))
            start = stop
        return self.staged(stages, edges, **more)

    @staticmethod
    def _too_late(cut: int, shallow: bool) -> str:
        """Return what is expected of an entry before layer ``cut``, where fewer tokens go on."""
        if shallow:
            return "no layer, as the text-blind layers come first (shallow=false leaves them out)"
        return f"a layer before {cut}, from which on fewer tokens are left"

    def probing(
        self,
        ends: tuple[int, ...],
        probe: Probe | None,
        shallow: tuple[Mode, ...],
        decode_sees: bool = False,
    ) -> StagePlan:
        """Return a plan that decides per prompt.

        ``ends`` are the last layers of all stages but the last; without a probe there is one stage.
        """
        if self.entry is not None and self.entry.layer:
            wanted = "no layer where the plan decides per prompt"
            self.reject("entry", self.entry.text, wanted)
        stages: list[Stage] = []
        # Nothing is probed in a layer without attention: no stage ends or stands alone there.
        attending = {*range(self.layers)} - self.dropped("attention")
        ends = tuple(end for end in ends if end in attending) if probe else ()
        while ends and max(attending) <= ends[-1]:
            ends = ends[:-1]
        for start, stop in pairwise([0, *(end + 1 for end in ends), self.layers]):
            head = () if stages else shallow
            modes = head + repeat_mode("dense", stop - start - len(head))
            stages.append(Stage((start, stop), self.visual_tokens, modes))
        edges = [Edge("probe")] * len(ends)
        return self.staged(stages, edges, probe=probe, decode_sees_shallow_vision=decode_sees)

    def staged(self, stages: list[Stage], edges: list[Edge], **more: Any) -> StagePlan:
        """Return the plan of these stages, called after what was asked for."""
        stages = [self._without(stage) for stage in stages]
        given = self.preset.given().items()
        words = [self.preset.name, *(f"{name}{as_word(value)}" for name, value in given)]
        if "entry" not in more:
            more["entry"] = self.entry
        return StagePlan(
            name=_short("-".join(words)),
            layers=self.layers,
            visual_tokens=self.offered,
            stages=tuple(stages),
            edges=tuple(edges),
            note=self._note(),
            **more,
        )

    def _without(self, stage: Stage) -> Stage:
        """Return a stage without what is dropped, and without what it would have done there."""
        gone = {part: self.dropped(part) & {*range(*stage.layers)} for part in get_args(Part)}
        if not any(gone.values()):
            return stage
        modes = tuple(
            "dense" if layer in gone["attention"] else mode
            for layer, mode in enumerate(stage.modes, start=stage.layers[0])
        )
        return replace(
            stage,
            modes=modes,
            norm=stage.norm if {*modes} != {"dense"} else "gated",
            frozen=self.left(stage.frozen),
            drop_attention=tuple(sorted(gone["attention"])),
            drop_mlp=tuple(sorted(gone["mlp"])),
        )

    def left(self, frozen: tuple[Frozen, ...]) -> tuple[Frozen, ...]:
        """Return what is frozen of the halves that are not dropped."""
        kept = [
            replace(item, layers=tuple(n for n in item.layers if n not in self.dropped(item.part)))
            for item in frozen
        ]
        return tuple(item for item in kept if item.layers)

    def _note(self) -> str:
        known, given = self.preset.options(), self.preset.given()
        if self.preset.measurable:
            if any(name in given for name in self.preset.measurable):
                return "thresholds chosen by hand"
            return f"{UNCALIBRATED}: as published for 7B"
        settled = {*given, "norm", "template", "positions", *COMMON, *ROUTING_OPTIONS}
        left = [name for name in known if name not in settled]
        if not left and not given:
            return ""
        return f"{UNCALIBRATED}: {', '.join(left)}" if left else "chosen by hand, not calibrated"


def _count(text: str) -> int:
    """Return the number that a text spells, 0 where it spells none."""
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def steps(low: int, high: int, most: int = 64) -> list[int]:
    """Return at most about ``most`` integers from ``low`` to ``high``, evenly spread."""
    return list(range(low, high + 1, max(1, (high - low) // most)))


def repeat_mode(mode: Mode, times: int) -> tuple[Mode, ...]:
    """Return ``mode`` for so many layers."""
    return (mode,) * times


def _short(name: str) -> str:
    """Return a name that a directory can have; two that are cut still differ."""
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9]}-{digest}"


def as_word(value: Any) -> str:
    """Return the value of an option as it is typed."""
    if isinstance(value, tuple):
        return "-".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
