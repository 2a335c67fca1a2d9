"""Measurements as plain data: what ``--json`` prints, and tables and page are made from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ...graphs.bundle import Bundle
from .call_timer import TimedCall
from .peak_memory import Footprint
from .peaks import Peaks
from .power import Meter
from .roofline import GraphRoofline, lower_bound_of, parts_of
from .spread import Spread
from .sweep import SweepPoint
from .timing import TimedAnswer, TimedSeries

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
    """What is known of one bundle, but for its operators."""
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
        "visual_tokens": manifest.plan.visual_tokens,
        "memory": asdict(memory),
        "cold": {name: asdict(one) for name, one in spreads["cold"].items()},
        "again": {name: asdict(one) for name, one in spreads["again"].items()},
        "timeline": _timeline(_typical(series.cold)),
        "sweep": [
            {
                "visual_tokens": p.visual_tokens,
                **asdict(p.ms),
                "floor_ms": peaks and lower_bound_of(manifest, p.calls, peaks),
            }
            for p in points
        ],
        "roofline": peaks
        and {
            "prefill": [_part(p) for p in parts_of(manifest, cold, medians, peaks)],
            "token": [_part(p) for p in parts_of(manifest, step, steps, peaks)],
        },
        "energy": _energy(series.cold, meter),
    }


def _part(part: GraphRoofline) -> dict[str, Any]:
    work = part.work
    return {
        "graph": part.graph,
        "calls": part.calls,
        "flops": work.flops,
        "nbytes": work.nbytes,
        "floor_ms": part.lower_bound_ms,
        "measured_ms": part.measured_ms,
        "share": part.share,
        "bound": part.bound,
    }


def _typical(questions: list[TimedAnswer]) -> TimedAnswer:
    """The one whose time to the first token is nearest to the median."""
    middle = Spread.of([one.first_token for one in questions]).median
    return min(questions, key=lambda one: abs(one.first_token - middle))


def _timeline(question: TimedAnswer) -> dict[str, Any]:
    """One answer's calls, in ms since it was asked."""

    def fact(event: TimedCall) -> dict[str, Any]:
        return {
            "graph": event.call.graph,
            "rows": event.call.rows,
            "slots": event.call.slots,
            "start_ms": (event.start - question.start) * 1e3,
            "ms": event.ms,
        }

    return {
        "events": [fact(event) for event in question.events],
        "preprocess_ms": question.preprocess,
        "first_token_ms": question.first_token,
        "total_ms": question.total,
    }


def _energy(questions: list[TimedAnswer], meter: Meter) -> dict[str, Any] | None:
    """Joules per answer and per token; None where they cannot be told."""
    joules = [meter.joules(one.start, one.stop) for one in questions]
    known = [one for one in joules if one is not None]
    if not known:
        return None
    spread = Spread.of(known)
    return {
        "answer_joules": asdict(spread),
        "token_joules": spread.median / (questions[0].later + 1),
    }


def power_facts(meter: Meter) -> dict[str, Any]:
    """Where power was read, and its rails; or why nothing was."""
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
    """How much faster the plan is than what stands beside it, and what the roofline promises.

    ``prefill`` counts the decoder alone: neither plan saves anything on preprocessing or tower.
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
            return sum(p[field] for p in run["roofline"]["prefill"] if p["graph"] != "vision")

        measured = decoder(against, "measured_ms") / decoder(plan, "measured_ms")
        promised = decoder(against, "floor_ms") / decoder(plan, "floor_ms")
        out |= {
            "prefill": measured,
            "prefill_promised": promised,
            "prefill_share": measured / promised,
        }
    return out


def dominant(run: dict[str, Any]) -> dict[str, Any]:
    """The part of a cold question's way to its first token that takes most, and its share."""
    cold = run["cold"]
    end = list(cold).index("first_token")
    parts = {name: one["median"] for name, one in list(cold.items())[:end]}
    name = max(parts, key=lambda key: parts[key])
    return {"part": name, "ms": parts[name], "share": parts[name] / cold["first_token"]["median"]}


def above_roofline(runs: dict[str, Any]) -> list[str]:
    """Graphs that were faster than the roofline says is possible: then it was measured too low."""
    names = {
        part["graph"]: None
        for run in runs.values()
        for phase in (run["roofline"] or {}).values()
        for part in phase
        if part["share"] > IMPOSSIBLE_SHARE
    }
    return list(names)
