"""Times of every operator, as ONNX Runtime notes them, by kind and by decoder layer.

Noting takes time itself, so these come from a session of their own; their shares are what matters.
Layers are read off node names (``layers.3/node_add``); what is outside every layer (masks,
positions, the last norm, the head) is ``other``.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from ...graphs.bundle import Bundle
from ...graphs.errors import BundleError
from ...runtime.session import Session
from .timing import TimedAnswer, prompts, time_questions

OTHER = "other"
QUESTIONS = 5
CONTAINER = "If"
"""Its time is that of operators in it, which are noted as well."""

LAYER_NODE = re.compile(r"layers\.(\d+)/")

Table = dict[str, dict[str, float]]
"""Milliseconds by graph, and in it by kind of operator or by decoder layer."""

NotedOperator = tuple[str, str, float]
"""(node name, kind, ms)."""

Times = defaultdict[tuple[str, str, str], float]
"""Milliseconds of one question by ("kinds" or "layers", graph, name)."""


def operator_times(bundle: Bundle, *, tokens: int, **options) -> dict[str, dict[str, Table]]:
    """Ask ``bundle`` a few questions with ONNX Runtime's profiler; ``options`` as ``Session``'s.

    Returns:
        Medians per cold question until its first token (``prefill``) and per later token
        (``decode``): ``kinds`` by falling time, ``layers`` in their order, what is in none last.

    Raises:
        BundleError: the profiler's files cannot be read, or do not fit the calls.
    """
    questions = []
    with tempfile.TemporaryDirectory() as folder:
        with Session(bundle, profile=Path(folder), **options) as session:
            source = prompts(seed=1)
            for _ in range(1 + QUESTIONS):  # the first warms up
                questions.append(time_questions(session, next(source), tokens))
            files = session.executor.end_profiles()
        runs = {name: list(_runs(file)) for name, file in files.items()}
    return _attributed(questions, runs)


def _runs(file: Path) -> Iterator[list[NotedOperator]]:
    """Yield the operators of each run of one graph, in order."""
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
    times = [at for at, *_ in nodes]
    for start, stop in spans:
        inside = nodes[bisect_left(times, start) : bisect_right(times, stop)]
        yield [(name, kind, duration / 1e3) for _, name, kind, duration in inside]


def _attributed(
    questions: Sequence[tuple[TimedAnswer, TimedAnswer]],
    runs: Mapping[str, Sequence[list[NotedOperator]]],
) -> dict[str, dict[str, Table]]:
    """Give every run of every graph to the call that it belongs to."""
    left = {graph: iter(own) for graph, own in runs.items()}
    prefill: list[Times] = [defaultdict(float) for _ in questions]
    decode: list[Times] = [defaultdict(float) for _ in questions]
    for number, (cold, again) in enumerate(questions):
        for answer in (cold, again):
            for index, event in enumerate(answer.events):
                later = index >= len(answer.prefill)
                for graph in left:
                    if graph.split(".")[0] != event.call.graph:
                        continue  # a stage in parts has several graphs
                    run = next(left[graph], None)
                    if run is None:
                        raise BundleError(
                            f"ONNX Runtime's profiler noted {len(runs[graph])} runs of graph "
                            f"'{graph}', fewer than took place. Ask for fewer tokens: --tokens 8"
                        )
                    times = (decode if later else prefill)[number]
                    for node, kind, ms in run if answer is cold else ():
                        layer = LAYER_NODE.search(node)
                        ms /= answer.later if later else 1
                        times["kinds", graph, kind] += ms
                        times["layers", graph, layer[1] if layer else OTHER] += ms
    return {"prefill": _medians(prefill[1:]), "decode": _medians(decode[1:])}


def _medians(questions: Sequence[Times]) -> dict[str, Table]:
    """Return the medians over the questions of what each kind and each layer took."""
    kinds: Table = {}
    layers: Table = {}
    tables = {"kinds": kinds, "layers": layers}
    for key in dict.fromkeys(key for times in questions for key in times):
        what, graph, name = key
        tables[what].setdefault(graph, {})[name] = median(
            times.get(key, 0.0) for times in questions
        )
    for graph in kinds:
        kinds[graph] = dict(sorted(kinds[graph].items(), key=lambda item: -item[1]))
        layers[graph] = dict(sorted(layers[graph].items(), key=_layer_order))
    return tables


def _layer_order(item: tuple[str, float]) -> float:
    return math.inf if item[0] == OTHER else int(item[0])
