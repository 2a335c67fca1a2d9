"""The search finds the entry that planted measurements demand, and counts second questions."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from visistage.calib.plan_search.candidates import Pricing, Tried
from visistage.calib.plan_search.choose import choose_plan
from visistage.calib.plan_search.dynamics import Dynamics
from visistage.calib.plan_search.entry_candidates import entry_candidates, entry_counts
from visistage.calib.plan_search.goal import SELECTORS, SelectionGoal, goal_or_plan
from visistage.calib.sample_prompts import SampleImage, SamplePrompt, usual_image
from visistage.compile.planfile import resolve_plan
from visistage.graphs.errors import PlanError
from visistage.graphs.families.family import in_one_run
from visistage.graphs.plan.cost import Geometry, dense_cost, plan_cost
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.stages import Entry
from visistage.tests.support.planted_plans import (
    LAYERS,
    TOKENS,
    E,
    K,
    Recorder,
    T,
    agree,
    planted,
    pricing,
    truth,
)

PRUNED = f"visipruner:shallow=0,t={T},e={E},keep={K}"


@pytest.fixture(scope="module")
def dynamics():
    rng = np.random.default_rng(0)
    return Dynamics.of([planted(rng) for _ in range(12)], first=1)


def world(*, needed, harm=0.3, behind=truth):
    """A model of whose tokens ``needed[selector]`` must enter, and that else loses ``harm``."""

    def of(plan):
        entry = plan.entry
        lost = 0 if entry is None else harm * max(0, 1 - entry.keep / needed[entry.selector])
        return max(behind(plan) - lost, 0)

    return of


def choose(dynamics, of, **limits):
    measure = Recorder(of)
    goal = SelectionGoal(**(limits or {"lose": 0.0}))
    return choose_plan(dynamics, pricing(), goal, measure, Recorder(of)), measure


def test_an_entry_alone_is_found_where_nothing_behind_it_may_go(dynamics):
    def behind(plan):  # any selection by the question, and any exit, is fatal
        return 1.0 if len(plan.stages) == 1 else 0.5

    of = world(needed={"scope": 6, "divprune": 12, "cls": 24}, behind=behind)
    choice, measure = choose(dynamics, of)
    assert choice.text == "scope:keep=6"
    assert choice.plan.entry == Entry("scope", 6)
    assert choice.plan.calibrated
    assert len(measure.plans) <= SelectionGoal(lose=0.0).most
    reason = choice.rationale["entry"]
    assert reason.startswith("scope alone: 6 visual tokens of an image enter, and all layers see")
    assert "agree: scope:keep=6 100.0 %, divprune:keep=6 85.0 %, cls:keep=6 77.5 %" in reason
    fewer = re.search(r"the best with fewer, scope:keep=(\d), agrees on (\d+)", reason)
    assert (int(fewer[1]), int(fewer[2])) in {(4, 90), (3, 85)}
    assert set(choice.rationale) == {"entry", "s"}


def test_dense_is_the_answer_where_everything_loses(dynamics):
    choice, measure = choose(dynamics, lambda plan: 0.9, lose=0.05)
    assert (choice.text, choice.fits) == ("dense", False)
    assert choice.plan.is_dense
    assert any(plan.entry for plan in measure.plans)
    assert choice.rationale["t"].startswith("dense: nothing cheaper that was measured keeps")


def test_visipruner_alone_is_found_where_every_token_must_enter(dynamics):
    of = world(needed=dict.fromkeys(SELECTORS, 10 * TOKENS))
    choice, measure = choose(dynamics, of)
    assert choice.plan.entry is None
    assert choice.plan.keep is not None
    assert choice.rationale["entry"].startswith("No entry: all visual tokens of an image enter")
    # Each selector was asked, and then others where there was a step to explain.
    assert {plan.entry.selector for plan in measure.plans if plan.entry} == set(SELECTORS)


def test_both_are_found_together_where_each_leaves_something_to_the_other(dynamics):
    of = world(needed={"scope": 24, "divprune": 12, "cls": 24})
    choice, _ = choose(dynamics, of, lose=0.0, most=24)
    entry, taken = choice.plan.entry, choice.tried[choice.chosen]
    assert entry == Entry("divprune", 12)
    assert choice.text.startswith("visipruner:shallow=0,t=")
    assert choice.text.endswith(",entry=divprune-12")
    alone = [
        tried for tried in choice.tried if tried.candidate.entry is None and of_plan(tried, of) == 1
    ]
    assert all(taken.flops < tried.flops for tried in alone)
    assert set(choice.rationale) == {"entry", "s", "t", "K", "e"}
    assert "read where all do" in choice.rationale["entry"]


def of_plan(found, of):
    return of(pricing().plan(found.candidate))


def test_without_selectors_no_entry_is_measured(dynamics):
    choice, measure = choose(dynamics, truth, lose=0.0, selectors=())
    assert not any(plan.entry for plan in measure.plans)
    assert "entry" not in choice.rationale


def test_what_may_be_lost_does_not_change_what_is_measured_and_a_cost_does(dynamics):
    of = world(needed={"scope": 6, "divprune": 12, "cls": 24})
    one, other = (choose(dynamics, of, lose=lose)[1].plans for lose in (0.0, 0.2))
    assert [plan.name for plan in one] == [plan.name for plan in other]
    choice, _ = choose(dynamics, of, cost=0.2)
    assert choice.tried[choice.chosen].candidate.cost <= 0.2
    measured = [tried for tried in choice.tried if tried.candidate.text != "visipruner"]
    assert all(tried.candidate.cost <= 0.2 for tried in measured)


def test_plans_with_and_without_an_entry_take_turns(dynamics):
    of = world(needed={"scope": 24, "divprune": 12, "cls": 24})
    _, measure = choose(dynamics, of, lose=0.0, most=16)
    seeds, turns = measure.plans[:8], measure.plans[8:]
    assert [bool(plan.entry) for plan in seeds] == [False, *[True] * 3, *[False] * 4]
    assert [bool(plan.entry) for plan in turns[:4]] == [True, False, True, False]


def test_most_is_kept_and_nothing_is_measured_twice(dynamics):
    of = world(needed={"scope": 6, "divprune": 12, "cls": 24})
    for most in (1, 2, 4, 16, 40):
        _, measure = choose(dynamics, of, lose=0.0, most=most)
        assert len(measure.plans) <= most
        assert len({plan.hash for plan in measure.plans}) == len(measure.plans)


# --- costs ----------------------------------------------------------------------------------------


def second(text, layers=10, tokens=24, prefix=3, rows=5):
    """FLOPs of a second question, and of the dense model's, spelled out from the plan's layers."""
    geometry = Geometry(layers, 64, 128, 300)
    price = Pricing(geometry, tokens, prefix, rows)
    plan = resolve_plan(text, layers, tokens)
    macs, selected = geometry.head_weights, False
    for index, stage in enumerate(plan.stages):
        if index and plan.edges[index - 1].op == "select":
            selected = True
            held = prefix + plan.stages[index - 1].visual_tokens + rows
            macs += 2 * held * 64  # one query
        run = rows + (stage.visual_tokens if selected else 0)
        slots = prefix + stage.visual_tokens + rows
        macs += stage.depth * geometry.layer_macs(run, run, run * slots)
    return price, plan, 2 * macs


def test_the_usual_image_is_the_median_of_the_samples():
    """One of several runs counts once; a prompt without an image not at all."""
    pixels = np.zeros((1, 3, 2, 2), np.float32)
    tiled = in_one_run(12, runs=(5, "between", 7))
    shown = [(SampleImage(pixels, in_one_run(rows)),) for rows in (4, 30)]
    shown.append((SampleImage(pixels, tiled), (7,), SampleImage(pixels, tiled, 1)))
    prompts = [SamplePrompt("a sample", (*parts, (1, 2))) for parts in ((), *shown)]
    assert usual_image(prompts) == 12
    assert usual_image(prompts[:1]) == 0


@pytest.mark.parametrize("text", ["dense", "scope:keep=6", "exit-only:e=4", PRUNED])
def test_images_of_few_tokens_are_paid_for_as_such(text):
    """A model whose images may have 96 tokens, and whose samples have 24: as one of 24."""
    geometry = Geometry(10, 64, 128, 300)
    price, small = Pricing(geometry, 96, 3, 5, usual=24), Pricing(geometry, 24, 3, 5)
    assert price.flops(4, 6, 7) == small.flops(4, 6, 7) < Pricing(geometry, 96).flops(4, 6, 7)
    assert price.flops(4, 60, 7) == price.flops(4, 24, 7) == price.flops(7, None, 7)
    plans = (resolve_plan(text, 10, own.visual_tokens) for own in (price, small))
    assert price.second_question(next(plans)) == small.second_question(next(plans))


@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "scope:keep=6",
        "exit-only:e=4",
        PRUNED,
        f"{PRUNED[:-1]}3,entry=scope-12",
        "exit-only:e=4,entry=cls-6",
    ],
)
def test_a_second_question_costs_its_own_rows_and_those_it_selects(text):
    price, plan, flops = second(text)
    share, found = price.second_question(plan)
    assert found == pytest.approx(flops)
    _, _, dense = second("dense")
    assert share == pytest.approx(flops / dense)


def test_a_selection_by_the_question_costs_more_and_an_entry_less_than_dense():
    shares = [
        second(text)[0].second_question(second(text)[1])[0]
        for text in ("scope:keep=6", "dense", f"visipruner:shallow=0,t={T},e={E},keep=12")
    ]
    assert shares == sorted(shares)
    assert shares[0] < shares[1] == 1 < shares[2]


@pytest.mark.parametrize(
    "text", ["scope:keep=6", "divprune:keep=3", f"{PRUNED},entry=cls-12", "exit-only:e=4"]
)
def test_costs_of_a_first_question_are_those_of_the_plan(text):
    price = pricing()
    plan = resolve_plan(text, LAYERS, TOKENS)
    found = price.candidate(
        text, plan.trigger, plan.keep, plan.exit, entry=plan.entry, predicted=None
    )
    macs = plan_cost(plan, price.geometry, accounting="graphs").visual_macs
    assert found.visual_flops == pytest.approx(2 * macs)
    assert found.cost == pytest.approx(macs / dense_cost(plan, price.geometry).visual_macs)
    assert found.is_entry_alone == text.startswith(SELECTORS)


def test_of_plans_of_one_cost_that_with_the_cheaper_second_question_is_taken(dynamics):
    """A selection by the question runs its rows again; the first question alone would not tell."""

    def of(plan):
        return 1.0 if plan.entry is None or plan.entry.keep >= 12 else 0.5

    choice, _ = choose(dynamics, of, lose=0.01)
    fitting = [tried for tried in choice.tried if tried.measured.tokens.share == 1]
    taken = choice.tried[choice.chosen]
    assert taken.flops == min(tried.flops for tried in fitting)
    assert taken.flops == taken.candidate.visual_flops + taken.second_flops


# --- estimates ------------------------------------------------------------------------------------


def test_every_candidate_with_an_entry_is_a_valid_plan_and_estimates_add_up():
    price = pricing()
    plan = resolve_plan(PRUNED, LAYERS, TOKENS)
    texts = {"scope:keep=6": 0.9, PRUNED: 0.8}
    tried = []
    for text, share in texts.items():
        plan = resolve_plan(text, LAYERS, TOKENS)
        candidate = price.candidate(
            text, plan.trigger, plan.keep, plan.exit, entry=plan.entry, predicted=None
        )
        tried.append(Tried(candidate, agree(share), *price.second_question(plan)))
    assert entry_counts(TOKENS) == [12, 9, 6, 4, 3, 1]
    found = {made.text: made for made in entry_candidates(price, tried, SELECTORS)}
    for text, made in found.items():
        plan = price.plan(made)
        assert (plan.trigger, plan.keep, plan.exit) == (made.t, made.keep, made.e), text
        assert plan.entry == made.entry
    loss = tried[0].loss
    assert set(found) == {
        *(f"scope:keep={count}" for count in (12, 9, 4, 3, 1)),
    }  # nothing is known of other selectors, and both together should lose more than K0 = 6 does
    assert found["scope:keep=12"].predicted == pytest.approx(loss / 2)
    assert found["scope:keep=3"].predicted == pytest.approx(2 * loss)
    tried[0] = replace(tried[0], measured=agree(0.5))
    found = {made.text: made for made in entry_candidates(price, tried, SELECTORS)}
    # K = 6 needs more than 6 to choose from, and with 9 more should be lost than by K0 = 6 alone.
    assert {text for text in found if "entry" in text} == {f"{PRUNED},entry=scope-12"}
    both = found[f"{PRUNED},entry=scope-12"].predicted
    assert both == pytest.approx(tried[0].loss / 2 + tried[1].loss)


def test_a_selector_that_needs_renumbering_gets_it(dynamics):
    _, measure = choose(dynamics, truth, lose=0.0, selectors=("visionzip",))
    plans = [plan for plan in measure.plans if plan.entry]
    assert plans
    assert {plan.entry.positions for plan in plans} == {"renumbered"}


# --- the file and the options ---------------------------------------------------------------------


def test_the_choice_as_json_has_entry_and_second_question(dynamics):
    of = world(needed={"scope": 6, "divprune": 12, "cls": 24})
    data = json.loads(json.dumps(choose(dynamics, of)[0].to_dict()))
    taken = data["candidates"][data["chosen"]]
    plan = StagePlan.from_dict(data["plan"])
    assert taken["entry"] == plan.entry.text
    assert taken["second"] == pytest.approx(pricing().second_question(plan)[0])
    assert data["question"] == {"prefix": 35, "text": 40}
    entries = {candidate["entry"] for candidate in data["candidates"]}
    assert None in entries
    assert len(entries) > 3


def test_the_short_form_of_an_entry_is_what_presets_take():
    for text in ("scope-6", "divprune-3-renumbered"):
        plan = resolve_plan(f"visipruner:keep=2,entry={text}", LAYERS, TOKENS)
        assert plan.entry.text == text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"selectors": "scoop"}, r"found 'scoop', expected names among scope, .* --no-entry"),
        ({"selectors": "scope,"}, "found ''"),
        ({"selectors": "scope", "no_entry": True}, "found --no-entry beside --selectors scope"),
    ],
)
def test_selectors_that_are_none_are_refused(options, words):
    with pytest.raises(PlanError, match=words):
        goal_or_plan(None, **options)


def test_selectors_are_typed_with_commas():
    assert goal_or_plan(None).selectors == SELECTORS
    assert goal_or_plan(None, selectors="cls, scope,cls").selectors == ("cls", "scope")
    assert goal_or_plan(None, no_entry=True).selectors == ()
    with pytest.raises(PlanError, match="found --no-entry beside --plan visipruner"):
        goal_or_plan("visipruner", no_entry=True)
