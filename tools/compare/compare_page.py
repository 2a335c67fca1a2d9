"""A comparison as one HTML file: accuracy of every method at each cost, and all numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...pages.chart import Chart, of_names, of_shares
from ...pages.page import render_page
from ...pages.units import percent
from ..profile.machine import machine_line
from .compare_facts import Row, at_target, several_weights, targets

TEMPLATE_FOLDER = Path(__file__).parent
KINDS = ("warm", "amber", "cool", "ink", "mute")
"""Colours of the shares, the least first; shares beyond share the last one."""

LETTER = 6.6
"""Units of the drawing that a letter of a method's name takes."""


def render_comparison(facts: dict[str, Any]) -> str:
    """Return the page's HTML; ``facts`` as ``compare`` returns them, with ``left_out``."""
    rows = facts["rows"]
    shown = {
        "facts": facts,
        "dense": rows[0],
        "named": several_weights(rows),
        "groups": [(target, at_target(rows, target)) for target in targets(rows)],
        "kinds": list(rows[0]["by_type"]),
        "legend": list(zip(KINDS, targets(rows), strict=False)),
        "plot": plot(rows).svg(),
        "machine": machine_line(facts["machine"]),
        "best": best(rows),
    }
    return render_page(TEMPLATE_FOLDER, shown, charts=True, interval=interval)


def best(rows: Sequence[Row]) -> Row | None:
    """Return the most accurate plan at the least share."""
    return next((at_target(rows, target)[0] for target in targets(rows)), None)


def plot(rows: Sequence[Row], width: int = 960) -> Chart:
    """Draw the accuracy of every method, a dot for each plan with its interval."""
    shares = targets(rows)
    methods = list(dict.fromkeys(row["method"] for t in shares for row in at_target(rows, t)))
    low = min(row["accuracy"]["low"] for row in rows)
    x = of_shares(low, 1.0, "accuracy, with 95 % intervals; dashed: dense")
    y = of_names(methods, down=True)
    each = 14 + 12 * max(1, len(shares))
    chart = Chart(
        x,
        y,
        "Accuracy of every method at each share of the visual FLOPs",
        width=width,
        height=60 + each * max(1, len(methods)),
        left=24 + round(LETTER * max(map(len, methods), default=0)),
    )
    dense = rows[0]["accuracy"]["share"]
    chart.whisker(dense, y.low, y.high, "mute dashed")
    for row in rows[1:]:
        index = shares.index(row["target"])
        offset = 0.5 * (index - (len(shares) - 1) / 2) / max(1, len(shares) - 0.5)
        level = methods.index(row["method"]) + offset
        kind, found = KINDS[min(index, len(KINDS) - 1)], row["accuracy"]
        words = (
            f"{row['plan']}: {percent(found['share'], 1)} {interval(found)} at "
            f"{percent(row['visual_flops_share'], 1)} of the visual FLOPs"
        )
        chart.line([(found["low"], level), (found["high"], level)], f"{kind} thin")
        chart.dot(found["share"], level, kind + (" open" if row["control"] else ""), words)
    return chart


def interval(share: dict[str, Any]) -> str:
    """Return ``93.2–97.1``, in per cent."""
    return f"{100 * share['low']:.1f}–{100 * share['high']:.1f}"
