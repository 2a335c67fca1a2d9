"""The load and the soak without peers: a made-up engine, and answers that are wrong on purpose."""

import json
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer
from visistage.bench import capacity, serving, soak
from visistage.bench.environments import OWN
from visistage.bench.peer_models import Peer
from visistage.bench.peers import PeerRun
from visistage.bench.runner import RUNNERS, Ready, Runner
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.served import data_uri, question
from visistage.tests.support.served import serving as running

HONEST = """
from serving import Crowd, serve_crowds
class Honest:
    about = {"made": "up"}
    def __init__(self, model, threads): pass
    def crowd(self, questions, callers, new):
        crowd = Crowd(len(questions))
        for number, (image, question, text) in enumerate(questions):
            crowd.ask(number)
            for token in range(min(new, 3)):
                crowd.hear(number, [token + callers * (text == "mixed") + int(image.sum())])
        return crowd
serve_crowds(Honest)
"""


def test_a_crowd_is_asked_and_tallied(tmp_path):
    script = tmp_path / "made_up.py"
    script.write_text(HONEST)
    settings = json.dumps({"model": "m", "threads": 1})
    run = PeerRun(Peer("made-up", "made up", "none", OWN, lambda *_: None))
    np.save(tmp_path / "0.npy", np.full((2, 2, 3), 1, np.uint8))
    texts = ("same", "same", "same", "mixed")
    asked = [{"image": str(tmp_path / "0.npy"), "question": "q", "text": text} for text in texts]
    command = [sys.executable, str(script), settings]
    with Runner("made up", command, tmp_path / "log", {"PYTHONPATH": str(RUNNERS)}) as run.runner:
        run.ready = run.runner.ready(60)
        assert isinstance(run.ready, Ready)
        tallies = {}
        for callers in (1, 8):
            reply = serving.ask(run, asked, callers, 3)
            tallies[callers] = serving.CrowdTally(reply["seconds"], reply["answers"])
        row = serving.row_of(run, tallies, 1)
        assert serving.ask(run, asked, 1, 4) == {}, "three tokens are too few"
    assert row["callers_8"]["answers"] == 4
    assert row["callers_8"]["as_alone"] == 0.75, "one answer depends on its company"
    ratio = row["callers_8"]["tokens_a_second"] / row["callers_8"]["answers_a_second"]
    assert ratio == pytest.approx(3)
    assert "have not 4 tokens" in serving.row_of(run, {}, 1)["failed"]
    assert serving.ask(run, asked, 1, 3) == {}, "nothing after a failure"


def test_a_soak_notices_what_is_wrong(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(soak, "WARM_REQUESTS", 20)
    checkpoint = toy.make_checkpoint(tmp_path_factory.mktemp("soak") / "toy")
    bundle = built_once(checkpoint, tmp_path_factory)("visipruner:shallow=1,t=1,e=2,keep=4")
    with running({"toy": bundle}, lanes=2) as server:
        every = [
            soak.SoakQuestion(body, server.ask(body)[1]["choices"][0]["message"]["content"])
            for body in (question("Why?", data_uri(seed)) for seed in range(3))
        ]
        process = psutil.Process()
        found = soak.soak(server.port, process, every, 80, 3)
        assert found["wrong"] == []
        assert sum(found["outcomes"].values()) == 80
        assert {"answered", "aborted", "broken"} <= set(found["outcomes"])
        assert found["left"] == 0
        mixed = [soak.SoakQuestion(every[0].body, every[1].expected)]
        found = soak.soak(server.port, process, mixed, 30, 1)
        assert found["outcomes"]["wrong"] > 10
        assert found["wrong"]


def test_the_server_answers_a_crowd_as_the_engine_does(tmp_path, tmp_path_factory):
    checkpoint = toy.make_checkpoint(tmp_path_factory.mktemp("crowd") / "toy")
    bundle = built_once(checkpoint, tmp_path_factory)("visipruner:shallow=1,t=1,e=2,keep=4")
    asked = []
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", picture(number))
        file = str(tmp_path / f"{number}.npy")
        asked.append({"image": file, "question": f"Why {number}?", "text": ""})
    said = {}
    for script in ("ours_batching", "ours_http"):
        run = PeerRun(Peer(script, script, script, OWN, lambda *_: bundle.path, {"callers": 2}))
        with ExitStack() as stack:
            run.start(SimpleNamespace(minutes=1), 1, stack)
            assert run.failed is None
            said[script] = serving.ask(run, asked, 2, 5)["answers"]
        assert all(answer["first_ms"] < answer["total_ms"] for answer in said[script])
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    for own, served in zip(said["ours_batching"], said["ours_http"], strict=True):
        text = tokenizer.decode(own["tokens"])
        assert {heard.strip() for heard in served["tokens"]} == {text.strip()}


def test_a_load_is_asked_at_its_times_and_by_its_callers():
    def ask(number):
        time.sleep(0.02)
        return 20.0 + number

    began = time.perf_counter()
    assert capacity.at_times(ask, [0.0, 30.0, 200.0]) == pytest.approx([20, 21, 22], abs=8)
    assert 0.2 < time.perf_counter() - began < 0.5
    began = time.perf_counter()
    assert capacity.by_callers(ask, 2, 10) == [20.0 + number for number in range(10)]
    assert 0.1 <= time.perf_counter() - began < 0.3


def test_a_round_in_which_the_machine_was_slow_spoils_only_itself():
    even = [float(number) for number in range(1, 101)]
    slow = [10 * first for first in even]
    facts = capacity.compared([(even, even), (slow, even), (even, even)])
    assert facts["p95_ms"]["ratios"] == pytest.approx([1.0, 0.1, 1.0])
    assert facts["p95_ms"]["ratio"] == 1.0
    assert facts["p50_ms"]["measured"] == facts["p50_ms"]["simulated"] == pytest.approx(50.5, abs=1)
