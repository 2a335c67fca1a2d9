"""A calibration -> ``calibration.html``: what a person reads before trusting it.

In the order of a decision: warnings, samples, the plan and its reasons, the dynamics it rests on,
the ranges. What was not measured is left out, and the page says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...compile.quantize.calibration_file import Calibration
from ...graphs.quantization import OBSERVERS
from ...pages.page import render_page, write_page
from ..plan_search.dynamics import PUBLISHED
from . import charts, range_charts
from .series import by_sensitivity, kept_float, rows_seen, series_of
from .warnings import calibration_warnings

TEMPLATE_FOLDER = Path(__file__).parent
CALIBRATION_PAGE = "calibration.html"

ORDER = ("precision", "entry", "s", "t", "K", "e")
"""Reasons in the order of the layers they are about; JSON sorts them otherwise."""

MOST_LISTED = 200
"""Samples named on the page; calibration.json has all of them."""


def write_report(calibration: Calibration, folder: str | Path) -> str:
    """Write the page into ``folder``, whole or not at all; return its name.

    Raises:
        CapacityError: it cannot be written there.
    """
    write_page(
        render_calibration(calibration), Path(folder) / CALIBRATION_PAGE, "--out calibrations"
    )
    return CALIBRATION_PAGE


def render_calibration(calibration: Calibration) -> str:
    """Return the page's HTML."""
    facts = {
        "calibration": calibration,
        "plan": calibration.plan,
        "warnings": calibration_warnings(calibration),
        "samples": calibration.samples,
        "most_listed": MOST_LISTED,
        "choice": _choice(calibration.choice),
        "dynamics": _dynamics(calibration.dynamics, calibration.choice),
        "ranges": _ranges(calibration) if calibration.groups else None,
    }
    return render_page(TEMPLATE_FOLDER, facts, charts=True)


def _choice(choice: Mapping[str, Any]) -> dict[str, Any] | None:
    if not choice:
        return None
    # Older choices lack some: what had not been thought of when they were made.
    lacking = dict.fromkeys(("entry", "second", "first_ms", "second_ms"))
    candidates = [{**lacking, **found} for found in choice["candidates"]]
    shares = [candidate["measured"][choice["agreement"]]["share"] for candidate in candidates]
    return {
        "precision": "fp32",
        "shipped": None,
        "question": None,
        "dense": None,
        **choice,
        "candidates": candidates,
        "taken": None if choice["chosen"] is None else candidates[choice["chosen"]],
        "reasons": sorted(choice["reasons"].items(), key=lambda reason: _place(reason[0])),
        "foot": charts.FOOT,
        "below": any(share < charts.FOOT for share in shares),
        "plot": charts.pareto(choice) if candidates else "",
    }


def _place(letter: str) -> int:
    return ORDER.index(letter) if letter in ORDER else -1


def _dynamics(dynamics: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any] | None:
    if not dynamics:
        return None
    layers = dynamics["layers"]
    triggers = [(f"cosine {row['cosine']:g}", row["t"]) for row in dynamics["triggers"]]
    exits = [
        (f"{row['exit_cosine']:g}, {row['rule']}", row["e"])
        for row in dynamics["exits"]
        if row["cosine"] == PUBLISHED.cosine
    ]
    kind = choice.get("agreement", "tokens")
    return {
        **dynamics,
        "published": PUBLISHED,
        "kept_published": [row for row in dynamics["kept"] if row["cosine"] == PUBLISHED.cosine],
        "cosine_plot": charts.cosines(dynamics),
        "trigger_plot": charts.histograms(triggers, layers, "never"),
        "exit_plot": charts.histograms(exits, layers, "never") if exits else "",
        "mass_plot": charts.mass(dynamics),
        "blind_plot": charts.blind(dynamics, kind) if dynamics["text_blind"] else "",
        "kind": kind,
    }


def _ranges(calibration: Calibration) -> dict[str, Any]:
    groups, plan = calibration.groups, calibration.plan
    every, observer = list(groups.values()), calibration.best_observer
    series = series_of(groups)
    ranked, kept = by_sensitivity(groups), kept_float(groups)
    sensitivity = {name: errors for group in every for name, errors in group.sensitivity.items()}

    def mean(errors: Iterable[float]) -> float:
        return sum(errors) / len(every)

    return {
        "observer": observer,
        "observers": [
            (
                name,
                mean(group.errors[name] for group in every),
                mean(group.smoothed_errors[name] for group in every),
            )
            for name in OBSERVERS
        ],
        "rows": rows_seen(groups, plan),
        "smoothed": sum(group.alpha is not None for group in every),
        "reach": [(kind.title, range_charts.reach(kind, plan)) for kind in series],
        "errors": [(kind.title, range_charts.errors(kind, observer, plan)) for kind in series],
        "alphas": range_charts.alphas(series),
        "ranked": ranked,
        "kept": kept,
        "sensitivity": range_charts.sensitivity_chart(ranked, len(kept)) if ranked else "",
        "linears": [(name, sensitivity[name]) for name, _ in ranked],
        "colours": range_charts.OBSERVER_COLOURS,
    }
