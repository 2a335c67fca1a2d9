"""An engine in the hands of many callers: its answers are those of a session, asked alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from visistage import runtime
from visistage.compile.build import make_bundle
from visistage.graphs.bundle import Bundle
from visistage.graphs.errors import BusyError, CapacityError, PromptError, TargetError
from visistage.runtime.engine import ROOM, Engine
from visistage.runtime.ticket import Cancelled
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.calibrated import calibrate
from visistage.tests.support.stand_ins import stand_in, write_engines

PLANS = {
    "gated": "visipruner:shallow=1,t=1,e=2,keep=4",
    "dense": "dense",
    "entered": "scope:keep=5",
    "served": "vica:layers=0-2,prefix=frozen",
    "per prompt": "visipruner-code:shallow=1",
}
QUESTIONS = ["How many?", "What is this, and why?", "Is there a red circle in it?", "Name it."]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("engine") / "toy")


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    return built_once(checkpoint, tmp_path_factory)


def engine_of(bundle: Bundle, **options) -> Engine:
    engine = Engine(Bundle.open(bundle.path), threads=1, **options)
    engine.eos = frozenset()  # a toy's answers end anywhere
    return engine


def asked(count: int) -> list[tuple]:
    """Return images, prompts and lengths, so that lanes join and leave at different steps."""
    return [
        (None if at % 5 == 4 else picture(at % 3), QUESTIONS[at % 4], 3 + 7 * at % 19)
        for at in range(count)
    ]


def alone(bundle: Bundle, prompts: list[tuple]) -> list[tuple]:
    with runtime.load(bundle.path, threads=1) as session:
        session.eos = frozenset()
        answers = [session.infer(i, p, max_tokens=n) for i, p, n in prompts]
    return [(answer.tokens, answer.text, answer.plan) for answer in answers]


@pytest.mark.parametrize("target", ["cpu", "cpu-portable"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_answers_written_together_are_those_of_a_session(bundles, plan, target):
    bundle, prompts = bundles(plan, target), asked(14)
    with engine_of(bundle, lanes=4, gap_ms=0) as engine:
        tickets = [engine.submit(i, p, max_tokens=n) for i, p, n in prompts]
        answers = [ticket.wait(60) for ticket in tickets]
        assert engine.tokens > engine.steps, "nothing was written together"
    found = [(answer.tokens, answer.text, answer.plan) for answer in answers]
    assert found == alone(bundle, prompts)


@pytest.mark.parametrize("precision", ["int8", "w4", "int8:cache=int8"])
def test_integers_answer_together_as_alone(bundles, checkpoint, precision, tmp_path):
    calibrate(checkpoint, PLANS["gated"], tmp_path)
    options = {"precision": precision, "calibration": tmp_path}
    bundle, prompts = bundles(PLANS["gated"], **options), asked(10)
    with engine_of(bundle, lanes=4, gap_ms=0) as engine:
        tickets = [engine.submit(i, p, max_tokens=n) for i, p, n in prompts]
        found = [ticket.wait(60).tokens for ticket in tickets]
    assert found == [tokens for tokens, *_ in alone(bundle, prompts)]


def test_a_lane_that_was_not_moved_would_be_noticed(bundles, monkeypatch):
    bundle, prompts = bundles(PLANS["gated"]), asked(14)
    monkeypatch.setattr(
        "visistage.runtime.backends.cpu_caches.CacheBlocks.move", lambda *given: None
    )
    with engine_of(bundle, lanes=4) as engine:
        tickets = [engine.submit(i, p, max_tokens=n) for i, p, n in prompts]
        found = [ticket.wait(60).tokens for ticket in tickets]
    assert found != [tokens for tokens, *_ in alone(bundle, prompts)]


def test_callers_on_many_threads_get_their_own_answers(bundles):
    bundle, prompts = bundles(PLANS["gated"]), asked(24)
    expected = [tokens for tokens, *_ in alone(bundle, prompts)]
    with engine_of(bundle, lanes=3) as engine, ThreadPoolExecutor(8) as callers:

        def ask(prompt):
            image, question, tokens = prompt
            return engine.submit(image, question, max_tokens=tokens).wait(60).tokens

        assert list(callers.map(ask, prompts)) == expected


def test_pieces_are_the_answer(bundles):
    with engine_of(bundles(PLANS["dense"]), lanes=2) as engine:
        tickets = [engine.submit(picture(1), q, max_tokens=9) for q in QUESTIONS]
        texts = ["".join(ticket).strip() for ticket in tickets]
        assert texts == [ticket.answer.text for ticket in tickets]
        assert list(tickets[0]) == [], "an answer that is over has no more pieces"


def test_times_of_graphs_are_those_of_a_session(bundles):
    bundle = bundles(PLANS["gated"])
    with engine_of(bundle, lanes=2) as engine, runtime.load(bundle.path, threads=1) as session:
        found = engine.submit(picture(2), "Why?", max_tokens=3).wait(30).timings.graphs_ms
        again = engine.submit(picture(2), "Why?", max_tokens=3).wait(30).timings.graphs_ms
        assert {*found} == {*session.infer(picture(2), "Why?", max_tokens=3).timings.graphs_ms}
        assert "vision" in {*found} - {*again}


def test_slots_of_a_long_prompt_are_given_up_and_its_image_is_not(bundles):
    with engine_of(bundles(PLANS["gated"]), lanes=3) as engine:
        first = engine.submit(picture(1), "Why?", max_tokens=5).wait(30)
        slots = engine.executor.store.slots(2)
        engine.submit(picture(1), "Go on", max_tokens=190).wait(30)
        assert engine.executor.store.slots(2) > 2 * slots
        again = engine.submit(picture(1), "Why?", max_tokens=5).wait(30)
        assert engine.executor.store.slots(2) == slots
        assert again.tokens == first.tokens
        assert "vision" not in again.timings.graphs_ms


def test_lanes_have_slots_for_answers_and_no_more(bundles):
    """Attention pays for every slot of every lane at every step."""
    with engine_of(bundles("dense"), lanes=3) as running:
        store, seen, resize = running.executor.store, [], running.executor.store.resize

        def noted(stage, slots, kept):
            seen.append(slots)
            return resize(stage, slots, kept)

        store.resize = noted
        for _ in range(2):
            for ticket in [running.submit(picture(at), "Why?", max_tokens=9) for at in range(6)]:
                ticket.wait()
        rows = running.context.slots_for(ticket.request.parts, 9)[0]
        assert store.slots(0) == store.rounded(rows)
        assert len(seen) == 1, "whole answers at once, and the same slots again"
        long = running.submit(picture(0), "Why?", max_tokens=300)
        long.wait()
        assert len(seen) <= 2 + 300 // ROOM + 1, "not every few tokens"


def test_one_lane_needs_no_lanes_of_a_back_end(bundles):
    bundle, prompts = bundles(PLANS["gated"]), asked(3)
    with engine_of(bundle, lanes=1) as engine:
        found = [engine.submit(i, p, max_tokens=n).wait(60).tokens for i, p, n in prompts]
    assert found == [tokens for tokens, *_ in alone(bundle, prompts)]


def test_a_cancelled_answer_frees_its_lane_and_changes_no_other(bundles):
    bundle, prompts = bundles(PLANS["gated"]), asked(6)
    with engine_of(bundle, lanes=2) as engine:
        endless = [engine.submit(picture(at), "Go on", max_tokens=150) for at in range(2)]
        next(endless[0])
        waiting = [engine.submit(i, p, max_tokens=n) for i, p, n in prompts]
        waiting[3].cancel()
        for ticket in endless:
            ticket.cancel()
        answered = [ticket for ticket in waiting if ticket is not waiting[3]]
        found = [ticket.wait(60).tokens for ticket in answered]
        for ticket in (*endless, waiting[3]):
            with pytest.raises(Cancelled):
                ticket.wait(60)
        assert engine.load() == {"waiting": 0, "running": 0, "lanes": 2}
    del prompts[3]
    assert found == [tokens for tokens, *_ in alone(bundle, prompts)]


def test_a_prompt_is_cancelled_within_one_call_of_a_stage(bundles):
    with engine_of(bundles(PLANS["gated"]), lanes=2) as engine:
        calls, reached, go_on = [], threading.Event(), threading.Event()
        append = engine._alone[0]._executor.append

        def slow(stage, *given):
            calls.append(stage)
            reached.set()
            go_on.wait(10)
            return append(stage, *given)

        engine._alone[0]._executor.append = slow
        ticket = engine.submit(picture(1), "Why?")
        reached.wait(10)
        ticket.cancel()
        go_on.set()
        with pytest.raises(Cancelled):
            ticket.wait(10)
        assert calls == [0]
        engine._alone[0]._executor.append = append
        assert engine.submit(picture(1), "Why?", max_tokens=3).wait(10).tokens


def test_answers_under_way_go_on_while_a_prompt_is_computed(bundles):
    with engine_of(bundles(PLANS["gated"]), lanes=2, gap_ms=0) as engine:
        first = engine.submit(picture(0), "Go on", max_tokens=150)
        next(first)
        steps, before = [], engine._alone[1]._executor.append

        def noted(*given):
            steps.append(engine.steps)
            return before(*given)

        engine._alone[1]._executor.append = noted
        engine.submit(picture(1), "Why?", max_tokens=2).wait(30)
        assert len(steps) > 1
        assert sorted(set(steps)) == steps, "a token between any two calls of a stage"
        first.cancel()


def test_a_full_queue_and_bad_questions_are_refused_at_once(bundles):
    with engine_of(bundles(PLANS["gated"]), lanes=1, queue=2) as engine:
        held = threading.Event()
        first = engine.submit(picture(0), "Go on", max_tokens=100, notify=lambda _: held.wait(5))
        while not first.began:
            time.sleep(0.01)
        others = [engine.submit(picture(0), "Why?", max_tokens=2) for _ in range(2)]
        with pytest.raises(BusyError, match="2 questions are waiting"):
            engine.submit(picture(0), "Why?")
        for prompt, options, error in (
            ("", {}, PromptError),
            ("Why?", {"max_tokens": 100_000}, CapacityError),
            ("Why?", {"temperature": -1}, PromptError),
        ):
            with pytest.raises(error):
                engine.submit(picture(0), prompt, **options)
        held.set()
        first.cancel()
        assert all(ticket.wait(30).tokens for ticket in others)


def test_a_failure_reaches_its_caller_and_no_other(bundles):
    with engine_of(bundles(PLANS["gated"]), lanes=2) as engine:
        broken = engine.submit(picture(0), "Why?", max_tokens=4)
        assert broken.wait(30)
        prefill = engine._contexts[0].prefill
        engine._contexts[0].prefill = lambda parts: 1 / 0
        with pytest.raises(ZeroDivisionError):
            engine.submit(picture(0), "Why?").wait(30)
        engine._contexts[0].prefill = prefill
        again = engine.submit(picture(0), "Why?", max_tokens=4).wait(30)
        assert again.tokens == broken.answer.tokens


def test_closing_cancels_or_drains(bundles):
    for drain in (False, True):
        engine = engine_of(bundles(PLANS["gated"]), lanes=1)
        tickets = [engine.submit(picture(0), "Go on", max_tokens=40) for _ in range(3)]
        engine.close(drain=drain)
        assert all(ticket.over.is_set() for ticket in tickets)
        assert all((ticket.answer is not None) == drain for ticket in tickets) or not drain
        if not drain:
            assert any(isinstance(ticket.error, Cancelled) for ticket in tickets)
        with pytest.raises(BusyError, match="closing"):
            engine.submit(picture(0), "Why?")
        engine.close()


def test_a_device_has_one_lane_and_a_queue(tmp_path, monkeypatch):
    """Engines are stand-ins that compute the graphs on the CPU."""
    stand_in(monkeypatch)
    checkpoint = toy.make_checkpoint(tmp_path / "toy", kv_heads=2)
    options = {"target": "rtx", "contexts": (256,)}
    bundle = make_bundle(str(checkpoint), plan=PLANS["gated"], out=tmp_path, **options)
    write_engines(bundle)
    prompts = asked(5)
    with Engine(Bundle.open(bundle.path), lanes=1) as engine:
        engine.eos = frozenset()
        tickets = [engine.submit(i, p, max_tokens=n) for i, p, n in prompts]
        found = [ticket.wait(60).tokens for ticket in tickets]
    with runtime.load(bundle.path) as session:
        session.eos = frozenset()
        expected = [session.infer(i, p, max_tokens=n).tokens for i, p, n in prompts]
    assert found == expected
    with pytest.raises(TargetError, match="--lanes"):
        Engine(Bundle.open(bundle.path), lanes=2)


def test_lanes_are_refused_where_a_back_end_has_none(bundles):
    bundle = Bundle.open(bundles(PLANS["dense"], "cpu-portable").path)
    with pytest.raises(TargetError, match="--lanes"):
        Engine(bundle, lanes=4, backend="openvino")
    with pytest.raises(TargetError, match="lanes is 0"):
        Engine(bundle, lanes=0)


def test_a_seeded_draw_is_the_same_in_any_company(bundles):
    bundle = bundles(PLANS["gated"])
    options = {"max_tokens": 12, "temperature": 1.5, "seed": 5}
    with engine_of(bundle, lanes=4) as engine:
        tickets = [engine.submit(picture(at % 2), "Why?", **options) for at in range(6)]
        found = [ticket.wait(30).tokens for ticket in tickets]
    assert found[0] == found[2] == found[4]
    assert found[1] == found[3] == found[5]
    assert np.unique(found, axis=0).shape[0] == 2
