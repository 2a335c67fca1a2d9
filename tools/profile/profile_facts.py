"""Measurements as plain data: what ``--json`` prints, and tables and page are made from; labels."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ...graphs.bundle import Bundle
from ...graphs.parts import ENTRY, PROJECT, VISION
from .peak_memory import Footprint
from .power import Meter
from .roofline import Peaks, parts_of, works_of
from .sweep import SweepPoint
from .timing import FIRST_TOKEN, Spread, TimedAnswer, TimedSeries, image_layout

IMPOSSIBLE_SHARE = 1.1
"""Share of the roofline above which it cannot be right: a busy machine looked slower than it is."""


def run_facts(
    bundle: Bundle,
    series: TimedSeries,
    memory: Footprint,
    points: list[SweepPoint],
    peaks: Peaks | None,
    meter: Meter,
) -> dict[str, Any]:
    """Return what is known of one bundle, but for its operators."""
    manifest = bundle.manifest
    spreads = series.spreads()
    cold, _, step = series.calls()
    medians = {name: one.median for name, one in spreads["cold"].items()}
    steps = {n.removeprefix("step."): ms for n, ms in medians.items() if n.startswith("step.")}
    return {
        "name": bundle.path.resolve().name,
        "model": manifest.model,
        "plan": manifest.plan.name,
        "precision": manifest.precision,
        "target": manifest.target,
        "visual_tokens": image_layout(manifest.config).rows,
        "memory": asdict(memory),
        "cold": {name: asdict(one) for name, one in spreads["cold"].items()},
        "again": {name: asdict(one) for name, one in spreads["again"].items()},
        "timeline": _timeline(_typical(series.cold)),
        "sweep": [
            {
                "visual_tokens": p.visual_tokens,
                **asdict(p.ms),
                "floor_ms": peaks and sum(map(peaks.lower_bound_ms, works_of(manifest, p.calls))),
            }
            for p in points
        ],
        "roofline": peaks
        and {
            "prefill": parts_of(manifest, cold, medians, peaks),
            "token": parts_of(manifest, step, steps, peaks),
        },
        "energy": _energy(series.cold, meter),
    }


def _typical(questions: list[TimedAnswer]) -> TimedAnswer:
    """Return the answer whose time to the first token is nearest to the median."""
    middle = Spread.of([answer.first_token for answer in questions]).median
    return min(questions, key=lambda answer: abs(answer.first_token - middle))


def _timeline(answer: TimedAnswer) -> dict[str, Any]:
    """Return one answer's calls, in ms since it was asked."""
    return {
        "events": [
            {
                **asdict(event.call),
                "start_ms": (event.start - answer.start) * 1e3,
                "ms": event.ms,
            }
            for event in answer.events
        ],
        "preprocess_ms": answer.preprocess,
        "first_token_ms": answer.first_token,
        "total_ms": answer.total,
    }


def _energy(questions: list[TimedAnswer], meter: Meter) -> dict[str, Any] | None:
    """Return the joules of an answer and of a token; None where they are not known."""
    joules = [meter.joules(answer.start, answer.stop) for answer in questions]
    known = [energy for energy in joules if energy is not None]
    if not known:
        return None
    spread = Spread.of(known)
    return {
        "answer_joules": asdict(spread),
        "token_joules": spread.median / (questions[0].later + 1),
    }


def power_facts(meter: Meter) -> dict[str, Any]:
    """Return where power was read, and its rails; or why nothing was."""
    if meter.source is None or not meter.samples:
        return {"source": None, "reason": meter.reason}
    reason = meter.reason
    rails = meter.rails_mw()
    if not rails:
        reason = f"{meter.source.name} shows no power rail"
    return {
        "source": meter.source.name,
        "reason": reason,
        "samples": len(meter.samples),
        "interval_ms": meter.interval * 1e3,
        "rails_mw": rails,
        "device_memory_bytes": meter.peak_memory_bytes(),
    }


def speed_up(plan: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """Return how much faster the plan is than the baseline, and what the roofline promises.

    ``prefill`` counts the decoder alone: no plan saves anything before it.
    """

    def ratio(kind: str, name: str) -> float:
        return against[kind][name]["median"] / plan[kind][name]["median"]

    out = {
        "first_token": ratio("cold", "first_token"),
        "second_question": ratio("again", "first_token"),
        "per_token": ratio("cold", "per_token"),
    }
    if plan["roofline"] and against["roofline"]:  # not between precisions

        def decoder(run: dict[str, Any], field: str) -> float:
            return sum(p[field] for p in run["roofline"]["prefill"] if p["graph"] != VISION)

        measured = decoder(against, "measured_ms") / decoder(plan, "measured_ms")
        promised = decoder(against, "floor_ms") / decoder(plan, "floor_ms")
        out |= {
            "prefill": measured,
            "prefill_promised": promised,
            "prefill_share": measured / promised,
        }
    return out


def dominant(run: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a cold question's first token that takes most, and its share."""
    cold = run["cold"]
    end = list(cold).index("first_token")
    parts = {name: one["median"] for name, one in list(cold.items())[:end]}
    name = max(parts, key=lambda key: parts[key])
    return {"part": name, "ms": parts[name], "share": parts[name] / cold["first_token"]["median"]}


def above_roofline(runs: dict[str, Any]) -> list[str]:
    """Return graphs that were faster than the roofline allows: then it was measured too low."""
    names = {
        part["graph"]: None
        for run in runs.values()
        for phase in (run["roofline"] or {}).values()
        for part in phase
        if part["share"] > IMPOSSIBLE_SHARE
    }
    return list(names)


ROW_LABELS = {
    "preprocess": "decode and preprocess",
    VISION: "vision encoder and projector",
    ENTRY: "selection at the entry",
    PROJECT: "projector of what enters",
    "host": "between the graphs",
    FIRST_TOKEN: "first token",
    "per_token": "each later token",
    "step.host": "  of it between the graphs",
    "total": "whole answer",
}


def row_names(runs: dict[str, Any]) -> list[str]:
    """Return every quantity of any bundle, in the order of an answer."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run["cold"]))
    order = {"host": 1, FIRST_TOKEN: 2, "per_token": 3, "step.host": 5, "total": 9}
    rank = {name: order.get(name, 4 if name.startswith("step.") else 0) for name in names}
    return sorted(names, key=lambda name: rank[name])


def label(name: str) -> str:
    """Return a quantity in words."""
    if name in ROW_LABELS:
        return ROW_LABELS[name]
    return f"  of it {name.removeprefix('step.')}" if name.startswith("step.") else name
