"""A template and its styles -> one HTML file that needs nothing else: no server, no network.

Templates escape every string. Charts and styles are put in as they are: ``chart`` escapes what it
is given, styles are files of the package.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from ..graphs.errors import CapacityError
from .units import show_bytes
from .words import flops, ms, percent, ranges

PAGES_FOLDER = Path(__file__).parent

FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "ms": ms,
    "flops": flops,
    "bytes": show_bytes,
    "ranges": ranges,
}
"""What templates may write behind a number."""


def template(file: Path, **filters: Callable[..., Any]) -> jinja2.Template:
    """The template in ``file``, which escapes and refuses what it does not know."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(file.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS | filters
    return environment.get_template(file.name)


def style(*files: Path) -> str:
    """The common style, then that of ``files``."""
    every = [PAGES_FOLDER / "base.css", *files]
    return "\n".join(file.read_text(encoding="utf-8") for file in every)


def write_page(html: str, path: Path, hint: str) -> None:
    """Put a page at ``path``, whole or not at all.

    Raises:
        CapacityError: it cannot be written there; ``hint`` is what to type instead.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CapacityError(
            f"the page cannot be written to {path}: {error.strerror}. "
            f"Name a place in a folder that exists: {hint}"
        ) from error
