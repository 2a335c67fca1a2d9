"""Plans with fewer layers among those that a calibration measures, and what they are ranked by."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from visistage.calib.plan_search.choose import choose_plan
from visistage.calib.plan_search.depth_candidates import depth_candidates
from visistage.calib.plan_search.dynamics import Dynamics
from visistage.calib.plan_search.goal import SelectionGoal
from visistage.calib.run.layerwise import LayerObserver, run_layerwise
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.tests.support import toy
from visistage.tests.support.chain_judge import LAYERS as DEPTH
from visistage.tests.support.chain_judge import PLANS, ChainJudge, prompts
from visistage.tests.support.plain import Plain
from visistage.tests.support.planted_plans import LAYERS, Recorder, planted, pricing

BLOCKS = (0.9, 0.5, 0.04, 0.3, 0.02, 0.2, 0.1, 0.4, 0.6, 0.8)


@pytest.fixture
def dynamics():
    rng = np.random.default_rng(0)
    read = Dynamics.of([planted(rng) for _ in range(6)], first=1)
    return replace(read, blocks=BLOCKS)


def test_layers_that_turn_rows_least_are_left_out_first(dynamics):
    found = depth_candidates(dynamics, pricing())
    assert [candidate.text for candidate in found] == ["depth:drop=4", "depth:drop=2-4"]
    assert [candidate.cost for candidate in found] == pytest.approx([0.9, 0.8])
    assert [candidate.predicted for candidate in found] == pytest.approx(
        [0.02 / sum(BLOCKS), 0.06 / sum(BLOCKS)]
    )
    assert depth_candidates(replace(dynamics, blocks=()), pricing()) == []


def test_fewer_layers_are_chosen_where_they_pay(dynamics):
    """Only these lose nothing; they are measured where they are asked for, and only there."""

    def good(plan):
        return 1.0 if plan.dropped else 0.5

    goal = SelectionGoal(lose=0.0, selectors=(), most=12, depth=True)
    choice = choose_plan(dynamics, pricing(), goal, Recorder(good), Recorder(good))
    assert choice.text == "depth:drop=2-4"
    assert choice.plan.calibrated
    assert [layer for _, layer in choice.plan.dropped] == [2, 2, 4, 4]
    assert choice.to_dict()["plan"]["stages"][0]["drop_mlp"] == [2, 4]
    measure = Recorder(good)
    other = choose_plan(dynamics, pricing(), replace(goal, depth=False), measure)
    assert other.text == "dense"
    assert not any(plan.dropped for plan in measure.plans)
    assert len(BLOCKS) == LAYERS


class Turns(LayerObserver):
    """Keeps the cosines that it is given, by layer."""

    reads = True

    def __init__(self):
        self.seen = {layer: [] for layer in range(DEPTH)}

    def turns(self, layer, cosine):
        self.seen[layer].append(cosine)


def test_what_a_layer_turns_is_what_transformers_rows_show(tmp_path):
    checkpoint = open_checkpoint(str(toy.make_checkpoint(tmp_path, layers=DEPTH, kv_heads=2)))
    weights = {name: tensor.float() for name, tensor in checkpoint.state_dict().items()}
    text = checkpoint.raw["text_config"]
    config = {**text, "rope_theta": text["rope_parameters"]["rope_theta"]}
    given, turns = prompts()[:1], Turns()
    run_layerwise(checkpoint, given, PLANS["dense"], observer=turns)
    segments = ChainJudge(checkpoint, weights, PLANS["dense"]).segments(given[0])
    x, plain = torch.cat([segment.rows[0] for segment in segments]), Plain(weights, config)
    for layer in range(DEPTH):
        before = x
        x = plain.layer(layer, x, torch.arange(len(x)))
        wanted = (before * x).sum(1) / before.norm(dim=1) / x.norm(dim=1)
        (found,) = turns.seen[layer]
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
