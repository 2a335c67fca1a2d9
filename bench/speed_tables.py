"""Rows of the tables on speed, from the records of ``peers`` and ``scaling``; no measuring here.

A table is (header, rows) of text. What a record lacks stays empty: peers fail, and say why below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

FIGURES = {"cold": "cold TTFT", "second": "second question", "per_token": "per token"}


@dataclass(frozen=True)
class Goal:
    """A figure of ours over the best of theirs: at most ``limit``."""

    measure: str
    figure: str
    ours: str  # beginning of keys
    theirs: tuple[str, ...]
    limit: float


SWEEPS = {
    "visual": ("side", "Visual tokens, by the size of the picture in pixels"),
    "images": ("images", "Visual tokens, by pictures of 576 in a prompt"),
    "text": ("words added", "Length of the question"),
    "batch": ("prompts", "Prompts at once, all of them together"),
    "questions": ("questions", "Questions about one picture, the mean of them"),
    "slots": ("slots", "Room in the caches"),
}
"""Of ``scaling``: what its axis is, and the table's title."""

F32 = ("openvino-fp32-f32", "openvino-fp32-f32-prefix")
GOALS = (
    Goal("cold TTFT, FP32, pruned", "cold", "visistage-visipruner-fp32", F32, 0.6),
    Goal("cold TTFT, W8A8, pruned", "cold", "visistage-visipruner-int8", ("openvino-",), 0.6),
    Goal("second question, FP32", "second", "visistage-visipruner-fp32", F32, 0.25),
    Goal("ms per token, FP32", "per_token", "visistage-visipruner-fp32", F32, 1.0),
    Goal("ms per token, INT8", "per_token", "visistage-visipruner-int8", ("openvino-int8",), 1.0),
)
"""Against OpenVINO GenAI in the same run; theirs is its fastest setting among those named."""


def peers(rows: Sequence[Row]) -> Table:
    """Everyone who answered: medians in milliseconds, each beside its floor."""
    header = ["peer"]
    for name in FIGURES.values():
        header += [f"{name}, ms", "floor"]
    header += ["= transformers", "peak MiB", "load, s"]
    return header, [
        [
            row["label"],
            *(cell for figure in FIGURES for cell in _beside_lower_bound(row, figure)),
            _agreement(row.get("agreement")),
            f"{row['peak_mib']:,.0f}",
            f"{(row['import_ms'] + row['load_ms']) / 1e3:.1f}",
        ]
        for row in rows
        if "cold" in row
    ]


def failures(rows: Sequence[Row]) -> list[str]:
    """Who was not measured to the end, and why."""
    return [f"{row['label']}: {row['failed']}" for row in rows if "failed" in row]


def goals(rows: Sequence[Row]) -> Table:
    """What was aimed at, and what became of it; empty where one side did not answer."""
    found = []
    for goal in GOALS:
        ours = _best(rows, (goal.ours,), goal.figure, exact=False)
        theirs = _best(rows, goal.theirs, goal.figure, exact=goal.theirs == F32)
        ratio = (
            None if ours is None or theirs is None else _median(ours, goal) / _median(theirs, goal)
        )
        found.append(
            [
                goal.measure,
                f"at most {goal.limit:g}x",
                "" if ratio is None else f"{ratio:.2f}x",
                "" if ratio is None else "yes" if ratio <= goal.limit else "no",
                "" if ours is None else f"{_median(ours, goal):.1f} ms, {ours['label']}",
                "" if theirs is None else f"{_median(theirs, goal):.1f} ms, {theirs['label']}",
            ]
        )
    return ["measure", "goal", "ratio", "reached", "ours", "theirs"], found


def rates(rows: Sequence[Row]) -> str:
    """What the floors are computed from."""
    measured = rows[0]["rates"]
    each = [f"{value / 1e9:.0f} G{kind}" for kind, value in measured["operations"].items()]
    return f"{', '.join(each)} operations and {measured['bandwidth'] / 1e9:.1f} GB a second"


def sweep(rows: Iterable[Row], name: str, axis: str) -> Table:
    """One sweep of ``scaling``, a row for every value and plan."""
    header = [axis, "plan", "prompt rows", "TTFT, ms", "p90", "per token, ms", "peak MiB"]
    return header, [
        [
            f"{row['value']:,}",
            row["plan"],
            f"{row['prompt_rows']:,}",
            f"{row['first_ms']['median']:.1f}",
            f"{row['first_ms']['p90']:.1f}",
            f"{row['per_token_ms']['median']:.2f}",
            f"{row['peak_mib']:,.0f}",
        ]
        for row in rows
        if row["sweep"] == name and "first_ms" in row
    ]


def presets(rows: Iterable[Row]) -> Table:
    """Speed-ups over dense, beside those that the roofline predicts."""
    header = ["preset", "prefill, ms", "speed-up", "predicted", "reached"]
    return header, [
        [
            f"`{row['plan']}`",
            f"{row['prefill_ms']['median']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['predicted']:.2f}x",
            f"{100 * row['reached']:.0f} %",
        ]
        for row in rows
        if row["sweep"] == "presets"
    ]


def _beside_lower_bound(row: Row, figure: str) -> tuple[str, str]:
    digits = 2 if figure == "per_token" else 1
    floor = row.get("floor", {}).get(figure)
    measured = f"{row[figure]['median']:.{digits}f}" if figure in row else ""
    return measured, "" if floor is None else f"{floor:.{digits}f}"


def _agreement(found: Row | None) -> str:
    return "" if found is None else f"{100 * found['leading']:.1f} %"


def _best(rows: Sequence[Row], keys: Sequence[str], figure: str, *, exact: bool) -> Row | None:
    """The fastest row whose key is, or begins with, one of ``keys``."""
    fit = [
        row
        for row in rows
        if figure in row
        and any(row["key"] == k if exact else row["key"].startswith(k) for k in keys)
    ]
    return min(fit, key=lambda row: row[figure]["median"], default=None)


def _median(row: Row, goal: Goal) -> float:
    return row[goal.figure]["median"]
