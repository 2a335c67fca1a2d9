"""A server and its callers: OpenAI's own client, disconnects, the end."""

import base64
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import pytest
from visistage import runtime
from visistage.graphs.errors import TargetError
from visistage.serve.options import ServeOptions
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.served import CHAT, data_uri, question, serving, slowed

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
HEALTH = ("/health", "/ready", "/v2/health/live", "/v2/health/ready")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    checkpoint = toy.make_checkpoint(tmp_path_factory.mktemp("serve") / "toy")
    return built_once(checkpoint, tmp_path_factory)(PLAN)


@pytest.fixture(scope="module")
def server(bundle):
    with serving({"toy": bundle}, lanes=2, queue=8) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    address = f"http://127.0.0.1:{server.port}/v1"
    return openai.OpenAI(base_url=address, api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def alone(bundle):
    """A session's answers to the same questions."""
    with runtime.load(bundle.path, threads=1) as session:
        session.eos = frozenset()
        yield session


# --- answers --------------------------------------------------------------------------------------


def test_an_answer_is_that_of_a_session(client, alone):
    body = question("How many?", data_uri(1), data_uri(2), max_tokens=9)
    answer = client.chat.completions.create(model="toy", extra_body={"visistage": True}, **body)
    expected = alone.infer([picture(1), picture(2)], "How many?", max_tokens=9)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == expected.plan.prompt_rows
    assert answer.model == "toy"
    facts = answer.visistage
    for image, shown in zip(facts["images"], expected.shown, strict=True):
        kept = zip(*shown.kept(expected.plan.kept).nonzero(), strict=True)
        assert image["kept"] == [[int(row), int(column)] for row, column in kept]
        assert image["grid"] == [4, 4]
        assert image["box"][2] - image["box"][0] == pytest.approx(40 / 52)
    assert sum(len(image["kept"]) for image in facts["images"]) == facts["kept_tokens"] == 4


def test_a_conversation_and_a_stop_string(client, alone):
    turns = [
        {"role": "developer", "content": "Be brief."},
        *question("And this?", data_uri(1))["messages"],
        {"role": "assistant", "content": "A cat.", "refusal": None, "annotations": []},
        {"role": "user", "content": "Where?"},
    ]
    said = client.chat.completions.create(model="toy", messages=turns, max_tokens=12)
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
    ]
    expected = alone.infer([picture(1)], plain, max_tokens=12)
    assert said.choices[0].message.content == expected.text
    stop = expected.text[5:7]
    cut = client.chat.completions.create(model="toy", messages=turns, max_tokens=12, stop=[stop])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == expected.text.partition(stop)[0].strip()


def test_a_stream_is_the_answer_in_pieces(client):
    body = question("Why?", data_uri(3), max_tokens=15, temperature=1.2, seed=7)
    whole = client.chat.completions.create(model="toy", **body)
    chunks = list(
        client.chat.completions.create(
            model="toy", stream=True, stream_options={"include_usage": True}, **body
        )
    )
    *pieces, last, usage = chunks
    texts = [chunk.choices[0].delta.content or "" for chunk in pieces]
    assert "".join(texts).strip() == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 5
    assert last.choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    other = client.chat.completions.create(model="toy", **{**body, "seed": 8})
    assert other.choices[0].message.content != whole.choices[0].message.content


def test_an_answer_follows_a_schema_and_tells_its_probabilities(server, client, alone):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}}
    schema |= {"required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema}}
    server.engine.eos, ends = frozenset({2}), server.engine.eos
    try:
        body = question("How many?", data_uri(1), max_tokens=60, response_format=form)
        answer = client.chat.completions.create(
            model="toy", logprobs=True, top_logprobs=2, **body
        ).choices[0]
        streamed = list(client.chat.completions.create(model="toy", stream=True, **body))
        free = {"type": "json_object"}
        loose = client.chat.completions.create(model="toy", **{**body, "response_format": free})
        cut = client.chat.completions.create(model="toy", **{**body, "max_tokens": 2})
    finally:
        server.engine.eos = ends
    assert answer.finish_reason == "stop"
    assert 0 <= json.loads(answer.message.content)["n"] <= 9
    assert cut.choices[0].finish_reason == "length", "so nobody takes it for the whole"
    assert loose.choices[0].message.content.startswith("{")
    tokens = answer.logprobs.content
    assert "".join(token.token for token in tokens).startswith(answer.message.content[:5])
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    assert all(token.bytes == list(token.token.encode()) for token in tokens)
    assert all(-9999 <= other.logprob <= 0 for token in tokens for other in token.top_logprobs)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == answer.message.content
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "number?"}}}
    server.refused(question(response_format=bad), 422, "invalid_value")


