"""An evaluation: its progress and its table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ...graphs.errors import VisistageError
from ...graphs.foreign_text import shortened
from ...graphs.progress import Advance
from .output import console, note, say, silent

if TYPE_CHECKING:
    from ...calib.answer_file import AnswerFile
    from ...calib.evaluate import EvaluationReport
    from ...calib.samples import Sample

MOST_SHOWN = 5
"""Wrong answers and samples that could not be asked listed; ``--json`` has all of them."""


@contextmanager
def counting(total: int, doing: str = "asking") -> Iterator[Advance]:
    """Show a bar on stderr that moves with every call; nothing where there is no terminal."""
    shown = console(err=True)
    with Progress(console=shown, transient=True, disable=silent(shown)) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda units: bar.advance(task, units)


def unfinished(key: Any) -> AnswerFile | None:
    """Return the file here that keeps answers until an evaluation is done; None if it cannot be."""
    from ...calib.answer_file import AnswerFile

    name = f"evaluate-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}.partial.jsonl"
    try:
        return AnswerFile(Path(name), key)
    except VisistageError as error:
        say(f"{error}; if this run is stopped, the next one begins anew", err=True)
        return None


def tell_refused(refused: Sequence[tuple[str, str]], of: int) -> None:
    """Name the first samples that cannot be asked, before hours are spent on the others."""
    if refused:
        note(f"{len(refused)} of {of} samples cannot be asked and count nowhere:")
        for name, why in refused[:MOST_SHOWN]:
            note(f"  {name}: {shortened(why)}")


def tell_known(kept: AnswerFile | None, samples: Sequence[Sample]) -> None:
    """Say how many answers an earlier run left."""
    known = sum(kept.find(sample) is not None for sample in samples) if kept else 0
    if kept and known:
        note(f"{known} of {len(samples)} answers are in {kept.file} already")


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
        lines.append(f"{len(report.unreadable)} samples could not be asked and count nowhere:")
        lines += [f"  {name}: {why}" for name, why in report.unreadable[:MOST_SHOWN]]
    return Group(table, *(Text(line) for line in lines))
