"""What a question returns: the text, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Timings:
    """Milliseconds. ``first_token_ms`` counts from the call to the first token, pictures included.

    ``graphs_ms`` is the time inside each graph until the first token; a picture that was opened
    before costs nothing here.
    """

    preprocess_ms: float
    graphs_ms: dict[str, float]
    first_token_ms: float
    per_token_ms: float | None  # mean over the tokens after the first; None with one token
    total_ms: float


@dataclass(frozen=True)
class PlanFacts:
    """How the plan treated this prompt.

    ``visual_tokens``: of all images, as they entered; ``kept``: their positions after the last
    selection (None in a plan without one, or without an image).
    """

    plan: str
    trigger: int
    exit: int
    visual_tokens: int
    prompt_rows: int
    kept: tuple[int, ...] | None


@dataclass(frozen=True)
class Answer:
    """An answer; ``str(answer)`` is its text.

    ``finish``: "eos" (the model ended it), "stop" (a stop string) or "length" (max_tokens).
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    timings: Timings
    plan: PlanFacts = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)
