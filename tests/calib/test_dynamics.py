"""Dynamics say when published rules would fire, count what never does, and suggest thresholds."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from visistage.calib.plan_search.dynamics import (
    COSINES,
    Dynamics,
    PromptReading,
    quantile,
    ranks_up_to,
    spread,
)
from visistage.calib.plan_search.thresholds import suggest_thresholds
from visistage.graphs.errors import DataError
from visistage.graphs.plan.probing import Decision
from visistage.graphs.plan.stages import Probe
from visistage.graphs.presets.presets import parse_request, preset

LAYERS, TOKENS = 8, 12


def planted(trigger=3, last_loud=5, strong=(2, 7), cosine=0.9, layers=LAYERS, tokens=TOKENS):
    """Tokens ``strong`` count in layers ``trigger`` to ``last_loud``; all others do nothing."""
    cosines = np.full((layers, tokens), 0.99995, np.float32)
    norms = np.full((layers, tokens), 0.01, np.float32)
    for layer in range(trigger, last_loud + 1):
        cosines[layer, list(strong)] = cosine
        norms[layer, list(strong)] = 1.0
    return PromptReading(cosines, norms)


def never(layers=LAYERS, tokens=TOKENS):
    return PromptReading(
        np.full((layers, tokens), 0.9999, np.float32), np.full((layers, tokens), 0.01, np.float32)
    )


def test_rules_are_those_of_the_runtime():
    readings = [planted(3, 4), planted(5, 5), never()]
    probe = Probe(first=1, cosine=0.95, contribution=0.5, exit_cosine=0.999)
    found = Dynamics.of(readings, first=1).decide(probe)
    assert [(one.trigger, one.exit) for one in found] == [(3, 6), (5, 7), (None, None)]
    for one, reading in zip(found, readings, strict=True):
        by_hand = Decision(probe)
        for layer in range(1, LAYERS):
            kept = slice(None) if by_hand.kept is None else by_hand.kept
            if not by_hand.settled:
                by_hand.read(layer, reading.cosine[layer][kept], reading.norm[layer][kept])
        assert (one.trigger, one.exit) == (by_hand.trigger, by_hand.exit)
    assert found[0].kept.tolist() == [2, 7]


def test_both_exit_rules():
    reading = planted(2, 2)
    reading.cosine[4, 2] = 0.9  # one loud layer between two quiet ones
    dynamics = Dynamics.of([reading], first=1)
    probe = Probe(1, 0.95, 0.5, True, 0.999, 2)
    assert dynamics.decide(probe)[0].exit == 5
    consecutive = Probe(1, 0.95, 0.5, True, 0.999, 2, True)
    assert dynamics.decide(consecutive)[0].exit == 6


def test_what_never_fires_is_censored_in_quantiles_and_named():
    readings = [planted(trigger=t) for t in (2, 3, 3, 4, 5)] + [never(), never()]
    data = Dynamics.of(readings, first=1).to_dict()
    (row,) = [row["t"] for row in data["triggers"] if row["cosine"] == 0.95]
    assert (row["of"], row["reached"]) == (7, 5)
    assert (row["p10"], row["p50"], row["p90"], row["max"]) == (2, 4, None, 5)
    assert row["histogram"] == [0, 0, 1, 2, 1, 1, 0, 0]
    assert row["text"] == "p10: 2, p50: 4, p90: > 7 (2 of 7 never fired)"


def test_quantiles_are_values_that_were_seen():
    assert quantile([5, 1, 3], 0.5) == 3
    assert quantile([5, 1, 3], 0.0) == 1
    assert quantile([1, None], 0.5) == 1
    assert quantile([1, None], 0.51) is None
    assert spread([None, None])["text"] == "p10: none, p50: none, p90: none (2 of 2 never fired)"


def test_minimum_cosine_and_mass_are_what_numpy_says():
    rng = np.random.default_rng(0)
    readings = [
        PromptReading(1 - rng.random((4, n), np.float32) / 9, rng.random((4, n), np.float32))
        for n in (6, 6, 12)  # the last prompt has two pictures
    ]
    dynamics = Dynamics.of(readings, first=0)
    data = dynamics.to_dict()
    assert data["visual_tokens"] == [6, 12]
    assert data["mass"]["ranks"] == [1, 2, 4, 8, 12] == list(ranks_up_to(12))
    assert data["min_cosine"][2][0] == pytest.approx(
        min(one.cosine[2].min() for one in readings), abs=1e-6
    )
    of_one = np.sort(readings[2].norm[1])[::-1]
    assert dynamics.mass([2])[2, 1, 0] == pytest.approx(of_one[:2].sum() / of_one.sum())
    assert dynamics.mass([8])[0, 1, 0] == pytest.approx(1)  # fewer tokens than the rank


def test_kept_tokens_and_the_mass_that_they_hold():
    dynamics = Dynamics.of([planted(), planted(strong=(1, 4, 9))], first=1)
    decisions = dynamics.decide(Probe(1, 0.95, 0.5))
    assert [len(one.kept) for one in decisions] == [2, 3]
    held = 2 / (2 + 10 * 0.01)
    assert dynamics.mass_of(decisions)[0] == pytest.approx(held, abs=1e-6)


def test_the_json_form_is_bounded_by_layers_and_not_by_prompts():
    few = json.dumps(Dynamics.of([planted()] * 3).to_dict())
    many = json.dumps(Dynamics.of([planted()] * 300).to_dict())
    assert len(many) < 1.1 * len(few)
    assert "NaN" not in many


def test_prompts_without_an_image_say_nothing():
    empty = PromptReading(np.ones((LAYERS, 0), np.float32), np.ones((LAYERS, 0), np.float32))
    assert len(Dynamics.of([empty, planted()]).readings) == 1
    with pytest.raises(DataError, match="no prompt with an image"):
        Dynamics.of([empty])


def test_readings_that_overflow_are_refused_by_number():
    broken = planted()
    broken.norm[4, 3] = np.inf
    with pytest.raises(DataError, match="prompt 1: its readings are not finite"):
        Dynamics.of([planted(), broken])


def test_suggested_thresholds_fire_where_the_published_ones_fire_too_early():
    # Noise turns the output by 0.99 from the first layer on, what matters by 0.9 in layer 3.
    def noisy():
        reading = planted(3, 4, cosine=0.9)
        reading.cosine[reading.cosine > 0.95] = 0.99
        return reading

    dynamics = Dynamics.of([noisy() for _ in range(20)], first=1)
    suggestion = suggest_thresholds(dynamics)
    name, options = parse_request(suggestion.plan)
    assert name == "visipruner-adaptive"
    assert 0.9 < options["cosine"] <= 0.92
    assert options["exit_cosine"] <= 0.99
    assert [one.trigger for one in dynamics.decide(Probe(1, options["cosine"], 0.2))] == [3] * 20
    assert {one.trigger for one in dynamics.decide(Probe(1, 0.995, 0.2))} == {1}
    assert "published 0.995" in suggestion.reason
    assert preset(name, LAYERS, TOKENS, **options).kind == "adaptive"


def test_where_nothing_ever_fires_the_suggestion_says_so():
    suggestion = suggest_thresholds(Dynamics.of([never()] * 4))
    assert "in 0 % of the prompts" in suggestion.reason
    assert "deep=false" in suggestion.plan
    assert "no exit" in suggestion.reason


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 12), st.integers(1, 20), st.integers(0, 2**31))
def test_any_depth_and_token_count_gives_a_table_and_a_plan(layers, tokens, seed):
    rng = np.random.default_rng(seed)
    readings = [
        PromptReading(
            (1 - rng.random((layers, tokens)) ** 4).astype(np.float32),
            rng.random((layers, tokens)).astype(np.float32),
        )
        for _ in range(3)
    ]
    dynamics = Dynamics.of(readings)
    data = json.loads(json.dumps(dynamics.to_dict()))
    assert [row["cosine"] for row in data["triggers"]] == list(COSINES)
    assert all(row["t"]["reached"] == sum(row["t"]["histogram"]) for row in data["triggers"])
    reached = [row["t"]["reached"] for row in data["triggers"]]
    assert reached == sorted(reached)  # a higher threshold fires no less often
    name, options = parse_request(suggest_thresholds(dynamics).plan)
    if layers >= 3:
        assert preset(name, layers, tokens, **options).probe is not None
