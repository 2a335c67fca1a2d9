"""Each edge selector ranks as its rule says, written slowly; planted mistakes are noticed.

Also what a stage hands out for one, and that a score which claims not to look at the question keeps
the same rows whatever is asked.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.contract import INVISIBLE, select_spec, stage_spec
from visistage.graphs.modules import scores
from visistage.graphs.modules.select import Selector
from visistage.graphs.parts import whole_stages
from visistage.graphs.plan.stages import Edge
from visistage.graphs.presets.presets import preset
from visistage.graphs.selectors.edge import READINGS
from visistage.graphs.selectors.registry import EDGE_SELECTORS

from ..support import reference
from ..support import reference_scores as slow
from ..support.cases import Case

HEADS, GROUPS, WIDTH, HIDDEN = 4, 2, 8, 6
N, SLOTS, TEXT = 12, 24, 5
SAMPLES = 3
FIRST = 2  # slot of the first visual row


def drawn(seed, spread=1.0):
    """Inputs of a selection: samples without padding, with padded visual rows, with padded text."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=(SAMPLES, *shape), scale=spread).astype(np.float32)

    used = FIRST + N + TEXT
    order = np.tile(np.arange(SLOTS, dtype=np.int32), (SAMPLES, 1))
    order[:, used:] = INVISIBLE
    order[1, FIRST : FIRST + 4] = INVISIBLE
    order[2, FIRST + N : FIRST + N + 3] = INVISIBLE
    visual = np.arange(FIRST, FIRST + N)
    return {
        "probe_query": normal(HEADS, WIDTH),
        "key": normal(GROUPS, SLOTS, WIDTH),
        "value": normal(GROUPS, SLOTS, WIDTH),
        "slot_order": order,
        "query_order": np.full(SAMPLES, used - 1, np.int32),
        "visual_slots": np.tile(visual, (SAMPLES, 1)),
        "rows": normal(N, HIDDEN),
        "positions": np.where(order == INVISIBLE, 0, order)[:, visual].astype(np.int32),
        "order": order[:, visual],
        "change": np.abs(normal(N)),
        "text_queries": normal(TEXT, HEADS, WIDTH),
        "text_order": order[:, FIRST + N : used],
    }


def alike(seed):
    """Rows that come in pairs: equal keys, values and changes give equal scores."""
    given = drawn(seed)
    for name, axis in (("key", 2), ("value", 2), ("change", 1)):
        array = np.moveaxis(given[name], axis, 0)
        start = FIRST if axis == 2 else 0
        array[start + 1 : start + N : 2] = array[start : start + N : 2]
    return given


GIVEN = {
    "drawn": drawn(0),
    "sharp": drawn(1, spread=3.0),
    "flat": drawn(2, spread=0.0),  # every score is the same
    "pairs": alike(3),
    "one row of text": {
        name: value[:, -1:] if name.startswith("text_") else value
        for name, value in drawn(4).items()
    },
}


def sample_of(given, at):
    return {name: value[at] for name, value in given.items()}


def disagreements(name, rule, change=lambda given: given):
    """Inputs and counts where a selector's scores or rows are not the rule's."""
    wrong = []
    for label, given in GIVEN.items():
        read = {n: v for n, v in given.items() if n in EDGE_SELECTORS[name].inputs}
        for keep in (1, 5, N):
            selector = Selector(Edge("select", name, keep))
            rows, positions, order, scores = (t.numpy() for t in selector.of(change(read)))
            for at in range(SAMPLES):
                index, expected = slow.select(rule, sample_of(given, at), keep)
                fits = np.allclose(scores[at], expected, rtol=1e-4, atol=1e-6)
                own = np.sort(-expected)
                tied = keep < N and own[keep] - own[keep - 1] < 1e-5
                if tied:  # any of the tied will do, in the order of their places
                    kept = [int(p) for p in order[at] if p != INVISIBLE]
                    fits &= kept == sorted(set(kept))
                    best = [float(-expected[p - FIRST]) for p in kept]
                    fits &= np.allclose(np.sort(best), own[: len(best)], atol=1e-5)
                else:
                    fits &= np.array_equal(rows[at], given["rows"][at][index])
                    fits &= np.array_equal(positions[at], given["positions"][at][index])
                    fits &= np.array_equal(order[at], given["order"][at][index])
                wrong += [] if fits else [f"{label}, sample {at}, keep {keep}"]
    return wrong


def test_every_selector_has_a_file_a_reference_and_readings_that_exist():
    files = {file.stem for file in Path(scores.__file__).parent.glob("*.py")}
    assert files - {"__init__", "readings"} == set(EDGE_SELECTORS) == set(slow.RULES)
    for selector in EDGE_SELECTORS.values():
        assert selector.reads
        assert {*selector.reads} <= {*READINGS}
        assert selector.summary


@pytest.mark.parametrize("name", EDGE_SELECTORS)
def test_a_score_is_that_of_its_rule(name):
    assert disagreements(name, slow.RULES[name]) == []


