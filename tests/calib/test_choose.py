"""The choice is the one that planted data demands, and a looser budget never costs more."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from visistage.calib.plan_search.candidates import cut_off, friendly, knee, plan_candidates
from visistage.calib.plan_search.choose import choose_plan
from visistage.calib.plan_search.dynamics import Dynamics, PromptReading
from visistage.calib.plan_search.goal import SelectionGoal
from visistage.calib.plan_search.measure_plans import hold_out
from visistage.graphs.errors import DataError, PlanError
from visistage.graphs.plan.cost import dense_cost, plan_cost
from visistage.graphs.plan.plan import StagePlan
from visistage.tests.support.planted_plans import (
    E,
    K,
    Recorder,
    T,
    planted,
    pricing,
    truth,
)


def goal(**limits):
    """Leave entries out: what is planted in these dynamics knows nothing of them."""
    return SelectionGoal(**{"selectors": (), "most": 12, **limits})


@pytest.fixture
def dynamics():
    rng = np.random.default_rng(0)
    return Dynamics.of([planted(rng) for _ in range(12)], first=1)


def test_the_planted_trigger_tokens_and_exit_are_found(dynamics):
    measure = Recorder()
    choice = choose_plan(dynamics, pricing(), goal(lose=0.0), measure, Recorder())
    assert choice.text == f"visipruner:shallow=0,t={T},e={E},keep={K}"
    assert (choice.plan.trigger, choice.plan.keep, choice.plan.exit) == (T, K, E)
    assert choice.fits
    assert choice.plan.calibrated
    assert len(measure.plans) <= 12
    assert set(choice.rationale) == {"s", "t", "K", "e"}
    assert f"K = {K}" in choice.rationale["K"]


def test_a_dozen_is_the_most_that_is_measured_and_none_is_measured_twice(dynamics):
    for most in (1, 2, 5, 12, 30):
        measure = Recorder()
        choose_plan(dynamics, pricing(), goal(lose=0.01, most=most), measure)
        assert len(measure.plans) <= most
        assert len({plan.name for plan in measure.plans}) == len(measure.plans)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.floats(0, 0.4), min_size=2, max_size=4),
    st.integers(0, 2**31),
)
def test_a_looser_budget_never_gives_a_costlier_plan(budgets, seed):
    rng = np.random.default_rng(seed)
    dynamics = Dynamics.of([planted(rng) for _ in range(4)], first=1)
    noise = {}

    def noisy(kind):
        def of(plan):
            key = (kind, plan.name)
            noise.setdefault(key, rng.normal(0, 0.03))
            return min(max(truth(plan) + noise[key], 0), 1)

        return Recorder(of)

    measure, confirm = noisy("choosing"), noisy("held out")
    costs = []
    for lose in sorted(budgets):
        choice = choose_plan(dynamics, pricing(), goal(lose=lose), measure, confirm)
        taken = None if choice.chosen is None else choice.tried[choice.chosen]
        costs.append(float("inf") if taken is None else taken.flops)
    assert costs == sorted(costs, reverse=True)


def test_what_does_not_hold_on_held_out_samples_is_a_near_miss(dynamics):
    cheapest = choose_plan(dynamics, pricing(), goal(lose=0.05), Recorder(), Recorder())
    rejected = cheapest.text

    def of(plan):
        return 0.5 if plan.name == cheapest.plan.name else truth(plan)

    choice = choose_plan(dynamics, pricing(), goal(lose=0.05), Recorder(), Recorder(of))
    assert choice.text != rejected
    (miss,) = [one for one in choice.tried if one.candidate.text == rejected]
    assert miss.verdict.startswith("near miss")
    assert "held-out samples 50.0 % (100 of 200 differ)" in miss.verdict
    taken = choice.tried[choice.chosen]
    assert taken.verdict == "chosen"
    assert taken.flops > miss.flops
    assert taken.held_out.tokens.share >= 0.95


def test_nothing_fits_is_dense_and_says_so(dynamics):
    choice = choose_plan(dynamics, pricing(), goal(lose=0.01), Recorder(lambda plan: 0.8))
    assert (choice.text, choice.chosen, choice.fits) == ("dense", None, False)
    assert choice.plan.is_dense
    assert choice.rationale["t"].startswith("dense: nothing cheaper that was measured keeps")


def test_a_cost_budget_takes_the_best_within_it(dynamics):
    choice = choose_plan(dynamics, pricing(), goal(cost=0.5), Recorder(), Recorder())
    within = [one for one in choice.tried if one.candidate.cost <= 0.5]
    assert within
    taken = choice.tried[choice.chosen]
    assert taken in within
    assert taken.measured.tokens.share == max(one.measured.tokens.share for one in within)
    tight = choose_plan(dynamics, pricing(), goal(cost=0.01), Recorder(), Recorder())
    assert tight.text == "dense"
    assert not tight.fits


def test_a_cost_is_kept_even_where_luck_had_chosen(dynamics):
    choice = choose_plan(
        dynamics, pricing(), goal(cost=0.5), Recorder(), Recorder(lambda plan: 0.1)
    )
    assert choice.tried[choice.chosen].candidate.cost <= 0.5


def test_the_measured_front_is_no_worse_than_anything(dynamics):
    data = json.loads(
        json.dumps(
            choose_plan(dynamics, pricing(), goal(lose=0.1), Recorder(), Recorder()).to_dict()
        )
    )
    assert [one["cost"] for one in data["candidates"]] == sorted(
        one["cost"] for one in data["candidates"]
    )
    for one in data["candidates"]:
        share = one["measured"]["tokens"]["share"]
        beaten = any(
            other["cost"] <= one["cost"] and other["measured"]["tokens"]["share"] > share
            for other in data["candidates"]
        )
        assert one["front"] != beaten or not one["front"]
        assert not (one["front"] and beaten)
    assert StagePlan.from_dict(data["plan"]).calibrated
    assert data["candidates"][data["chosen"]]["verdict"] == "chosen"


def test_few_tokens_are_said_to_prove_little(dynamics):
    choice = choose_plan(dynamics, pricing(), goal(lose=0.01), Recorder(), Recorder())
    (warning,) = choice.warnings
    assert "200 tokens do not prove the budget" in warning
    assert "381 tokens" in warning


def test_costs_are_those_of_the_plans():
    price = pricing()
    one = price.candidate("visipruner:shallow=0,t=4,e=7,keep=6", 4, 6, 7, predicted=0.0)
    plan = price.plan(one)
    assert (plan.trigger, plan.keep, plan.exit, plan.stages[0].gated_layers) == (4, 6, 7, ())
    macs = plan_cost(plan, price.geometry, accounting="graphs").visual_macs
    assert one.visual_flops == pytest.approx(2 * macs)
    assert one.cost == pytest.approx(macs / dense_cost(plan, price.geometry).visual_macs)


def test_what_is_cut_off_is_what_later_layers_would_miss():
    reading = PromptReading(np.ones((3, 4), np.float32), np.ones((3, 4), np.float32))
    reading.norm[0] = [4, 3, 2, 1]
    reading.cosine[1] = 1 - np.array([0.1, 0.1, 0.2, 0.1])
    reading.cosine[2] = 1 - np.array([0.3, 0.1, 0.1, 0.1])
    cut = cut_off(Dynamics((reading,), 0), 0, [2])
    total = 4 * 1.0 + 1 * 1.2  # weights 4 and 1 by depth; the angle is 2 (1 - cos)
    assert cut[0, 0] == pytest.approx(1.0)
    assert cut[1, 1] == pytest.approx((4 * 0.6 + 1.2) / total, abs=1e-5)
    assert cut[1, 2] == pytest.approx((4 * 0.6 + 1 * 0.4) / total, abs=1e-5)


def test_candidates_of_one_t_trade_cost_for_influence(dynamics):
    for of_t in plan_candidates(dynamics, pricing()).values():
        assert [one.cost for one in of_t] == sorted(one.cost for one in of_t)
        predicted = [one.predicted for one in of_t]
        assert predicted == sorted(predicted, reverse=True)
        assert knee(of_t) in of_t


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 24), st.integers(1, 40), st.integers(0, 2**31))
def test_every_candidate_of_any_model_is_a_valid_plan(layers, tokens, seed):
    rng = np.random.default_rng(seed)
    readings = [
        PromptReading(
            (1 - rng.random((layers, tokens)) ** 3 / 2).astype(np.float32),
            rng.random((layers, tokens)).astype(np.float32),
        )
        for _ in range(3)
    ]
    price = pricing(layers, tokens)
    found = plan_candidates(Dynamics.of(readings), price)
    for t, of_t in found.items():
        for one in of_t:
            plan = price.plan(one)  # checks itself
            assert plan.trigger == one.t == t
            assert (plan.keep, plan.exit) == (one.keep, one.e)
            assert 0 < one.cost < 1
    assume(layers > 1)
    assert found


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "expected one of the two"),
        ({"lose": 0.1, "cost": 0.5}, "expected one of the two"),
        ({"lose": 1.0}, "expected 0 % to below 100 %"),
        ({"cost": 0.0}, "expected above 0 %"),
    ],
)
def test_a_budget_that_is_none_is_refused(limits, words):
    with pytest.raises(PlanError, match=words):
        SelectionGoal(**limits)


def test_friendly_numbers_round_up_and_little():
    assert [friendly(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 33, 49)] == [
        *(1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 48, 64),
    ]
    assert all(n <= friendly(n) <= max(2 * n - 1, n) for n in range(1, 5000))


# --- holding out ----------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60), st.sampled_from([0, 0.2, 0.5])
)
def test_an_image_is_on_one_side_only(images, share):
    if share and len(set(images)) == 1:
        with pytest.raises(DataError, match="found 1 image"):
            hold_out(images, share)
        return
    choosing, held = hold_out(images, share)
    assert sorted([*choosing, *held]) == list(range(len(images)))
    assert not {images[i] for i in choosing} & {images[i] for i in held}
    assert choosing
    assert bool(held) == bool(share)


def test_holding_out_does_not_follow_the_order_of_the_file():
    images = [f"{hash_:064x}" for hash_ in np.random.default_rng(0).permutation(99)]
    choosing, held = hold_out(images, 1 / 3)
    assert (len(choosing), len(held)) == (66, 33)
    shuffled = images[::-1]
    assert {shuffled[i] for i in hold_out(shuffled, 1 / 3)[1]} == {images[i] for i in held}
    with pytest.raises(DataError, match="expected 0 to below 1"):
        hold_out(images, 1.0)
