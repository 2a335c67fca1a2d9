"""Routed depth: routers of a layer say which rows run its attention and its MLP. Pure data.

A router reads the raw rows that enter a layer, and gives each of them a gate: what the sublayer
adds to the row is multiplied by it. Keys and values are cached for every row, whatever its gate.
What a router computes is in the module of its kind in ``graphs/modules/routers``.

Source: docs/methods.md, "Routed depth".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args

from ..errors import PlanError
from ..fields import check_word, is_number, reject

RoutingForm = Literal["exact", "capacity"]
"""``exact``: every row runs, and gates multiply; ``capacity``: a fixed share of a call's rows,
those of the best scores and the last one, are gathered, run by their gates, and put back."""

FORMS: tuple[str, ...] = get_args(RoutingForm)

FINEST = 1000
"""Largest denominator of a share in a graph, which counts in integers."""


@dataclass(frozen=True)
class RouterKind:
    """One kind of router: a row of ``ROUTERS``.

    Attributes:
        name: as plans write it.
        summary: what it decides, in a line.
        gates: modules of a layer, by the released names, that gate its attention and its MLP; the
            same one twice gates both.
        module: file of ``graphs/modules/routers``.
        whole_prompt: True if it compares all rows of a prompt, which must then come in one call.
        inner: True if the first and the last layer have no routers.
    """

    name: str
    summary: str
    gates: tuple[str, str]
    module: str
    whole_prompt: bool = False
    inner: bool = False


ROUTERS: dict[str, RouterKind] = {
    kind.name: kind
    for kind in (
        RouterKind(
            "skipgpt",
            "SkipGPT: each row runs attention, MLP, both or none; routers with a hidden layer",
            ("router_attention", "router_mlp"),
            "hidden",
        ),
        RouterKind(
            "skipgpt-lrm",
            "SkipGPT as LRM-Pruning has it: routers of one linear layer",
            ("router_attention", "router_mlp"),
            "linear",
        ),
        RouterKind(
            "dllm",
            "D-LLM: each row runs a whole layer or skips it",
            ("router_block", "router_block"),
            "linear",
        ),
        RouterKind(
            "mod",
            "MoD: of a prompt's rows a share runs each sublayer, scaled by its router",
            ("router", "router_mlp"),
            "threshold",
            whole_prompt=True,
            inner=True,
        ),
    )
}


_MODULES = "|".join(sorted({gate for kind in ROUTERS.values() for gate in kind.gates}))
_ROUTER = re.compile(rf"model\.layers\.(\d+)\.({_MODULES})\.")


def is_router(name: str) -> bool:
    """Return whether a tensor of this name, the checkpoint's, is a router's of any kind."""
    return _ROUTER.match(name) is not None


@dataclass(frozen=True)
class Routing:
    """The routers of a plan; the plan that it is in has it checked."""

    kind: str  # a name of ``ROUTERS``
    form: RoutingForm = "exact"
    # Of the capacity form: the rows of a call that run. MoD's is what its sparsity leaves.
    share: float | None = field(default=None, metadata={"omit": True})
    # Of routers that compare rows: the part of a prompt's rows that skips.
    sparsity: float | None = field(default=None, metadata={"omit": True})

    @property
    def router(self) -> RouterKind:
        """The row of ``ROUTERS``."""
        return ROUTERS[self.kind]

    @property
    def gathers(self) -> bool:
        """True if only some rows of a call run."""
        return self.form == "capacity"

    @property
    def competes(self) -> bool:
        """True if a row's gate depends on the other rows of its call."""
        return self.gathers or self.router.whole_prompt

    @property
    def fraction(self) -> Fraction:
        """Share of a call's rows that the capacity form gathers, as graphs count it."""
        share = 1 - self.sparsity if self.sparsity is not None else self.share
        assert share is not None
        return Fraction(share).limit_denominator(FINEST)

    def gathered(self, rows: int) -> int:
        """Return how many of so many rows the capacity form gathers."""
        return math.ceil(self.fraction * rows)

    def allowed(self, rows: int) -> int:
        """Return how many of so many rows may run, by which routers that compare rows decide.

        With a sparsity that is k of MoD, in the very arithmetic of its authors: for some sparsities
        a product such as 0.1 x 10 is below the whole number.
        """
        if self.sparsity is None:
            return self.gathered(rows)
        return max(1, int((1 - self.sparsity) * rows))

    def routes(self, layer: int, layers: int) -> bool:
        """Return whether ``layer`` of a decoder of so many has routers."""
        return not self.router.inner or 0 < layer < layers - 1

    @property
    def summary(self) -> str:
        """Its effect, in words."""
        skip = f", {100 * self.sparsity:g} % of the rows skip" if self.sparsity is not None else ""
        if not self.gathers:
            return f"routers: {self.router.name}{skip}, every row is computed and gates multiply"
        share = 100 * float(self.fraction)
        return f"routers: {self.router.name}{skip}, at most {share:g} % of a call's rows run"


def check_routing(routing: Routing) -> None:
    """Refuse fields of a routing that contradict each other. Raises PlanError."""
    if not isinstance(routing, Routing):
        reject("routing", routing, "a kind of routers", PlanError, "Write kind: skipgpt.")
    check_word("routing.kind", routing.kind, tuple(ROUTERS), PlanError, "Write one of them.")
    check_word("routing.form", routing.form, FORMS, PlanError, "Write one of them.")
    compares = routing.router.whole_prompt
    for name, wanted, reason in (
        ("share", routing.gathers and not compares, "in the capacity form of routers that read "
         "one row each, and there alone"),
        ("sparsity", compares, "for routers that compare rows, and for those alone"),
    ):  # fmt: skip
        value = getattr(routing, name)
        if (value is not None) != wanted:
            reject(f"routing.{name}", value, f"one {reason}", PlanError, "Add or remove it.")
        if wanted and not (is_number(value) and 0 <= value <= 1):
            expected = "a number from 0 to 1"
            reject(f"routing.{name}", value, expected, PlanError, "Write a share of the rows.")
    if routing.gathers and not routing.fraction:
        name = "sparsity" if compares else "share"
        expected = f"a share of at least 1 in {FINEST} that runs"
        reject(f"routing.{name}", getattr(routing, name), expected, PlanError, "Let more run.")
