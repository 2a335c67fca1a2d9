"""Times of every operator, as ONNX Runtime notes them, by kind and by decoder layer.

Noting takes time itself, so these come from a session of their own; their shares are what matters.
Layers are read off node names (``layers.3/node_add``); what stands outside every layer (masks,
positions, the last norm, the head) is ``other``.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ...graphs.bundle import Bundle
from ...graphs.errors import BundleError
from ...runtime.session import Session
from .fresh_prompts import prompts
from .timing import TimedAnswer, time_questions, until_first_token

OTHER = "other"
ROUNDS = 5
CONTAINER = "If"
"""Its time is that of operators in it, which are noted as well."""

LAYER_NODE = re.compile(r"layers\.(\d+)/")


Table = dict[str, dict[str, float]]
"""Milliseconds by graph, and in it by kind of operator or by decoder layer."""


@dataclass(frozen=True)
class Operators:
    """One phase: ``kinds`` by falling time, ``layers`` in their order, what is in none last."""

    kinds: Table
    layers: Table


@dataclass(frozen=True)
class OperatorTimes:
    """Medians per cold question until its first token, and per later token."""

    prefill: Operators
    decode: Operators


def operator_times(bundle: Bundle, *, tokens: int, **options) -> OperatorTimes:
    """Ask ``bundle`` a few questions with ONNX Runtime's profiler; ``options`` as ``Session``'s.

    Raises:
        BundleError: the profiler's files cannot be read, or do not fit the calls.
    """
    questions = []
    with tempfile.TemporaryDirectory() as folder:
        with Session(bundle, profile=Path(folder), **options) as session:
            source = prompts(seed=1)
            for _ in range(1 + ROUNDS):  # the first warms up
                questions.append(time_questions(session, next(source), tokens))
            files = session.executor.end_profiles()
        runs = {name: list(_runs(file)) for name, file in files.items()}
    return _attributed(questions, runs)


Run = Sequence[tuple[str, str, float]]
"""(node name, kind, ms) of every operator of one run of a graph."""

Noted = tuple[str, str, str, float]
"""The same with the graph's name in front."""


def _runs(file: Path) -> Iterator[Run]:
    """The runs of one graph, in order."""
    try:
        events = json.loads(file.read_text(encoding="utf-8"))
        nodes = sorted(
            (e["ts"], e["name"].removesuffix("_kernel_time"), e["args"]["op_name"], e["dur"])
            for e in events
            if e.get("cat") == "Node"
            and e["name"].endswith("_kernel_time")
            and e["args"]["op_name"] != CONTAINER
        )
        spans = sorted(
            (e["ts"], e["ts"] + e["dur"])
            for e in events
            if e.get("cat") == "Session" and e["name"] == "model_run"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{file.name}, which ONNX Runtime's profiler wrote, cannot be read ({error}). "
            "Profile without it: --no-operators"
        ) from error
    at = 0
    for start, stop in spans:
        while at < len(nodes) and nodes[at][0] < start:
            at += 1
        run = []
        while at < len(nodes) and nodes[at][0] <= stop:
            run.append((nodes[at][1], nodes[at][2], nodes[at][3] / 1e3))
            at += 1
        yield run


def _attributed(
    questions: Sequence[tuple[TimedAnswer, TimedAnswer]],
    runs: dict[str, list[Run]],
) -> OperatorTimes:
    """Give every run of every graph to the call that it belongs to."""
    phases: tuple[list[list[Noted]], list[list[Noted]]] = ([], [])
    seen: dict[str, int] = defaultdict(int)
    for pair in questions:
        for question in pair:
            first = len(until_first_token(question))
            noted: tuple[list[Noted], list[Noted]] = ([], [])
            for index, event in enumerate(question.events):
                for graph in _graphs(event.call.graph, runs):
                    if seen[graph] == len(runs[graph]):
                        raise BundleError(
                            f"ONNX Runtime's profiler noted {len(runs[graph])} runs of graph "
                            f"'{graph}', fewer than took place. Ask for fewer tokens: --tokens 8"
                        )
                    run = runs[graph][seen[graph]]
                    seen[graph] += 1
                    noted[index >= first].extend((graph, *operator) for operator in run)
            if question is pair[0]:
                phases[0].append(noted[0])
                phases[1].append([(g, n, k, ms / question.later) for g, n, k, ms in noted[1]])
    return OperatorTimes(*(_summed(quantises[1:]) for quantises in phases))


def _graphs(name: str, runs: dict[str, Any]) -> list[str]:
    """The graphs that one call runs: a stage in parts has several."""
    return [graph for graph in runs if graph.split(".")[0] == name]


def _summed(quantises: Sequence[Sequence[Noted]]) -> Operators:
    """Medians over the rounds of what each kind and each layer took."""
    tables: tuple[dict, dict] = ({}, {})
    for number, round_ in enumerate(quantises):
        for graph, node, kind, ms in round_:
            layer = LAYER_NODE.search(node)
            for table, key in zip(tables, (kind, layer[1] if layer else OTHER), strict=True):
                row = table.setdefault(graph, {}).setdefault(key, [0.0] * len(quantises))
                row[number] += ms
    kinds, layers = (
        {graph: {key: median(times) for key, times in row.items()} for graph, row in one.items()}
        for one in tables
    )
    return Operators(
        {g: dict(sorted(row.items(), key=lambda item: -item[1])) for g, row in kinds.items()},
        {g: dict(sorted(row.items(), key=_in_order)) for g, row in layers.items()},
    )


def _in_order(item: tuple[str, float]) -> float:
    return math.inf if item[0] == OTHER else int(item[0])
