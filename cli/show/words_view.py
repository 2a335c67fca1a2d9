"""Words that an image's rows resemble, as ``visistage words`` shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...calib.words import Word


def words_facts(model: str, images: int, words: Sequence[Word]) -> dict[str, Any]:
    """Return what was found, as JSON."""
    return {"model": model, "images": images, "words": [asdict(word) for word in words]}


def words_table(facts: dict[str, Any]) -> RenderableType:
    """Tabulate the same facts."""
    table = Table("id", "text", "rows", "images", "length", "attention")
    for column in (0, 2, 3, 4, 5):
        table.columns[column].justify = "right"
    for word in facts["words"]:
        table.add_row(
            str(word["id"]),
            Text(repr(word["text"])),
            f"{word['share']:.1%}",
            f"{word['images']:.0%}",
            f"{word['norm']:.2f}",
            f"{word['attention']:.2f}",
        )
    ids = "-".join(str(id_) for id_ in sorted(word["id"] for word in facts["words"][:2]))
    told = f"Of {facts['images']} images. A plan: embedlens:targets={ids}"
    return Group(table, Text(told, style="dim"))
