"""The plan and the dynamics of a calibration as charts; JSON in, SVG out.

The shapes drawn are those of ``calib.plan_search.choose`` and ``calib.plan_search.dynamics``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...pages.chart import Axis, Chart, of_layers, of_names, of_shares
from ...pages.units import percent

Facts = Mapping[str, Any]

COSINE_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 0.99999)
"""Cosines that an axis may name."""

FOOT = 0.8
"""Plans that agree less are drawn at the foot of the plot: they are all too bad to use."""

HALF = 470
"""Width of a chart beside another."""

WORDY = 170
"""Room for words on the left of a chart."""


def pareto(choice: Facts) -> str:
    """Draw every candidate by cost and agreement, with the front, the budget and the choice."""
    kind, candidates = choice["agreement"], choice["candidates"]
    lowest = min((candidate["measured"][kind]["low"] for candidate in candidates), default=1.0)
    most = max((candidate["cost"] for candidate in candidates), default=1.0)
    title = f"{kind} that agree with dense"
    x = of_shares(0.0, max(1.0, most), choice["cost"])
    y = of_shares(max(lowest, FOOT), 1.0, title)
    chart = Chart(x, y, "Candidate plans by cost and agreement with the dense model", height=380)
    if "lose" in choice["budget"]:
        least = 1 - choice["budget"]["lose"]
        if least >= y.low:
            chart.across(least, "mute dashed", f"budget: {percent(least, 1)}")
    else:
        chart.whisker(choice["budget"]["cost"], y.low, y.high, "mute dashed")
    front = sorted(
        (candidate["cost"], candidate["measured"][kind]["share"])
        for candidate in candidates
        if candidate["front"]
    )
    if front:
        chart.steps([*front, (max(front[-1][0], 1.0), front[-1][1])], "faint", "the front")
    for index, candidate in enumerate(candidates):
        cost, share, held = candidate["cost"], candidate["measured"][kind], candidate["held_out"]
        chosen = index == choice["chosen"]
        kinds = "warm" if chosen else "amber" if candidate["verdict"] else "faint"
        shape = chart.diamond if candidate.get("entry") else chart.dot
        words = f"{candidate['text']}: {_agreement(share)} at {percent(cost)} of the cost"
        if candidate["verdict"]:
            words += f"; {candidate['verdict']}"
        chart.whisker(cost, share["low"], share["high"], f"{kinds} thin")
        if held is not None:
            chart.dot(cost, held[kind]["share"], "cool open", f"{words}; held out", 6)
        shape(cost, share["share"], kinds, words, 6 if chosen else 4)
    chart.dot(1.0, 1.0, "ink", "dense: agrees with itself", 4)
    return chart.svg()


def cosines(dynamics: Facts) -> str:
    """Draw each prompt's least cosine by layer, in quantile bands. Close to 1 is high."""
    shares, rows = dynamics["quantiles"], dynamics["min_cosine"]
    distances = [1 - cosine for row in rows for cosine in row]
    near = max(min((distance for distance in distances if distance > 0), default=0.0), 1e-6)
    closeness = _Closeness(max(*distances, 2 * near), near)
    chart = Chart(
        of_layers(len(rows)), closeness, "Least cosine without one visual token, by layer"
    )
    for below in range(len(shares) // 2):  # bands around the middle, the outermost first
        above = len(shares) - 1 - below
        low_line = [(layer, row[below]) for layer, row in enumerate(rows)]
        high_line = [(layer, row[above]) for layer, row in enumerate(rows)]
        words = f"{percent(shares[below])} to {percent(shares[above])} of the prompts"
        chart.band(low_line, high_line, "cool", words)
    middle = shares.index(0.5)
    chart.line([(layer, row[middle]) for layer, row in enumerate(rows)], "cool", "median")
    for layer, row in enumerate(rows):
        words = ", ".join(f"{percent(s)}: {c:.5g}" for s, c in zip(shares, row, strict=True))
        chart.dot(layer, row[middle], "cool", f"layer {layer}: {words}", 3)
    return chart.svg()


def histograms(rows: Sequence[tuple[str, Facts]], layers: int, never: str) -> str:
    """Draw a line of cells for each spread of layers; those that never got there come last.

    rows: (words, spread). never: name of the last column.
    """
    x = of_layers(layers)
    x = Axis(x.low, layers + 1.5, (*x.ticks, (layers + 0.75, never)), x.title)
    y = of_names([words for words, _ in rows], down=True)
    chart = Chart(x, y, "Prompts by layer", height=54 + 26 * len(rows), left=WORDY)
    for index, (words, spread) in enumerate(rows):
        of = max(spread["of"], 1)
        for layer, count in enumerate(spread["histogram"]):
            if count:
                title = f"{words}: {count} of {of} prompts in layer {layer}"
                chart.tile(layer, index, count / of, "warm", title, str(count))
        beyond = spread["of"] - spread["reached"]
        if beyond:
            title = f"{words}: {beyond} of {of} prompts never"
            chart.tile(layers + 0.75, index, beyond / of, "faint", title, str(beyond))
    return chart.svg()


def mass(dynamics: Facts) -> str:
    """Draw the share of contributions that the top K tokens hold, by layer: the median prompt's."""
    ranks, median, low = (dynamics["mass"][key] for key in ("ranks", "median", "low"))
    y = of_names([f"K = {rank}" for rank in ranks], down=True)
    layers = len(median)
    label = "Share of the contributions that the top tokens hold"
    chart = Chart(of_layers(layers), y, label, height=54 + 26 * len(ranks), left=WORDY)
    for layer in range(layers):
        for index, rank in enumerate(ranks):
            share = median[layer][index]
            title = (
                f"layer {layer}, top {rank}: {percent(share)} of the contributions, "
                f"{percent(low[layer][index])} in the lowest tenth of the prompts"
            )
            words = f"{100 * share:.0f}" if layers < 24 else ""
            chart.tile(layer, index, share, "cool", title, words)
    return chart.svg()


def blind(dynamics: Facts, kind: str) -> str:
    """Draw agreement by the number of text-blind layers: measured, with intervals."""
    rows = dynamics["text_blind"]
    most = max(row["shallow"] for row in rows)
    ticks = tuple((row["shallow"], str(row["shallow"])) for row in rows)
    x = Axis(-0.5, most + 0.5, ticks, "text-blind layers")
    y = of_shares(min(row[kind]["low"] for row in rows), 1.0, f"{kind} that agree with dense")
    chart = Chart(x, y, "What text-blind layers cost", height=240)
    chart.line([(row["shallow"], row[kind]["share"]) for row in rows], "cool")
    for row in rows:
        share, at = row[kind], row["shallow"]
        chart.whisker(at, share["low"], share["high"], "cool thin")
        chart.dot(at, share["share"], "cool", f"{at} text-blind layers: {_agreement(share)}")
    return chart.svg()


class _Closeness(Axis):
    """An axis of cosines by their distance from 1, on a log scale: twice as close is one step.

    far, near: distances at its foot and its head.
    """

    def __init__(self, far: float, near: float):
        ticks = [cosine for cosine in COSINE_TICKS if near <= 1 - cosine <= far]
        named = tuple((cosine, f"{cosine:g}") for cosine in ticks)
        super().__init__(far, near, named, "least cosine")

    def part(self, value: float) -> float:
        """Return the part of the axis below a cosine."""
        distance = min(max(1 - value, self.high), self.low)
        return 1 - Axis(self.high, self.low, log=True).part(distance)


def _agreement(share: Facts) -> str:
    return (
        f"{percent(share['share'], 1)} ({share['right']} of {share['total']}, "
        f"95 %: {percent(share['low'], 1)} to {percent(share['high'], 1)})"
    )
