"""The rung of what rounding costs: the quantised torch chain against the checkpoint's own weights.

Same plan, same prompts, the float chain's tokens given to both. How much an answer may change is
for its user to judge, so agreement and errors are reported; what fails is a chain that says nothing
of the float one's any more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...graphs.bundle import Bundle
from .chains import Asked, TorchChain
from .compare import tensor_error
from .stored_graph import graph_files
from .verify_report import CheckResult

LOGITS_LIMIT = 1.0
"""Largest error of the logits that passes: root mean square, in the spread of the float ones.
Logits that have nothing to do with each other are 1.4 apart."""


def compare_quantised(
    bundle: Bundle,
    original: TorchChain,
    quantised: TorchChain,
    asked: Sequence[Asked],
    steps: int,
) -> CheckResult:
    """Agreement of tokens, and errors of logits along the tokens of the float chain."""
    failure, errors, worst = "", [], 0.0
    places = agreed = reselected = 0
    squares = spreads = 0.0
    for one in asked:
        want = original.answer(one, steps)
        got = quantised.follow(one, want.tokens)
        places += len(want.tokens)
        agreed += sum(a == b for a, b in zip(got.tokens, want.tokens, strict=True))
        reselected += got.selection != want.selection
        name = one.sample.name
        error = tensor_error(f"{name}: logits", got.logits, want.logits)
        errors.append(error)
        if error.relative is None:
            failure = failure or f"{name}: the logits are not finite"
            continue
        mean = float(np.square(got.logits.astype(np.float64) - want.logits).mean())
        variance = float(want.logits.astype(np.float64).var())
        squares, spreads = squares + mean, spreads + variance
        apart = (mean / (variance or 1.0)) ** 0.5
        worst = max(worst, apart)
        if apart > LOGITS_LIMIT:
            failure = failure or (
                f"{name}: the logits are {apart:.2g} of their spread away from those of the "
                f"checkpoint, in the root mean square, expected at most {LOGITS_LIMIT:g}"
            )
    overall = (squares / (spreads or 1.0)) ** 0.5
    return CheckResult(
        failure,
        graph_files(bundle),
        tuple(errors),
        {
            "teacher-forced": f"{agreed} of {places} tokens agree",
            "logits": f"off by {overall:.3f} of their spread in the root mean square, "
            f"{worst:.3f} in the worst prompt",
            "prompts whose kept visual tokens differ": reselected,
        },
    )
