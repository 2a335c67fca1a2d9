"""Cells, columns and tables of Markdown, made from the rows of records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Cell = Callable[[Row], str]
Columns = Sequence[tuple[str, Cell]]


def cell(path: str, form: str = "", unit: str = "", times: float = 1) -> Cell:
    """Return what formats the value at ``path`` (``per_token.median``), if there is one."""

    def text(row: Row) -> str:
        value: Any = row
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            return ""
        return f"{value if times == 1 else value * times:{form}}{unit}"

    return text


def code(*paths: str) -> Cell:
    """Return what shows the first value as code, the others after it."""
    first, *others = (cell(path) for path in paths)
    return lambda row: ", ".join([f"`{first(row)}`", *(other(row) for other in others)])


def percent(path: str) -> Cell:
    """Return what shows a share."""
    return cell(path, ".1f", " %", 100)


def mean_of(path: str) -> Cell:
    """Return what shows a mean over the questions: a whole number where the plan fixes it."""
    fixed, varying = cell(path, ".0f"), cell(path, ".2f")
    return lambda row: (fixed if row.get("kind", "static") == "static" else varying)(row)


def table(columns: Columns, rows: Iterable[Row]) -> str:
    """Return the Markdown of ``rows``."""
    lines = [
        [title for title, _ in columns],
        ["---", *("---:" for _ in columns[1:])],
        *([text(row) for _, text in columns] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
