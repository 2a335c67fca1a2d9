"""Charts as inline SVG: axes, lines, bands, bars, dots, cells. Nothing is fetched, nothing runs.

A mark's ``kind`` is a class of ``chart.css``: a colour (``ink``, ``cool``, ...), perhaps with a
manner (``dashed``). A ``title`` shows under the pointer and is what a screen reader says. All text
is escaped here, so templates put a chart in as it is. This module knows nothing of what it draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

Point = tuple[float, float]

TOP, BOTTOM, LEFT, RIGHT = 14, 40, 52, 24
"""Margins around the plot, in units of the drawing; they hold the axis labels."""

CROWD = 17
"""From so many layers on, only every fourth is numbered."""


@dataclass(frozen=True)
class Axis:
    """A range and its ticks (value, words); what is outside is drawn at the nearer end.

    ruled: whether an upright axis draws a line across at each tick.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...] = ()
    title: str = ""
    log: bool = False
    ruled: bool = True

    def part(self, value: float) -> float:
        """Return the place of ``value``, 0 at ``low`` and 1 at ``high``."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(max((value - low) / (high - low), 0.0), 1.0)


def of_layers(count: int, title: str = "layer") -> Axis:
    """Return an axis of layers 0 to ``count`` - 1, each in the middle of its column."""
    step = 1 if count < CROWD else 4
    ticks = tuple((layer, str(layer)) for layer in range(0, count, step))
    return Axis(-0.5, count - 0.5, ticks, title)


def of_shares(low: float = 0.0, high: float = 1.0, title: str = "") -> Axis:
    """Return an axis of shares, in per cent at round steps."""
    low = min(low, high - 0.01) if high - low < 1e-6 else low
    span = high - low
    step = next(s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25) if span / s <= 5.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 1 if step < 0.01 else 0
    ticks = tuple((i * step, f"{100 * i * step:.{digits}f} %") for i in range(first, last + 1))
    return Axis(first * step, max(last, first + 1) * step, ticks, title)


def of_decades(values: Iterable[float], title: str = "", *, shares: bool = False) -> Axis:
    """Return an axis around the positive ``values``: decades, or 1, 2, 5 within few.

    shares: whether ticks are in per cent.
    """
    seen = [value for value in values if value > 0] or [1.0]
    low, high = min(seen), max(seen)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if high / low < 100 else (1,)
    marks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    start = max(i for i, mark in enumerate(marks) if mark <= low)
    stop = min((i for i, mark in enumerate(marks) if mark >= high), default=len(marks) - 1)
    marks = marks[start : max(stop, start + 1) + 1]
    every = math.ceil(len(marks) / 7)
    words = "{:.6g} %" if shares else "{:.6g}"
    ticks = tuple((mark, words.format(100 * mark if shares else mark)) for mark in marks[::every])
    return Axis(marks[0], marks[-1], ticks, title, log=True)


def of_names(names: Sequence[str], *, down: bool = False) -> Axis:
    """Return an axis with a place for each name; ``down``: the first on top when upright."""
    ends = (len(names) - 0.5, -0.5) if down else (-0.5, len(names) - 0.5)
    return Axis(*ends, tuple(enumerate(names)), ruled=False)


STYLES = ("base.css", "chart.css")
"""Styles of a page with charts, which a drawing by itself needs, too."""


def svg_file(chart: Chart) -> str:
    """Return a drawing as a file of its own, on a ground of its own, light or dark as wanted."""
    style = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in STYLES)
    head, rest = chart.svg().split(">", 1)
    ground = '<rect width="100%" height="100%" style="fill:var(--paper)"/>'
    named = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{named}>\n<style>{style}.graph {{ margin: 0 }}</style>\n{ground}{rest}\n"


class Chart:
    """A plot with two axes. label: what it shows, in words. left: room for the y axis's words."""

    def __init__(
        self, x: Axis, y: Axis, label: str, width: int = 960, height: int = 280, left: int = LEFT
    ):
        self.x, self.y, self.label = x, y, label
        self.width, self.height, self.left = width, height, left
        self.marks: list[str] = []
        self._labels: list[tuple[float, float, float, float]] = []

    def line(self, points: Sequence[Point], kind: str, title: str = "") -> None:
        """Draw a line through ``points``."""
        path = "L".join(f"{self._x(x)} {self._y(y)}" for x, y in points)
        self._mark(f'<path class="line {kind}" d="M{path}"', title)

    def steps(self, points: Sequence[Point], kind: str, title: str = "") -> None:
        """Draw steps through ``points``, along the axes: at first to the right."""
        path = f"M{self._x(points[0][0])} {self._y(points[0][1])}"
        path += "".join(f"H{self._x(x)}V{self._y(y)}" for x, y in points[1:])
        self._mark(f'<path class="line {kind}" d="{path}"', title)

    def band(self, low: Sequence[Point], high: Sequence[Point], kind: str, title: str = "") -> None:
        """Fill the band between two lines."""
        path = "L".join(f"{self._x(x)} {self._y(y)}" for x, y in [*low, *reversed(high)])
        self._mark(f'<path class="band {kind}" d="M{path}Z"', title)

    def bar(self, left: float, right: float, value: float, kind: str, title: str = "") -> None:
        """Draw a bar from the foot of the plot to ``value``."""
        self.cell((left, right), (self.y.low, value), kind, title)

    def cell(self, x: Point, y: Point, kind: str, title: str = "", shade: float = 1.0) -> None:
        """Fill a rectangle. shade: its opacity."""
        left, right = sorted(self._x(end) for end in x)
        top, bottom = sorted(self._y(end) for end in y)
        size = f'width="{right - left:.5g}" height="{bottom - top:.5g}"'
        faint = "" if shade >= 1 else f' fill-opacity="{shade:.2f}"'
        self._mark(f'<rect class="mark {kind}" x="{left}" y="{top}" {size}{faint}', title)

    def tile(
        self, x: float, y: float, share: float, kind: str, title: str = "", words: str = ""
    ) -> None:
        """Fill heat map cell (x, y) with opacity ``share``."""
        around = (x - 0.47, x + 0.47), (y - 0.45, y + 0.45)
        self.cell(*around, kind, title, 0.1 + 0.9 * share)
        self._text(self._x(x), self._y(y) + 4, words, "middle", "over" if share > 0.55 else "on")

    def dot(self, x: float, y: float, kind: str, title: str = "", radius: float = 4) -> None:
        """Draw a circle of ``radius`` units."""
        at = f'cx="{self._x(x)}" cy="{self._y(y)}"'
        self._mark(f'<circle class="mark {kind}" {at} r="{radius:g}"', title)

    def diamond(self, x: float, y: float, kind: str, title: str = "", radius: float = 4) -> None:
        """Draw a square on its corner, ``radius`` units from its centre to a side."""
        at, reach = f"M{self._x(x)} {self._y(y)}", f"{1.4 * radius:g}"
        path = f"{at}m0-{reach}l{reach} {reach}l-{reach} {reach}l-{reach}-{reach}z"
        self._mark(f'<path class="mark {kind}" d="{path}"', title)

    def whisker(self, x: float, low: float, high: float, kind: str) -> None:
        """Draw an upright line, for an interval."""
        at = self._x(x)
        self._mark(f'<path class="line {kind}" d="M{at} {self._y(low)}V{self._y(high)}"', "")

    def across(self, y: float, kind: str, words: str = "") -> None:
        """Draw a level line from end to end, with words above it."""
        at = self._y(y)
        self._mark(f'<path class="line {kind}" d="M{self.left} {at}H{self.width - RIGHT}"', "")
        self._text(self.width - RIGHT - 4, at - 5, words, "end")

    def name(self, x: float, y: float, words: str) -> None:
        """Write words beside the dot at (x, y), where they cover no other label."""
        at, level, width = self._x(x), self._y(y), 6.5 * len(words)
        for dx, dy in (
            (9, 4),
            (9, -9),
            (9, 17),
            (-9 - width, 4),
            (-9 - width, -9),
            (-9 - width, 17),
        ):
            box = (at + dx, level + dy - 11, at + dx + width + 4, level + dy + 2)
            inside = self.left <= box[0] and box[2] <= self.width - RIGHT / 2
            apart = all(
                box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1]
                for b in self._labels
            )
            if inside and apart:
                self._labels.append(box)
                self._text(box[0], level + dy, words, "start")
                return

    def svg(self) -> str:
        """Return the drawing, its axes behind the marks."""
        foot = self.height - BOTTOM
        axes = []
        for value, words in self.y.ticks:
            at = self._y(value)
            if self.y.ruled:
                axes.append(f'<path class="tick" d="M{self.left} {at}H{self.width - RIGHT}"/>')
            axes.append(_text(self.left - 8, at + 4, words, "end"))
        for value, words in self.x.ticks:
            axes.append(_text(self._x(value), foot + 17, words, "middle"))
        axes.append(f'<path class="axis" d="M{self.left} {foot}H{self.width - RIGHT}"/>')
        axes.append(
            _text((self.left + self.width - RIGHT) / 2, self.height - 5, self.x.title, "middle")
        )
        if self.y.title:
            axes.append(_text(2, 10, self.y.title, "start"))
        label = escape(self.label, quote=True)
        return (
            f'<svg class="graph" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{label}">{"".join(axes)}{"".join(self.marks)}</svg>'
        )

    def _mark(self, start: str, title: str) -> None:
        tag = start[1 : start.index(" ")]
        end = f"><title>{escape(title)}</title></{tag}>" if title else "/>"
        self.marks.append(start + end)

    def _text(self, x: float, y: float, words: str, anchor: str, kind: str = "") -> None:
        if words:
            self.marks.append(_text(x, y, words, anchor, kind))

    def _x(self, value: float) -> float:
        return round(self.left + self.x.part(value) * (self.width - self.left - RIGHT), 1)

    def _y(self, value: float) -> float:
        foot = self.height - BOTTOM
        return round(foot - self.y.part(value) * (foot - self._top), 1)

    @property
    def _top(self) -> int:
        return TOP + (10 if self.y.title else 0)


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
