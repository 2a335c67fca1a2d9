"""A calibration: its samples, how it goes, and what it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...calib.samples import Sample, read_samples, samples_file
from ...compile.checkpoint.known_models import DEMO
from ...graphs.errors import DataError, PlanError, TargetError
from ...graphs.quantization import QUANTISED, QuantConfig, is_quantised, parse_quant_config
from ...pages.units import show_seconds
from .bar import StepBar

if TYPE_CHECKING:
    from ...compile.quantize.calibration_file import Calibration

CALIBRATION_SCENES = 120
"""Scenes read unless told otherwise."""

DEMO_SERIES = 1000
"""The series of held-out scenes that calibrates the demo. Evaluations ask series 0, and a scene of
one is not in the other (tests/calib/test_calibrate.py)."""

MOST_SHOWN = 5
"""Unreadable pictures listed; calibration.json has all of them."""


def calibration_samples(
    model: str, data: Path | None, count: int | None
) -> tuple[list[Sample], tuple[str, ...]]:
    """Samples, with answers or without, and the names of the files that they are from.

    Raises:
        DataError: unusable data, or none for a model that brings none.
    """
    if data is not None:
        return read_samples(data, count, answers=False), (samples_file(data).name,)
    if model != DEMO:
        raise DataError(
            f"there are no samples for model '{model}' in this package, only for '{DEMO}'. Give "
            "pictures and prompts of the kind that it will be asked: --data questions.jsonl"
        )
    from ...demo.heldout import held_out

    made = enumerate(held_out(count or CALIBRATION_SCENES, DEMO_SERIES))
    return [
        Sample(f"scene {number}", one.image, one.question, one.answer, one.kind)
        for number, one in made
    ], (f"demo scenes, series {DEMO_SERIES}",)


def goal_or_plan(plan: str | None, **goal: Any) -> Any:
    """The plan that was named, or how to choose one: a ``calib.plan_search.chooser.Wish``.

    goal: ``lose``, ``cost``, ``holdout``, ``most`` and ``precision``, None where not typed.

    Raises:
        PlanError: both, or a budget that is none.
        TargetError: a precision that plans are not measured in.
    """
    typed = {name: value for name, value in goal.items() if value is not None}
    if plan is not None:
        if typed:
            option = {"most": "candidates"}.get(next(iter(typed)), next(iter(typed)))
            raise PlanError(
                f"found --{option} beside --plan {plan}, expected one of the two: a plan that is "
                f"named is not chosen. Leave out --{option} or --plan."
            )
        return plan
    from ...calib.plan_search.choose import Budget
    from ...calib.plan_search.chooser import SelectionGoal

    if "precision" in typed:
        typed["recipe"] = _quant_config(typed.pop("precision"))
    limits = {name: typed.pop(name) for name in ("lose", "cost") if name in typed}
    return SelectionGoal(Budget(**(limits or {"lose": 0.01})), **typed)


def _quant_config(precision: str) -> QuantConfig | None:
    """Of a quantised precision; None: FP32."""
    if precision == "fp32":
        return None
    if not is_quantised(precision):
        raise TargetError(
            f"--precision {precision}: plans are measured on this machine's CPU, in fp32, "
            f"{', '.join(QUANTISED)}, or a recipe such as int8:vision=float. For the FP16 graphs "
            "of a GPU choose in fp32: leave --precision out"
        )
    return parse_quant_config(precision)


class CalibrationProgressBar(StepBar):
    """A ``calib.progress.Watcher`` on stderr."""

    def start(self, step: str, total: int | None) -> None:
        """Show the step that runs now."""
        self.show(step, total)

    def done(self, step: str, seconds: float, outcome: str) -> None:
        """Leave one line behind."""
        self.leave(f"{step:<40} {show_seconds(seconds):>9}   {outcome}")


def calibration_facts(folder: Path, calibration: Calibration) -> dict[str, Any]:
    """What ``--json`` prints; the ranges themselves are in the folder."""
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
        "next": next_command(folder, calibration),
    }


def next_command(folder: Path, calibration: Calibration) -> str:
    """What to type to use it."""
    dummy = calibration.model.endswith("-dummy")
    model = calibration.model.removesuffix("-dummy")
    chosen = calibration.choice.get("precision", "fp32")
    precision = chosen if is_quantised(chosen) else "int8"
    named = f"MODEL={model}{' DUMMY=1' if dummy else ''} PRECISION={precision}"
    return f"make engines {named} CALIB={folder}"


def calibration_table(folder: Path, calibration: Calibration) -> RenderableType:
    """The plan with its reasons, what else was tried, doubts, and what to do next."""
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
        parts.append(Text(f"{len(samples.unreadable)} pictures could not be read, count nowhere:"))
        parts += [Text(f"  {name}: {why}") for name, why in samples.unreadable[:MOST_SHOWN]]
    found = calibration_warnings(calibration)
    if found:
        parts.append(Text("before you trust it:"))
        parts += [Text(f"  - {one}") for one in found]
    parts.append(Text(f"read first: {folder / CALIBRATION_PAGE}"))
    parts.append(Text(f"then: {next_command(folder, calibration)}"))
    return Group(*parts)


def _candidates(choice: Any) -> Table:
    table = Table("plan", "t", "K", "e", "visual FLOPs", "choosing", "held out", "verdict")
    for column in table.columns[1:7]:
        column.justify = "right"
    for number, one in enumerate(choice["candidates"]):
        held = one["held_out"]
        table.add_row(
            one["text"],
            str(one["t"]),
            "" if one["keep"] is None else str(one["keep"]),
            str(one["e"]),
            f"{100 * one['cost']:.1f} %",
            _agreement(one["measured"]["tokens"]),
            _agreement(held["tokens"]) if held else "",
            one["verdict"],
            style="bold" if number == choice["chosen"] else None,
        )
    return table


def _agreement(tokens: Any) -> str:
    low, high = 100 * tokens["low"], 100 * tokens["high"]
    return f"{100 * tokens['share']:.1f} % ({low:.1f} to {high:.1f})"
