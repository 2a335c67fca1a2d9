"""Presets: what they become for a depth, what they refuse, how they are named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from visistage.graphs.errors import PlanError
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.presets.presets import PRESETS, parse_request, preset
from visistage.graphs.presets.request import UNCALIBRATED


def counts(plan):
    """Visual tokens of every layer, as runs of (layers, tokens)."""
    return [(stage.depth, stage.visual_tokens) for stage in plan.stages]


@pytest.mark.parametrize(
    ("layers", "visual_tokens", "shallow", "t", "e", "keep"),
    [(32, 576, 6, 18, 27, 64), (8, 144, 1, 4, 6, 16), (40, 576, 7, 22, 33, 64)],
)
def test_default_plan_follows_the_depth(layers, visual_tokens, shallow, t, e, keep):
    plan = preset("visipruner", layers, visual_tokens)
    assert (plan.trigger, plan.exit, plan.keep) == (t, e, keep)
    first, middle, last = plan.stages
    assert first.modes == ("sink",) + ("text_blind",) * (shallow - 1) + ("dense",) * (
        t + 1 - shallow
    )
    assert set(middle.modes) == set(last.modes) == {"dense"}
    assert [stage.layers for stage in plan.stages] == [(0, t + 1), (t + 1, e + 1), (e + 1, layers)]
    assert (middle.visual_tokens, last.visual_tokens) == (keep, 0)
    assert [edge.op for edge in plan.edges] == ["select", "drop"]
    assert plan.edges[0].score == "value_norm"
    assert not plan.calibrated
    assert not plan.decode_sees_shallow_vision
    assert plan.note.startswith(UNCALIBRATED)


def test_options_of_visipruner():
    plan = preset("visipruner", 32, 576, shallow=6, t=14, e=23, keep=32)
    assert counts(plan) == [(15, 576), (9, 32), (8, 0)]
    assert plan.name == "visipruner-shallow6-t14-e23-keep32"
    assert UNCALIBRATED not in plan.note
    assert "not calibrated" in plan.note
    some = preset("visipruner", 32, 576, t=14)
    assert some.note == "uncalibrated defaults: shallow, e, keep"


@pytest.mark.parametrize("shallow", [False, 0])
def test_without_shallow_layers(shallow):
    plan = preset("visipruner", 32, 576, shallow=shallow)
    assert all(not stage.gated_layers for stage in plan.stages)


def test_exit_at_the_last_layer_is_no_edge():
    assert counts(preset("visipruner", 8, 90, t=4, e=7, keep=5)) == [(5, 90), (3, 5)]
    assert preset("exit-only", 8, 90, e=7).edges == ()


def test_layer_0_rules():
    def first(**options):
        return preset("visipruner", 32, 576, **options).stages[0]

    assert first().modes[:2] == ("sink", "text_blind")
    assert first(template="13b").modes[:2] == ("sink_half", "text_blind")
    assert first(norm="renorm").modes[:2] == ("text_blind_novv", "text_blind")
    assert first(norm="renorm").norm == "renorm"
    assert first(norm="renorm", template="13b").modes[0] == "sink_half"
    assert preset("visipruner", 32, 576, norm="renorm").stages[1].norm == "gated"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dense", {}, [(32, 576)]),
        ("fastv", {}, [(3, 576), (29, 144)]),
        ("fastv", {"k": 2, "r": 0.5}, [(2, 576), (30, 288)]),
        ("pyramiddrop", {}, [(8, 576), (8, 288), (8, 144), (8, 72)]),
        ("pyramiddrop", {"ratio": 1}, [(8, 576)] * 4),
        ("sparsevlm", {}, [(3, 576), (4, 300), (9, 200), (16, 110)]),
        ("sparsevlm", {"keep": (66, 30, 17)}, [(3, 576), (4, 66), (9, 30), (16, 17)]),
        ("v2drop", {}, [(3, 576), (14, 288), (5, 144), (10, 1)]),
        ("v2drop", {"entry": "scope-192"}, [(3, 192), (14, 96), (5, 48), (10, 1)]),
        ("v2drop", {"before": (8,), "keep": (576,)}, [(8, 576), (24, 576)]),
        ("tops", {}, [(12, 128), (12, 64), (8, 16)]),
        ("tops", {"entry": "divprune-256-renumbered"}, [(12, 256), (12, 128), (8, 32)]),
        ("exit-only", {"e": 24}, [(25, 576), (7, 0)]),
        ("exit-only", {}, [(28, 576), (4, 0)]),
    ],
)
def test_peers(name, options, expected):
    plan = preset(name, 32, 576, **options)
    assert counts(plan) == expected
    assert {edge.score for edge in plan.edges if edge.op == "select"} <= {
        "attention",
        name,
    }
    assert preset("dense", 32, 576).note == ""


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("visiprunr", {}, "Did you mean 'visipruner'?"),
        (
            "visipruner",
            {"kep": 3},
            "kep: found an unknown key, expected one of entry, drop, drop_attention, drop_mlp",
        ),
        ("visipruner", {"kep": 3}, "Did you mean 'keep'?"),
        ("dense", {"t": 3}, "t: found an unknown key, expected one of entry, drop, drop_attention"),
        ("visipruner", {"t": 27}, "t: found 27, expected a layer from 0 to 26, before e=27"),
        ("visipruner", {"t": "14"}, "t: found '14', expected an integer"),
        ("visipruner", {"t": True}, "t: found True, expected an integer"),
        ("visipruner", {"shallow": True}, "shallow: found True, expected an integer or False"),
        ("visipruner", {"shallow": 19}, "shallow: found 19, expected a layer from 0 to t=18"),
        ("visipruner", {"shallow": -1}, "shallow: found -1"),
        (
            "visipruner",
            {"t": 4},
            "shallow (the default for 32 layers): found 6, expected a layer from 0 to t=4",
        ),
        ("visipruner", {"e": 32}, "e: found 32, expected a layer from 0 to 31"),
        ("visipruner", {"keep": 0}, "keep: found 0, expected 1 to 576 tokens"),
        ("visipruner", {"keep": 577}, "keep: found 577, expected 1 to 576 tokens"),
        ("visipruner", {"norm": "none"}, "norm: found 'none', expected one of gated, renorm"),
        ("visipruner", {"norm": "renorm", "shallow": 0}, "no layer is text-blind"),
        ("visipruner", {"template": "3b"}, "template: found '3b', expected one of 7b, 13b"),
        ("v2drop", {"keep": (3, 4, 1)}, "keep: found (3, 4, 1), expected 3 counts from 576 to 1"),
        ("v2drop", {"before": (4, 9)}, "keep (the default for 32 layers)"),
        ("v2drop", {"before": (0,)}, "before: found (0,), expected integers from 1 to 31"),
        ("tops", {"keep": (129, 1)}, "keep: found (129, 1), expected 2 counts from 128 to 1"),
        ("tops", {"entry": "scope"}, "entry: found 'scope', expected a selector"),
        ("fastv", {"k": 0}, "k: found 0, expected 1 to 31 layers"),
        ("fastv", {"k": 32}, "k: found 32"),
        ("fastv", {"r": 1.0}, "r: found 1.0, expected a share that leaves 1 to 3840 of 576"),
        ("fastv", {"r": float("nan")}, "r: found nan, expected a finite number"),
        ("pyramiddrop", {"ratio": 0.01}, "ratio: found 0.01"),
        ("exit-only", {"e": -1}, "e: found -1"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(PlanError) as caught:
        preset(name, 32, 576, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(("layers", "tokens"), [(0, 576), (32, 0), (32.0, 576), (True, 576)])
def test_sizes_are_checked(layers, tokens):
    with pytest.raises(PlanError, match="expected a positive integer"):
        preset("dense", layers, tokens)


def test_tiny_decoders():
    assert counts(preset("visipruner", 3, 4)) == [(2, 4), (1, 1)]
    with pytest.raises(PlanError, match=r"t \(the default for 2 layers\): found 1"):
        preset("visipruner", 2, 4)
    with pytest.raises(PlanError, match="expected 4 or more"):
        preset("pyramiddrop", 3, 4)


def test_many_tokens_stay_within_top_k():
    assert preset("visipruner", 32, 100_000).keep == 3840


@settings(deadline=None)
@given(
    st.sampled_from(sorted(set(PRESETS) - {"vica"})),  # which has to be told
    st.integers(4, 80),
    st.integers(8, 3000),
)
def test_every_preset_fits_every_decoder(name, layers, visual_tokens):
    plan = preset(name, layers, visual_tokens)
    assert (plan.layers, plan.visual_tokens, plan.name) == (layers, visual_tokens, name)
    assert StagePlan.from_dict(plan.to_dict()) == plan
    assert plan.is_dense == (name == "dense")


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*PRESETS["visipruner"].options(), "k", "r"]),
        st.integers(-2, 12) | st.sampled_from(["gated", "renorm", "13b", None, 0.5, False, [1]]),
        max_size=4,
    ),
    st.sampled_from(sorted(PRESETS)),
)
def test_any_options_give_a_plan_or_a_plan_error(options, name):
    try:
        plan = preset(name, 10, 12, **options)
    except PlanError:
        return
    assert plan.layers == 10


def from_text(text):
    name, options = parse_request(text)
    return preset(name, 32, 576, **options)


def test_options_from_text():
    name, found = parse_request(" visipruner : t=14, keep = 32,norm=renorm,shallow=no")
    assert name == "visipruner"
    assert found == {"t": 14, "keep": 32, "norm": "renorm", "shallow": False}
    assert parse_request("fastv:k=2,r=0.5") == ("fastv", {"k": 2, "r": 0.5})
    assert parse_request("fastv:x=y") == ("fastv", {"x": "y"})
    assert parse_request("unknown:x=y") == ("unknown", {"x": "y"})
    assert parse_request("dense") == parse_request("dense:") == ("dense", {})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("t", "option: found 't', expected key=value"),
        ("=3", "expected key=value"),
        ("t=", "expected key=value"),
        ("t=x", "t: found 'x', expected an integer"),
        ("t=1.5", "expected an integer"),
        ("t=" + "9" * 5000, "expected an integer"),
    ],
)
def test_bad_option_strings(item, message):
    with pytest.raises(PlanError, match=message):
        from_text(f"visipruner:{item}")
    with pytest.raises(PlanError, match="t: found it twice, expected it once"):
        from_text("visipruner:t=1,t=2")


def test_exact_presets_of_the_published_models():
    """docs/methods.md, "VisiPruner: plans per prompt": where shallow layers end, where probes
    begin, which rules."""
    code, paper = (preset(f"visipruner-{name}", 32, 576) for name in ("code", "paper"))
    assert code.stages[0].modes == ("sink", *("text_blind",) * 5, "dense", "dense")
    assert paper.stages[0].modes == ("sink", *("text_blind_novv",) * 6, "dense")
    for plan in (code, paper):
        assert plan.kind == "exact"
        assert [stage.layers for stage in plan.stages][:2] == [(0, 8), (8, 9)]
        assert len(plan.stages) == 25
        assert {stage.visual_tokens for stage in plan.stages} == {576}
        assert (plan.probe.first, plan.probe.cosine, plan.probe.contribution) == (7, 0.995, 0.2)
        assert (plan.probe.exit_cosine, plan.probe.exit_layers) == (0.999, 2)
        assert (plan.trigger, plan.keep, plan.exit) == (None, None, None)
    assert (code.probe.strict, code.probe.consecutive) == (True, False)
    assert (paper.probe.strict, paper.probe.consecutive) == (False, True)
    assert code.decode_sees_shallow_vision
    assert not paper.decode_sees_shallow_vision
    thirteen = preset("visipruner-code", 40, 576).stages[0].modes
    assert thirteen[:7] == ("sink_half", *("text_blind",) * 5, "dense")
    assert preset("visipruner-code", 40, 576, template="7b").stages[0].modes[0] == "sink"


def test_adaptive_preset_of_the_published_model():
    plan = preset("visipruner-adaptive", 32, 576)
    assert plan.kind == "adaptive"
    assert len(plan.edges) >= 6
    assert len(plan.probe.buckets) >= 4
    assert plan.probe.buckets == (8, 16, 32, 64, 144, 576)
    assert [stage.layers[1] - 1 for stage in plan.stages[:-1]] == [
        8,
        10,
        12,
        14,
        16,
        18,
        20,
        23,
        27,
    ]
    assert not plan.decode_sees_shallow_vision
    rows = [plan.probe.rows_for(kept) for kept in (0, 1, 8, 9, 64, 65, 145, 577, 1153)]
    assert rows == [0, 8, 8, 16, 64, 144, 576, 1152, 1728]
    two = preset("visipruner-adaptive", 32, 576, boundaries=(9, 20), buckets=(4, 576))
    assert [stage.layers for stage in two.stages] == [(0, 10), (10, 21), (21, 32)]
    assert two.name == "visipruner-adaptive-boundaries9-20-buckets4-576"


def test_parts_of_the_method_can_be_left_out():
    middle = preset("visipruner-code", 32, 576, shallow=False, deep=False)
    assert (middle.stages[0].gated_layers, middle.probe.first) == ((), 7)
    assert middle.probe.exit_cosine is None
    shallow = preset("visipruner-code", 32, 576, middle=False)
    assert (shallow.kind, len(shallow.stages), shallow.probe) == ("static", 1, None)
    assert preset("visipruner-code", 32, 576, shallow=4).probe.first == 5
    assert preset("visipruner-paper", 32, 576, shallow=4).probe.first == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"middle": False, "cosine": 0.9}, "found cosine=0.9 beside middle=false"),
        ({"deep": False, "exit_rule": "consecutive"}, "beside deep=false, expected one of the two"),
        ({"cosine": 2}, "cosine: found 2, expected a number from -1 to 1"),
        ({"contribution": -0.1}, "contribution: found -0.1"),
        ({"probe": 5}, "probe: found 5, expected a layer from shallow=6 to 30"),
        ({"probe": 31}, "probe: found 31"),
        ({"shallow": 31}, "shallow: found 31, expected a layer from 0 to 30"),
        ({"exit_layers": 0}, "exit_layers: found 0, expected 1 or more"),
        ({"exit_rule": "always"}, "expected one of cumulative, consecutive"),
        ({"middle": 1}, "middle: found 1, expected true or false"),
        ({"boundaries": (12, 9)}, "expected integers from 7 to 30, ascending"),
        ({"boundaries": ()}, "expected integers"),
        ({"boundaries": "8-10"}, "boundaries: found '8-10', expected a list"),
        ({"buckets": (0, 4)}, "expected integers from 1 to 576"),
    ],
)
def test_refusals_of_plans_that_decide_per_prompt(options, message):
    with pytest.raises(PlanError) as caught:
        preset("visipruner-adaptive", 32, 576, **options)
    assert message in str(caught.value)


def test_options_of_probes_from_strings():
    _, found = parse_request(
        "visipruner-adaptive:cosine=0.99,deep=no,boundaries=8-10-12,buckets=4,exit_rule=cumulative"
    )
    assert found == {
        "cosine": 0.99,
        "deep": False,
        "boundaries": (8, 10, 12),
        "buckets": (4,),
        "exit_rule": "cumulative",
    }
    for item, message in (("middle=maybe", "true or false"), ("buckets=a-b", "8-16-32")):
        with pytest.raises(PlanError, match=message):
            from_text(f"visipruner-adaptive:{item}")


def test_long_names_are_cut_and_still_differ():
    many = {"cosine": 0.123456789012345, "contribution": 0.123456789012345, "exit_cosine": 0.5}
    plans = [
        preset("visipruner-adaptive", 32, 576, boundaries=(9, 20, end), **many) for end in (25, 26)
    ]
    assert all(len(plan.name) == 100 for plan in plans)
    assert plans[0].name != plans[1].name
