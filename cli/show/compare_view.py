"""A comparison on the terminal: a table of cost and accuracy below the findings."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...pages.units import show_bytes
from ...tools.compare.compare_facts import APART, Row, at_target, several_weights, targets


def comparison_table(facts: dict[str, Any]) -> RenderableType:
    """Every plan by share of the visual FLOPs, the most accurate first; dense above all."""
    rows = facts["rows"]
    named = several_weights(rows)
    kinds = [kind for kind in APART if kind in rows[0]["by_type"]]
    table = Table(
        "plan",
        *(["weights"] if named else []),
        "FLOPs",
        "right",
        "95 %",
        *kinds,
        "= dense",
        "2nd right",
        "first ms",
        "2nd ms",
        "token ms",
        "visual KV",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(*_cells(rows[0], kinds, named), style="bold")
    for target in targets(rows):
        table.add_section()
        for row in at_target(rows, target):
            table.add_row(*_cells(row, kinds, named), style="dim" if row["control"] else None)
    asked = f"{facts['samples']} images, {facts['second_questions']} with a second question"
    lines = [Text(asked), *(Text(f"left out: {reason}") for reason in facts["left_out"])]
    alarms = [Text(finding, style="bold red") for finding in facts["findings"]]
    return Group(*alarms, table, *lines)


def _cells(row: Row, kinds: list[str], named: bool) -> list[str]:
    right, second, kv = row["accuracy"], row["second"], row["visual_kv_bytes"]
    share = row["visual_flops_share"]
    return [
        row["plan"] + (" (control)" if row["control"] else ""),
        *([row["weights"]] if named else []),
        "" if share is None else _percent(share),
        _percent(right["share"]),
        f"{100 * right['low']:.1f}–{100 * right['high']:.1f}",
        *(_percent(row["by_type"][kind]["share"]) for kind in kinds),
        _percent(row["agreement"]["share"]),
        _percent(second["accuracy"]["share"]) if second else "",
        *(f"{row[name]['median']:.1f}" for name in ("first_token_ms", "second_question_ms")),
        f"{row['per_token_ms']['median']:.2f}",
        "" if kv is None else show_bytes(kv),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
