"""Plans: facts, the dict form, and every refusal names its field."""

import copy
import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from visistage.graphs.errors import PlanError
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.stages import MAX_KEEP, MODES, Edge, Probe, Stage

N = 9


def dense(count):
    return ("dense",) * count


SELECT = Edge("select", "value_norm", 4)
DROP = Edge("drop")
STAGES = (
    Stage((0, 4), N, ("sink", "text_blind", "dense", "dense")),
    Stage((4, 6), 4, dense(2)),
    Stage((6, 8), 0, dense(2)),
)
PLAN = StagePlan("three", 8, N, STAGES, (SELECT, DROP), note="for tests")


def with_stage(index, **changes):
    stages = list(STAGES)
    stages[index] = replace(stages[index], **changes)
    return tuple(stages)


def test_facts():
    assert (PLAN.trigger, PLAN.exit, PLAN.keep) == (3, 5, 4)
    assert [PLAN.visual_tokens_in(layer) for layer in range(8)] == [N] * 4 + [4] * 2 + [0] * 2
    assert [stage.depth for stage in PLAN.stages] == [4, 2, 2]
    assert [stage.gated_layers for stage in PLAN.stages] == [(0, 1), (), ()]
    assert not PLAN.is_dense
    with pytest.raises(IndexError):
        PLAN.visual_tokens_in(8)


def test_stages_are_blind_to_questions_up_to_the_first_cut_that_looks_at_one():
    dropped = replace(PLAN, stages=(Stage((0, 6), N, dense(6)), STAGES[2]), edges=(DROP,))
    looser = with_stage(1, visual_tokens=6)[1:2]
    twice = replace(
        PLAN,
        stages=(STAGES[0], *looser, Stage((6, 8), 4, dense(2))),
        edges=(replace(SELECT, keep=6), SELECT),
    )
    assert [plan.blind_stages for plan in (PLAN, dropped, twice)] == [1, 2, 1]
    assert dropped.blind_stages_of(2) == 2
    blind = replace(PLAN, edges=(replace(SELECT, score="v2drop"), *PLAN.edges[1:]))
    both = replace(twice, edges=tuple(replace(edge, score="v2drop") for edge in twice.edges))
    assert [plan.blind_stages for plan in (blind, both)] == [3, 3]
    assert [blind.blind_stages_of(images) for images in (0, 1, 2)] == [3, 3, 1]
    attention = replace(both, edges=(both.edges[0], replace(SELECT, score="attention")))
    assert attention.blind_stages == 2


def test_a_score_of_visual_rows_alone_may_follow_a_text_blind_layer():
    stages = (Stage((0, 3), N, ("text_blind",) * 3), Stage((3, 8), 4, dense(5)))
    edge = replace(SELECT, keep=4)
    StagePlan("early", 8, N, stages, (replace(edge, score="v2drop"),))
    with pytest.raises(PlanError, match=r"dense: edges\[0\] scores the visual tokens"):
        StagePlan("early", 8, N, stages, (edge,))


def test_facts_of_plans_without_a_selection():
    dense_plan = StagePlan("dense", 8, N, (Stage((0, 8), N, dense(8)),))
    assert dense_plan.is_dense
    assert (dense_plan.trigger, dense_plan.exit, dense_plan.keep) == (7, 7, None)
    blind = replace(dense_plan, stages=(Stage((0, 8), N, ("text_blind", *dense(7))),))
    assert not blind.is_dense
    exits = StagePlan(
        "exit", 8, N, (Stage((0, 5), N, dense(5)), Stage((5, 8), 0, dense(3))), (DROP,)
    )
    assert (exits.trigger, exits.exit, exits.keep) == (4, 4, None)


