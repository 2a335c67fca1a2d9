"""A template and its styles -> one HTML file that needs nothing else: no server, no network.

Every page fills the blocks of ``base.html``, whose content security policy forbids all requests.
Templates escape every string. Charts and styles are put in as they are: ``chart`` escapes what it
is given, styles are files of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from ..graphs.errors import CapacityError
from ..graphs.files import check_place, write_to_place
from .chart import STYLES
from .units import flops, ms, percent, ranges, show_bytes

PAGES_FOLDER = Path(__file__).parent

FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "ms": ms,
    "flops": flops,
    "bytes": show_bytes,
    "ranges": ranges,
}
"""Filters of numbers for templates."""


def render_page(
    folder: Path, facts: Mapping[str, Any], *, charts: bool = False, **filters: Callable[..., str]
) -> str:
    """Return what ``page.html`` and ``page.css`` in ``folder`` make of ``facts``.

    A template refuses what it does not know. ``charts``: whether the page has any (``chart``).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, PAGES_FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS | filters
    shared = STYLES if charts else ("base.css",)
    styles = [*(PAGES_FOLDER / name for name in shared), folder / "page.css"]
    style = "\n".join(file.read_text(encoding="utf-8") for file in styles)
    return environment.get_template("page.html").render(facts, style=style)


def check_page_place(path: Path, hint: str) -> None:
    """Refuse a place for a page before the work that fills it; see ``write_page``."""
    _at_place(path, hint, check_place)


def write_page(html: str, path: Path, hint: str) -> None:
    """Put a page at ``path``, whole or not at all; of a link at its target, or through a pipe.

    Raises:
        CapacityError: it cannot be written there; ``hint`` is what to type instead.
    """
    _at_place(path, hint, lambda place: write_to_place(place, html))


def _at_place(path: Path, hint: str, do: Callable[[Path], Any]) -> None:
    try:
        do(path)
    except OSError as error:
        raise CapacityError(
            f"the page cannot be written to {path}: {error.strerror}. "
            f"Name a file in a folder that exists: {hint}"
        ) from error