def test_a_bias_bends_an_answer_and_a_stream_tells_probabilities_at_its_end(client):
    ask = client.chat.completions.create
    body = question("Why?", data_uri(1), max_tokens=4, logprobs=True, logit_bias={"77": 100})
    chunks = list(ask(model="toy", stream=True, **body))
    told = [
        token
        for chunk in chunks
        for token in (chunk.choices[0].logprobs or ()) and chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in told] == [told[0].token] * 4
    assert chunks[-1].choices[0].logprobs.content == told


def test_many_callers_get_their_own_answers(server, alone):
    asked = [(at % 5, f"Question {at % 3}") for at in range(24)]
    expected = {key: alone.infer(picture(key[0]), key[1], max_tokens=5).text for key in set(asked)}
    found = {}

    def caller(number):
        for at in range(number, len(asked), 6):
            seed, text = asked[at]
            status, answer, _ = server.ask(question(text, data_uri(seed)))
            assert status == 200, answer
            found[at] = answer["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {at: expected[key] for at, key in enumerate(asked)}


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").visistage["loaded"]
    with pytest.raises(openai.NotFoundError, match=r"no model 'tony'.*Did you mean 'toy'"):
        client.models.retrieve("tony")
    for path in HEALTH:
        assert server.call("GET", path)[0] == 200
    server.ask(question("Again", data_uri(4)))
    server.ask(question("And again", data_uri(4)))
    assert server.idle()
    text = server.call("GET", "/metrics")[1].decode()
    for line in (
        'visistage_lanes{model="toy"} 2.0',
        'visistage_running{model="toy"} 0.0',
        'visistage_waiting{model="toy"} 0.0',
    ):
        assert line in text
    for name in (
        'visistage_image_cache_hits_total{cache="stages",model="toy"}',
        'visistage_image_cache_bytes{cache="stages",model="toy"}',
        'visistage_first_token_seconds_count{model="toy"}',
        'visistage_token_gap_seconds_count{model="toy"}',
        'visistage_tokens_total{kind="answer",model="toy"}',
        'visistage_requests_total{route="/v1/chat/completions",status="200"}',
    ):
        assert float(re.search(re.escape(name) + r" (\S+)", text)[1]) > 0


def test_refusals_reach_openais_client_as_its_errors(client):
    ask = client.chat.completions.create
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for fields, param in (
        ({"tools": tools}, "tools"),
        ({"n": 2}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"7": 101}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop": ["x"] * 100}, "stop"),
    ):
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ask(model="toy", **{**question(), **fields})
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="gpt-4o", **question())
    assert missing.value.code == "model_not_found"


# --- callers who go away --------------------------------------------------------------------------


@contextlib.contextmanager
def calling(server, body, left_out=0):
    """A socket on which a question was asked, but for its last bytes."""
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(head.encode() + data[: len(data) - left_out % len(data)])
        yield connection


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_while_answers_are_written_frees_lanes(server, stream):
    body = question("Go on", data_uri(1), max_tokens=1000, stream=stream)
    with slowed(server.engine):
        with calling(server, body), calling(server, body) as second:
            if stream:
                assert any(b"data:" in second.recv(4096) for _ in range(9))
            wait_for(lambda: server.engine.load()["running"] == 2)
            with calling(server, body):  # waits for a lane
                wait_for(lambda: server.engine.load()["waiting"] == 1)
        assert server.idle(3)
    text = server.service.metrics.text().decode()
    assert float(re.search(r"visistage_cancelled_total{.*} (\S+)", text)[1]) >= 3
    assert server.ask(question())[0] == 200


def test_who_goes_away_during_prefill_is_not_answered(server):
    engine, reached, go_on, calls = server.engine, threading.Event(), threading.Event(), []
    executor = engine._alone[0]._executor
    append = executor.append

    def slow(stage, *given):
        calls.append(stage)
        reached.set()
        go_on.wait(10)
        return append(stage, *given)

    executor.append = slow
    try:
        with calling(server, question("Never asked before", data_uri(77))):
            assert reached.wait(10)
        wait_for(lambda: not server.service.active)
        go_on.set()
        assert server.idle(3)
    finally:
        executor.append = append
    assert calls == [0], "within one call of a stage"


