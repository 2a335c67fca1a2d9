"""Answers and times of a plan -> the row of a comparison, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...calib.answer_file import Heard
from ...calib.evaluate import UNTYPED, Share
from ...calib.samples import Sample, normalise_answer
from ...calib.two_turns import Turns
from ...compile.matched_bundles import ComparedPlan
from ..profile.timing import Spread
from .asking import Pair

Row = dict[str, Any]

APART = ("reading", "yes/no")
"""Kinds of questions that are shown first: pruning hurts them most."""


MOST_NAMED = 4
"""Methods that a finding names; more are counted, the table has them."""


def row_facts(
    plan: ComparedPlan,
    turns: Sequence[Turns],
    pairs: Sequence[Pair],
    dense: Sequence[Pair],
    times: Mapping[str, Spread],
) -> Row:
    """Return the row of one plan; ``pairs`` and ``dense`` are its answers and the dense plan's.

    Accuracies and agreements are of first questions, those in ``second`` of second ones.
    """
    first = [(turn.first, pair[0]) for turn, pair in zip(turns, pairs, strict=True)]
    second = [
        (turn.second, pair[1])
        for turn, pair in zip(turns, pairs, strict=True)
        if turn.second is not None and pair[1] is not None
    ]
    theirs = [pair[0] for pair in dense]
    theirs_second = [pair[1] for pair in dense if pair[1] is not None]
    manifest = plan.bundle.manifest
    text = manifest.config.text
    row_bytes = 2 * text.kv_heads * text.head_dim * manifest.cache_element_bytes
    rows = mean([heard.visual_rows for _, heard in first if heard.visual_rows is not None])
    shares = [heard.flops_share for _, heard in first if heard.flops_share is not None]
    return {
        "method": plan.method,
        "plan": plan.plan,
        "weights": plan.weights,
        "bundle": plan.bundle.path.name,
        "control": plan.control,
        "target": plan.target,
        "visual_flops_share": plan.share if plan.share is not None else mean(shares),
        "accuracy": accuracy(first).to_dict(),
        "by_type": {kind: share.to_dict() for kind, share in by_type(first).items()},
        "agreement": agreement([heard for _, heard in first], theirs).to_dict(),
        "second": {
            "accuracy": accuracy(second).to_dict(),
            "by_type": {kind: share.to_dict() for kind, share in by_type(second).items()},
            "agreement": agreement([heard for _, heard in second], theirs_second).to_dict(),
            "on_cached_image": sum(heard.encoded is False for _, heard in second),
        }
        if second
        else None,
        **{figure: asdict(spread) for figure, spread in times.items()},
        "visual_kv_bytes": None if rows is None else rows * row_bytes,
    }


def is_right(sample: Sample, heard: Heard) -> bool:
    """Return whether an answer is the expected one, as an evaluation counts it."""
    return normalise_answer(heard.text) == normalise_answer(sample.answer)


def accuracy(asked: Iterable[tuple[Sample, Heard]]) -> Share:
    """Return how many answers are right."""
    marks = [is_right(sample, heard) for sample, heard in asked]
    return Share(sum(marks), len(marks))


def by_type(asked: Sequence[tuple[Sample, Heard]]) -> dict[str, Share]:
    """Return how many are right of each kind of question, those of ``APART`` first."""
    own: dict[str, list[tuple[Sample, Heard]]] = {}
    for sample, heard in asked:
        own.setdefault(sample.type or UNTYPED, []).append((sample, heard))
    ordered = [kind for kind in APART if kind in own] + sorted({*own} - {*APART})
    return {kind: accuracy(own[kind]) for kind in ordered}


def agreement(ours: Sequence[Heard], theirs: Sequence[Heard]) -> Share:
    """Return how many answers have the text of the dense model's."""
    same = sum(a.text == b.text for a, b in zip(ours, theirs, strict=True))
    return Share(same, len(ours))


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of no values."""
    return sum(values) / len(values) if values else None


def targets(rows: Sequence[Row]) -> list[float | None]:
    """Return the shares that rows were brought to, ascending; None last, for rows that were not."""
    found = {row["target"] for row in rows[1:]}
    return [*sorted(found - {None}), *([None] if None in found else [])]


def at_target(rows: Sequence[Row], target: float | None) -> list[Row]:
    """Return the rows at a share of the visual FLOPs, the most accurate first."""
    own = [row for row in rows[1:] if row["target"] == target]
    return sorted(own, key=lambda row: -row["accuracy"]["share"])


def several_weights(rows: Sequence[Row]) -> bool:
    """Return whether some plan runs with weights that were trained for its method."""
    return len({row["weights"] for row in rows}) > 1


def findings(rows: Sequence[Row]) -> list[str]:
    """Return bad news in sentences: methods that a control equals, and images computed again."""
    found = []
    for target in targets(rows):
        own = at_target(rows, target)
        controls = [row for row in own if row["control"]]
        if target is None or not controls:
            continue
        best = controls[0]
        beaten = [
            row["method"]
            for row in own
            if not row["control"] and row["accuracy"]["share"] <= best["accuracy"]["share"]
        ]
        if beaten:
            count = f"{len(beaten)} of {sum(not row['control'] for row in own)} methods"
            found.append(
                f"At {100 * target:g} % of the visual FLOPs the control {best['method']} "
                f"({100 * best['accuracy']['share']:.1f} %) is at least as accurate as "
                f"{', '.join(beaten) if len(beaten) <= MOST_NAMED else count}."
            )
    for row in rows:
        second = row["second"]
        if second and second["on_cached_image"] < second["accuracy"]["total"]:
            found.append(
                f"{row['plan']} computed the image again for "
                f"{second['accuracy']['total'] - second['on_cached_image']} second questions."
            )
    return found
