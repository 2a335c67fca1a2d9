"""A profile as one HTML file: a timeline, time against visual tokens, and the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...graphs.parts import OF_LAYERS, PROJECT, VISION, stage_of
from ...pages.chart import Axis, Chart, of_decades
from ...pages.page import render_page
from .machine import machine_line
from .profile_facts import label, row_names

TEMPLATE_FOLDER = Path(__file__).parent
RUN_COLOURS = {"plan": "warm", "against": "cool"}
SLOWEST = 6
"""Kinds of operators that are shown by name; the others are summed."""


def render_profile(facts: dict[str, Any]) -> str:
    """Return the page's HTML; ``facts`` as ``profile`` returns them."""
    runs = facts["runs"]
    longest = max(run["timeline"]["total_ms"] for run in runs.values())
    shown = {
        "facts": facts,
        "plan": runs["plan"],
        "against": runs.get("against"),
        "machine": machine_line(facts["machine"]),
        "rows": [(name, label(name)) for name in row_names(runs)],
        "lanes": {name: lane(run["timeline"], longest) for name, run in runs.items()},
        "ticks": ticks(longest),
        "longest": longest,
        "sweep": sweep_chart(runs),
        "roof": roof_chart(facts) if facts["peaks"] else "",
        "layers": layer_chart(runs["plan"]) if runs["plan"]["operators"] else "",
        "kinds": kind_rows(runs["plan"]) if runs["plan"]["operators"] else [],
    }
    return render_page(TEMPLATE_FOLDER, shown, charts=True, number=show_ms)


def lane(timeline: dict[str, Any], longest: float) -> list[dict[str, Any]]:
    """Return one answer as blocks: left and width in per cent of the longest answer."""
    start = timeline["events"][0]["start_ms"] if timeline["events"] else 0.0
    before = {"graph": "preprocess", "rows": 0, "slots": 0, "start_ms": 0.0}
    blocks = [{**before, "ms": min(timeline["preprocess_ms"], start)}, *timeline["events"]]
    return [
        {
            **block,
            "left": 100 * block["start_ms"] / longest,
            "width": 100 * block["ms"] / longest,
            "kind": _kind(block["graph"]),
            "later": block["start_ms"] >= timeline["first_token_ms"],
        }
        for block in blocks
    ]


def ticks(longest: float) -> list[dict[str, float]]:
    """Return round times along an axis from 0 to ``longest``, and their places in per cent."""
    step = round_step(longest)
    count = math.floor(longest / step) + 1
    return [{"ms": n * step, "left": 100 * n * step / longest} for n in range(count)]


def round_step(most: float) -> float:
    """Return 1, 2 or 5 times a power of ten, so that up to six steps reach ``most``."""
    power = 10 ** math.floor(math.log10(most / 6)) if most > 0 else 1.0
    return next(s * power for s in (1, 2, 5, 10, 20) if most / (s * power) <= 6)


def sweep_chart(runs: dict[str, Any]) -> str:
    """Draw the decoder's prefill in ms against visual tokens; dashed: the lower bound."""
    points = [point for run in runs.values() for point in run["sweep"]]
    if not points:
        return ""
    x = _from_zero(max(p["visual_tokens"] for p in points), "visual tokens")
    chart = Chart(
        x,
        _from_zero(max(p["p90"] for p in points), "ms"),
        "Time of the decoder's prefill against the number of visual tokens",
    )
    for name, run in runs.items():
        own = sorted(run["sweep"], key=lambda p: p["visual_tokens"])
        chart.line([(p["visual_tokens"], p["median"]) for p in own], RUN_COLOURS[name])
        if own[0]["floor_ms"] is not None:
            lower_bound = [(p["visual_tokens"], p["floor_ms"]) for p in own]
            chart.line(
                lower_bound, f"{RUN_COLOURS[name]} dashed thin", f"{run['plan']}: lower bound"
            )
        for p in own:
            chart.whisker(p["visual_tokens"], p["least"], p["p90"], f"{RUN_COLOURS[name]} thin")
            title = f"{run['plan']}: {p['visual_tokens']} visual tokens, {p['median']:.1f} ms"
            chart.dot(p["visual_tokens"], p["median"], RUN_COLOURS[name], title)
    return chart.svg()


