"""The table at the end of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...graphs.commands import visistage
from ...graphs.quantization import is_quantised

if TYPE_CHECKING:
    from ...compile.quantize.calibration_file import Calibration

MOST_SHOWN = 5
"""Unreadable images listed; calibration.json has all of them."""


def calibration_facts(folder: Path, calibration: Calibration, next_command: str) -> dict[str, Any]:
    """Return what ``--json`` prints; the ranges themselves are in the folder."""
    from ...calib.page.warnings import calibration_warnings

    return {
        "path": str(folder),
        "hash": calibration.hash,
        "model": calibration.model,
        "plan": calibration.plan.to_dict(),
        "samples": calibration.samples.to_dict(),
        "groups": len(calibration.groups),
        "best_observer": calibration.best_observer,
        "dynamics": dict(calibration.dynamics),
        "choice": dict(calibration.choice),
        "doubts": calibration_warnings(calibration),
        "next": next_command,
    }


def next_command(model: str, folder: Path, calibration: Calibration, **options: Any) -> str:
    """Return the command that uses it: with the plan alone, or in the precision it is for."""
    chosen = calibration.choice.get("precision", "fp32")
    precision = chosen if is_quantised(chosen) else "int8" if calibration.groups else None
    return visistage("build", model, precision=precision, calib=folder, **options)


def calibration_table(folder: Path, calibration: Calibration, next_command: str) -> RenderableType:
    """Show the plan with its rationale, other candidates, warnings, and the next command."""
    from ...calib.page.calibration_page import CALIBRATION_PAGE
    from ...calib.page.warnings import calibration_warnings

    samples, choice = calibration.samples, calibration.choice
    lines = [f"plan {choice.get('text', calibration.plan.name)}"]
    lines += [f"  {why}" for why in dict.fromkeys(choice.get("reasons", {}).values())]
    parts: list[RenderableType] = []
    if choice.get("candidates"):
        parts.append(_candidates(choice))
    parts += [Text(line) for line in lines]
    if "shipped" in choice:
        shipped = choice["shipped"]
        asked = "held-out" if shipped["samples"] == "held_out" else "choosing"
        agrees = _agreement(shipped["tokens"])
        parts.append(Text(f"as it ships, {choice['precision']}: {agrees} on {asked} samples"))
    suggested = calibration.dynamics.get("suggested")
    if suggested:
        parts.append(Text(f"per prompt instead: {suggested['plan']}, not measured"))
    if samples.unreadable:
        parts.append(Text(f"{len(samples.unreadable)} samples could not be used, count nowhere:"))
        parts += [Text(f"  {name}: {why}") for name, why in samples.unreadable[:MOST_SHOWN]]
    found = calibration_warnings(calibration)
    if found:
        parts.append(Text("before you trust it:"))
        parts += [Text(f"  - {warning}") for warning in found]
    parts.append(Text(f"read first: {folder / CALIBRATION_PAGE}"))
    parts.append(Text(f"then: {next_command}"))
    return Group(*parts)


def _candidates(choice: Any) -> Table:
    costs, agreed = ("visual FLOPs", "2nd question"), ("choosing", "held out")
    table = Table("plan", "t", "K", "e", *costs, *agreed, "verdict")
    for column in table.columns[1:8]:
        column.justify = "right"
    for number, one in enumerate(choice["candidates"]):
        held = one["held_out"]
        table.add_row(
            one["text"],
            str(one["t"]),
            "" if one["keep"] is None else str(one["keep"]),
            str(one["e"]),
            f"{100 * one['cost']:.1f} %{_ms(one, 'first_ms')}",
            f"{100 * one['second']:.0f} %{_ms(one, 'second_ms')}" if "second" in one else "",
            _agreement(one["measured"]["tokens"]),
            _agreement(held["tokens"]) if held else "",
            one["verdict"],
            style="bold" if number == choice["chosen"] else None,
        )
    return table


def _ms(one: Any, name: str) -> str:
    return f", {one[name]:.1f} ms" if name in one else ""


def _agreement(tokens: Any) -> str:
    low, high = 100 * tokens["low"], 100 * tokens["high"]
    return f"{100 * tokens['share']:.1f} % ({low:.1f} to {high:.1f})"
