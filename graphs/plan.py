"""A stage plan: which decoder layers see how many visual tokens, and how. Frozen, checked data.

    layers [0, 19): 576 visual tokens -- select 64 --> [19, 28): 64 -- drop --> [28, 32): 0

It knows nothing about weights, files or devices; ``compile/planfile.py`` reads and writes YAML.
Layers are absolute, counted from 0, ranges half-open. Errors are ``PlanError`` and name the field,
what was found, what was expected and what to write instead.

Source: docs/design.md section 4; modes: methods.md 1.3 and 1.5.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn, get_args

from .errors import PlanError

VERSION = 1
"""Version of the dict form. Readers refuse others."""

MAX_NAME = 100
"""Longest name of a plan: it becomes part of a directory's."""

MAX_KEEP = 3840
"""Largest K of a selection: TensorRT's TopK goes no further."""

Mode = Literal["dense", "text_blind", "text_blind_novv", "sink", "sink_half"]
"""How one layer treats visual tokens; all but ``dense`` are gated per slot (design.md section 3).

    dense            everybody attends as usual
    text_blind       text rows lose the visual columns; visual rows are untouched
    text_blind_novv  the same, and visual rows see the prefix only
    sink             as text_blind_novv, and text rows put the removed mass on the value of the
                     first visual token (layer 0 of VisiPruner, 7B)
    sink_half        visual rows see the prefix only, text rows lose the first half of the visual
                     columns, nothing is merged (layer 0 of VisiPruner, 13B)
"""

Norm = Literal["gated", "renorm"]
"""``gated``: removed after the softmax, its mass is lost; ``renorm``: masked before the softmax."""

Op = Literal["select", "drop", "probe"]
"""What an edge does: keep K tokens, keep none, or whatever the plan's ``Probe`` finds."""

Score = Literal["value_norm", "attention"]

MODES: tuple[str, ...] = get_args(Mode)
NORMS: tuple[str, ...] = get_args(Norm)
OPS: tuple[str, ...] = get_args(Op)
SCORES: tuple[str, ...] = get_args(Score)
LATER_MODES = ("frozen", "attn_frozen", "mlp_frozen", "cross")
LATER_OPS = ("inject",)


