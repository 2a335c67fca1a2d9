"""The report of a verification: checks, errors by tensor, machine; as JSON and as a page.

Nothing in it names the machine or its user, so that a report may travel with the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...graphs.errors import BundleError
from ...graphs.files import write_file
from ...graphs.foreign_text import escape_json, printable

VERIFY_FORMAT = 1
JSON_FILE, PAGE_FILE = "verify.json", "verify.md"

PASSED, FAILED = "passed", "failed"
IMPOSSIBLE = "impossible here"
NOTHING = "nothing to check"

MOST_ERRORS = 20
"""Tensors listed on the page; the JSON has all of them."""


class ImpossibleError(Exception):
    """A check that cannot run on this machine; says why."""


class NothingError(Exception):
    """A bundle that holds nothing for a check; says why."""


def require_memory(what: str, needed: int, free: int) -> None:
    """Raise where ``what`` needs more bytes than are free.

    Raises:
        ImpossibleError: has both figures.
    """
    if needed > free:
        raise ImpossibleError(
            f"{what} needs {needed / 2**20:.0f} MiB of memory, {free / 2**20:.0f} MiB are free"
        )


@dataclass(frozen=True)
class TensorError:
    """The distance of a tensor from the same tensor of the check's other side, the reference.

    ``largest``: of all elements, or of the nearer half (``compare.Bounds.share``); ``spread``:
    standard deviation of the reference; ``relative``: largest / spread; all None where a value is
    not finite.
    """

    tensor: str
    largest: float | None
    spread: float | None
    relative: float | None


@dataclass(frozen=True)
class CheckResult:
    """The findings of a check that ran.

    Attributes:
        failure: the first thing that is wrong; empty where the check passed.
        files: the bundle's files that ran or were read.
        errors: by tensor, where tensors were compared.
        facts: everything else that was counted, plain JSON.
    """

    failure: str = ""
    files: tuple[str, ...] = ()
    errors: tuple[TensorError, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckRecord:
    """A check in a report: its status, and the reason where it failed or did not run."""

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
    """All checks of a bundle, and what they ran on."""

    bundle: dict[str, Any]
    checks: tuple[CheckRecord, ...]
    versions: dict[str, str]
    machine: dict[str, Any]

    @property
    def failed(self) -> CheckRecord | None:
        """The first check that failed."""
        return next((record for record in self.checks if record.status == FAILED), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON form."""
        return {
            "format": VERIFY_FORMAT,
            "passed": self.failed is None,
            "bundle": self.bundle,
            "rungs": [asdict(record) for record in self.checks],
            "versions": self.versions,
            "machine": self.machine,
        }

    def write(self, folder: Path) -> None:
        """Write both forms into ``folder``.

        Raises:
            BundleError: the folder cannot be written.
        """
        data = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        for name, text in (
            (JSON_FILE, escape_json(data) + "\n"),
            (PAGE_FILE, printable(page(self))),
        ):
            try:
                write_file(folder / name, text)
            except OSError as error:
                raise BundleError(
                    f"the report {folder / name} cannot be written ({error.strerror}). Verify a "
                    "copy of the bundle in a folder that you may write to"
                ) from error


def page(report: VerifyReport) -> str:
    """Return the report in Markdown."""
    records, failed = report.checks, report.failed
    head = "Every check that ran passed."
    if failed is not None:
        head = f"**Failed: {failed.name}.** {failed.reason}"
    bundle = ", ".join(f"{name} {value}" for name, value in report.bundle.items())
    out = ["# Verification", "", head, "", f"Bundle: {bundle}.", "", "## Checks", ""]
    out += _table(
        ("check", "compares", "result", "largest error", "seconds"),
        [(r.name, r.compares, r.status, _brief(r.worst), f"{r.seconds:.1f}") for r in records],
    )
    for status in (FAILED, IMPOSSIBLE, NOTHING):
        chosen = [record for record in records if record.status == status]
        if chosen:
            out += ["", f"## {status.capitalize()}", ""]
            out += [f"- {record.name}: {record.reason}" for record in chosen]
    out += ["", "## What ran, and when it passes", ""]
    for record in records:
        if record.status in (PASSED, FAILED):
            out += [f"- {record.name}: {record.rule}"]
            out += [f"  - files: {', '.join(record.files)}"] if record.files else []
            out += [f"  - {name}: {_plain(value)}" for name, value in record.facts.items()]
    errors = [(record.name, error) for record in records for error in record.errors]
    errors.sort(key=lambda named: _badness(named[1]), reverse=True)
    out += ["", "## Largest errors by tensor", ""]
    out += [f"The first {MOST_ERRORS} of {len(errors)}; relative to the reference's spread.", ""]
    out += _table(
        ("check", "tensor", "largest error", "spread", "relative"),
        [
            (name, e.tensor, _number(e.largest), _number(e.spread), _number(e.relative))
            for name, e in errors[:MOST_ERRORS]
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
