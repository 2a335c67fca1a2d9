"""Facts and tables on the terminal, or in a pipe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

PIPE_WIDTH = 160
"""A pipe has no width; tables must not be folded to 80 columns for a program that reads them."""


def show_json(facts: Any) -> None:
    """Print facts as JSON on stdout."""
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def show(table: RenderableType, *, err: bool = False) -> None:
    """Print a table on stdout, or on stderr."""
    from rich.console import Console

    console = Console(stderr=err, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=err, highlight=False, width=PIPE_WIDTH)
    console.print(table)
