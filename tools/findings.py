"""Findings that are told first: pruning changed an answer or made it slower, times mean nothing."""

from __future__ import annotations

from collections.abc import Mapping

SLOWER = 1.05
"""Times as long from which a plan counts as slower; less is the noise of two runs."""


def findings(
    times: Mapping[str, tuple[float, float]],
    answers: tuple[str, str] | None = None,
    beside: str = "the unpruned model",
) -> list[str]:
    """Return a sentence for each thing that pruning should not have done.

    Args:
        times: milliseconds with the plan and ``beside``, by what they are times of.
        answers: with the plan and ``beside``, where they differ.
        beside: what the plan is compared with.
    """
    found = []
    if answers is not None:
        found.append(f"Pruning changed the answer: {answers[0]!r}, {beside} says {answers[1]!r}.")
    slower = [
        f"{name} {ours:.1f} ms for {theirs:.1f} ms"
        for name, (ours, theirs) in times.items()
        if theirs > 0 and ours > SLOWER * theirs
    ]
    if slower:
        found.append(f"Slower than {beside}: {', '.join(slower)}.")
    return found