@dataclass(frozen=True)
class Stage:
    """A contiguous range of layers with one visual-token count; checked by the plan it is in."""

    layers: tuple[int, int]  # [start, stop)
    visual_tokens: int  # per image in stage 0, per prompt after a selection
    modes: tuple[Mode, ...]  # one per layer
    norm: Norm = "gated"

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.layers[1] - self.layers[0]

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """Absolute indices of the layers that take gates: every mode but ``dense``."""
        start = self.layers[0]
        return tuple(start + i for i, mode in enumerate(self.modes) if mode != "dense")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form; ``norm`` only where it means something."""
        data: dict[str, Any] = {
            "layers": list(self.layers),
            "visual_tokens": self.visual_tokens,
            "modes": list(self.modes),
        }
        return data | ({"norm": self.norm} if self.gated_layers else {})


@dataclass(frozen=True)
class Edge:
    """What happens to the visual tokens between two stages."""

    op: Op
    score: Score | None = None  # select: what the last prompt row ranks them by
    keep: int | None = None  # select: K, for all images of a prompt together

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, without what a ``drop`` does not have."""
        fields = {"op": self.op, "score": self.score, "keep": self.keep}
        return {key: value for key, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Probe:
    """How a plan decides per prompt: what the last prompt row's attention must show, and when.

    In every layer from ``first`` on, o is that row's attention output (all heads, before the
    output projection) and c_j the part of it that comes from visual token j.

        trigger   the first layer where some cos(o - c_j, o) < cosine; kept are the tokens with
                  |c_j| > contribution in that layer (>= where not ``strict``)
        exit      the layer that brings the number of quiet layers since to ``exit_layers``; quiet
                  is a layer where every kept token has cos(o - c_j, o) >= exit_cosine

    Both act at the next edge. ``consecutive``: a layer that is not quiet starts the count again.
    ``buckets``: row counts that a selection is padded to, ascending; empty: exactly what is kept.

    Source: methods.md 1.2 and 1.3.
    """

    first: int
    cosine: float
    contribution: float
    strict: bool = True
    exit_cosine: float | None = None  # None: vision stays to the end
    exit_layers: int = 2
    consecutive: bool = False
    buckets: tuple[int, ...] = ()

    def rows_for(self, kept: int) -> int:
        """Rows that ``kept`` tokens take: their bucket, beyond the largest a multiple of it."""
        if not self.buckets or not kept:
            return kept
        largest = self.buckets[-1]
        return next((size for size in self.buckets if size >= kept), -(-kept // largest) * largest)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {**asdict(self), "buckets": list(self.buckets)}


@dataclass(frozen=True)
class StagePlan:
    """The ordered stages of a decoder and the edges between them.

    A plan with a ``probe`` decides per prompt: every edge is a ``probe``, and every stage has room
    for all N visual tokens. It is *exact* where an edge follows each probed layer and nothing is
    padded, *adaptive* otherwise. All other plans are *static*.

    Raises:
        PlanError: on construction, when a field contradicts another or asks for something that
            this version does not run.
    """

    name: str
    layers: int  # decoder depth
    visual_tokens: int  # N of one image
    stages: tuple[Stage, ...]
    edges: tuple[Edge, ...] = ()  # edge i lies between stages i and i + 1
    decode_sees_shallow_vision: bool = False  # gates all open in decode steps
    calibrated: bool = False
    note: str = ""
    probe: Probe | None = None

    def __post_init__(self) -> None:
        _check_plan(self)

    @property
    def kind(self) -> Literal["static", "exact", "adaptive"]:
        """Who decides t, K and e: the plan, or each prompt, exactly or at the next edge."""
        if self.probe is None:
            return "static"
        single = all(len(self.probed_layers(i)) == 1 for i in range(len(self.edges)))
        reaches_the_end = self.stages[-1].depth == 1
        return "exact" if single and reaches_the_end and not self.probe.buckets else "adaptive"

    @property
    def trigger(self) -> int | None:
        """t: the last layer with all N visual tokens (a selection that keeps all N ends it too).

        None where every prompt has its own.
        """
        return None if self.probe else self.stages[0].layers[1] - 1

    @property
    def exit(self) -> int | None:
        """e: the last layer with any visual tokens; None where every prompt has its own."""
        if self.probe:
            return None
        return max(stage.layers[1] for stage in self.stages if stage.visual_tokens) - 1

    @property
    def keep(self) -> int | None:
        """K of the first selection, None in a plan without one that is known beforehand."""
        return next((edge.keep for edge in self.edges if edge.op == "select"), None)

    @property
    def probe_layers(self) -> tuple[int, ...]:
        """The layers that selections read: the last one of each stage before a ``select``."""
        pairs = zip(self.stages, self.edges, strict=False)
        return tuple(stage.layers[1] - 1 for stage, edge in pairs if edge.op == "select")

    def probed_layers(self, stage: int) -> range:
        """Layers of ``stage`` whose probe can still change something: an edge follows them."""
        if self.probe is None or stage >= len(self.edges):
            return range(0)
        start, stop = self.stages[stage].layers
        return range(max(start, self.probe.first), stop)

    @property
    def is_dense(self) -> bool:
        """Whether this is the unpruned model."""
        return not self.edges and not self.stages[0].gated_layers

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON: every field counts."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def visual_tokens_in(self, layer: int) -> int:
        """Visual tokens that run through ``layer``. Raises IndexError outside the decoder."""
        for stage in self.stages:
            if stage.layers[0] <= layer < stage.layers[1]:
                return stage.visual_tokens
        raise IndexError(f"layer {layer} of a decoder with {self.layers}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form; ``from_dict`` gives the same plan back."""
        return {
            "version": VERSION,
            "name": self.name,
            "layers": self.layers,
            "visual_tokens": self.visual_tokens,
            "stages": [stage.to_dict() for stage in self.stages],
            "edges": [edge.to_dict() for edge in self.edges],
            "decode_sees_shallow_vision": self.decode_sees_shallow_vision,
            "calibrated": self.calibrated,
            "note": self.note,
            **({"probe": self.probe.to_dict()} if self.probe else {}),
        }

    @classmethod
    def from_dict(cls, data: Any) -> StagePlan:
        """Strict inverse of ``to_dict``.

        Raises:
            PlanError: an unknown or missing key, another version, or anything the constructor
                refuses.
        """
        fields = _fields(data, "plan", _PLAN_REQUIRED, _PLAN_OPTIONAL)
        version = fields.pop("version")
        if not _is_int(version) or version != VERSION:
            _refuse("version", version, str(VERSION), "The file is from another visistage.")
        stages = [
            _fields(item, f"stages[{i}]", ("layers", "visual_tokens", "modes"), ("norm",))
            for i, item in enumerate(_list(fields["stages"], "stages"))
        ]
        edges = [
            _fields(item, f"edges[{i}]", ("op",), ("score", "keep"))
            for i, item in enumerate(_list(fields.get("edges", []), "edges"))
        ]
        for i, stage in enumerate(stages):
            for key in ("layers", "modes"):
                stage[key] = tuple(_list(stage[key], f"stages[{i}].{key}"))
        fields["stages"] = tuple(Stage(**stage) for stage in stages)
        fields["edges"] = tuple(Edge(**edge) for edge in edges)
        if "probe" in fields:
            probe = _fields(fields["probe"], "probe", *_PROBE_FIELDS)
            probe["buckets"] = tuple(_list(probe.get("buckets", []), "probe.buckets"))
            fields["probe"] = Probe(**probe)
        return cls(**fields)


_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._+-]{{0,{MAX_NAME - 1}}}")
_PLAN_REQUIRED = ("version", "name", "layers", "visual_tokens", "stages")
_PLAN_OPTIONAL = ("edges", "decode_sees_shallow_vision", "calibrated", "note", "probe")
_PROBE_FIELDS = (
    ("first", "cosine", "contribution"),
    ("strict", "exit_cosine", "exit_layers", "consecutive", "buckets"),
)


def nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    """' Did you mean ...?' for the known word closest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


# --- checks, from the whole to its parts ---------------------------------------------------------


def _check_plan(plan: StagePlan) -> None:
    if not isinstance(plan.name, str) or not _NAME.fullmatch(plan.name):
        # The name becomes part of a directory's name.
        wanted = f"1 to {MAX_NAME} letters, digits or any of . _ + -"
        _refuse("name", plan.name, wanted, "Rename the plan.")
    if not isinstance(plan.note, str) or not (plan.note.isprintable() and len(plan.note) <= 500):
        _refuse("note", plan.note, "one printable line of up to 500 characters", "Shorten it.")
    for field in ("decode_sees_shallow_vision", "calibrated"):
        if not isinstance(getattr(plan, field), bool):
            _refuse(field, getattr(plan, field), "true or false", "Write one of them.")
    for field in ("layers", "visual_tokens"):
        if not _is_int(getattr(plan, field)) or getattr(plan, field) < 1:
            _refuse(field, getattr(plan, field), "a positive integer", "Take it from the model.")
    if not _is_tuple_of(plan.stages, Stage) or not plan.stages:
        _refuse("stages", plan.stages, "one stage or more", "The dense plan has exactly one.")
    if not _is_tuple_of(plan.edges, Edge) or len(plan.edges) != len(plan.stages) - 1:
        found = _Words(f"{len(plan.edges)} edges") if isinstance(plan.edges, tuple) else plan.edges
        wanted = f"{len(plan.stages) - 1}, one between each two stages"
        _refuse("edges", found, wanted, "Add or remove an edge.")
    start = 0
    for i, stage in enumerate(plan.stages):
        _check_stage(f"stages[{i}]", stage, start, first=i == 0)
        start = stage.layers[1]
    if start != plan.layers:
        field, last = f"stages[{len(plan.stages) - 1}].layers", plan.stages[-1].layers
        fix = f"Write [{last[0]}, {plan.layers}]."
        _refuse(field, list(last), f"the last stage to stop at layers={plan.layers}", fix)
    if plan.stages[0].visual_tokens != plan.visual_tokens:
        _refuse(
            "stages[0].visual_tokens",
            plan.stages[0].visual_tokens,
            f"all visual_tokens={plan.visual_tokens} of an image",
            "Pruning before the decoder and late injection are not supported yet.",
        )
    for i, edge in enumerate(plan.edges):
        _check_edge(i, edge, plan.stages[i], plan.stages[i + 1])
    _check_probe(plan)


def _check_stage(at: str, stage: Stage, start: int, first: bool) -> None:
    layers = stage.layers
    if not (isinstance(layers, tuple) and len(layers) == 2 and all(map(_is_int, layers))):
        _refuse(f"{at}.layers", layers, "[start, stop]", f"Start at layer {start}.")
    if layers[0] != start or layers[1] <= start:
        wanted = f"[{start}, stop] with stop > {start}, no gap and no overlap"
        _refuse(f"{at}.layers", list(layers), wanted, f"Start at layer {start}.")
    if not _is_int(stage.visual_tokens) or stage.visual_tokens < 0:
        _refuse(f"{at}.visual_tokens", stage.visual_tokens, "an integer >= 0", "0 means none.")
    if not isinstance(stage.modes, tuple) or len(stage.modes) != stage.depth:
        found = (
            _Words(f"{len(stage.modes)} modes") if isinstance(stage.modes, tuple) else stage.modes
        )
        wanted = f"{stage.depth}, one for each of layers {layers[0]} to {layers[1] - 1}"
        _refuse(f"{at}.modes", found, wanted, "Add or remove modes.")
    for i, mode in enumerate(stage.modes):
        _check_word(f"{at}.modes[{i}]", mode, MODES, LATER_MODES)
        if mode != "dense" and not first:
            # One call carries visual and text rows together there, and a gate cannot tell them
            # apart: it holds for a call. With 0 visual tokens there is nothing to gate at all.
            fix = "Write dense; the text-blind layers come before the first edge."
            _refuse(f"{at}.modes[{i}]", mode, "dense in every stage after the first", fix)
    _check_word(f"{at}.norm", stage.norm, NORMS)
    if stage.norm == "renorm" and not stage.gated_layers:
        _refuse(f"{at}.norm", "renorm", "gated", "No layer of this stage masks anything.")
    if stage.norm == "renorm" and "sink" in stage.modes:
        # Masked before the softmax, no mass is removed that a sink could take.
        field = f"{at}.modes[{stage.modes.index('sink')}]"
        _refuse(field, "sink", "no sink where norm is renorm", "Write text_blind_novv.")


def _check_edge(index: int, edge: Edge, before: Stage, after: Stage) -> None:
    at, after_field = f"edges[{index}]", f"stages[{index + 1}].visual_tokens"
    _check_word(f"{at}.op", edge.op, OPS, LATER_OPS)
    if before.visual_tokens == 0:
        _refuse(f"{at}.op", edge.op, "no edge after the vision has left", "Merge the two stages.")
    if edge.op != "select":
        for key in ("score", "keep"):
            if getattr(edge, key) is not None:
                _refuse(f"{at}.{key}", getattr(edge, key), f"none at a {edge.op}", "Remove it.")
        # A prompt whose probe finds nothing takes all its visual tokens along.
        room = 0 if edge.op == "drop" else before.visual_tokens
        if after.visual_tokens != room:
            wanted = f"{room} after the {edge.op} of {at}"
            _refuse(after_field, after.visual_tokens, wanted, f"Write {room}.")
        return
    _check_word(f"{at}.score", edge.score, SCORES)
    limit = min(before.visual_tokens, MAX_KEEP)
    if not _is_int(edge.keep) or not 1 <= edge.keep <= limit:  # type: ignore[operator]
        wanted = f"1 to {limit}: what the stage before has, and at most {MAX_KEEP}"
        _refuse(f"{at}.keep", edge.keep, wanted, "To keep none, write op: drop.")
    if after.visual_tokens != edge.keep:
        wanted = f"{at}.keep={edge.keep}"
        _refuse(after_field, after.visual_tokens, wanted, f"Write {edge.keep}.")
    if before.modes[-1] != "dense":
        # The last text row attends to no visual token there, so every score would be zero.
        field = f"stages[{index}].modes[{before.depth - 1}]"
        wanted = f"dense: {at} scores the visual tokens in this layer, and text must see them"
        _refuse(field, before.modes[-1], wanted, "Move the edge behind a dense layer.")


def _check_probe(plan: StagePlan) -> None:
    """The numbers of ``plan.probe``, and that edges and probe belong together."""
    probe = plan.probe
    for i, edge in enumerate(plan.edges):
        if probe is None and edge.op == "probe":
            fix = "Add probe: with first, cosine and contribution, or write select or drop."
            _refuse(f"edges[{i}].op", "probe", "select or drop in a plan without a probe", fix)
        if probe is not None and edge.op != "probe":
            fix = "Write op: probe, or remove the probe."
            _refuse(f"edges[{i}].op", edge.op, "probe, as the plan decides per prompt", fix)
    if probe is None:
        return
    if not isinstance(probe, Probe):
        _refuse("probe", probe, "the numbers of a probe", "Write first, cosine and contribution.")
    if not plan.edges:
        found = _Words("one")
        _refuse("probe", found, "none in a plan without edges", "Add an edge, or remove it.")
    blind = max(plan.stages[0].gated_layers, default=-1) + 1
    stop = plan.stages[0].layers[1]
    if not _is_int(probe.first) or not blind <= probe.first < stop:
        wanted = f"{blind} to {stop - 1}: a layer of the first stage from which on all are dense"
        _refuse("probe.first", probe.first, wanted, "Move it, or the first edge.")
    for name, low, high in (
        ("cosine", -1.0, 1.0),
        ("contribution", 0.0, math.inf),
        ("exit_cosine", -1.0, 1.0),
    ):
        value = getattr(probe, name)
        if value is None and name == "exit_cosine":
            continue
        if not _is_number(value) or not low <= value <= high:
            wanted = f"a number from {low:g} to {high:g}"
            _refuse(f"probe.{name}", value, wanted, "Write one.")
    for name in ("strict", "consecutive"):
        if not isinstance(getattr(probe, name), bool):
            _refuse(f"probe.{name}", getattr(probe, name), "true or false", "Write one of them.")
    if not _is_int(probe.exit_layers) or probe.exit_layers < 1:
        _refuse("probe.exit_layers", probe.exit_layers, "a positive integer", "Write 2.")
    sizes = probe.buckets
    ascending = isinstance(sizes, tuple) and all(map(_is_int, sizes))
    if not ascending or list(sizes) != sorted(set(sizes)) or any(size < 1 for size in sizes):
        _refuse("probe.buckets", sizes, "positive integers, ascending", "Sort them, each once.")
    if sizes and sizes[-1] > plan.visual_tokens:
        wanted = f"at most {plan.visual_tokens}, all that an image has"
        _refuse("probe.buckets", sizes[-1], wanted, f"End with {plan.visual_tokens}.")


# --- small parts ----------------------------------------------------------------------------------


def _refuse(field: str, found: Any, expected: str, fix: str) -> NoReturn:
    raise PlanError(f"{field}: found {_show(found)}, expected {expected}. {fix}")


class _Words(str):
    """A finding in our own words; everything else is quoted, as it may hold terminal escapes."""


def _show(value: Any) -> str:
    try:
        text = str(value) if isinstance(value, _Words) else repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, deep nesting
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _check_word(field: str, word: Any, known: tuple[str, ...], later: tuple[str, ...] = ()) -> None:
    if word in known:
        return
    listing = f"one of {', '.join(known)}"
    if word == "absent":
        _refuse(field, word, listing, "Absent vision is a stage with visual_tokens: 0.")
    if word in later:
        _refuse(field, word, listing, f"{word} is planned, but not supported yet.")
    hint = nearest(word, known) if isinstance(word, str) else ""
    _refuse(field, word, listing, hint.strip() or "Write one of them.")


def _is_int(value: Any) -> bool:
    # Positions and orders are int32 tensors, so nothing that counts tokens may exceed them.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_tuple_of(value: Any, kind: type) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, kind) for item in value)


def _list(value: Any, field: str) -> list:
    if not isinstance(value, list):
        _refuse(field, value, "a list", "Write it as [a, b].")
    return value


def _fields(
    data: Any, at: str, required: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, Any]:
    """``data`` as a dict with known keys only and the required ones present."""
    if not isinstance(data, Mapping):
        _refuse(at, data, "a mapping", f"Its keys are {', '.join(required + optional)}.")
    prefix = "" if at == "plan" else f"{at}."
    for key in data:
        if key not in required + optional:
            hint = nearest(str(key), required + optional) if isinstance(key, str) else ""
            keys = f"one of {', '.join(required + optional)}"
            plain = isinstance(key, str) and key.isprintable() and len(key) <= 80
            field = f"{prefix}{key if plain else _show(key)}"
            _refuse(field, _Words("an unknown key"), keys, hint.strip() or "Remove it.")
    for key in required:
        if key not in data:
            _refuse(f"{prefix}{key}", _Words("nothing"), "a value", f"Add {key}: to the plan.")
    return dict(data)
