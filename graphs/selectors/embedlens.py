"""EmbedLens's rule: rows by the ids of the vocabulary whose input embeddings they resemble most.

A row is matched where one of the target ids is among its three by cosine. Those that are matched
are removed, or those that are not, or by chance as many as are matched; or all enter, told apart.

Where rows are removed, what is left is padded to the count that the plan has room for. Where more
are left than that, they are thinned evenly, which no published experiment does.

Source: docs/methods.md, "EmbedLens".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .entry import PADDING, EncoderReadings, Entered
from .random import shuffled


def choose(
    given: EncoderReadings, keep: int, targets: Sequence[int] = (), removes: str = "none"
) -> Entered:
    """Return the rows that are left, then padding up to ``keep``."""
    assert given.vocabulary is not None
    matched = np.asarray(np.isin(given.vocabulary, targets).any(1))
    leaves = {
        "none": np.zeros_like(matched),
        "matched": matched,
        "unmatched": ~matched,
        "random": _by_chance(given, matched),
    }[removes]
    left = np.flatnonzero(~leaves)
    if len(left) > keep:
        left = left[np.arange(keep) * len(left) // keep]
    index = np.pad(left, (0, keep - len(left)), constant_values=PADDING).astype(np.int64)
    return Entered(index, matched=matched[index.clip(0)] & (index >= 0))


def _by_chance(given: EncoderReadings, matched: np.ndarray) -> np.ndarray:
    """Return (N,) bool: as many unmatched rows as are matched, as far as there are so many."""
    chosen, others = np.zeros_like(matched), np.flatnonzero(~matched)
    order = shuffled(given.image, len(others))
    chosen[others[order[: matched.sum()]]] = True
    return chosen
