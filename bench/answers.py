"""Numbers of answers: how far they agree, and how their times spread."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import mean

from .runner import Answered


def agreement(
    answers: dict[tuple[int, str], Answered],
    wanted: dict[tuple[int, str], Answered],
    ends: Collection[int] = (),
) -> dict[str, float] | None:
    """How long answers begin as the reference's do, and how many are equal; None without any.

    Once a token differs the rest answers another beginning, so only what precedes it counts; nor
    does what the reference says past its end, one of the ids ``ends``.
    """
    both = [key for key in answers if key in wanted]
    if not both:
        return None
    shares = []
    for key in both:
        told = wanted[key].tokens
        end = next((at for at, token in enumerate(told) if token in ends), len(told))
        shares.append(leading(answers[key].tokens[: end + 1], told[: end + 1]))
    return {
        "leading": mean(shares),
        "equal": mean(share == 1 for share in shares),
        "answers": len(both),
    }


def leading(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of tokens before the first that differs."""
    equal = 0
    for mine, theirs in zip(one, other, strict=True):
        if mine != theirs:
            break
        equal += 1
    return equal / len(one)
