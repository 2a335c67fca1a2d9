"""The checks of a Jetson as a table, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from ...runtime.jetson import board_checks


def board_facts() -> dict[str, Any]:
    """Return every check of this machine, with bundles in the working directory."""
    checks = board_checks(Path())
    return {
        "ready": all(check.advice is None for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def board_table() -> RenderableType:
    """Tabulate the same facts."""
    table = Table("check", "found", "what to do")
    for check in board_facts()["checks"]:
        table.add_row(check["name"], check["found"], check["advice"] or "ok")
    return table
