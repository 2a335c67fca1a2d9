"""Named plans for a decoder of any depth: ``preset("visipruner", 32, 576, t=14, keep=32)``.

It knows methods, not models: without options every number follows from the depth and the count of
visual tokens, and the plan says that it is uncalibrated.

Source: docs/design.md section 4; VisiPruner: methods.md 1.3 and 1.8 (b); peers: methods.md 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import PlanError
from .plan import MAX_KEEP, NORMS, Edge, Mode, Norm, Score, Stage, StagePlan, nearest

UNCALIBRATED = "uncalibrated defaults"
"""How the note of a plan begins whose numbers nobody measured on this model."""

LATER = (
    "visipruner-code",
    "visipruner-paper",
    "visipruner-adaptive",
    "hidrop",
    "vica",
    "embedlens",
)


@dataclass(frozen=True)
class Preset:
    """One named plan: what it does and the options it takes (name -> one line)."""

    summary: str
    options: dict[str, str]


PRESETS: dict[str, Preset] = {
    "dense": Preset("the unpruned model", {}),
    "visipruner": Preset(
        "text-blind shallow layers, the top K visual tokens after layer t, none after layer e",
        {
            "shallow": "first layer that is not text-blind, or false (3/16 of the depth)",
            "t": "last layer with all visual tokens (9/16 of the depth)",
            "e": "last layer with any visual tokens (27/32 of the depth)",
            "keep": "K, visual tokens kept after t (a ninth of them)",
            "norm": "gated or renorm: what happens to the attention taken away (gated)",
            "template": "7b or 13b: the rule of layer 0 (7b)",
        },
    ),
    "fastv": Preset(
        "after k layers, keep a share 1-r of the visual tokens by attention",
        {
            "k": "layers with all visual tokens (3)",
            "r": "share of the visual tokens to remove, 0 to 1 (0.75)",
        },
    ),
    "pyramiddrop": Preset(
        "after each quarter of the depth, keep a share of the visual tokens by attention",
        {"ratio": "share kept at each of the three edges, 0 to 1 (0.5)"},
    ),
    "exit-only": Preset(
        "all visual tokens up to layer e, none after it",
        {"e": "last layer with any visual tokens (27/32 of the depth)"},
    ),
}


def preset(name: str, layers: int, visual_tokens: int, **options: Any) -> StagePlan:
    """The plan of preset ``name`` for a decoder of ``layers`` layers and N ``visual_tokens``.

    The plan is called after the preset and the options given, so that two settings never share a
    directory: ``visipruner-t14-keep32``. Options: ``PRESETS[name].options``.

    Raises:
        PlanError: an unknown preset or option, or values that contradict each other.
    """
    if name not in PRESETS:
        if name in LATER:
            hint = f" {name} is planned, but not supported yet."
        else:
            hint = nearest(name, tuple(PRESETS))
        raise PlanError(f"preset: found {name!r}, expected one of {', '.join(PRESETS)}.{hint}")
    known = tuple(PRESETS[name].options)
    for option in options:
        if option not in known:
            hint = f"one of {', '.join(known)}.{nearest(option, known)}" if known else "no options."
            raise PlanError(f"{name}: found option {option!r}, expected {hint}")
    for field, value in (("layers", layers), ("visual_tokens", visual_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(
                f"{name}: found {field}={value!r}, expected a positive integer. "
                "Take it from the model's config.json."
            )
    return _BUILDERS[name](_Request(name, layers, visual_tokens, options))


def options_from_strings(name: str, items: Iterable[str]) -> dict[str, Any]:
    """Options of preset ``name`` from ``["t=14", "keep=32"]``, with the types it expects.

    Raises:
        PlanError: an item that is no ``key=value``, a repeated key, or a value of another type.
            Unknown keys are left to ``preset``.
    """
    options: dict[str, Any] = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise PlanError(
                f"{name}: found option {item[:60]!r}, expected key=value, such as t=14."
            )
        if key in options:
            raise PlanError(f"{name}: found option {key!r} twice, expected it once. Remove one.")
        options[key] = _parse(name, key, value)
    return options


def _parse(name: str, key: str, value: str) -> Any:
    if name not in PRESETS or key not in PRESETS[name].options or key in ("norm", "template"):
        return value  # ``preset`` judges it
    if key == "shallow" and value.lower() in ("false", "no", "off", "none"):
        return False
    try:
        return float(value) if key in ("r", "ratio") else int(value)
    except ValueError:
        kind = "a number" if key in ("r", "ratio") else "an integer"
        raise PlanError(f"{name}: found {key}={value[:40]}, expected {kind}.") from None


# --- one builder per preset -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """What was asked for, and typed access to it."""

    preset: str
    layers: int
    visual_tokens: int
    options: dict[str, Any]

    def integer(self, option: str, default: int) -> int:
        value = self.options.get(option, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(option, value, "an integer")
        return value

    def share(self, option: str, default: float) -> float:
        value = self.options.get(option, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            self.refuse(option, value, "a number from 0 to 1")
        return value

    def word(self, option: str, known: tuple[str, ...]) -> str:
        value = self.options.get(option, known[0])
        if value not in known:
            self.refuse(option, value, f"one of {', '.join(known)}")
        return value

    def refuse(self, option: str, value: Any, expected: str) -> NoReturn:
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
            dense = _repeat("dense", stop - start - len(head))
            if stages:
                edges.append(Edge("select", score, count) if count else Edge("drop"))
            stages.append(Stage((start, stop), count, head + dense, norm if head else "gated"))
            start = stop
        changed = {
            key: self.options[key] for key in PRESETS[self.preset].options if key in self.options
        }
        words = [self.preset, *(f"{key}{_word(value)}" for key, value in changed.items())]
        return StagePlan(
            name="-".join(words),
            layers=self.layers,
            visual_tokens=self.visual_tokens,
            stages=tuple(stages),
            edges=tuple(edges),
            note=self._note(set(changed)),
        )

    def _note(self, given: set[str]) -> str:
        left = [
            key for key in PRESETS[self.preset].options if key not in given | {"norm", "template"}
        ]
        if not PRESETS[self.preset].options:
            return ""
        return f"{UNCALIBRATED}: {', '.join(left)}" if left else "chosen by hand, not calibrated"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _dense(ask: _Request) -> StagePlan:
    return ask.plan([(ask.layers, ask.visual_tokens)])


def _visipruner(ask: _Request) -> StagePlan:
    last = ask.layers - 1
    off = ask.options.get("shallow") is False
    shallow = 0 if off else ask.integer("shallow", 3 * ask.layers // 16)
    t = ask.integer("t", 9 * ask.layers // 16)
    e = ask.integer("e", 27 * ask.layers // 32)
    keep = ask.integer("keep", min(max(1, ask.visual_tokens // 9), MAX_KEEP))
    norm: Any = ask.word("norm", NORMS)
    template = ask.word("template", ("7b", "13b"))
    if not 0 <= e <= last:
        ask.refuse("e", e, f"a layer from 0 to {last}")
    if not 0 <= t < e:
        ask.refuse("t", t, f"a layer from 0 to {e - 1}, before e={e}")
    if not 0 <= shallow <= t:
        ask.refuse("shallow", shallow, f"a layer from 0 to t={t}, which the selection reads")
    limit = min(ask.visual_tokens, MAX_KEEP)
    if not 1 <= keep <= limit:
        ask.refuse("keep", keep, f"1 to {limit} tokens")
    if norm == "renorm" and not shallow:
        ask.refuse("norm", norm, "gated, as no layer is text-blind")
    modes: tuple[Mode, ...] = ()
    if shallow:
        # Masked before the softmax no mass is lost that a sink could take: what remains of the
        # sink rule is that visual rows see the prefix only (methods.md 1.5 with g = 1).
        sink: Mode = "text_blind_novv" if norm == "renorm" else "sink"
        first: Mode = "sink_half" if template == "13b" else sink
        modes = (first, *_repeat("text_blind", shallow - 1))
    counts = [(t + 1, ask.visual_tokens), (e + 1, keep), (ask.layers, 0)]
    return ask.plan(counts if e < last else counts[:2], "value_norm", modes, norm)


def _fastv(ask: _Request) -> StagePlan:
    k, r = ask.integer("k", 3), ask.share("r", 0.75)
    if not 1 <= k < ask.layers:
        ask.refuse("k", k, f"1 to {ask.layers - 1} layers")
    keep = _rounded((1 - r) * ask.visual_tokens)
    if not 1 <= keep <= MAX_KEEP:
        ask.refuse("r", r, f"a share that leaves 1 to {MAX_KEEP} of {ask.visual_tokens} tokens")
    return ask.plan([(k, ask.visual_tokens), (ask.layers, keep)], "attention")


def _pyramiddrop(ask: _Request) -> StagePlan:
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
            ask.refuse("ratio", ratio, f"a share that leaves 1 to {MAX_KEEP} tokens at every edge")
    return ask.plan(counts, "attention")


def _exit_only(ask: _Request) -> StagePlan:
    # By default an exit there is, however few the layers.
    e = ask.integer("e", max(0, min(27 * ask.layers // 32, ask.layers - 2)))
    if not 0 <= e < ask.layers:
        ask.refuse("e", e, f"a layer from 0 to {ask.layers - 1}")
    counts = [(e + 1, ask.visual_tokens), (ask.layers, 0)]
    return ask.plan(counts if e < ask.layers - 1 else counts[:1])


def _repeat(mode: Mode, times: int) -> tuple[Mode, ...]:
    return (mode,) * times


def _rounded(count: float) -> int:
    return int(count + 0.5)


_BUILDERS: dict[str, Callable[[_Request], StagePlan]] = {
    "dense": _dense,
    "visipruner": _visipruner,
    "fastv": _fastv,
    "pyramiddrop": _pyramiddrop,
    "exit-only": _exit_only,
}
