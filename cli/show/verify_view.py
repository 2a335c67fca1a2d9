"""The table of a verification."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...graphs.errors import ParityError
from ...tools.verify.verify_report import FAILED, IMPOSSIBLE, NOTHING, PASSED, VerifyReport

STYLES = {PASSED: "green", FAILED: "bold red", IMPOSSIBLE: "yellow", NOTHING: "dim"}


def verify_table(report: VerifyReport, where: str) -> RenderableType:
    """Tabulate every check with its largest error, or why there is none.

    ``where``: the report's file.
    """
    table = Table("check", "compares", "result", "largest error", "why")
    for record in report.checks:
        worst = record.worst
        error = ""
        if worst is not None:
            number = "not finite" if worst.relative is None else f"{worst.relative:.1e}"
            error = f"{number} {worst.tensor}"
        status = Text(record.status, STYLES[record.status])
        table.add_row(record.name, record.compares, status, error, record.reason)
    return Group(table, Text(f"the whole report: {where}"))


def require_passed(report: VerifyReport, where: str, again: str) -> None:
    """Raise for the first check that failed; ``again`` is the command that builds the bundle.

    Raises:
        ParityError: names the check, what was found and expected, and the report.
    """
    failed = report.failed
    if failed is not None:
        raise ParityError(
            f"check '{failed.name}' failed ({failed.compares}): {failed.reason}. Expected: "
            f"{failed.rule}. Build the bundle again and verify it: {again}; the "
            f"whole report: {where}"
        )
