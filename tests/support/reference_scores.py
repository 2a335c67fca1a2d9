"""Scores of edge selectors written to be obvious, in FP64, row by row: the judges of ``scores``.

Each takes one sample's inputs of a selection by name and returns a score for each visual row
(docs/methods.md, "The contribution of a visual token", "SparseVLM", "V2Drop"). No code is shared
with the graphs.
"""

import numpy as np

EMPTY = 2**31 - 1


def softmax_row(query, keys, seen):
    """Attention (H, S) of one query (H, d) to keys (G, S, d), which heads share in turn."""
    heads, width = query.shape
    out = np.zeros((heads, keys.shape[1]))
    for head in range(heads):
        group = head * len(keys) // heads
        slots = [s for s in range(keys.shape[1]) if seen[s]]
        scores = np.array([query[head] @ keys[group, s] / width**0.5 for s in slots])
        weights = np.exp(scores - scores.max())
        out[head, slots] = weights / weights.sum()
    return out


def last_row(given):
    return softmax_row(
        given["probe_query"], given["key"], given["slot_order"] <= given["query_order"]
    )


def value_norm(given):
    attention, values = last_row(given), given["value"]
    out = []
    for slot in given["visual_slots"]:
        parts = [
            attention[head, slot] * values[head * len(values) // len(attention), slot]
            for head in range(len(attention))
        ]
        out.append(np.linalg.norm(np.concatenate(parts)))
    return out


def attention(given):
    row = last_row(given)
    return [
        np.mean([row[head, slot] for head in range(len(row))]) for slot in given["visual_slots"]
    ]


def v2drop(given):
    return list(given["change"])


def sparsevlm(given):
    rows = []
    for query, order in zip(given["text_queries"], given["text_order"], strict=True):
        if order != EMPTY:
            row = softmax_row(query, given["key"], given["slot_order"] <= order).mean(0)
            rows.append([row[slot] for slot in given["visual_slots"]])
    mass = [sum(row) for row in rows]
    raters = [row for row, own in zip(rows, mass, strict=True) if own >= np.mean(mass) - 1e-12]
    return list(np.mean(raters, 0))


RULES = {
    "value_norm": value_norm,
    "attention": attention,
    "next_attention": attention,  # of another layer, which is not the score's business
    "v2drop": v2drop,
    "sparsevlm": sparsevlm,
}


def select(rule, given, keep):
    """The places kept, ascending: the best ``keep``, padding last; and all scores."""
    given = {
        name: np.asarray(value, np.float64) if np.asarray(value).dtype.kind == "f" else value
        for name, value in given.items()
    }
    scores = [
        score if order <= given["query_order"] else -1.0
        for score, order in zip(rule(given), given["order"], strict=True)
    ]
    ranked = sorted(range(len(scores)), key=lambda at: -scores[at])
    return sorted(ranked[:keep]), np.array(scores)
