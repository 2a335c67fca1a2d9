"""A calibration -> ``calibration.html``: what a person reads before trusting it.

In the order in which one decides: what speaks against it, what was read, the plan and why, the
dynamics it rests on, the ranges. What was not measured is left out, and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...compile.quantize.calibration_file import Calibration
from ...graphs.quantization import OBSERVERS
from ...pages.page import PAGES_FOLDER as PAGES
from ...pages.page import style, template, write_page
from ..plan_search.dynamics import PUBLISHED
from . import charts, range_charts
from .series import by_sensitivity, kept_float, rows_seen, series_of
from .warnings import calibration_warnings

TEMPLATE_FOLDER = Path(__file__).parent
CALIBRATION_PAGE = "calibration.html"

ORDER = "stKe"
"""Reasons in the order of the layers they are about; JSON sorts them otherwise."""

MOST_LISTED = 200
"""Samples named on the page; calibration.json has all of them."""


def write_report(calibration: Calibration, folder: str | Path) -> str:
    """Write the page into ``folder``, whole or not at all; returns its name.

    Raises:
        CapacityError: it cannot be written there.
    """
    write_page(
        render_calibration(calibration), Path(folder) / CALIBRATION_PAGE, "--out calibrations"
    )
    return CALIBRATION_PAGE


def render_calibration(calibration: Calibration) -> str:
    """The page's HTML."""
    return template(TEMPLATE_FOLDER / "page.html").render(
        style=style(PAGES / "chart.css", TEMPLATE_FOLDER / "page.css"),
        calibration=calibration,
        plan=calibration.plan,
        doubts=calibration_warnings(calibration),
        samples=calibration.samples,
        most_listed=MOST_LISTED,
        choice=_choice(calibration.choice),
        dynamics=_dynamics(calibration.dynamics, calibration.choice),
        ranges=_ranges(calibration) if calibration.groups else None,
    )


def _choice(choice: Mapping[str, Any]) -> dict[str, Any] | None:
    if not choice:
        return None
    chosen = None if choice["chosen"] is None else choice["candidates"][choice["chosen"]]
    return {
        **choice,
        "precision": choice.get("precision", "fp32"),
        "shipped": choice.get("shipped"),
        "taken": chosen,
        "reasons": sorted(choice["reasons"].items(), key=lambda one: ORDER.find(one[0])),
        "foot": charts.FOOT,
        "below": any(
            one["measured"][choice["agreement"]]["share"] < charts.FOOT
            for one in choice["candidates"]
        ),
        "plot": charts.pareto(choice) if choice["candidates"] else "",
    }


def _dynamics(dynamics: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any] | None:
    if not dynamics:
        return None
    layers = dynamics["layers"]
    triggers = [(f"cosine {row['cosine']:g}", row["t"]) for row in dynamics["triggers"]]
    published = [one for one in dynamics["exits"] if one["cosine"] == PUBLISHED.cosine]
    exits = [(f"{one['exit_cosine']:g}, {one['rule']}", one["e"]) for one in published]
    kind = choice.get("agreement", "tokens")
    return {
        **dynamics,
        "published": PUBLISHED,
        "kept_published": [one for one in dynamics["kept"] if one["cosine"] == PUBLISHED.cosine],
        "cosine_plot": charts.cosines(dynamics),
        "trigger_plot": charts.histograms(triggers, layers, "never"),
        "exit_plot": charts.histograms(exits, layers, "never") if exits else "",
        "mass_plot": charts.mass(dynamics),
        "blind_plot": charts.blind(dynamics, kind) if dynamics["text_blind"] else "",
        "kind": kind,
    }


def _ranges(calibration: Calibration) -> dict[str, Any]:
    groups, plan = calibration.groups, calibration.plan
    observer = calibration.best_observer
    every = series_of(groups)
    ranked, kept = by_sensitivity(groups), kept_float(groups)
    return {
        "observer": observer,
        "observers": _observers(calibration),
        "rows": rows_seen(groups, plan),
        "smoothed": sum(group.alpha is not None for group in groups.values()),
        "aware": sum(group.aware_alpha is not None for group in groups.values()),
        "reach": [(one.title, range_charts.reach(one, plan)) for one in every],
        "errors": [(one.title, range_charts.errors(one, observer, plan)) for one in every],
        "alphas": range_charts.alphas(every),
        "ranked": ranked,
        "kept": kept,
        "sensitivity": range_charts.sensitivity_chart(ranked, len(kept)) if ranked else "",
        "linears": _linears(calibration, [name for name, _ in ranked]),
        "colours": range_charts.OBSERVER_COLOURS,
    }


def _observers(calibration: Calibration) -> list[tuple[str, float, float]]:
    """(observer, error, smoothed error): means over groups, W8A8."""
    every = list(calibration.groups.values())
    return [
        (
            name,
            sum(group.errors[name] for group in every) / len(every),
            sum(group.smoothed_errors[name] for group in every) / len(every),
        )
        for name in OBSERVERS
    ]


def _linears(calibration: Calibration, order: Sequence[str]) -> list[tuple[str, Mapping]]:
    """(linear layer, error by scheme) in ``order``."""
    found = {
        name: by_scheme
        for group in calibration.groups.values()
        for name, by_scheme in group.sensitivity.items()
    }
    return [(name, found[name]) for name in order]