def test_a_selection_of_all_tokens_still_ends_the_first_stage():
    stages = (STAGES[0], Stage((4, 8), N, dense(4)))
    plan = StagePlan("all", 8, N, stages, (Edge("select", "attention", N),))
    assert (plan.trigger, plan.exit, plan.keep) == (3, 7, N)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": "../up"}, "name: found '../up'"),
    "empty name": ({"name": ""}, "name:"),
    "note": ({"note": "two\nlines"}, "note:"),
    "escape in note": ({"note": "\x1b[31m"}, "note: found '\\x1b[31m'"),
    "flag": ({"calibrated": 1}, "calibrated: found 1, expected true or false"),
    "other flag": ({"decode_sees_shallow_vision": None}, "decode_sees_shallow_vision:"),
    "depth": ({"layers": 9}, r"stages[2].layers: found [6, 8], expected the last stage to stop"),
    "depth type": ({"layers": 8.0}, "layers: found 8.0, expected a positive integer"),
    "bool depth": ({"layers": True}, "layers: found True"),
    "no tokens": ({"visual_tokens": 0}, "visual_tokens: found 0, expected a positive integer"),
    "int32": ({"visual_tokens": 2**31}, "visual_tokens:"),
    "first stage": ({"visual_tokens": 10}, "stages[0].visual_tokens: found 9, expected all"),
    "no stages": ({"stages": ()}, "stages: found ()"),
    "list": ({"stages": list(STAGES)}, "stages:"),
    "edges": ({"edges": (SELECT,)}, "edges: found 1 edges, expected 2, one between"),
    "gap": (
        {"stages": with_stage(1, layers=(5, 6))},
        "stages[1].layers: found [5, 6], expected [4",
    ),
    "backwards": ({"stages": with_stage(1, layers=(4, 4))}, "stages[1].layers:"),
    "no pair": ({"stages": with_stage(0, layers=(0,))}, "stages[0].layers: found (0,)"),
    "negative": ({"stages": with_stage(2, visual_tokens=-1)}, "stages[2].visual_tokens: found -1"),
    "modes": (
        {"stages": with_stage(1, modes=dense(3))},
        "stages[1].modes: found 3 modes, expected 2",
    ),
    "mode": (
        {"stages": with_stage(0, modes=("sink", "text_blnd", *dense(2)))},
        "stages[0].modes[1]: found 'text_blnd', expected one of dense, text_blind, "
        "text_blind_novv, sink, sink_half. Did you mean 'text_blind'?",
    ),
    "frozen": (
        {"stages": with_stage(0, modes=("frozen", *dense(3)))},
        "Rows are frozen by",
    ),
    "absent": (
        {"stages": with_stage(2, modes=("absent", "absent"))},
        "Absent vision is a stage with visual_tokens: 0",
    ),
    "late blind": (
        {"stages": with_stage(1, modes=("text_blind", "dense"))},
        "stages[1].modes[0]: found 'text_blind', expected dense in every stage after the first",
    ),
    "blind without vision": (
        {"stages": with_stage(2, modes=("dense", "sink"))},
        "stages[2].modes[1]: found 'sink', expected dense",
    ),
    "norm": ({"stages": with_stage(0, norm="gate")}, "stages[0].norm: found 'gate'"),
    "idle norm": ({"stages": with_stage(1, norm="renorm")}, "stages[1].norm: found 'renorm'"),
    "sink renorm": (
        {"stages": with_stage(0, norm="renorm")},
        "stages[0].modes[0]: found 'sink', expected no sink where norm is renorm",
    ),
    "blind probe": (
        {"stages": with_stage(0, modes=("dense", "dense", "dense", "text_blind"))},
        "stages[0].modes[3]: found 'text_blind', expected dense: edges[0] scores",
    ),
    "inject": (
        {"edges": (Edge("inject"), DROP)},  # type: ignore[arg-type]
        "edges[0].op: found 'inject', expected one of select, drop, probe, carry. Visual rows that",
    ),
    "score": ({"edges": (replace(SELECT, score=None), DROP)}, "edges[0].score: found None"),
    "keep": (
        {"edges": (replace(SELECT, keep=10), DROP)},
        "edges[0].keep: found 10, expected 1 to 9",
    ),
    "no keep": ({"edges": (replace(SELECT, keep=None), DROP)}, "edges[0].keep: found None"),
    "keep 0": ({"edges": (replace(SELECT, keep=0), DROP)}, "To keep none, write op: drop"),
    "other keep": (
        {"edges": (replace(SELECT, keep=5), DROP)},
        "stages[1].visual_tokens: found 4, expected edges[0].keep=5. Write 5.",
    ),
    "probe edge": (
        {"edges": (Edge("probe"), DROP)},
        "stages[1].visual_tokens: found 4, expected 9 after the probe",
    ),
    "drop keeps": ({"edges": (SELECT, Edge("drop", keep=3))}, "edges[1].keep: found 3"),
    "drop scores": ({"edges": (SELECT, Edge("drop", score="attention"))}, "edges[1].score:"),
    "drop leaves": (
        {"stages": with_stage(2, visual_tokens=4)},
        "stages[2].visual_tokens: found 4, expected 0 after the drop of edges[1]",
    ),
    "two drops": (
        {"stages": with_stage(1, visual_tokens=0), "edges": (DROP, DROP)},
        "edges[1].op: found 'drop', expected no edge after the vision has left",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_by_field(case):
    changes, message = REFUSED[case]
    with pytest.raises(PlanError) as caught:
        replace(PLAN, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_top_k_has_a_limit():
    def plan(keep):
        stages = (Stage((0, 1), 5000, dense(1)), Stage((1, 2), keep, dense(1)))
        return StagePlan("wide", 2, 5000, stages, (Edge("select", "attention", keep),))

    assert plan(MAX_KEEP).keep == MAX_KEEP
    with pytest.raises(PlanError, match=r"edges\[0\].keep: found 3841, expected 1 to 3840"):
        plan(MAX_KEEP + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(colour=1), "colour: found an unknown key"),
        (lambda d: d.update(vsual_tokens=1), "Did you mean 'visual_tokens'?"),
        (lambda d: d.update({"\x1b[2J": 1}), "'\\x1b[2J': found an unknown key"),
        (lambda d: d.update({3: 1}), "3: found an unknown key"),
        (lambda d: d["stages"][1].update(mode="dense"), "stages[1].mode: found an unknown key"),
        (lambda d: d["edges"][0].update(K=4), "edges[0].K: found an unknown key"),
        (lambda d: d.pop("version"), "version: found nothing"),
        (lambda d: d.update(version=2), "version: found 2, expected 1"),
        (lambda d: d.update(version=True), "version: found True"),
        (lambda d: d["stages"][0].pop("modes"), "stages[0].modes: found nothing"),
        (lambda d: d.update(stages={}), "stages: found {}, expected a list"),
        (lambda d: d["stages"].append(7), "stages[3]: found 7, expected a mapping"),
        (lambda d: d["stages"][0].update(layers="0-4"), "stages[0].layers: found '0-4'"),
        (lambda d: d.update(layers=16**5000), "layers: found a huge int"),
    ],
)
def test_dicts_are_read_strictly(change, message):
    data = PLAN.to_dict()
    change(data)
    with pytest.raises(PlanError) as caught:
        StagePlan.from_dict(data)
    assert message in str(caught.value)