def test_a_thousand_disconnects_leave_nothing_behind(server):
    """Callers leave in the middle of a request, in the queue, in a prefill, in an answer."""
    known = question("Why?", data_uri(1), max_tokens=9)
    before, engine = server.ask(known)[1]["choices"], server.engine
    asked = [question("Go on", data_uri(seed), max_tokens=1000, stream=True) for seed in range(9)]
    connections = [contextlib.ExitStack() for _ in range(3)]  # one more than there are lanes
    for at in range(1000):
        with connections[at % 3]:
            pass
        call = calling(server, asked[at % 9], left_out=at if at % 4 == 1 else 0)
        connection = connections[at % 3].enter_context(call)
        if at % 4 == 3:
            connection.recv(4096)
    for connection in connections:
        connection.close()
    assert server.idle()
    text = server.service.metrics.text().decode()
    assert float(re.search(r"visistage_cancelled_total{.*} (\S+)", text)[1]) > 300, (
        "most had been taken"
    )
    assert not engine._running
    assert not engine._waiting
    assert not any(own.borrowed for own in server.service.pool.served.values())
    assert server.ask(known)[1]["choices"] == before
    assert not any(context.pending for context in engine._contexts[1:])
    stages = range(len(engine.context.chain.slots))
    wanted = engine.context.slots_for((), 1000)
    assert all(engine.executor.store.slots(at) <= 2 * wanted[at] + 64 for at in stages)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(server, tmp_path):
    body = tmp_path / "question.json"
    body.write_text(json.dumps(question("Why?", data_uri(1))))
    words = ["curl", "-sS", "--max-time", "20", "-H", "content-type: application/json"]
    address = f"http://127.0.0.1:{server.port}"

    def curl(*more):
        return subprocess.run([*words, *more], capture_output=True, text=True, check=True).stdout

    said = json.loads(curl("-d", f"@{body}", address + CHAT))
    assert said["choices"] == server.ask(json.loads(body.read_text()))[1]["choices"]
    # Above a kibibyte curl asks whether it may send its body, and waits for a 100.
    body.write_text(json.dumps(question("Why?", data_uri(picture(1, 64, 64)), stream=True)))
    assert len(body.read_bytes()) > 1024
    assert curl("-N", "-H", "expect: 100-continue", "-d", f"@{body}", address + CHAT).endswith(
        "data: [DONE]\n\n"
    )
    assert json.loads(curl(address + "/health")) == {"status": "ok"}
    assert curl("-o", "/dev/null", "-w", "%{http_code}", "-d", "{", address + CHAT) == "400"


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


# --- who may ask ----------------------------------------------------------------------------------


def test_the_key_is_asked_for_on_every_route_but_health(bundle):
    with serving({"toy": bundle}, lanes=1, api_key="s3cret") as server:
        routes = ("/", "/metrics", "/v1/models", "/v1/models/toy", "/nowhere", CHAT)
        basic = "Basic " + base64.b64encode(b"me:s3cret").decode()
        wrong = "Basic " + base64.b64encode(b"s3cret:").decode()
        for path in routes:
            for sent in (
                None,
                "Bearer",
                "Bearer wrong",
                "Bearer s3cret2",
                "s3cret",
                wrong,
                "Basic %",
            ):
                headers = {} if sent is None else {"authorization": sent}
                status, answer, found = server.call("GET", path, **headers)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key"), (path, sent)
                assert found["www-authenticate"].startswith("Basic")
        assert server.ask(question())[0] == 401
        for path in HEALTH:
            assert server.call("GET", path)[0] == 200
        for good in ("Bearer s3cret", basic, "bearer  s3cret"):
            assert server.call("GET", "/v1/models", authorization=good)[0] == 200
            assert server.ask(question(), authorization=good)[0] == 200


@pytest.mark.parametrize("key", ["", " key", "schlüssel", "a\nb"])
def test_a_key_that_no_header_carries_is_refused(key):
    with pytest.raises(TargetError, match="API key"):
        ServeOptions(api_key=key)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_others_reach_no_server_without_a_key(host):
    with pytest.raises(TargetError, match="--host"):
        ServeOptions(host=host)
    assert not ServeOptions(host=host, api_key="key").loopback


def test_another_name_for_this_machine_is_refused(server):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.nip.io", "", "localhost.evil"):
        status, answer, _ = server.call("GET", "/health", host=host)
        assert (status, answer["error"]["code"]) == (403, "host_not_allowed"), host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"):
        assert server.call("GET", "/health", host=host)[0] == 200


