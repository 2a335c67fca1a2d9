"""Entry selectors written to be obvious, in FP64: the judges of ``graphs/selectors``.

One row after another, every score computed anew, no matrix kept up (docs/methods.md, "Entry
selectors"). Each returns the places of the rows that enter, and their features where some were
merged. No code is shared with the selectors.
"""

import numpy as np


def cosine(x, y):
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y) / lengths if lengths else 0.0


def cosines(rows):
    rows = np.asarray(rows, np.float64)
    return np.array([[cosine(x, y) for y in rows] for x in rows])


def best(candidates, score):
    """The candidate of the largest score; the first one on a tie, as ``max`` has it."""
    return max(sorted(candidates), key=score)


def scope_order(s, a, keep):
    chosen = []
    for _ in range(keep):
        covered = [max([0.0, *(s[i, j] for j in chosen)]) for i in range(len(s))]

        def gain(j, covered=covered):
            return float(a[j]) * np.maximum(0, s[:, j] - covered).sum()

        chosen.append(best(set(range(len(s))) - set(chosen), gain))
    return chosen


def divprune_order(s, keep):
    everything = set(range(len(s)))
    far = np.inf  # a row without another one

    def from_others(j):
        return min([-s[i, j] for i in everything - {j}], default=far)

    chosen = [best(everything, from_others)]
    while len(chosen) < keep:
        left = everything - set(chosen)
        chosen.append(best(left, lambda j: min(-s[i, j] for i in chosen)))
    return chosen


def highest(a, keep):
    chosen = []
    while len(chosen) < keep:
        chosen.append(best(set(range(len(a))) - set(chosen), lambda j: a[j]))
    return chosen


def scope(given, keep):
    return sorted(scope_order(cosines(given.features), given.saliency, keep)), None


def divprune(given, keep):
    return sorted(divprune_order(cosines(given.rows), keep)), None


def cls(given, keep):
    return sorted(highest(given.saliency, keep)), None


def merged_rows(features, keys, salient, count):
    """Targets, and the features of each with the mean of the rows that are most like it."""
    rest = [j for j in range(len(features)) if j not in salient]
    if not count:
        return {}
    step = max(1, len(rest) // count)
    targets = rest[::step][:count]
    groups = {target: [] for target in targets}
    for j in rest:
        if j not in targets:
            groups[best(targets, lambda t, j=j: cosine(keys[j], keys[t]))].append(features[j])
    return {t: features[t] + (np.mean(g, 0) if g else 0) for t, g in groups.items()}


def visionzip(given, keep):
    features, keys = given.features.astype(np.float64), given.keys.astype(np.float64)
    entering = {} if given.class_row is None else {-1: given.class_row}
    own = keep - len(entering)
    count = round(own * 10 / 64)
    salient = highest(given.saliency, own - count)
    entering |= {j: features[j] for j in salient}
    entering |= merged_rows(features, keys, salient, count)
    return sorted(entering), np.array([entering[j] for j in sorted(entering)])


def uniform(given, keep):
    n = len(given.features)
    return [int(i * n / keep) for i in range(keep)], None


RULES = {
    "scope": scope,
    "divprune": divprune,
    "cls": cls,
    "visionzip": visionzip,
    "uniform": uniform,
}
"""By the selectors' names; ``random`` has no other rule than to repeat itself."""