def roof_chart(facts: dict[str, Any]) -> str:
    """Draw every graph under the roof: operations a second against operations a byte."""
    peaks = facts["peaks"]
    parts = [
        (name, phase, part)
        for name, run in facts["runs"].items()
        if run["roofline"]
        for phase in ("prefill", "token")
        for part in run["roofline"][phase]
        if part["measured_ms"] and part["flops"] and part["nbytes"]
    ]
    ridge = peaks["flops"] / peaks["bandwidth"]
    intensities = [part["flops"] / part["nbytes"] for *_, part in parts] + [ridge / 4, ridge * 4]
    rates = [part["flops"] / part["measured_ms"] / 1e6 for *_, part in parts]
    x = of_decades(intensities, "FLOPs for each byte")
    y = of_decades([*rates, peaks["flops"] / 1e9], "GFLOP/s")
    chart = Chart(x, y, "Operations a second against operations a byte, below what is possible")
    slope = [(x.low, x.low * peaks["bandwidth"] / 1e9), (ridge, peaks["flops"] / 1e9)]
    if slope[0][1] < y.low:  # where the memory's line enters the plot
        slope[0] = (y.low * 1e9 / peaks["bandwidth"], y.low)
    chart.line([*slope, (x.high, peaks["flops"] / 1e9)], "ink", "what this machine can do")
    for name, phase, part in parts:
        when = "first token" if phase == "prefill" else "later token"
        rate = part["flops"] / part["measured_ms"] / 1e6
        title = (
            f"{part['graph']}, {when}, {facts['runs'][name]['plan']}: {rate:.3g} GFLOP/s, "
            f"{100 * part['share']:.0f} % of the roofline"
        )
        manner = "" if phase == "prefill" else " open"
        chart.dot(
            part["flops"] / part["nbytes"], rate, f"{RUN_COLOURS[name]}{manner}", title, radius=5
        )
        chart.name(part["flops"] / part["nbytes"], rate, part["graph"])
    return chart.svg()


def layer_chart(run: dict[str, Any]) -> str:
    """Draw the milliseconds of every decoder layer on the way to the first token."""
    times: dict[int, float] = {}
    for graph, row in run["operators"]["prefill"]["layers"].items():
        if graph.startswith(OF_LAYERS):
            for layer, ms in ((int(key), ms) for key, ms in row.items() if key.isdecimal()):
                times[layer] = times.get(layer, 0.0) + ms
    if not times:
        return ""
    last = max(times)
    step = 1 if last < 16 else 4
    x = Axis(
        -0.5, last + 0.5, tuple((n, str(n)) for n in range(0, last + 1, step)), "decoder layer"
    )
    chart = Chart(x, _from_zero(max(times.values()), "ms"), "Time of every decoder layer")
    for layer, ms in sorted(times.items()):
        chart.bar(layer - 0.36, layer + 0.36, ms, "warm", f"layer {layer}: {ms:.2f} ms")
    return chart.svg()


def kind_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """List the slowest kinds of operators of each graph with their shares."""
    rows = []
    for phase, when in (("prefill", "first token"), ("decode", "later token")):
        for graph, kinds in run["operators"][phase]["kinds"].items():
            whole = sum(kinds.values())
            if not whole:
                continue
            named = [(kind, ms / whole) for kind, ms in list(kinds.items())[:SLOWEST]]
            rest = 1 - sum(share for _, share in named)
            if len(kinds) > SLOWEST:
                named.append((f"{len(kinds) - SLOWEST} others", rest))
            rows.append({"graph": graph, "when": when, "ms": whole, "kinds": named})
    return rows


def show_ms(value: float | None) -> str:
    """Return milliseconds for a table: three digits that count."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _from_zero(most: float, title: str) -> Axis:
    step = round_step(most)
    last = math.ceil(most / step)
    marks: Sequence[int] = range(last + 1)
    return Axis(0.0, last * step, tuple((n * step, f"{n * step:g}") for n in marks), title)


def _kind(graph: str) -> str:
    """Return the colour of a block: by what it is, stages by their number."""
    if graph in ("preprocess", VISION):
        return graph
    if graph == PROJECT:
        return VISION
    if graph.startswith(OF_LAYERS):
        return f"stage{min(stage_of(graph), 3)}"
    return "select"
