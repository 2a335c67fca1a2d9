"""How a ladder goes, on stderr, and its table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ...graphs.errors import ParityError
from ...pages.units import show_seconds
from ...tools.verify.check_steps import Check
from ...tools.verify.verify_report import (
    FAILED,
    IMPOSSIBLE,
    NOTHING,
    PASSED,
    CheckRecord,
    VerifyReport,
)
from .bar import StepBar

STYLES = {PASSED: "green", FAILED: "bold red", IMPOSSIBLE: "yellow", NOTHING: "dim"}


class VerifyProgressBar(StepBar):
    """A watcher (``tools/verify/verify.py``)."""

    def __init__(self) -> None:
        super().__init__(measured=False)

    def start(self, check: Check) -> None:
        """Show the rung that is tried now."""
        self.show(f"{check.name}: {check.compares}")

    def done(self, record: CheckRecord) -> None:
        """Leave one line behind."""
        self.leave(f"{record.name:<22} {record.status:<17}{show_seconds(record.seconds):>9}")


def verify_table(report: VerifyReport, where: str) -> RenderableType:
    """Every rung with its largest error, or why there is none; ``where`` the report lies."""
    table = Table("rung", "compares", "result", "largest error", "why")
    for record in report.rungs:
        worst = record.worst
        error = ""
        if worst is not None:
            number = "not finite" if worst.relative is None else f"{worst.relative:.1e}"
            error = f"{number} {worst.tensor}"
        status = Text(record.status, STYLES[record.status])
        table.add_row(record.name, record.compares, status, escape(error), escape(record.reason))
    return Group(table, Text(f"the whole report: {where}"))


def require_passed(report: VerifyReport, where: str) -> None:
    """Raise for the first rung that failed.

    Raises:
        ParityError: names the rung, what was found and expected, and the report.
    """
    failed = report.failed
    if failed is not None:
        raise ParityError(
            f"rung '{failed.name}' failed ({failed.compares}): {failed.reason}. Expected: "
            f"{failed.rule}. Build the bundle again and verify it: make engines MODEL=...; the "
            f"whole report: {where}"
        )
