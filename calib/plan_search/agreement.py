"""Agreement of a plan with the dense model, token for token, through the public runtime.

``dense_answers`` asks the dense bundle once; ``agreement`` forces another bundle along those
answers, so that one early difference does not count again in every later token. What the other
bundle would answer by itself shows as well: greedily, it agrees until the first token that differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graphs.progress import Advance, no_advance
from ..evaluate import Share
from ..samples import Sample

if TYPE_CHECKING:
    from ...runtime import Session

TOP_TOKENS = 256
"""Tokens whose probabilities are kept of each position. All others count as one, so that the
divergence is at most the true one; a reference of long answers stays small."""


@dataclass(frozen=True)
class Agreement:
    """The share of predictions that are those of the dense model.

    tokens: of the dense answers, each predicted from the dense answer before it. The end of an
    answer is left out, unless the answer is empty: after a one-word answer every plan stops, and
    counting that would halve every loss. answers: that a greedy run would give whole, end
    included. kl: mean nats per predicted token, end included, from dense to this model.
    divergences: for each prompt the first token that differs, None where none does.
    """

    tokens: Share
    answers: Share
    kl: float
    divergences: tuple[int | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form; divergences counted by token."""
        found = Counter(at for at in self.divergences if at is not None)
        return {
            "prompts": len(self.divergences),
            "tokens": self.tokens.to_dict(),
            "answers": self.answers.to_dict(),
            "kl": self.kl,
            "divergences": {str(at): found[at] for at in sorted(found)},
        }


@dataclass(frozen=True)
class DenseAnswer:
    """One dense answer.

    tokens: (T,) ids, the end included where the model ended it (``ended``).
    ids: (T, R) int32, the top tokens of each position, descending; log_probs: theirs, (T, R)
    float32.
    """

    sample: Sample
    tokens: tuple[int, ...]
    ended: bool
    ids: np.ndarray
    log_probs: np.ndarray

    @property
    def counted(self) -> int:
        """Number of tokens that count."""
        return max(len(self.text_tokens), 1)

    @property
    def text_tokens(self) -> tuple[int, ...]:
        """Tokens without the end; none where the model said nothing."""
        return self.tokens[: -1 if self.ended else None]


def dense_answers(
    session: Session, samples: Iterable[Sample], max_tokens: int, advance: Advance = no_advance
) -> tuple[DenseAnswer, ...]:
    """Answer every sample greedily and keep the top tokens at each position.

    The checkpoint's own sampling settings do not count: repetition penalties would make an answer
    that no teacher-forced prediction equals.

    Raises:
        VisistageError: an image that cannot be opened, or a prompt that the bundle cannot take.
    """
    greedy = replace(session.sampling, temperature=0.0, repetition_penalty=1.0)
    answers = []
    for sample in samples:
        answer = session.infer(sample.image, sample.prompt, max_tokens=max_tokens, sampling=greedy)
        logits = session.score(sample.image, sample.prompt, answer.tokens[:-1])
        ids, log_probs = _top_tokens(log_softmax(logits))
        answers.append(DenseAnswer(sample, answer.tokens, answer.finish == "eos", ids, log_probs))
        advance(1)
    return tuple(answers)


def agreement(
    session: Session, answers: Iterable[DenseAnswer], advance: Advance = no_advance
) -> Agreement:
    """Force ``session``'s bundle along dense answers, and compare each prediction.

    Raises:
        VisistageError: a prompt that the bundle cannot take.
    """
    right = total = positions = 0
    kl = 0.0
    divergences: list[int | None] = []
    for dense in answers:
        logits = session.score(dense.sample.image, dense.sample.prompt, dense.tokens[:-1])
        same = logits.argmax(-1) == dense.ids[:, 0]
        right += int(same[: dense.counted].sum())
        total += dense.counted
        divergences.append(None if same.all() else int(np.argmin(same)))
        kl += float(divergence(dense, log_softmax(logits)).sum())
        positions += len(dense.tokens)
        advance(1)
    assert divergences, "nothing to compare with"
    whole = Share(divergences.count(None), len(divergences))
    return Agreement(Share(right, total), whole, kl / positions, tuple(divergences))


def divergence(dense: DenseAnswer, log_probs: np.ndarray) -> np.ndarray:
    """Return KL (T,) in nats from a dense answer to another model's ``log_probs`` (T, V).

    The tokens beyond the dense model's top tokens count as one.
    """
    theirs = np.take_along_axis(log_probs, dense.ids, 1)
    mine = dense.log_probs.astype(np.float64)
    inside = np.exp(mine)
    rest = np.clip(1 - inside.sum(1), 0, 1)
    their_rest = np.clip(1 - np.exp(theirs).sum(1), 1e-12, 1)
    outside = np.where(rest > 0, rest * (np.log(np.maximum(rest, 1e-300)) - np.log(their_rest)), 0)
    # Rounding may leave the sum a hair below zero, which no divergence is.
    return np.maximum((inside * (mine - theirs)).sum(1) + outside, 0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return (T, V) log-probabilities in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _top_tokens(log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the top tokens of each position and their log-probabilities, descending."""
    # Stable, so that of equal ones the lowest id comes first, as argmax has it.
    ids = np.argsort(-log_probs, axis=1, kind="stable")[:, :TOP_TOKENS]
    found = np.take_along_axis(log_probs, ids, 1)
    return ids.astype(np.int32), found.astype(np.float32)
