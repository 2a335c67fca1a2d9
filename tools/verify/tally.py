"""Agreement of whole answers: tokens, logits and what the plan chose, counted over prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .compare import Bounds, first_wrong, tensor_error
from .token_choices import Selection, SelectionMargins, selection_margin
from .verify_report import CheckResult, TensorError


@dataclass(frozen=True)
class Trajectory:
    """A greedy answer: logits (T, V) float32, their likeliest tokens (T,), what the plan chose for
    the prompt, and on what grounds.
    """

    logits: np.ndarray
    tokens: tuple[int, ...]
    selection: Selection
    margins: SelectionMargins


class Tally:
    """Counts agreement over prompts, and says what the first unexplained difference is.

    Where ``bounds`` know no ties, tokens and choices are equal. Otherwise they may differ as near
    ties do: a token where the logits are within the tolerance, a visual token where another scores
    as much within the tie, a probe that reads a threshold within it; then the logits are compared
    with those that the reference has for the same choice.
    """

    def __init__(self, bounds: Bounds):
        self.bounds, self.exact = bounds, not bounds.tie
        self.failure = ""
        self.errors: list[TensorError] = []
        self.places = self.agreed = self.equal = self.reselected = 0
        self.divergences: dict[str, int] = {}

    def add(
        self,
        name: str,
        want: Trajectory,
        logits: np.ndarray,
        selection: Selection,
        free: tuple[int, ...],
        forced_run: Callable[[Selection], Trajectory],
    ) -> None:
        """Note a prompt.

        Args:
            name: of the prompt.
            want: the reference's own answer.
            logits: along its tokens.
            selection: what the plan chose.
            free: tokens without a teacher.
            forced_run: the reference along the same tokens, its choice given.
        """
        said = logits.argmax(-1)
        apart = [at for at, token in enumerate(want.tokens) if said[at] != token]
        self.places += len(want.tokens)
        self.agreed += len(want.tokens) - len(apart)
        first = next((at for at, token in enumerate(free) if token != want.tokens[at]), None)
        if first is None:
            self.equal += 1
        else:
            self.divergences[name] = first
        failure, reference = "", want.logits
        if selection != want.selection:
            self.reselected += 1
            apart_by = selection_margin(want.margins, want.selection, selection)
            if self.exact or apart_by > self.bounds.tie:
                failure = (
                    f"{name}: {_difference(want.selection, selection)}, {apart_by:.2g} from a tie"
                )
            else:
                reference = forced_run(selection).logits
        errors = [
            tensor_error(f"{name}: logits of the {where}", logits[steps], reference[steps])
            for where, steps in (("prompt", slice(1)), ("answer", slice(1, len(said))))
            if len(said[steps])
        ]
        self.errors += errors
        failure = failure or first_wrong(errors, self.bounds.whole)
        if apart and self.exact:
            failure = failure or f"{name}: token {apart[0]} of the teacher-forced answer differs"
        if first is not None and first not in apart:
            failure = failure or (
                f"{name}: the free-running answer differs at token {first}, where the "
                "teacher-forced one does not"
            )
        self.failure = self.failure or failure

    def result(self, files: tuple[str, ...]) -> CheckResult:
        """All of it."""
        return CheckResult(
            self.failure,
            files,
            tuple(self.errors),
            {
                "teacher-forced": f"{self.agreed} of {self.places} tokens agree",
                "free-running": f"{self.equal} of {self.equal + len(self.divergences)} answers "
                "are equal to their end",
                "first divergence, by prompt": self.divergences,
                "prompts whose kept visual tokens differ": self.reselected,
            },
        )


def _difference(want: Selection, got: Selection) -> str:
    if want.trigger != got.trigger:
        return f"layer {got.trigger} called for a selection, expected {want.trigger}"
    if want.kept != got.kept:
        return "other visual tokens were kept"
    return f"vision left after layer {got.exit}, expected {want.exit}"
