"""Reasons not to trust a calibration, in plain words: one sentence or two each.

Limits here are judgements about when a person should look twice, not about what is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...compile.quantize.calibration_file import Calibration
from ...pages.units import percent
from ..plan_search.dynamics import PUBLISHED
from .series import by_sensitivity, rows_seen

FEW_SAMPLES = 32
FEW_ROWS = 300
WIDE = 0.05
"""An interval of agreement this wide tells little."""

CLIPPED = 0.25
"""A threshold below this part of the largest input cuts deep."""

LOUD = 0.01
"""A relative squared error of this much is 20 dB below the signal."""


def calibration_warnings(calibration: Calibration) -> list[str]:
    """Return every warning, the gravest kinds first; empty where there is none."""
    return [
        *_about_choice(calibration.choice),
        *_about_samples(calibration),
        *_about_dynamics(calibration.dynamics),
        *_about_ranges(calibration),
    ]


def _about_choice(choice: Mapping[str, Any]) -> Iterator[str]:
    if not choice:
        yield (
            "The plan was given, not chosen: nothing on this page says how well it agrees with the "
            "dense model. Calibrate without --plan, or ask its bundle: visistage evaluate."
        )
        return
    yield from choice["warnings"]
    yield from _about_shipped(choice)
    if not choice["fits"]:
        yield (
            "No pruned plan kept the budget, so the plan is dense: nothing is pruned. A looser "
            "budget or more samples may find one."
        )
        return
    if choice["chosen"] is None:
        return
    chosen = choice["candidates"][choice["chosen"]]
    if chosen["held_out"] is None:
        yield (
            "Nothing was held out: the plan's agreement was measured on the samples that chose "
            "it, so it flatters. Give more samples, or a larger --holdout."
        )
        return
    share = chosen["held_out"][choice["agreement"]]
    # Of a budget of agreement the choice itself says whether it is proved.
    if "cost" in choice["budget"] and share["high"] - share["low"] > WIDE:
        yield (
            f"The agreement of the plan is anywhere between {percent(share['low'], 1)} and "
            f"{percent(share['high'], 1)}: {share['total']} {choice['agreement']} held out are "
            "too few to tell. Give more samples."
        )


def _about_shipped(choice: Mapping[str, Any]) -> Iterator[str]:
    """Warn of a quantised bundle that loses more than it may."""
    if "shipped" not in choice or "lose" not in choice["budget"]:
        return
    kind, lose = choice["agreement"], choice["budget"]["lose"]
    shipped, quantised_agreement = choice["shipped"][kind], choice["rounding"][kind]
    lost, alone = 1 - shipped["share"], 1 - quantised_agreement["share"]
    if lost > lose + 1e-9:
        yield (
            f"As it ships, in {choice['precision']}, the plan loses {percent(lost, 1)} of "
            f"{shipped['total']} {kind}; the budget is {percent(lose, 1)}. On the choosing samples "
            f"rounding alone loses {percent(alone, 1)} of {quantised_agreement['total']}. Leave "
            "sensitive layers in float (keep=5%), or choose a looser budget."
        )


def _about_samples(calibration: Calibration) -> Iterator[str]:
    samples = calibration.samples
    if samples.count < FEW_SAMPLES:
        yield (
            f"Only {samples.count} sample{'s were' if samples.count != 1 else ' was'} read: what "
            "others would show is not in these numbers. Give 64 or more of the kind that the model "
            "will be asked."
        )
    if samples.unreadable:
        yield (
            f"{len(samples.unreadable)} of {samples.count + len(samples.unreadable)} samples could "
            "not be read and count for nothing; they are named below."
        )


def _about_dynamics(dynamics: Mapping[str, Any]) -> Iterator[str]:
    for row in dynamics.get("triggers", ()):
        never = row["t"]["of"] - row["t"]["reached"]
        if row["cosine"] == PUBLISHED.cosine and never:
            yield (
                f"{never} of {row['t']['of']} prompts never triggered at the published cosine "
                f"{row['cosine']:g}: quantiles count them as later than every layer."
            )


def _about_ranges(calibration: Calibration) -> Iterator[str]:
    groups = calibration.groups
    if not groups:
        yield "No ranges were measured: this calibration serves no INT8 bundle."
        return
    if calibration.rows == "dense":
        yield (
            "Ranges are of the dense model's rows, not of those that the plan's stages see: they "
            "are for comparison."
        )
    if calibration.include_prefix:
        yield (
            "Rows before the image count in these ranges, though bundles compute them in float: "
            "they are for comparison."
        )
    for part in rows_seen(groups, calibration.plan):
        # The head sees one row a token, and INT8 bundles leave that row in float.
        if part.rows[0] < FEW_ROWS and part.part != "head":
            yield (
                f"The ranges of {part.part} rest on {part.rows[0]} rows: "
                f"fewer than {FEW_ROWS} miss what is rare. Give more samples."
            )
    observer = calibration.best_observer
    reach = {name: float((group.absmax / group.factors).max()) for name, group in groups.items()}
    cuts = {
        name: groups[name].smoothed_thresholds[observer] / most
        for name, most in reach.items()
        if most > 0
    }
    deep = {name: part for name, part in cuts.items() if part < CLIPPED}
    if deep:
        worst = min(deep, key=deep.__getitem__)
        yield (
            f"The observer {observer} cuts below {percent(CLIPPED)} of the largest input in "
            f"{len(deep)} of {len(groups)} groups, deepest in {worst}: at {percent(deep[worst])}."
        )
    loud = [(name, error) for name, error in by_sensitivity(groups) if error > LOUD]
    if loud:
        name, error = loud[0]
        yield (
            f"INT8 changes the output of {len(loud)} linear layer{'s' if len(loud) > 1 else ''} "
            f"by more than {percent(LOUD)} (squared, relative), most in {name}: {percent(error)}. "
            "Precision int8:keep=5% leaves the worst ones in float."
        )
