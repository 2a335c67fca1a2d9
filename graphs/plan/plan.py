"""A stage plan: which decoder layers see how many visual tokens, and how. Frozen, checked data.

    layers [0, 19): 576 visual tokens -- select 64 --> [19, 28): 64 -- drop --> [28, 32): 0

It knows nothing about weights, files or devices; ``compile/planfile.py`` reads and writes YAML,
``plan_checks.py`` says what is wrong with a plan.

Source: docs/design.md, "The plan".
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from .plan_checks import check_plan
from .plan_fields import fields_of, is_int, list_of, reject_field
from .stages import Edge, Probe, Stage

PLAN_VERSION = 1
"""Version of the dict form. Readers refuse others."""

_PLAN_REQUIRED = ("version", "name", "layers", "visual_tokens", "stages")
_PLAN_OPTIONAL = ("edges", "decode_sees_shallow_vision", "calibrated", "note", "probe")
_PROBE_FIELDS = (
    ("first", "cosine", "contribution"),
    ("strict", "exit_cosine", "exit_layers", "consecutive", "buckets"),
)


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
        check_plan(self)

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
            "version": PLAN_VERSION,
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
        fields = fields_of(data, "plan", _PLAN_REQUIRED, _PLAN_OPTIONAL)
        version = fields.pop("version")
        if not is_int(version) or version != PLAN_VERSION:
            reject_field(
                "version", version, str(PLAN_VERSION), "The file is from another visistage."
            )
        stages = [
            fields_of(item, f"stages[{i}]", ("layers", "visual_tokens", "modes"), ("norm",))
            for i, item in enumerate(list_of(fields["stages"], "stages"))
        ]
        edges = [
            fields_of(item, f"edges[{i}]", ("op",), ("score", "keep"))
            for i, item in enumerate(list_of(fields.get("edges", []), "edges"))
        ]
        for i, stage in enumerate(stages):
            for key in ("layers", "modes"):
                stage[key] = tuple(list_of(stage[key], f"stages[{i}].{key}"))
        fields["stages"] = tuple(Stage(**stage) for stage in stages)
        fields["edges"] = tuple(Edge(**edge) for edge in edges)
        if "probe" in fields:
            probe = fields_of(fields["probe"], "probe", *_PROBE_FIELDS)
            probe["buckets"] = tuple(list_of(probe.get("buckets", []), "probe.buckets"))
            fields["probe"] = Probe(**probe)
        return cls(**fields)
