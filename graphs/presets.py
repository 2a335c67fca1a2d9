"""Named plans for a decoder of any depth: ``preset("visipruner", 32, 576, t=14, keep=32)``.

It knows methods, not models: without options every number follows from the depth and the count of
visual tokens, and the plan says that it is uncalibrated.

Source: docs/design.md section 4; VisiPruner: methods.md 1.2 to 1.4 and 1.8; peers: methods.md 5.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NoReturn

from .errors import PlanError
from .plan import (
    MAX_KEEP,
    MAX_NAME,
    NORMS,
    Edge,
    Mode,
    Norm,
    Probe,
    Score,
    Stage,
    StagePlan,
    nearest,
)

UNCALIBRATED = "uncalibrated defaults"
"""How the note of a plan begins whose numbers nobody measured on this model."""

LATER = ("hidrop", "vica", "embedlens")

TEMPLATES = ("7b", "13b")
EXIT_RULES = ("cumulative", "consecutive")

BOUNDARIES = (8, 10, 12, 14, 16, 18, 20, 23, 27)
"""Last layers of the stages of an adaptive plan, for 32 layers; others in proportion. Triggers
fall around the middle, and a stage of two layers wastes 3 % of the visual work at most
(methods.md 1.8 c); exits fall late and cost little."""

BUCKET_SHARES = (72, 36, 18, 9, 4, 1)
"""Buckets of an adaptive plan are N divided by these: 8, 16, 32, 64, 144 and all of 576. The
published mean of K is 10; with all N as the largest, no token that counts is ever left out."""


@dataclass(frozen=True)
class Preset:
    """One named plan: what it does and the options it takes (name -> one line)."""

    summary: str
    options: dict[str, str]


_TRIGGER_OPTIONS = ("boundaries", "buckets", "cosine", "contribution")
_EXIT_OPTIONS = ("exit_cosine", "exit_layers", "exit_rule")
_PROBE_OPTIONS = {
    "middle": "true or false: whether tokens are selected (true)",
    "deep": "true or false: whether the selected tokens may leave (true)",
    "cosine": "below it in some token, a layer selects (0.995)",
    "contribution": "tokens above this L2 norm stay (0.2)",
    "exit_cosine": "not below it in any token, a layer is quiet (0.999)",
    "exit_layers": "quiet layers until vision leaves (2)",
    "exit_rule": "cumulative or consecutive: which quiet layers count together",
}

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
    "visipruner-code": Preset(
        "VisiPruner as its released code runs: every layer's probe decides, per prompt",
        {
            "shallow": "first layer that is not text-blind, or false (6, less in short decoders)",
            "probe": "first layer whose probe counts (the one after shallow)",
            "template": "7b or 13b: the rule of layer 0 (13b in a decoder of 40 layers)",
            **_PROBE_OPTIONS,
        },
    ),
    "visipruner-paper": Preset(
        "VisiPruner as its paper describes it: every layer's probe decides, per prompt",
        {
            "shallow": "first layer that is not text-blind, or false (7, less in short decoders)",
            "probe": "first layer whose probe counts (shallow)",
            **_PROBE_OPTIONS,
        },
    ),
    "visipruner-adaptive": Preset(
        "the probe decides per prompt, and acts at the nearest later boundary of a few",
        {
            "shallow": "first layer that is not text-blind, or false (3/16 of the depth)",
            "probe": "first layer whose probe counts (the one after shallow)",
            "template": "7b or 13b: the rule of layer 0 (7b)",
            "boundaries": "last layers of stages, such as 8-10-12 (9 of them in 32 layers)",
            "buckets": "rows that a selection is padded to, such as 8-16-576 (6 of them)",
            **_PROBE_OPTIONS,
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


_WORDS = ("norm", "template", "exit_rule")
_SWITCHES = ("middle", "deep")
_LISTS = ("boundaries", "buckets")
_NUMBERS = ("r", "ratio", "cosine", "contribution", "exit_cosine")


def _parse(name: str, key: str, value: str) -> Any:
    if name not in PRESETS or key not in PRESETS[name].options or key in _WORDS:
        return value  # ``preset`` judges it
    if key in _SWITCHES and value.lower() in ("true", "yes", "on"):
        return True
    if key in ("shallow", *_SWITCHES) and value.lower() in ("false", "no", "off", "none"):
        return False
    try:
        if key in _LISTS:
            return tuple(int(item) for item in value.split("-"))
        return float(value) if key in _NUMBERS else int(value)
    except ValueError:
        kind = "a number" if key in _NUMBERS else "an integer"
        kind = "integers such as 8-16-32" if key in _LISTS else kind
        kind = "true or false" if key in _SWITCHES else kind
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

    def number(self, option: str, default: float, low: float, high: float) -> float:
        value = self.options.get(option, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            self.refuse(option, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def switch(self, option: str, default: bool) -> bool:
        value = self.options.get(option, default)
        if not isinstance(value, bool):
            self.refuse(option, value, "true or false")
        return value

    def integers(self, option: str, default: tuple[int, ...], low: int, high: int) -> list[int]:
        """Ascending, from ``low`` to ``high``."""
        value = self.options.get(option, default)
        fits = isinstance(value, (tuple, list)) and bool(value)
        if not fits or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            self.refuse(option, value, "integers")
        if list(value) != sorted(set(value)) or not low <= value[0] <= value[-1] <= high:
            self.refuse(option, value, f"integers from {low} to {high}, ascending")
        return list(value)

    def without(self, reason: str, *options: str) -> None:
        """Refuse options that ``reason`` leaves without a meaning."""
        for option in options:
            if option in self.options:
                raise PlanError(
                    f"{self.preset}: found {option}={_word(self.options[option])} beside {reason}, "
                    f"expected one of the two. Remove {option}."
                )

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
            modes = head + _repeat("dense", stop - start - len(head))
            stages.append(Stage((start, stop), self.visual_tokens, modes))
        edges = (Edge("probe"),) * len(ends)
        return self._named(
            tuple(stages), edges, probe=probe, decode_sees_shallow_vision=decode_sees
        )

    def _named(self, stages: tuple[Stage, ...], edges: tuple[Edge, ...], **more: Any) -> StagePlan:
        """The plan, called after what was asked for."""
        changed = {
            key: self.options[key] for key in PRESETS[self.preset].options if key in self.options
        }
        words = [self.preset, *(f"{key}{_word(value)}" for key, value in changed.items())]
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
        if "cosine" in PRESETS[self.preset].options:
            by_hand = bool(given & {"cosine", "contribution", "exit_cosine"})
            return (
                "thresholds chosen by hand" if by_hand else f"{UNCALIBRATED}: as published for 7B"
            )
        left = [
            key for key in PRESETS[self.preset].options if key not in given | {"norm", "template"}
        ]
        if not PRESETS[self.preset].options:
            return ""
        return f"{UNCALIBRATED}: {', '.join(left)}" if left else "chosen by hand, not calibrated"


def _short(name: str) -> str:
    """A name that a directory can have; two that are cut still differ."""
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9]}-{digest}"


def _word(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "-".join(map(str, value))
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
    template = ask.word("template", TEMPLATES)
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


def _visipruner_code(ask: _Request) -> StagePlan:
    template = ask.word("template", TEMPLATES if ask.layers != 40 else TEMPLATES[::-1])
    # The code compares with < and with > around one number, which leaves a dense layer between.
    shallow, first = _text_blind(ask, min(6, 3 * ask.layers // 16), gap=1)
    modes = _shallow("sink_half" if template == "13b" else "sink", "text_blind", shallow)
    ends = list(range(first, ask.layers - 1))
    return ask.probing(ends, _probe(ask, first), modes, decode_sees=True)


def _visipruner_paper(ask: _Request) -> StagePlan:
    shallow, first = _text_blind(ask, min(7, 3 * ask.layers // 16 + 1), gap=0)
    modes = _shallow("sink", "text_blind_novv", shallow)
    probe = _probe(ask, first, EXIT_RULES[::-1])
    ends = list(range(first, ask.layers - 1))
    return ask.probing(ends, probe and replace(probe, strict=False), modes)


def _visipruner_adaptive(ask: _Request) -> StagePlan:
    template = ask.word("template", TEMPLATES)
    shallow, first = _text_blind(ask, 3 * ask.layers // 16, gap=1)
    modes = _shallow("sink_half" if template == "13b" else "sink", "text_blind", shallow)
    last = ask.layers - 2
    near = {min(max(end * ask.layers // 32, first), last) for end in BOUNDARIES}
    ends = ask.integers("boundaries", tuple(sorted(near)), first, last)
    sizes = {max(1, ask.visual_tokens // share) for share in BUCKET_SHARES}
    buckets = ask.integers("buckets", tuple(sorted(sizes)), 1, ask.visual_tokens)
    probe = _probe(ask, first)
    return ask.probing(ends, probe and replace(probe, buckets=tuple(buckets)), modes)


def _text_blind(ask: _Request, default: int, gap: int) -> tuple[int, int]:
    """Options ``shallow`` and ``probe``: the number of text-blind layers, the first probed one."""
    off = ask.options.get("shallow") is False
    middle = default if off else ask.integer("shallow", default)
    # What the last layer's probe finds can change nothing.
    last = ask.layers - 2
    if not 0 <= middle <= last:
        ask.refuse("shallow", middle, f"a layer from 0 to {last}")
    shallow = 0 if off else middle
    first = ask.integer("probe", min(middle + gap, last))
    if not shallow <= first <= last:
        wanted = f"a layer from shallow={shallow} to {last}, the last but one"
        ask.refuse("probe", first, wanted)
    return shallow, first


def _shallow(first: Mode, others: Mode, count: int) -> tuple[Mode, ...]:
    return (first, *_repeat(others, count - 1)) if count else ()


def _probe(ask: _Request, first: int, rules: tuple[str, ...] = EXIT_RULES) -> Probe | None:
    """The numbers of the released scripts unless others were asked for; None without a middle."""
    deep = ask.switch("deep", True)
    if not ask.switch("middle", True):
        # Without selected tokens none can leave: the released code runs so, too.
        ask.without("middle=false", "probe", *_TRIGGER_OPTIONS, *_EXIT_OPTIONS)
        return None
    if not deep:
        ask.without("deep=false", *_EXIT_OPTIONS)
    exit_cosine = ask.number("exit_cosine", 0.999, -1, 1)
    exit_layers = ask.integer("exit_layers", 2)
    if exit_layers < 1:
        ask.refuse("exit_layers", exit_layers, "1 or more")
    return Probe(
        first,
        cosine=ask.number("cosine", 0.995, -1, 1),
        contribution=ask.number("contribution", 0.2, 0, 1e9),
        exit_cosine=exit_cosine if deep else None,
        exit_layers=exit_layers,
        consecutive=ask.word("exit_rule", rules) == "consecutive",
    )


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
    "visipruner-code": _visipruner_code,
    "visipruner-paper": _visipruner_paper,
    "visipruner-adaptive": _visipruner_adaptive,
    "fastv": _fastv,
    "pyramiddrop": _pyramiddrop,
    "exit-only": _exit_only,
}