def test_dict_form_says_nothing_superfluous():
    assert PLAN.to_dict()["edges"][1] == {"op": "drop"}
    assert "norm" not in PLAN.to_dict()["stages"][1]
    data = PLAN.to_dict()
    for optional in ("edges", "decode_sees_shallow_vision", "calibrated", "note"):
        del data[optional]
    data["stages"] = [{"layers": [0, 8], "visual_tokens": N, "modes": ["dense"] * 8}]
    assert StagePlan.from_dict(data).is_dense


def test_hash_is_pinned():
    # Bundles remember it: a change of the canonical form needs a new version of the plan format.
    plan = StagePlan("dense", 2, 4, (Stage((0, 2), 4, dense(2)),))
    assert plan.hash == "60f99cfcd3c58e93d9d74054b07bf8489f126e66df684c2ad545db2fc50dabe5"


# --- properties -----------------------------------------------------------------------------------


@st.composite
def plans(draw):
    """Any plan this version accepts."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    tokens = draw(st.integers(1, 4000))
    visual_tokens, start = tokens, 0
    stages, edges = [], []
    for index, depth in enumerate(counts):
        modes, norm = list(dense(depth)), "gated"
        if index:
            if draw(st.booleans()):
                tokens = draw(st.integers(1, min(tokens, MAX_KEEP)))
                edges.append(
                    Edge("select", draw(st.sampled_from(["value_norm", "attention"])), tokens)
                )
            else:
                tokens = 0
                edges.append(Edge("drop"))
        else:
            norm = draw(st.sampled_from(["gated", "renorm"]))
            allowed = [mode for mode in MODES if mode != "sink" or norm == "gated"]
            modes[:-1] = draw(st.tuples(*[st.sampled_from(allowed)] * (depth - 1)))
            norm = norm if any(mode != "dense" for mode in modes) else "gated"
        stages.append(Stage((start, start + depth), tokens, tuple(modes), norm))
        start += depth
        if tokens == 0:
            break
    return StagePlan(
        draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,20}", fullmatch=True)),
        start,
        visual_tokens,
        tuple(stages),
        tuple(edges),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.text(max_size=40).filter(str.isprintable)),
    )


@settings(deadline=None)
@given(plans())
def test_any_plan_round_trips(plan):
    data = json.loads(json.dumps(plan.to_dict()))
    again = StagePlan.from_dict(data)
    assert again == plan
    assert again.hash == plan.hash
    assert hash(again) == hash(plan)
    assert data == plan.to_dict()


@settings(deadline=None)
@given(plans(), plans())
def test_hash_tells_any_two_plans_apart(left, right):
    assert (left.hash == right.hash) == (left == right)


@settings(deadline=None)
@given(plans(), st.data())
def test_hash_depends_on_every_field(plan, data):
    changes = {
        "name": plan.name + "x",
        "decode_sees_shallow_vision": not plan.decode_sees_shallow_vision,
        "calibrated": not plan.calibrated,
        "note": plan.note + "x",
    }
    field = data.draw(st.sampled_from(sorted(changes)))
    assert replace(plan, **{field: changes[field]}).hash != plan.hash


def test_hash_depends_on_stages_and_edges():
    others = [
        replace(PLAN, stages=with_stage(0, modes=("sink", "sink", *dense(2)))),
        replace(PLAN, edges=(replace(SELECT, score="attention"), DROP)),
        replace(PLAN, visual_tokens=10, stages=with_stage(0, visual_tokens=10)),
        replace(PLAN, stages=with_stage(0, modes=("text_blind", *dense(3)))),
        replace(PLAN, stages=with_stage(0, modes=("text_blind", *dense(3)), norm="renorm")),
    ]
    assert len({plan.hash for plan in [PLAN, *others]}) == len(others) + 1


@settings(deadline=None)
@given(plans())
def test_facts_agree_with_the_layers(plan):
    tokens = [plan.visual_tokens_in(layer) for layer in range(plan.layers)]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[plan.trigger] == plan.visual_tokens
    assert tokens[plan.exit] > 0
    assert not any(tokens[plan.exit + 1 :])
    if plan.keep is not None:
        assert plan.stages[0].modes[plan.trigger] == "dense"
    if plan.is_dense:
        assert plan.exit == plan.trigger == plan.layers - 1
        assert not plan.stages[0].gated_layers


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
WORDS = st.sampled_from(
    [*MODES, "absent", "frozen", "select", "drop", "inject", "renorm", 0, 1, -1]
)


def places(data, at=()):
    """Paths to every value inside ``data``."""
    yield at
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*at, key))


@settings(max_examples=400, deadline=None)
@given(plans(), st.data())
def test_mutated_dicts_give_a_plan_or_a_plan_error(plan, data):
    mutant = {"plan": copy.deepcopy(plan.to_dict())}
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([at for at in places(mutant) if at]))
        owner = mutant
        for key in path[:-1]:
            owner = owner[key]
        action = data.draw(st.sampled_from(["replace", "word", "delete", "repeat"]))
        if action == "replace" or len(path) == 1:
            owner[path[-1]] = data.draw(JSON)
        elif action == "word":
            owner[path[-1]] = data.draw(WORDS)
        elif action == "delete":
            del owner[path[-1]]
        elif isinstance(owner, list):
            owner.insert(path[-1], copy.deepcopy(owner[path[-1]]))
        else:
            owner[data.draw(st.text(max_size=6))] = owner[path[-1]]
    try:
        found = StagePlan.from_dict(mutant["plan"])
    except PlanError as error:
        message = str(error)
    else:
        message = ""
        assert StagePlan.from_dict(found.to_dict()) == found
    assert message.isprintable()


def test_plans_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.name = "other"  # type: ignore[misc]


PROBE = Probe(2, 0.99, 0.2, exit_cosine=0.999, buckets=(2, N))
PROBING = StagePlan(
    "probing",
    8,
    N,
    (
        Stage((0, 4), N, ("sink", "text_blind", "dense", "dense")),
        Stage((4, 6), N, dense(2)),
        Stage((6, 8), N, dense(2)),
    ),
    (Edge("probe"), Edge("probe")),
    probe=PROBE,
)


def test_facts_of_plans_that_decide_per_prompt():
    assert PROBING.kind == "adaptive"
    assert (PROBING.trigger, PROBING.keep, PROBING.exit) == (None, None, None)
    assert [list(PROBING.probed_layers(i)) for i in range(3)] == [[2, 3], [4, 5], []]
    assert StagePlan.from_dict(json.loads(json.dumps(PROBING.to_dict()))) == PROBING
    assert PLAN.kind == "static"
    assert "probe" not in PLAN.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": 1}, "probe.first: found 1, expected 2 to 3"),
        ({"first": 4}, "probe.first: found 4"),
        ({"cosine": 1.5}, "probe.cosine: found 1.5, expected a number from -1 to 1"),
        ({"cosine": float("nan")}, "probe.cosine: found nan"),
        ({"contribution": "0.2"}, "probe.contribution: found '0.2'"),
        ({"exit_cosine": True}, "probe.exit_cosine: found True"),
        ({"strict": 1}, "probe.strict: found 1, expected true or false"),
        ({"exit_layers": 0}, "probe.exit_layers: found 0"),
        ({"buckets": (4, 2)}, "probe.buckets: found (4, 2), expected positive integers, ascending"),
        ({"buckets": (2, N + 1)}, "probe.buckets: found 10, expected at most 9"),
    ],
)
def test_numbers_of_a_probe_are_checked(changes, message):
    with pytest.raises(PlanError) as caught:
        replace(PROBING, probe=replace(PROBE, **changes))
    assert message in str(caught.value)


def test_edges_and_probe_belong_together():
    with pytest.raises(PlanError, match=r"edges\[0\].op: found 'probe', expected select, drop or"):
        replace(PROBING, probe=None)
    drop = (Stage((0, 4), N, STAGES[0].modes), Stage((4, 8), 0, dense(4)))
    with pytest.raises(PlanError, match=r"edges\[0\].op: found 'drop', expected probe"):
        replace(PROBING, stages=drop, edges=(DROP,))
    with pytest.raises(PlanError, match="probe: found one, expected none in a plan without edges"):
        replace(PROBING, stages=(Stage((0, 8), N, dense(8)),), edges=())
