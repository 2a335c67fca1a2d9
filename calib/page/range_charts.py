"""The ranges of a calibration as charts, by kind of input and layer: numbers in, SVG out."""

from __future__ import annotations

from collections.abc import Sequence

from ...graphs.plan.plan import StagePlan
from ...pages.chart import CROWD, Axis, Chart, of_decades, of_layers, of_names
from ...pages.units import percent
from .charts import HALF, WORDY
from .series import ELSEWHERE, RangeSeries

OBSERVER_COLOURS = {"minmax": "ink", "percentile": "amber", "entropy": "cool", "mse": "warm"}
"""Colours of the observers; min-max is the largest input itself."""


def reach(series: RangeSeries, plan: StagePlan) -> str:
    """Draw the largest input of each layer, and where each observer ends the range; log scale."""
    every = [value for group in series.groups for value in group.thresholds.values()]
    every += [float(group.absmax.max()) for group in series.groups]
    chart = _chart(series, of_decades(every), f"Ranges of {series.title}", plan)
    for observer, colour in OBSERVER_COLOURS.items():
        points = [(x, group.thresholds[observer]) for x, _, group in series.entries]
        if series.title != ELSEWHERE:
            chart.line(points, f"{colour} thin")
        for x, name, group in series.entries:
            value = group.thresholds[observer]
            chart.dot(x, value, colour, f"{name}, {observer}: {value:.4g}", 2.5)
    return chart.svg()


def errors(series: RangeSeries, observer: str, plan: StagePlan) -> str:
    """Draw the W8A8 error of each group before and after smoothing, with alpha; log scale."""
    every = [group.errors[observer] for group in series.groups]
    every += [group.smoothed_errors[observer] for group in series.groups]
    label = f"INT8 error of {series.title}, before and after smoothing"
    chart = _chart(series, of_decades(every, shares=True), label, plan)
    for x, name, group in series.entries:
        plain, smooth = group.errors[observer], group.smoothed_errors[observer]
        words = f"{name}: {percent(plain, 3)}"
        if group.alpha is not None:
            words += f", smoothed {percent(smooth, 3)} with alpha {group.alpha:g}"
            chart.whisker(x, plain, smooth, "warm thin")
        chart.dot(x, plain, "mute open", words, 3)
        if group.alpha is not None:
            chart.dot(x, smooth, "warm", words, 3)
    return chart.svg()


def alphas(every: Sequence[RangeSeries]) -> str:
    """Draw alpha of every smoothed group that is in a layer: a line of cells for each kind."""
    smoothed = [
        series
        for series in every
        if series.title != ELSEWHERE and any(group.alpha is not None for group in series.groups)
    ]
    layers = max((series.layers for series in smoothed), default=1)
    y = of_names([series.title for series in smoothed], down=True)
    height = 54 + 26 * len(smoothed)
    chart = Chart(of_layers(layers), y, "Smoothing by layer", height=height, left=WORDY)
    for row, series in enumerate(smoothed):
        for layer, name, group in series.entries:
            if group.alpha is not None:
                words = f"{group.alpha:g}" if layers < CROWD else ""
                chart.tile(layer, row, group.alpha, "warm", f"{name}: alpha {group.alpha:g}", words)
    return chart.svg()


def sensitivity_chart(ranked: Sequence[tuple[str, float]], kept: int) -> str:
    """Draw the error of every linear layer in INT8, the worst first, ``kept`` in colour."""
    y = of_decades([error for _, error in ranked], "relative squared error", shares=True)
    x = Axis(-0.5, len(ranked) - 0.5, title=f"{len(ranked)} linear layers, the worst first")
    chart = Chart(x, y, "Error of each linear layer in INT8", height=260)
    for index, (name, error) in enumerate(ranked):
        kind = "warm" if index < kept else "faint"
        chart.bar(index - 0.4, index + 0.4, error, kind, f"{name}: {percent(error, 3)}")
    return chart.svg()


def _chart(series: RangeSeries, y: Axis, label: str, plan: StagePlan) -> Chart:
    """Return a chart by layer, with a line where a stage ends."""
    if series.title == ELSEWHERE:
        x = of_names([name.rpartition(".")[2] for _, name, _ in series.entries])
    else:
        x = of_layers(series.layers, "")
    chart = Chart(x, y, label, HALF, 220)
    if series.decoder:
        for stage in plan.stages[:-1]:
            chart.whisker(stage.layers[1] - 0.5, y.low, y.high, "faint dashed thin")
    return chart
