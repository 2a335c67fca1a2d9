"""Two replicas under Ray Serve: answers, callers who go, and one that is killed under load."""

import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from urllib.request import Request, urlopen

import openai
import pytest
from visistage import runtime
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.served import data_uri, question

KEY = "s3cret"
ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    checkpoint = toy.make_checkpoint(tmp_path_factory.mktemp("ray") / "toy")
    return built_once(checkpoint, tmp_path_factory)("visipruner:shallow=1,t=1,e=2,keep=4")


@pytest.fixture(scope="module")
def client(bundle):
    from ray import serve
    from visistage.serve.ray import deployment

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"threads": 1, "lanes": 2, "queue": 8, "api_key": KEY}
    serve.run(deployment({"toy": bundle.path}, replicas=2, cpus=0.5, **options))
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
    serve.shutdown()
    ray.shutdown()


def test_answers_are_those_of_a_session(client, bundle):
    with runtime.load(bundle.path, threads=1) as session:
        expected = {seed: session.infer(picture(seed), "Why?", max_tokens=6) for seed in range(4)}
    for seed, answer in expected.items():
        body = question("Why?", data_uri(seed), max_tokens=6)
        found = client.chat.completions.create(model="toy", **body)
        assert found.choices[0].message.content == answer.text
        stream = client.chat.completions.create(model="toy", stream=True, **body)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces).strip() == answer.text
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(model="toy", n=2, **question())


def test_a_caller_who_goes_is_not_answered_to_the_end(client):
    body = question("Go on", data_uri(1), max_tokens=900, temperature=1.0, seed=2)
    for _ in range(8):
        stream = client.chat.completions.create(model="toy", stream=True, **body)
        next(stream)
        stream.close()
    deadline = time.monotonic() + 10
    while sum(counted(client, r"visistage_cancelled_total{.*} (\S+)").values()) < 8:
        assert time.monotonic() < deadline


def test_questions_about_an_image_go_to_the_replica_that_knows_it(client):
    hits = r'visistage_image_cache_hits_total{cache="stages".*} (\S+)'
    before = sum(counted(client, hits).values())
    for number in range(4):
        for seed in range(100, 110):
            client.chat.completions.create(
                model="toy",
                extra_headers={"serve_multiplexed_model_id": f"image {seed}"},
                **question(f"{number}?", data_uri(seed), max_tokens=1),
            )
    assert sum(counted(client, hits).values()) - before == 3 * 10, "all but the first of each"


def counted(client, pattern) -> dict[str, float]:
    """A metric of every replica, by when that began to count."""
    address, key = (
        str(client.base_url).replace("/v1/", "/metrics"),
        {"authorization": f"Bearer {KEY}"},
    )
    found = {}
    for _ in range(30):  # Ray asks either
        with urlopen(Request(address, headers=key)) as answer:
            text = answer.read().decode()
        began = re.search(r"visistage_requests_created{.*} (\S+)", text)
        value = re.search(pattern, text)
        found[began and began[1]] = float(value[1]) if value else 0.0
    return found


def test_a_replica_that_is_killed_under_load_is_replaced(client):
    body, over = question("Why?", data_uri(1), max_tokens=20), threading.Event()
    outcomes = {0: [], 2: []}

    def caller(retries):
        asking = client.with_options(max_retries=retries).chat.completions
        while not over.is_set():
            try:
                asking.create(model="toy", **body)
                outcomes[retries].append("answered")
            except (openai.APIStatusError, openai.APIConnectionError) as error:
                outcomes[retries].append(type(error).__name__)

    callers = [threading.Thread(target=caller, args=(retries,)) for retries in (0, 0, 2, 2)]
    for thread in callers:
        thread.start()
    time.sleep(1)
    os.kill(replicas()[0], signal.SIGKILL)
    killed = len(outcomes[0])
    deadline = time.monotonic() + 60
    while len(replicas()) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(1)
    over.set()
    for thread in callers:
        thread.join()
    assert len(replicas()) == 2
    assert outcomes[0][killed:].count("answered") > 10, "the other went on"
    assert sum(outcome != "answered" for outcome in outcomes[0]) <= 6
    assert set(outcomes[2]) == {"answered"}, "OpenAI's client asks twice again by itself"
    print({retries: Counter(found) for retries, found in outcomes.items()})


def replicas() -> list[int]:
    """Process ids of the replicas that are alive."""
    import psutil

    def name(process):
        try:
            return " ".join(process.cmdline())
        except psutil.Error:
            return ""

    found = psutil.Process().children(recursive=True)
    return sorted(p.pid for p in found if "ServeReplica" in name(p) and p.is_running())
