"""The simulation against queues that are solved by hand, and the command over it."""

import json
import random
from dataclasses import replace

import pytest
from click.testing import CliRunner
from visistage.cli.main import main
from visistage.compile.build import make_bundle
from visistage.graphs.bundle import Bundle
from visistage.graphs.errors import TargetError
from visistage.runtime.engine import Engine
from visistage.tools.estimate import capacity as capacity_module
from visistage.tools.estimate.capacity import capacity, estimated_costs, measured_costs
from visistage.tools.estimate.estimate_target import estimate_target
from visistage.tools.estimate.predict import PromptLengths, machine_of
from visistage.tools.estimate.queueing import (
    ServingCosts,
    Traffic,
    arrivals,
    encoders_needed,
    percentile,
    replicas_needed,
    simulate,
    simulate_callers,
    simulated_firsts,
)

COSTS = ServingCosts(30.0, 50.0, 20.0, 3, (10.0, 11.0, 12.0, 13.0))


def lindley(service: float, rate: float, requests: int, share: float) -> float:
    """Return a percentile of sojourn times in a queue with one server and equal service times."""
    chance = random.Random(0)
    waits, wait = [], 0.0
    for _ in range(requests):
        gap = chance.expovariate(rate) * 1e3
        chance.random()  # the simulation draws whether the image is new
        wait = max(0.0, wait - gap)
        waits.append(wait + service)
        wait += service
    return percentile(waits[len(waits) // 10 :], share)


@pytest.mark.parametrize("rate", [2, 8, 11])
@pytest.mark.parametrize("share", [50, 95])
def test_answers_of_one_token_are_a_queue_with_one_server(rate, share):
    found = simulate(COSTS, Traffic(rate, tokens=1), 1, gap_ms=100)
    name = f"first_token_p{share}_ms"
    assert getattr(found, name) == pytest.approx(lindley(80.0, rate, 4000, share))


def test_a_lonely_caller_waits_for_nobody():
    found = simulate(COSTS, Traffic(0.01, tokens=5), 1, gap_ms=100)
    assert found.first_token_p50_ms == pytest.approx(80.0)
    assert found.first_token_p95_ms == pytest.approx(80.0)
    assert found.token_p95_ms == pytest.approx(10.0)
    assert found.utilisation == pytest.approx(0.01e-3 * (80 + 4 * 10), rel=0.05)


def test_known_images_skip_the_encoder():
    found = simulate(COSTS, Traffic(0.01, questions_per_image=4, tokens=2), 1, gap_ms=100)
    assert found.first_token_p50_ms == pytest.approx(20.0)
    assert found.first_token_p95_ms == pytest.approx(80.0)


def test_nobody_waits_longer_for_a_token_than_the_bound():
    """The gap, and one call, of the encoder at most, and one step."""
    for gap in (0, 40):
        found = simulate(COSTS, Traffic(9, tokens=20), 1, gap_ms=gap)
        assert found.token_p95_ms <= gap + 30 + 13 + 1e-9
    patient = simulate(COSTS, Traffic(9, tokens=20), 1, gap_ms=1e9)
    assert patient.token_p95_ms > 40 + 30 + 13


def test_a_full_machine_answers_no_more_than_it_can():
    found = simulate(COSTS, Traffic(100, tokens=8), 1, gap_ms=1e9)
    per_answer = 80 + 7 * 13 / 4  # four lanes full
    assert found.utilisation == pytest.approx(1, abs=0.01)
    assert found.answers_per_second == pytest.approx(1e3 / per_answer, rel=0.1)


def test_callers_who_wait_for_their_answers():
    """One of them is alone; so many as there are lanes wait for each other's prompts only."""
    assert simulate_callers(COSTS, 1, 5, 3, gap_ms=100) == pytest.approx([80.0] * 5)
    assert simulate_callers(COSTS, 2, 2, 1, gap_ms=1e9) == pytest.approx([80.0, 160.0])
    slow = replace(COSTS, prepare_ms=7.0)
    assert simulate_callers(slow, 1, 5, 3, gap_ms=100) == pytest.approx([87.0] * 5)
    assert len(simulate_callers(COSTS, 8, 50, 4, gap_ms=100)) == 50


def test_times_are_those_that_a_load_is_asked_at():
    traffic = Traffic(0.01, tokens=3)
    times = [at for at, _ in arrivals(traffic, 4000, seed=3)]
    assert 4000 / times[-1] == pytest.approx(1e-5, rel=0.1)
    firsts = simulated_firsts(COSTS, traffic, 50, gap_ms=100, seed=3)
    assert sorted(firsts)[25] == pytest.approx(80.0)
    level = simulate(COSTS, traffic, 1, gap_ms=100, seed=3)
    assert level.first_token_p50_ms == pytest.approx(sorted(firsts)[25])


def test_lanes_are_worth_their_steps():
    alone = ServingCosts(30.0, 50.0, 20.0, 3, (10.0,))
    traffic = Traffic(30, tokens=30)
    one, four = (simulate(costs, traffic, 1, gap_ms=100) for costs in (alone, COSTS))
    assert four.answers_per_second > 1.8 * one.answers_per_second


def test_the_fewest_replicas_are_found():
    traffic = Traffic(40, tokens=16)
    found = replicas_needed(COSTS, traffic, 300, gap_ms=100)
    assert found.first_token_p95_ms <= 300
    assert simulate(COSTS, traffic, found.replicas - 1, gap_ms=100).first_token_p95_ms > 300
    assert replicas_needed(COSTS, traffic, 79, gap_ms=100) is None


def test_encoding_apart_saves_where_the_encoder_dominates_and_not_elsewhere():
    heavy = ServingCosts(300.0, 20.0, 10.0, 3, (2.0, 2.1, 2.2, 2.3))
    traffic = Traffic(20, tokens=4)
    joint = replicas_needed(heavy, traffic, 800, gap_ms=100)
    apart = encoders_needed(heavy, traffic, 800, gap_ms=100, most=joint.replicas)
    if apart is not None:
        assert apart[0] + apart[1].replicas < joint.replicas
        assert apart[0] >= 20 * 0.3
        assert apart[1].first_token_p95_ms <= 800
    light = ServingCosts(0.1, 50.0, 20.0, 3, (10.0,))
    assert encoders_needed(light, Traffic(10, tokens=4), 500, gap_ms=100, most=1) is None


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_bundle("demo", plan="visipruner", out=tmp_path_factory.mktemp("demo")).path


def test_measured_costs_are_those_of_the_engine(path):
    with Engine(Bundle.open(path), lanes=3, threads=1) as engine:
        costs = measured_costs(engine, PromptLengths(20, 8))
    assert costs.calls == 4, "three stages and a selection"
    assert len(costs.step_ms) == 3
    assert min(costs.question_ms, costs.prefill_ms, costs.encode_ms) > 0
    assert min(costs.step_ms) > 0


def test_estimated_steps_read_the_weights_once():
    target = estimate_target("llava-7b", "dense", "fp16", None)
    machine = machine_of(target, "h100")
    costs = estimated_costs(target, machine, PromptLengths(), 8)
    assert costs.step_ms[0] < costs.step_ms[7] < 1.5 * costs.step_ms[0]
    pruned = estimate_target("llava-7b", "scope:keep=64", "fp16", None)
    assert estimated_costs(pruned, machine, PromptLengths(), 8).prefill_ms < 0.6 * costs.prefill_ms


def test_a_time_that_nothing_keeps_is_refused():
    target = estimate_target("llava-7b", None, "fp16", None)
    with pytest.raises(TargetError, match="no number of replicas"):
        capacity(target, "orin-nano-8", PromptLengths(), Traffic(1), 10.0, lanes=2)


def run(*words):
    return CliRunner().invoke(main, ["estimate", *words])


def test_the_command(path, monkeypatch):
    words = ["llava-7b", "--device", "h100", "--rate", "20/s", "--p95", "800ms"]
    facts = json.loads(run(*words, "--json").stdout)
    assert facts["needed"]["plan"]["replicas"] <= facts["needed"]["dense"]["replicas"]
    assert not facts["measured"]
    shown = run(*words)
    assert shown.exit_code == 0, shown.output
    assert "replicas for 800 ms" in shown.stdout
    monkeypatch.setattr(capacity_module, "measured_costs", lambda *given: COSTS)
    shown = run(str(path), "--device", "cpu", "--rate", "9/min", "--lanes", "4")
    assert "measured here" in shown.stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--rate", "20", "no rate"), ("--rate", "0/s", "no rate"), ("--p95", "fast", "no time")],
)
def test_wrong_options(option, value, message):
    done = run("llava-7b", "--device", "h100", "--rate", "1/s", option, value)
    assert done.exit_code == 2
    assert message in done.stderr
