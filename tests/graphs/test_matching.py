"""Plans of every method come near the cost that they are brought to."""

import pytest
from visistage.graphs.errors import PlanError
from visistage.graphs.plan.cost import LLAVA_7B, Geometry
from visistage.graphs.presets.matching import (
    NEAR,
    flops_share,
    is_control,
    is_scaled,
    matched_plan,
    methods,
)
from visistage.graphs.presets.presets import PRESETS, parse_request, preset, request_text

SMALL = Geometry(layers=8, hidden=192, intermediate=512, vocab=300)
FLOORS = {"pyramiddrop": 0.3}
"""A quarter of the depth always sees the whole image."""


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(("geometry", "tokens"), [(SMALL, 144), (LLAVA_7B, 576)])
def test_a_plan_costs_what_it_was_brought_to(method, share, geometry, tokens):
    found = matched_plan(method, share, geometry, tokens)
    name, options = parse_request(found.text)
    plan = preset(name, geometry.layers, tokens, **options)
    assert found.share == flops_share(plan, geometry)
    wanted = max(share, FLOORS.get(method, 0))
    assert found.share == pytest.approx(wanted, abs=0.025 if share < wanted else NEAR)


def test_every_preset_that_is_the_same_for_every_prompt_is_compared():
    plain = {name for name, kind in PRESETS.items() if not kind.needs_weights}
    fixed = {name for name in plain if name != "dense" and preset(name, 32, 576).probe is None}
    assert {name for name in methods() if ":" not in name} == fixed
    assert "visipruner:entry=scope" in methods()


@pytest.mark.parametrize("share", [0.04, 0.08, 0.15])
def test_vica_is_brought_to_what_keys_and_values_cost(share):
    found = matched_plan("vica", share, LLAVA_7B, 576)
    assert found.share == pytest.approx(share, abs=NEAR)
    assert preset("vica", 32, 576, **parse_request(found.text)[1])
    assert "vica" not in methods()


@pytest.mark.parametrize("method", ["skipgpt", "skipgpt-lrm", "dllm", "mod"])
def test_a_method_with_weights_of_its_own_is_compared_where_it_is_named(method):
    assert method not in methods()
    assert is_scaled(method)
    found = matched_plan(method, 0.75, LLAVA_7B, 576)
    assert found.share == pytest.approx(0.75, abs=NEAR)
    assert "capacity" in found.text


def test_controls_are_named_and_stand_in_the_list():
    assert {name for name in methods() if is_control(name)} == {"random", "uniform"}


@pytest.mark.parametrize(
    ("method", "scaled"),
    [
        ("fastv", True),
        ("visipruner:entry=cls", True),
        ("visipruner:entry=scope-64", False),
        ("visipruner:t=3", False),
        ("visipruner-code", False),
        ("dense", False),
        ("mine.yaml", False),
    ],
)
def test_only_names_without_numbers_are_scaled(method, scaled):
    assert is_scaled(method) is scaled


@pytest.mark.parametrize(
    "text", ["dense", "visipruner:t=2,keep=36", "visipruner-adaptive:boundaries=3-5,deep=false"]
)
def test_a_request_is_read_as_it_was_written(text):
    assert request_text(*parse_request(text)) == text


def test_a_decoder_without_such_a_plan_is_refused_by_name():
    with pytest.raises(PlanError, match="fastv"):
        matched_plan("fastv", 0.5, Geometry(1, 64, 128, 300), 16)


def test_the_first_way_that_comes_near_counts():
    """K stays at its default where t alone does it, and near it elsewhere."""
    _, deep = parse_request(matched_plan("visipruner", 0.755, SMALL, 144).text)
    _, half = parse_request(matched_plan("visipruner", 0.5, SMALL, 144).text)
    assert abs(half["keep"] / 16 - 1) <= 2
    assert deep["t"] > half["t"]
    assert "k=3" in matched_plan("fastv", 0.5, SMALL, 144).text
    assert "k=3" not in matched_plan("fastv", 0.2, SMALL, 144).text
