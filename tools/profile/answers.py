"""Answers of a pruned bundle beside the unpruned model's: time saved by other answers is none.

Both are asked about the package's images, as ``infer`` would ask. What is timed would not do: soft
noise, and answers without end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compile.checkpoint.known_models import DEMO
from ...demo.gallery import demo_questions, general_questions
from ..findings import AnswerPair, answer_words

if TYPE_CHECKING:
    from ...graphs.bundle import Bundle
    from ...graphs.progress import Progress
    from ...runtime.answer import Answer
    from ...runtime.session import Session

GENERAL = 4
"""Questions to a model that the package has none for: a large one takes long over each."""

MAX_TOKENS = 32
"""Tokens of an answer that are compared."""

ImageQuestion = tuple[Path, str]
"""An image and a question about it."""


def image_questions(model: str) -> list[ImageQuestion]:
    """Return the package's questions for ``model``: the demo's own, or general ones."""
    return demo_questions() if model == DEMO else general_questions(GENERAL)


def answers_to(
    questions: Sequence[ImageQuestion], session: Session, progress: Progress
) -> list[Answer]:
    """Ask greedily; answers end as the model ends them, or after ``MAX_TOKENS``.

    Raises:
        VisistageError: as ``Session.infer``.
    """
    sampling = replace(session.sampling, temperature=0.0)
    answers = []
    for image, text in questions:
        answers.append(session.infer(image, text, max_tokens=MAX_TOKENS, sampling=sampling))
        progress.advance()
    return answers


def answer_pairs(
    questions: Sequence[ImageQuestion], pruned: Sequence[Answer], dense: Sequence[Answer]
) -> list[AnswerPair]:
    """Put both answers to each question side by side."""
    asked = zip(questions, pruned, dense, strict=True)
    return [AnswerPair(text, ours, theirs) for (_, text), ours, theirs in asked]


def comparison_facts(
    questions: Sequence[ImageQuestion], pairs: Sequence[AnswerPair], dense: Bundle
) -> dict[str, Any]:
    """Return every question with both answers, and how many of them pruning changed."""
    return {
        "dense": dense.path.resolve().name,
        "asked": len(pairs),
        "changed": sum(not pair.same for pair in pairs),
        "questions": [
            {
                "image": image.name,
                "question": text,
                "plan": answer_words(pair.pruned),
                "dense": answer_words(pair.dense),
                "same": pair.same,
            }
            for (image, text), pair in zip(questions, pairs, strict=True)
        ],
    }
