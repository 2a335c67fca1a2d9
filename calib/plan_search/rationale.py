"""The reasons for a plan in plain words, and warnings before it is trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluate import Z95
from .agreement import Agreement
from .candidates import Tried
from .dynamics import Dynamics

FIRM = 0.95
"""A cosine that no token reaches by noise; the published trigger, 0.995, is far more easily set
off in short decoders."""

LEAST_LOSS = 1e-4
"""A smaller loss takes more samples to prove than there are."""

MOST_HELD_OUT_TRIES = 2
"""Plans that held-out samples may judge before they have become choosing samples themselves."""


def rationale_for(
    dynamics: Dynamics,
    tried: Sequence[Tried],
    taken: Tried | None,
    text_blind: Sequence[dict[str, Any]],
) -> dict[str, str]:
    """Return a sentence each for s, t, K and e of the plan that was taken; None: the dense one.

    "entry" comes first where an entry was measured; of a plan that is an entry alone there is
    nothing to say of t, K and e.
    """
    if taken is None:
        closest = max(tried, key=lambda found: found.measured.tokens.share, default=None)
        why = "dense: nothing cheaper that was measured keeps the budget on all samples"
        if closest is not None:
            why += f"; the closest, {closest.candidate.text}, agrees on {_tokens(closest)}"
        return {"s": _shallow(0, text_blind), "t": why, "K": why, "e": why}
    candidate = taken.candidate
    reasons = {"s": _shallow(candidate.shallow, text_blind)}
    if any(found.candidate.entry for found in tried):
        reasons = {"entry": _entry(tried, taken)} | reasons
    if candidate.is_entry_alone:
        return reasons
    return reasons | {
        "t": _trigger(dynamics, tried, taken),
        "K": _keep(dynamics, candidate.t, candidate.keep),
        "e": _exit(dynamics, candidate.e),
    }


def about_precision(precision: str, quantised_agreement: Agreement) -> str:
    """Return the precision that plans were measured in, and how far the dense plan agrees in it."""
    tokens = quantised_agreement.tokens
    return (
        f"{precision}: every plan was measured in it, against the dense model in FP32. Rounding "
        f"alone, nothing pruned, agrees on {100 * tokens.share:.1f} % of {tokens.total} tokens."
    )


def warnings_for(
    lose: float | None, tried: Sequence[Tried], taken: Tried | None, confirmed: int
) -> tuple[str, ...]:
    """Return what weakens the choice. confirmed: how many plans the held-out samples judged."""
    out = []
    tokens = min((found.measured.tokens.total for found in tried), default=0)
    if tokens and lose is not None and LEAST_LOSS <= lose < 1 / tokens:
        out.append(
            f"One token of {tokens} is more than the budget allows, so one difference rules a plan "
            f"out: with {math.ceil(1 / lose)} tokens or more, cheaper ones may fit."
        )
    if confirmed > MOST_HELD_OUT_TRIES:
        out.append(
            f"The held-out samples judged {confirmed} plans in turn, so they had a part in "
            "choosing. Give more samples."
        )
    judged = None if taken is None else taken.held_out or taken.measured
    if judged is not None and lose is not None and judged.tokens.interval[0] < 1 - lose:
        low = 100 * (1 - judged.tokens.interval[0])
        text = (
            f"{judged.tokens.total} tokens do not prove the budget: a loss of up to {low:.1f} % "
            "cannot be ruled out (95 %)."
        )
        if lose >= LEAST_LOSS:
            # With nothing wrong, Wilson's lower end is n / (n + z^2).
            text += f" {math.ceil(Z95**2 * (1 - lose) / lose)} tokens without a miss would."
        out.append(text)
    return tuple(out)


def _entry(tried: Sequence[Tried], taken: Tried) -> str:
    """Return what enters, and what the nearest alternatives agree on."""
    entry = taken.candidate.entry
    if entry is None:
        text = "No entry: all visual tokens of an image enter"
        as_cheap = [
            found for found in tried if found.candidate.entry and found.flops <= taken.flops
        ]
        return _and_best(text, "with an entry that is as cheap", as_cheap)
    text = (
        f"{entry.selector}: {entry.keep} visual tokens of an image enter (what follows about t, K "
        "and e was read where all do)"
    )
    if taken.candidate.is_entry_alone:
        text = (
            f"{entry.selector} alone: {entry.keep} visual tokens of an image enter, and all layers "
            f"see them; a second question takes {100 * taken.second:.0f} % of what it takes dense"
        )
    alone = [
        (found.candidate.entry.keep, found)
        for found in tried
        if found.candidate.entry and found.candidate.is_entry_alone
    ]
    same = [
        f"{found.candidate.text} {100 * found.measured.tokens.share:.1f} %"
        for keep, found in sorted(alone, key=lambda both: -both[1].measured.tokens.share)
        if keep == entry.keep
    ]
    if same:
        text += f"; with so many, and nothing else pruned, agree: {', '.join(same)}"
    return _and_best(text, "with fewer", [found for keep, found in alone if keep < entry.keep])


def _and_best(text: str, which: str, found: Sequence[Tried]) -> str:
    """Return a sentence that ends with the best of ``found``, or says that there is none."""
    best = max(found, key=lambda one: one.measured.tokens.share, default=None)
    if best is None:
        return f"{text}; none {which} was measured."
    return f"{text}; the best {which}, {best.candidate.text}, agrees on {_tokens(best)}."


def _shallow(shallow: int, text_blind: Sequence[dict[str, Any]]) -> str:
    measured = ", ".join(
        f"s={row['shallow']}: {100 * row['tokens']['share']:.1f} %" for row in text_blind
    )
    cost = f" Agreement with them alone, nothing else pruned: {measured}." if measured else ""
    if shallow:
        return (
            f"s = {shallow}, as the uncalibrated preset has it. Text-blind layers save no work in "
            f"the graphs as they run.{cost}"
        )
    return f"s = 0: text-blind layers save no work in the graphs as they run.{cost}"


def _trigger(dynamics: Dynamics, tried: Sequence[Tried], taken: Tried) -> str:
    t = taken.candidate.t
    fired = np.mean((dynamics.lowest[:, dynamics.first : t + 1] < FIRM).any(1))
    earlier = [
        found
        for found in tried
        if found.candidate.t < t and found.candidate.entry == taken.candidate.entry
    ]
    text = (
        f"t = {t}: up to this layer a single token has turned the last row's output beyond cosine "
        f"{FIRM:g} in {100 * fired:.0f} % of the prompts"
    )
    if earlier:
        best = max(earlier, key=lambda found: found.measured.tokens.share)
        text += (
            f"; the best earlier t that was measured, {best.candidate.t}, agrees on {_tokens(best)}"
        )
    return text + "."


def _keep(dynamics: Dynamics, t: int, keep: int | None) -> str:
    if keep is None:
        return f"No selection: vision leaves after layer {t} as a whole."
    held = dynamics.mass([keep])[:, t, 0]
    low, median = (100 * float(np.quantile(held, share)) for share in (0.1, 0.5))
    return (
        f"K = {keep}: the top {keep} tokens hold {median:.1f} % of the contributions in layer {t} "
        f"in the median prompt, and {low:.1f} % or more in nine of ten."
    )


def _exit(dynamics: Dynamics, e: int) -> str:
    if e == dynamics.layers - 1:
        return f"e = {e}, the last layer: vision stays to the end."
    after = [
        float(influence[e + 1 :].sum() / max(influence.sum(), 1e-30))
        for influence in dynamics.influence
    ]
    return (
        f"e = {e}: the layers after it have {100 * float(np.mean(after)):.1f} % of the influence "
        "that visual tokens have on the dense model's last row."
    )


def _tokens(found: Tried) -> str:
    text = f"{100 * found.measured.tokens.share:.1f} % of the tokens"
    if found.held_out is not None:
        text += f", but on {100 * found.held_out.tokens.share:.1f} % of those held out"
    return text
