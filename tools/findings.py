"""Findings that are told first: pruning changed answers, or made them slower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.answer import Answer

SLOWER = 1.05
"""Times as long from which a plan counts as slower; less is the noise of two runs."""


@dataclass(frozen=True)
class AnswerPair:
    """The answers to one question: with pruning, and the unpruned model's."""

    question: str
    pruned: Answer
    dense: Answer

    @property
    def same(self) -> bool:
        """Return whether they are equal, token for token."""
        return self.pruned.tokens == self.dense.tokens


def answer_words(answer: Answer) -> dict[str, Any]:
    """Return an answer's text, tokens and end as plain data."""
    return {"text": answer.text, "tokens": list(answer.tokens), "finish": answer.finish}


def changed_answers(pairs: Sequence[AnswerPair]) -> list[str]:
    """Return a sentence on the answers that pruning changed, with the first; none if none did."""
    changed = [pair for pair in pairs if not pair.same]
    if not changed:
        return []
    first = changed[0]
    said = f"{first.pruned.text!r}, the unpruned model says {first.dense.text!r}."
    if len(pairs) == 1:
        return [f"Pruning changed the answer: {said}"]
    count = f"{len(changed)} of {len(pairs)}"
    return [f"Pruning changed {count} answers. The first, to {first.question!r}: {said}"]


def slower(
    times: Mapping[str, tuple[float, float]], beside: str = "the unpruned model"
) -> list[str]:
    """Return a sentence on the times that pruning made longer; none if it made none so.

    Args:
        times: milliseconds with the plan and ``beside``, by what they are times of.
        beside: what the plan is compared with.
    """
    longer = [
        f"{name} {ours:.1f} ms for {theirs:.1f} ms"
        for name, (ours, theirs) in times.items()
        if theirs > 0 and ours > SLOWER * theirs
    ]
    return [f"Slower than {beside}: {', '.join(longer)}."] if longer else []
