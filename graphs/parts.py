"""The graphs of a bundle: their names, and which layers of a stage each holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from .plan.plan import StagePlan
from .text_config import TextConfig

VISION = "vision"
"""Name of the graph of encoder and projector, or of the encoder alone where a projection follows
the choice of rows."""

PROJECT = "project"
"""Name of the graph that projects the rows that a plan's entry chose."""

ENTRY = "entry"
"""Name of the time that the entry's selector takes on the host, among those of graphs."""

PROBE = "probe"
"""Name of the graph that reads a layer in plans that decide per prompt."""

SERVE = "serve"
"""Name, before a stage's number, of the graph of visual rows that none of its layers changes."""

STEP = "step"
"""Name, before a stage's number, of the graph of its calls of one row, where those have weights of
their own (``Quantization.decode``)."""

OF_LAYERS = ("stage", SERVE, STEP)
"""Beginnings of the names of graphs that run whole layers."""


@dataclass(frozen=True)
class StagePart:
    """Consecutive layers of one stage that make one graph: the whole stage, unless memory for
    compiling it is short.
    """

    stage: int
    layers: tuple[int, int]  # first, one past the last

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.layers[1] - self.layers[0]

    def ends(self, plan: StagePlan) -> bool:
        """Return whether the stage ends with it."""
        return self.layers[1] == plan.stages[self.stage].layers[1]

    def gated_layers(self, plan: StagePlan) -> tuple[int, ...]:
        """Return the layers of this part that read values through gates."""
        return self._own(plan.stages[self.stage].gated_layers)

    def gained_layers(self, plan: StagePlan) -> tuple[int, ...]:
        """Return the layers of this part whose updates of rows have gains."""
        return self._own(plan.stages[self.stage].gained_layers)

    def attention_layers(self, plan: StagePlan) -> tuple[int, ...]:
        """Return the layers of this part that attend, and so have a cache."""
        return self._own(plan.stages[self.stage].attention_layers)

    def _own(self, layers: Sequence[int]) -> tuple[int, ...]:
        return tuple(layer for layer in layers if self.layers[0] <= layer < self.layers[1])

    def serves(self, plan: StagePlan) -> bool:
        """Return whether visual rows have a graph of their own here (``Stage.serves``)."""
        return plan.stages[self.stage].serves

    def injected_layers(self, text: TextConfig) -> tuple[int, ...]:
        """Return the layers of this part at whose input features are added to visual rows."""
        return tuple(layer for layer in text.inject if layer in range(*self.layers))


def whole_stages(plan: StagePlan) -> list[StagePart]:
    """Return one part for every stage."""
    return [StagePart(index, stage.layers) for index, stage in enumerate(plan.stages)]


def part_names(parts: Sequence[StagePart]) -> list[str]:
    """Return the graphs' names: ``stage1``, or ``stage1.part0``, ``stage1.part1``, and so on."""
    names = []
    for stage in dict.fromkeys(part.stage for part in parts):
        count = sum(part.stage == stage for part in parts)
        name = f"stage{stage}"
        names += [name] if count == 1 else [f"{name}.part{number}" for number in range(count)]
    return names


def serving_name(stage: str) -> str:
    """Return the name of the graph that serves visual rows beside a graph of a stage."""
    return stage.replace("stage", SERVE)


def step_name(stage: str) -> str:
    """Return the name of the graph for one row beside a graph of a stage."""
    return stage.replace("stage", STEP)


def serves_alone(graph: str) -> bool:
    """Return whether a graph's rows serve keys and values alone (``contract.serve_spec``)."""
    return graph.startswith(SERVE)


def stage_of(graph: str) -> int:
    """Return the stage that a graph belongs to: 1 for ``stage1.part0``, ``serve1`` and ``select1``.

    The probe reads any stage; where it runs, all have the same slots, so the first is returned.
    """
    if graph == PROBE:
        return 0
    return int(graph.split(".")[0].lstrip(ascii_lowercase))


def stage_parts(plan: StagePlan, stage: int, counts: Sequence[int]) -> list[StagePart]:
    """Return the parts of a stage that hold so many layers with attention each, in turn.

    Each part but the first begins with such a layer, so that what it holds follows from counts.
    """
    facts, parts = plan.stages[stage], []
    starts = (facts.layers[0], *facts.attention_layers[1:], facts.layers[1])
    at = 0
    for count in counts:
        parts.append(StagePart(stage, (starts[at], starts[at + count])))
        at += count
    return parts


def probed(plan: StagePlan, index: int) -> bool:
    """Return whether stage ``index`` ends in a selection."""
    return index < len(plan.edges) and plan.edges[index].op == "select"
