"""Candidates with an entry: selectors alone, and in front of the t, K and e of plans without one.

No dense run shows what a selector takes away, nor what is left to find behind it, so nothing here
is read from dynamics: each selector is measured alone, at a quarter of the visual tokens. From then
on the loss of a plan that was not measured is estimated from those that were:

    a selector alone     its loss at the nearest count, times that count by the new one
    with t, K and e      that, and the loss of the same t, K and e without an entry

An estimate ranks plans before they are measured. One that should lose more than a cheaper plan was
measured to lose is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...graphs.plan.stages import Entry
from ...graphs.selectors.registry import ENTRY_SELECTORS
from .candidates import Candidate, Pricing, Tried

FIRST = 1 / 4
"""The share of the visual tokens at which each selector is measured first."""

SHARES = (1 / 2, 3 / 8, FIRST, 3 / 16, 1 / 8, 1 / 16)
"""Shares of the visual tokens that may enter."""


def entry_counts(visual_tokens: int) -> list[int]:
    """Return values of K0 to try, descending."""
    return sorted({int(visual_tokens * share) for share in SHARES} - {0}, reverse=True)


def first_entries(pricing: Pricing, selectors: Sequence[str], limit: float) -> list[Candidate]:
    """Return each selector alone at a quarter of the tokens, or at the next count within a cost."""
    found = []
    for selector in selectors:
        alone = [
            _alone(pricing, selector, count, None)
            for count in entry_counts(pricing.image)
            if count <= pricing.image * FIRST
        ]
        found += [candidate for candidate in alone if candidate.cost <= limit][:1]
    return found


def entry_candidates(
    pricing: Pricing, tried: Sequence[Tried], selectors: Sequence[str]
) -> list[Candidate]:
    """Return what may pay and is not tried yet, of selectors that were, with an estimate each."""
    known = {found.candidate.text for found in tried}
    behind = [found for found in tried if found.candidate.entry is None and _cuts(found, pricing)]
    out: list[Candidate] = []
    for selector in selectors:
        losses = _losses_alone(tried, selector)
        for count in entry_counts(pricing.image) if losses else ():
            nearest = min(losses, key=lambda other: (abs(other - count), other))
            loss = losses[nearest] * nearest / count
            alone = _alone(pricing, selector, count, loss)
            assert alone.entry is not None
            out.append(alone)
            out += [
                _before(pricing, alone.entry, found.candidate, loss + found.loss)
                for found in behind
                if (found.candidate.keep or 0) < count
            ]
    return [
        candidate
        for candidate in out
        if candidate.text not in known
        and not any(
            found.candidate.cost <= candidate.cost and found.loss <= (candidate.predicted or 0)
            for found in tried
        )
    ]


def _alone(pricing: Pricing, selector: str, count: int, predicted: float | None) -> Candidate:
    closed = ENTRY_SELECTORS[selector].needs_renumbering
    entry = Entry(selector, count, "renumbered" if closed else "original")
    last = pricing.geometry.layers - 1
    return pricing.candidate(
        f"{selector}:keep={count}", last, None, last, entry=entry, predicted=predicted
    )


def _before(pricing: Pricing, entry: Entry, behind: Candidate, predicted: float) -> Candidate:
    text = f"{behind.text},entry={entry.text}"
    return pricing.candidate(
        text, behind.t, behind.keep, behind.e, entry=entry, predicted=predicted
    )


def _cuts(found: Tried, pricing: Pricing) -> bool:
    """Return whether a plan has numbers of its own that an entry leaves as they are."""
    return not found.candidate.shallow and found.candidate.t < pricing.geometry.layers - 1


def _losses_alone(tried: Iterable[Tried], selector: str) -> dict[int, float]:
    """Return by K0 what a selector alone was measured to lose."""
    return {
        found.candidate.entry.keep: found.loss
        for found in tried
        if found.candidate.entry is not None
        and found.candidate.entry.selector == selector
        and found.candidate.is_entry_alone
    }
