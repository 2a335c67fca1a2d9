"""What a ladder found: rungs, errors by tensor, machine; as JSON and as a page. Standard library.

Nothing in it names the machine or its user, so that a report may travel with the bundle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...graphs.errors import BundleError

VERIFY_FORMAT = 1
JSON_FILE, PAGE_FILE = "verify.json", "verify.md"

PASSED, FAILED = "passed", "failed"
IMPOSSIBLE = "impossible here"
NOTHING = "nothing to check"

MOST_ERRORS = 20
"""Tensors listed on the page; the JSON has all of them."""


@dataclass(frozen=True)
class TensorError:
    """How far a tensor is from the same tensor one rung below.

    ``largest``: of all elements; ``spread``: standard deviation of the reference; ``relative``:
    largest / spread; all None where a value is not finite.
    """

    tensor: str
    largest: float | None
    spread: float | None
    relative: float | None


@dataclass(frozen=True)
class CheckResult:
    """What running a rung showed.

    Attributes:
        failure: the first thing that is wrong; empty where the rung passed.
        files: which files of the bundle ran or were read.
        errors: by tensor, where tensors were compared.
        facts: whatever else was counted, plain JSON.
    """

    failure: str = ""
    files: tuple[str, ...] = ()
    errors: tuple[TensorError, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckRecord:
    """One rung of a report.

    ``reason`` says why it failed or was not run; ``rule`` is when it passes.
    """

    name: str
    compares: str
    rule: str
    status: str
    reason: str
    seconds: float
    files: tuple[str, ...] = ()
    errors: tuple[TensorError, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> TensorError | None:
        """The tensor with the largest relative error; one that is not finite before all others."""
        return max(self.errors, key=_badness, default=None)


@dataclass(frozen=True)
class VerifyReport:
    """A whole ladder; see the module."""

    bundle: dict[str, Any]
    rungs: tuple[CheckRecord, ...]
    versions: dict[str, str]
    machine: dict[str, Any]

    @property
    def failed(self) -> CheckRecord | None:
        """The first rung that failed."""
        return next((record for record in self.rungs if record.status == FAILED), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {"format": VERIFY_FORMAT, "passed": self.failed is None, **asdict(self)}

    def write(self, folder: Path) -> None:
        """Leave both forms in ``folder``, each complete or not there at all.

        Raises:
            BundleError: the folder cannot be written.
        """
        data = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        for name, text in ((JSON_FILE, data + "\n"), (PAGE_FILE, page(self))):
            temporary = folder / f"{name}.partial"
            try:
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, folder / name)
            except OSError as error:
                raise BundleError(
                    f"the report {folder / name} cannot be written ({error.strerror}). Verify a "
                    "copy of the bundle in a folder that you may write to"
                ) from error


def page(report: VerifyReport) -> str:
    """The report in Markdown."""
    failed = report.failed
    head = "Every rung that ran passed."
    if failed is not None:
        head = f"**Failed: {failed.name}.** {failed.reason}"
    bundle = ", ".join(f"{name} {value}" for name, value in report.bundle.items())
    out = ["# Verification", "", head, "", f"Bundle: {bundle}.", "", "## Rungs", ""]
    out += _table(
        ("rung", "compares", "result", "largest error", "seconds"),
        [
            (
                record.name,
                record.compares,
                record.status,
                _brief(record.worst),
                f"{record.seconds:.1f}",
            )
            for record in report.rungs
        ],
    )
    for title, status in (
        ("Failed", FAILED),
        ("Impossible here", IMPOSSIBLE),
        ("Nothing to check", NOTHING),
    ):
        chosen = [record for record in report.rungs if record.status == status]
        if chosen:
            out += ["", f"## {title}", ""]
            out += [f"- {record.name}: {record.reason}" for record in chosen]
    out += ["", "## What ran, and when it passes", ""]
    for record in report.rungs:
        if record.status in (PASSED, FAILED):
            out += [f"- {record.name}: {record.rule}"]
            out += [f"  - files: {', '.join(record.files)}"] if record.files else []
            out += [f"  - {name}: {_plain(value)}" for name, value in record.facts.items()]
    errors = sorted(
        ((record, error) for record in report.rungs for error in record.errors),
        key=lambda pair: _badness(pair[1]),
        reverse=True,
    )
    out += ["", "## Largest errors by tensor", ""]
    out += [f"The first {MOST_ERRORS} of {len(errors)}; relative to the reference's spread.", ""]
    out += _table(
        ("rung", "tensor", "largest error", "spread", "relative"),
        [
            (record.name, e.tensor, _number(e.largest), _number(e.spread), _number(e.relative))
            for record, e in errors[:MOST_ERRORS]
        ],
    )
    out += ["", "## Versions and machine", ""]
    out += _table(("", ""), [*report.versions.items(), *report.machine.items()])
    return "\n".join(out) + "\n"


def _badness(error: TensorError) -> float:
    return float("inf") if error.relative is None else error.relative


def _brief(error: TensorError | None) -> str:
    return f"{_number(error.relative)} ({error.tensor})" if error else ""


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    def line(cells: Iterable[Any]) -> str:
        texts = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(texts)} |"

    return [line(head), line("---" for _ in head), *(line(row) for row in rows)]
