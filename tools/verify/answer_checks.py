"""Checks of whole answers: real prompts through the torch chain and through the public runtime.

Teacher-forced: both go along the reference's tokens, so that one early difference hides no later
one. Free-running: each goes on with its own tokens, as for a user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ... import runtime
from ...graphs.targets import ONNXRUNTIME
from .chains import TorchChain, Trajectory
from .compare import Bounds, bounds_of, first_wrong, strict, tensor_error
from .runtime_checks import ask
from .token_choices import Selection, selection_margin
from .verify_report import CheckResult, TensorError
from .verify_target import NothingError, VerifyTarget

if TYPE_CHECKING:
    from ...runtime import Session

LOGITS_LIMIT = 1.0
"""Largest error of quantised logits that passes: root mean square, in the spread of the float ones.
Logits that have nothing to do with each other are 1.4 apart."""


class Tally:
    """Agreement of whole answers over prompts, and the first unexplained difference.

    Where ``bounds`` know no ties, tokens and selections are equal. Otherwise they may differ as
    near ties do: a token where the logits are within the tolerance, a visual token where another
    scores as much within the tie, a probe that reads a threshold within it; then the logits are
    compared with those that the reference has for the same selection.
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
            selection: the plan's.
            free: tokens without a teacher.
            forced_run: the reference along the same tokens, its selection given.
        """
        top = logits.argmax(-1)
        apart = [at for at, token in enumerate(want.tokens) if top[at] != token]
        self.places += len(want.tokens)
        self.agreed += len(want.tokens) - len(apart)
        first = next((at for at, token in enumerate(free) if token != want.tokens[at]), None)
        if first is None:
            self.equal += 1
        else:
            self.divergences[name] = first
        failure, reference, share = "", want.logits, self.bounds.share
        if selection != want.selection:
            self.reselected += 1
            other = forced_run(selection)
            margins = want.margins if want.margins.probe else other.margins
            margin = selection_margin(margins, want.selection, selection)
            if self.exact or margin > self.bounds.tie:
                difference = selection.difference(want.selection)
                failure = f"{name}: {difference}, {margin:.2g} from a tie"
            else:
                reference = other.logits
        errors = [
            tensor_error(
                f"{name}: logits of the {where}", logits[steps], reference[steps], share=share
            )
            for where, steps in (("prompt", slice(1)), ("answer", slice(1, len(top))))
            if len(top[steps])
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
        """Return everything noted."""
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


def compare_runtime(target: VerifyTarget) -> CheckResult:
    """Compare the runtime on ONNX Runtime with the torch chain in FP32.

    Where ONNX Runtime rounds the inputs of rearranged weights, mapped ones are tried as well: there
    nothing is rounded but what the graphs round.
    """
    found = _compare_session(target, target.session, bounds_of(target.kinds))
    manifest = target.bundle.manifest
    if found.failure or not target.loose or manifest.dtype == "float16":
        return found  # FP16 graphs are widened on a CPU, never mapped
    with runtime.load(
        target.bundle.path, backend=ONNXRUNTIME, memory_limit=manifest.weight_bytes
    ) as mapped:
        exact = _compare_session(target, mapped, bounds_of(strict(target.kinds)))
    facts = {f"mapped weights, {name}": fact for name, fact in exact.facts.items()}
    errors = [replace(error, tensor=f"{error.tensor}, mapped weights") for error in exact.errors]
    return replace(exact, errors=(*found.errors, *errors), facts={**found.facts, **facts})


def _compare_session(target: VerifyTarget, session: Session, bounds: Bounds) -> CheckResult:
    tally = Tally(bounds)
    for prompt in target.prompts:
        name, text = prompt.sample.name, prompt.sample.prompt
        want = target.reference.answer(prompt, target.max_tokens)
        logits = session.score(prompt.opened, text, want.tokens[:-1])
        answer = ask(session, prompt.opened, text, target.max_tokens)
        selection = Selection.of(answer.plan.kept, answer.plan.called, answer.plan.kept_at_edges)
        forced_run = partial(target.reference.follow, prompt, want.tokens)
        tally.add(name, want, logits, selection, answer.tokens, forced_run)
    return tally.result(target.files)


def compare_half(target: VerifyTarget) -> CheckResult:
    """Compare the torch chain in FP16 arithmetic with FP32, teacher-forced and free-running."""
    target.require_half()
    reference, prompts = target.reference, target.prompts
    half = TorchChain.stored(target.bundle, half=True, free=target.free)
    tally = Tally(target.half_bounds)
    for prompt in prompts:
        want = reference.answer(prompt, target.max_tokens)
        got = half.follow(prompt, want.tokens)
        free = half.answer(prompt, target.max_tokens)
        forced_run = partial(reference.follow, prompt, want.tokens)
        tally.add(prompt.sample.name, want, got.logits, got.selection, free.tokens, forced_run)
    return tally.result(target.files)


def compare_quantised(target: VerifyTarget) -> CheckResult:
    """Compare the quantised torch chain with the one over the checkpoint's own weights.

    How much an answer may change is for its user to judge, so agreement and errors along the float
    chain's tokens are reported; what fails are logits that have nothing to do with the float ones.
    """
    if not target.bundle.manifest.quantization.quantises:
        raise NothingError("every layer and every cache is a float one")
    original, quantised = target.original, target.reference
    failure, errors, agreed, reselected = "", [], [], 0
    squares, spreads = [0.0], [0.0]  # by prompt: mean square of the error, variance of the logits
    for prompt in target.prompts:
        name = prompt.sample.name
        want = original.answer(prompt, target.max_tokens)
        got = quantised.follow(prompt, want.tokens)
        agreed += [a == b for a, b in zip(got.tokens, want.tokens, strict=True)]
        reselected += got.selection != want.selection
        error = tensor_error(f"{name}: logits", got.logits, want.logits)
        errors.append(error)
        if error.relative is None:
            failure = failure or f"{name}: the logits are not finite"
            continue
        squares.append(float(np.square(got.logits.astype(np.float64) - want.logits).mean()))
        spreads.append(float(want.logits.astype(np.float64).var()))
        apart = _root_mean_square(squares[-1], spreads[-1])
        if apart > LOGITS_LIMIT:
            failure = failure or (
                f"{name}: the logits are {apart:.2g} of their spread away from those of the "
                f"checkpoint, in the root mean square, expected at most {LOGITS_LIMIT:g}"
            )
    overall = _root_mean_square(sum(squares), sum(spreads))
    worst = max(map(_root_mean_square, squares, spreads))
    return CheckResult(
        failure,
        target.files,
        tuple(errors),
        {
            "teacher-forced": f"{sum(agreed)} of {len(agreed)} tokens agree",
            "logits": f"off by {overall:.3f} of their spread in the root mean square, "
            f"{worst:.3f} in the worst prompt",
            "prompts whose kept visual tokens differ": reselected,
        },
    )


def _root_mean_square(square: float, spread: float) -> float:
    """Return an error in the spread of the logits; both squared."""
    return (square / (spread or 1.0)) ** 0.5
