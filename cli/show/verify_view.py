"""How a ladder goes, on stderr, and its table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ...graphs.errors import ParityError
from ...pages.units import show_seconds
from ...tools.verify.check_steps import Step
from ...tools.verify.verify_report import FAILED, IMPOSSIBLE, NOTHING, PASSED, Report, Rung
from .bar import StepBar

STYLES = {PASSED: "green", FAILED: "bold red", IMPOSSIBLE: "yellow", NOTHING: "dim"}


class LadderProgress(StepBar):
    """A watcher (``tools/verify/verify.py``)."""

    def __init__(self) -> None:
        super().__init__(measured=False)

    def start(self, step: Step) -> None:
        """Show the rung that is tried now."""
        self.show(f"{step.name}: {step.compares}")

    def done(self, rung: Rung) -> None:
        """Leave one line behind."""
        self.leave(f"{rung.name:<22} {rung.status:<17}{show_seconds(rung.seconds):>9}")


def report_table(report: Report, where: str) -> RenderableType:
    """Every rung with its largest error, or why there is none; ``where`` the report lies."""
    table = Table("rung", "compares", "result", "largest error", "why")
    for rung in report.rungs:
        worst = rung.worst
        error = ""
        if worst is not None:
            number = "not finite" if worst.relative is None else f"{worst.relative:.1e}"
            error = f"{number} {worst.tensor}"
        status = Text(rung.status, STYLES[rung.status])
        table.add_row(rung.name, rung.compares, status, escape(error), escape(rung.reason))
    return Group(table, Text(f"the whole report: {where}"))


def require_passed(report: Report, where: str) -> None:
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
