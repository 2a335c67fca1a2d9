"""VisionZip's rule: salient patches and the class row as they are, the others merged.

The patches that are not among the salient ones stand in their order. Every step-th of them is a
target, and each other one goes to the target whose key is most similar to its own. A target's row
is its features plus the mean of those that went to it.

The released code lets the merged rows follow the salient ones; here all enter in the order of
their places, a merged row at its target's. ``keep`` counts every row that enters: the published 64
is 65, for 54 salient patches, 10 merged rows and the class row.

Source: docs/methods.md, "Entry selectors".
"""

from __future__ import annotations

import numpy as np

from .arithmetic import largest
from .entry import EncoderReadings, Entered

MERGED = 10 / 64
"""Share of merged rows among those of patches, as published: 10 of 64, 20 of 128, 30 of 192."""


def choose(given: EncoderReadings, keep: int) -> Entered:
    """Return salient patches and merged rows, after the class row where there is one."""
    assert given.features is not None
    assert given.saliency is not None
    assert given.keys is not None
    own = keep if given.class_row is None else keep - 1
    merged = round(MERGED * own)
    salient = largest(given.saliency, own - merged)
    rest = np.setdiff1d(np.arange(given.patches), salient)
    targets = rest[:: max(1, len(rest) // max(1, merged))][:merged]
    index = np.union1d(salient, targets)
    features = given.features[index]
    if merged:
        others = np.setdiff1d(rest, targets)
        features[np.searchsorted(index, targets)] += means(given, targets, others)
    if given.class_row is not None:
        index, features = np.append(-1, index), np.vstack((given.class_row, features))
    return Entered(index, features)


def means(given: EncoderReadings, targets: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the mean features of the rows that go to each target; 0 where none does."""
    assert given.features is not None
    assert given.keys is not None
    keys = given.keys[targets]
    lengths = np.linalg.norm(keys, axis=1, keepdims=True)
    keys = np.divide(keys, lengths, out=np.zeros_like(keys), where=lengths > 0)
    nearest = (given.keys[others] @ keys.T).argmax(1)  # its own length ranks no target higher
    goes = (nearest == np.arange(len(targets))[:, None]).astype(np.float32)  # (targets, others)
    return goes @ given.features[others] / np.maximum(goes.sum(1, keepdims=True), 1)