@pytest.mark.parametrize("name", EDGE_SELECTORS)
@pytest.mark.parametrize("other", EDGE_SELECTORS)
def test_the_rules_differ(name, other):
    same = slow.RULES[name] is slow.RULES[other]
    assert (disagreements(name, slow.RULES[other]) == []) == same


def swapped(given, *names):
    """The same inputs with some of them moved by one row."""
    return {n: np.roll(v, 1, axis=1) if n in names else v for n, v in given.items()}


MUTATIONS = [
    ("value_norm", "value"),
    ("value_norm", "probe_query"),
    ("attention", "visual_slots"),
    ("attention", "key"),
    ("v2drop", "change"),
    ("v2drop", "order"),
    ("sparsevlm", "text_queries"),
    ("sparsevlm", "text_order"),
    ("sparsevlm", "key"),
]


@pytest.mark.parametrize(("name", "moved"), MUTATIONS)
def test_one_input_in_the_wrong_place_is_noticed(name, moved):
    assert disagreements(name, slow.RULES[name], lambda given: swapped(given, moved))


def test_raters_are_noticed():
    """All rows of the question, or the last one alone, rank otherwise than the raters."""

    def everybody(given):
        rows = []
        for query, order in zip(given["text_queries"], given["text_order"], strict=True):
            if order != INVISIBLE:
                row = slow.softmax_row(query, given["key"], given["slot_order"] <= order).mean(0)
                rows.append(row[given["visual_slots"]])
        return list(np.mean(rows, 0))

    assert disagreements("sparsevlm", everybody)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("deep"), layers=8, kv_heads=2)


def selecting(case, score, layer, keep):
    """A plan with one selection by ``score`` behind ``layer``."""
    plan = case.plan("fastv", k=layer + 1, r=1 - keep / case.model.visual_tokens)
    return replace(plan, edges=(Edge("select", score, keep),))


@pytest.mark.parametrize("keep", [1, 5, 16])
@pytest.mark.parametrize("score", ["v2drop", "sparsevlm"])
def test_a_plan_that_selects_by_it_equals_the_reference(deep, score, keep):
    ids, pixels = deep.prompt(8)
    rows, spans = deep.embeds(ids, pixels)
    mine = chain.run(deep.weights, deep.text, rows, spans, selecting(deep, score, 2, keep), 8)
    visual = torch.zeros(ids.shape[1], dtype=torch.bool)
    visual[spans[0][0][0] : spans[0][0][1]] = True
    method = reference.Static(0, 2, 7, keep, score=score)
    logits, kept, tokens = reference.generate(deep.weights, deep.text, rows[0], visual, method, 8)
    assert mine.kept == [kept.tolist()]
    assert (mine.logits[0] - logits).abs().max() < 1e-3
    assert mine.tokens[0].tolist() == tokens
    if keep == 5:
        other = replace(method, score="attention")
        others = reference.forward(deep.weights, deep.text, rows[0], visual, other)[1]
        assert others.tolist() != kept.tolist()


@pytest.mark.parametrize("name", EDGE_SELECTORS)
def test_a_question_changes_what_is_kept_unless_the_selector_is_blind(deep, name):
    """The same image under eight questions, asked of every score."""
    kept = set()
    for seed in range(8):
        ids, pixels = deep.prompt(1)
        other = torch.randint(5, 90, (9,), generator=torch.Generator().manual_seed(100 + seed))
        ids[0, -9:] = other
        rows, spans = deep.embeds(ids, pixels)
        result = chain.run(deep.weights, deep.text, rows, spans, selecting(deep, name, 2, 5))
        kept.add(tuple(result.kept[0]))
    assert (len(kept) == 1) == EDGE_SELECTORS[name].question_blind


@pytest.mark.parametrize("name", ["v2drop", "sparsevlm", "tops"])
def test_a_stage_hands_out_what_its_edge_reads_and_nothing_else(deep, name):
    text, plan = deep.model.text, preset(name, 8, 16)
    wanted = {"v2drop": ["change"], "sparsevlm": ["text_queries"], "tops": []}[name]
    for part in whole_stages(plan):
        for rows_back in (False, True):
            spec = stage_spec(text, plan, part, "float16", rows_back)
            extra = [t.name for t in spec.outputs if t.name in ("change", "text_queries")]
            assert extra == (wanted if part.stage < len(plan.edges) else [])
    for edge in plan.edges:
        read = {tensor.name for tensor in select_spec(text, edge, "float32").inputs}
        assert read == {n for n in edge.selector.inputs if not n.endswith("_scale")}
        assert ("key" in read) == (name != "v2drop")


def test_only_the_part_that_ends_a_stage_hands_it_out(deep):
    plan = preset("v2drop", 8, 16, before=(4,), keep=(8,))
    whole = whole_stages(plan)[0]
    parts = [replace(whole, layers=(0, 2)), replace(whole, layers=(2, 4))]
    names = [
        {
            tensor.name
            for tensor in stage_spec(deep.model.text, plan, part, "float32", False).outputs
        }
        for part in parts
    ]
    assert ["change" in found for found in names] == [False, True]
