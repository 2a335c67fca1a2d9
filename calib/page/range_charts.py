"""The ranges of a calibration as charts, by kind of input and layer: numbers in, SVG out."""

from __future__ import annotations

from collections.abc import Sequence

from ...graphs.plan.plan import StagePlan
from ...pages.chart import CROWD, Axis, Chart, of_decades, of_layers, of_names
from ...pages.words import percent
from .charts import HALF, WORDY
from .series import ELSEWHERE, RangeSeries

OBSERVER_COLOURS = {"minmax": "ink", "percentile": "amber", "entropy": "cool", "mse": "warm"}
"""Of the observers; min-max is the largest input itself."""


def reach(series: RangeSeries, plan: StagePlan) -> str:
    """Largest input of each layer, and where each observer ends the range; log scale."""
    every = [value for group in series.groups for value in group.thresholds.values()]
    every += [float(group.absmax.max()) for group in series.groups]
    chart = Chart(_x(series), of_decades(every), f"Ranges of {series.title}", HALF, 220)
    _edges(chart, series, plan)
    for observer, colour in OBSERVER_COLOURS.items():
        points = [
            (x, group.thresholds[observer])
            for x, group in zip(series.layers, series.groups, strict=True)
        ]
        if series.title != ELSEWHERE:
            chart.line(points, f"{colour} thin")
        for (x, value), name in zip(points, series.names, strict=True):
            chart.dot(x, value, colour, f"{name}, {observer}: {value:.4g}", 2.5)
    return chart.svg()


def errors(series: RangeSeries, observer: str, plan: StagePlan) -> str:
    """W8A8 error of each group before and after smoothing, with alpha; log scale."""
    before = [group.errors[observer] for group in series.groups]
    after = [group.smoothed_errors[observer] for group in series.groups]
    label = f"INT8 error of {series.title}, before and after smoothing"
    chart = Chart(_x(series), of_decades([*before, *after], shares=True), label, HALF, 220)
    _edges(chart, series, plan)
    rows = zip(series.layers, series.names, series.groups, before, after, strict=True)
    for x, name, group, plain, smooth in rows:
        words = f"{name}: {percent(plain, 3)}"
        if group.alpha is not None:
            words += f", smoothed {percent(smooth, 3)} with alpha {group.alpha:g}"
            chart.whisker(x, plain, smooth, "warm thin")
        chart.dot(x, plain, "mute open", words, 3)
        if group.alpha is not None:
            chart.dot(x, smooth, "warm", words, 3)
    return chart.svg()


def alphas(every: Sequence[RangeSeries]) -> str:
    """Alpha of every smoothed group that is in a layer: a line of cells for each kind."""
    layered = [
        series
        for series in every
        if series.title != ELSEWHERE and any(g.alpha is not None for g in series.groups)
    ]
    layers = 1 + max((max(series.layers) for series in layered), default=0)
    y = of_names([one.title for one in layered], down=True)
    x = of_layers(layers)
    chart = Chart(x, y, "Smoothing by layer", height=54 + 26 * len(layered), left=WORDY)
    for row, series in enumerate(layered):
        for layer, name, group in zip(series.layers, series.names, series.groups, strict=True):
            if group.alpha is None:
                continue
            words = f"{group.alpha:g}" if layers < CROWD else ""
            chart.tile(layer, row, group.alpha, "warm", f"{name}: alpha {group.alpha:g}", words)
    return chart.svg()


def sensitivity_chart(ranked: Sequence[tuple[str, float]], kept: int) -> str:
    """Error of every linear layer in INT8, the worst first; log scale. kept: how many stand out."""
    y = of_decades([error for _, error in ranked], "relative squared error", shares=True)
    x = Axis(-0.5, len(ranked) - 0.5, title=f"{len(ranked)} linear layers, the worst first")
    chart = Chart(x, y, "Error of each linear layer in INT8", height=260)
    for index, (name, error) in enumerate(ranked):
        kind = "warm" if index < kept else "faint"
        chart.bar(index - 0.4, index + 0.4, error, kind, f"{name}: {percent(error, 3)}")
    return chart.svg()


def _x(series: RangeSeries) -> Axis:
    if series.title == ELSEWHERE:
        return of_names([name.rpartition(".")[2] for name in series.names])
    return of_layers(max(series.layers) + 1, "")


def _edges(chart: Chart, series: RangeSeries, plan: StagePlan) -> None:
    """A line where a stage ends."""
    if series.decoder:
        for stage in plan.stages[:-1]:
            chart.whisker(stage.layers[1] - 0.5, chart.y.low, chart.y.high, "faint dashed thin")
