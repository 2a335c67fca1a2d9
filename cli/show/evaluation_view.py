"""An evaluation: its progress and its table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ...graphs.progress import Advance
from .output import console

if TYPE_CHECKING:
    from ...calib.evaluate import EvaluationReport

MOST_SHOWN = 5
"""Wrong answers and unreadable images listed; ``--json`` has all of them."""


@contextmanager
def counting(total: int) -> Iterator[Advance]:
    """Show a bar on stderr that moves with every call; nothing where there is no terminal."""
    shown = console(err=True)
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("asking", total=total)
        yield lambda units: bar.advance(task, units)


def evaluation_table(report: EvaluationReport) -> RenderableType:
    """Accuracy by type, speed, and the first few that went wrong."""
    table = Table("type", "right", "of", "accuracy")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, tally in report.by_type.items():
        table.add_row(name, str(tally.right), str(tally.total), f"{100 * tally.share:.1f} %")
    total = report.overall
    table.add_section()
    table.add_row("all", str(total.right), str(total.total), f"{100 * total.share:.1f} %")
    speed = f"first token {report.first_token_ms:.1f} ms"
    if report.per_token_ms is not None:
        speed += f", each later one {report.per_token_ms:.1f} ms (means)"
    lines = [speed]
    for miss in report.misses[:MOST_SHOWN]:
        lines.append(f"{miss.name}: {miss.prompt} expected {miss.expected!r}, got {miss.given!r}")
    if len(report.misses) > MOST_SHOWN:
        lines.append(f"... and {len(report.misses) - MOST_SHOWN} more wrong answers (--json)")
    if report.unreadable:
        lines.append(f"{len(report.unreadable)} images could not be read and count nowhere:")
        lines += [f"  {name}: {why}" for name, why in report.unreadable[:MOST_SHOWN]]
    return Group(table, *(Text(line) for line in lines))