def test_pages_of_other_sites_may_not_ask_unless_they_are_named(server, bundle):
    asked = {"origin": "https://app.example", "access_control_request_method": "POST"}
    status, _, headers = server.call("OPTIONS", CHAT, **asked)
    assert status == 405
    assert "access-control-allow-origin" not in headers
    # What a browser sends without asking first is not JSON by its type.
    sent = server.ask(question(), content_type="text/plain", origin="https://app.example")
    assert sent[0] == 415
    with serving({"toy": bundle}, lanes=1, allow_origins=("https://app.example",)) as other:
        assert other.call("OPTIONS", CHAT, **asked)[2]["access-control-allow-origin"]
        assert other.call("OPTIONS", CHAT, **{**asked, "origin": "https://evil.example"})[0] == 400
        found = other.ask(question(), origin="https://app.example")[2]
        assert found["access-control-allow-origin"] == "https://app.example"


# --- what goes wrong ------------------------------------------------------------------------------


def test_wrong_paths_and_methods_get_the_error_object(server):
    status, answer, _ = server.call("GET", "/v1/chat/completion")
    assert (status, answer["error"]["code"]) == (404, "not_found")
    assert "Did you mean '/v1/chat/completions'" in answer["error"]["message"]
    status, answer, headers = server.call("DELETE", CHAT)
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
    assert headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [True, False])
def test_a_bug_is_told_without_its_details(server, monkeypatch, caplog, stream):
    def fail(self, parts):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("visistage.runtime.reuse.Context.prefill", fail)
    status, answer, _ = server.ask(question(stream=stream))
    if stream:
        assert status == 200
        events = [json.loads(line[6:]) for line in answer.decode().split("\n\n") if line]
        assert events[-1]["error"]["code"] == "internal_error"
        answer = answer.decode()
    else:
        assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "secret" not in str(answer)
    assert "secret detail" in caplog.text
    monkeypatch.undo()
    assert server.ask(question())[0] == 200


def test_the_log_has_no_contents(server, caplog):
    assert server.idle(), "of earlier requests the lines are out"
    with caplog.at_level(logging.INFO, "visistage.serve"):
        _, answer, headers = server.ask(question("Is my secret safe?", data_uri(1)))
        server.refused(question("My secret", stop=[""]), 422, "invalid_value")
        server.call("GET", "/secret?secret=1")
        wait_for(lambda: len(caplog.records) == 3)  # a line comes behind its response
    lines = [record.getMessage() for record in caplog.records]
    identity = headers["x-request-id"]
    assert re.fullmatch(rf"{identity} POST {CHAT} 200 \d+ ms 5 tokens", lines[0])
    assert answer["id"] == f"chatcmpl-{identity}"
    assert "GET other 404" in lines[2]
    assert "secret" not in caplog.text.lower()


# --- its end --------------------------------------------------------------------------------------


@pytest.fixture
def process(bundle):
    """A server of the command line, with its port."""
    command = [sys.executable, "-m", "visistage", "serve", f"toy={bundle.path}", "--port", "0"]
    command += ["--threads", "1", "--max-tokens", "1500", "--drain", "20"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    ) as running:
        try:
            address = running.stdout.readline().strip()
            assert address, running.stderr.read()
            yield running, int(address.rpartition(":")[2])
        finally:
            running.kill()


def test_the_command_answers_and_drains(process):
    running, port = process
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
    body = question("Go on", data_uri(1), max_tokens=1500, temperature=1.0, seed=3)
    stream = client.chat.completions.create(model="toy", stream=True, **body)
    pieces = [next(stream)]
    running.send_signal(signal.SIGTERM)
    wait_for(lambda: status_of(port, "/ready") == 503)
    assert status_of(port, "/health") == 200
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="toy", **question())
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"] == "1"
    pieces += stream
    assert pieces[-1].choices[0].finish_reason in ("length", "stop")
    assert running.wait(20) == 0
    log = running.stderr.read()
    assert "serving toy" in log
    assert "503" in log
    assert "Traceback" not in log


def status_of(port, path):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def test_draining_has_an_end(bundle):
    with serving({"toy": bundle}, lanes=1, drain_seconds=0.3) as server, slowed(server.engine, 0.1):
        with calling(server, question("Go on", max_tokens=1000, stream=True)) as connection:
            heard = b""
            while b"data:" not in heard:  # the head may come alone
                heard += connection.recv(4096)
            server.server.handle_exit(signal.SIGTERM, None)
            began = time.monotonic()
            while connection.recv(4096):
                pass
        assert 0.2 < time.monotonic() - began < 5
