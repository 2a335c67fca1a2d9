"""Limits, each with its status; images from elsewhere; bodies that nobody sends on purpose."""

import contextlib
import http.server
import json
import random
import socket
import struct
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
from visistage.graphs.errors import CapacityError
from visistage.serve import images
from visistage.serve.images import image_bytes, is_public
from visistage.serve.options import ServeOptions
from visistage.serve.pool import EnginePool
from visistage.serve.requests import KNOWN, ImageAddress
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.served import CHAT, data_uri, question, serving, slowed

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
MOST_BODY = 300_000


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    checkpoint = toy.make_checkpoint(tmp_path_factory.mktemp("serve") / "toy")
    return built_once(checkpoint, tmp_path_factory)


@pytest.fixture(scope="module")
def host():
    """A host of images; /away leads to it, /large has no end in sight, /slow takes its time."""

    class Images(http.server.BaseHTTPRequestHandler):
        asked: ClassVar = []

        def do_GET(self):
            self.asked.append((self.path, self.headers["host"]))
            self.send_response({"/away": 302, "/none": 404}.get(self.path, 200))
            if self.path == "/away":
                self.send_header("location", "/cat.png")
            self.end_headers()
            if self.path.startswith("/cat"):
                self.wfile.write(image_bytes(ImageAddress(data_uri(5), ""), (), 10**6))
            if self.path == "/large":
                self.wfile.write(bytes(2 * MOST_BODY))
            if self.path == "/slow":
                time.sleep(1)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Images)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def server(bundles, host):
    allowed = (f"localhost:{host.server_port}", "images.example")
    with serving(
        {"toy": bundles(PLAN)},
        lanes=1,
        queue=2,
        max_body=MOST_BODY,
        max_images=2,
        max_pixels=10_000,
        max_tokens=100,
        allow_images_from=allowed,
    ) as running:
        yield running


# --- limits ---------------------------------------------------------------------------------------


def test_a_body_is_limited_whatever_it_says_about_its_length(server):
    server.refused(b"x" * (MOST_BODY + 1), 413, "body_too_large")
    server.refused(b"", 413, "body_too_large", content_length=str(MOST_BODY + 1))
    chunks = b"%x\r\n%s\r\n" % (100_000, bytes(100_000))
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(head.encode() + b"transfer-encoding: chunked\r\n\r\n" + 4 * chunks)
        assert b" 413 " in connection.recv(4096)
    assert server.refused(b"[" + b"[]," * 99_000 + b"1]", 400, "invalid_json")


def test_a_body_of_many_parts_is_refused_before_it_is_read(bundles, monkeypatch):
    monkeypatch.setattr("visistage.serve.requests.MOST_PARTS", 1000)
    with serving({"toy": bundles(PLAN)}, lanes=1) as server:
        body = json.dumps({"messages": [[]] * 1000}).encode()
        server.refused(body, 413, "body_too_large")


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr("visistage.serve.chat.BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(head.encode() + b"content-length: 10\r\n\r\n{")
        assert b" 408 " in connection.recv(4096)


def test_a_request_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr("visistage.serve.run.HEAD_SECONDS", 0.3)
    whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for begins in (b"", whole):  # at once, and behind a request that was answered
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(begins)
            assert not begins or b" 200 " in connection.recv(4096)
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(b"G")
                    time.sleep(0.05)
            assert 0.3 <= time.monotonic() - started < 2
    with socket.create_connection(("127.0.0.1", server.port), 2) as silent:
        assert silent.recv(1) == b""
    with slowed(server.engine, 0.1):
        assert server.ask(question())[0] == 200, "an answer may take its time"


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "", "application/json5"])
def test_a_body_of_another_type_is_refused(server, kind):
    server.refused(question(), 415, "unsupported_media_type", content_type=kind)


def test_images_are_limited_before_they_are_decoded(server, monkeypatch):
    error = server.refused(question("?", *[data_uri(0)] * 3), 413, "too_many_images")
    assert "3 images" in error["message"]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    large = data_uri(np.zeros((200, 100, 3), np.uint8))
    error = server.refused(question("?", large), 413, "image_too_large")
    assert error["param"] == "messages.0.content.0.image_url"


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("data:image/png;base64,AAAA", 415, "unsupported_image"),
        ("data:image/jp2;base64,AAAADGpQICANCocK", 415, "unsupported_image"),
        ("data:text/html;base64,AAAA", 415, "unsupported_image"),
        (data_uri(0)[:200], 422, "invalid_image"),
        ("data:image/png;base64,%%%", 422, "invalid_image"),
        ("data:image/png,raw", 422, "invalid_image_url"),
        ("data:", 422, "invalid_image_url"),
        ("photo.png", 422, "invalid_image_url"),
        ("/etc/passwd", 422, "invalid_image_url"),
        ("file:///etc/passwd", 422, "invalid_image_url"),
        ("ftp://images.example/a.png", 422, "invalid_image_url"),
        ("", 422, "invalid_image_url"),
    ],
)
def test_an_image_that_cannot_be_used_says_why(server, url, status, code):
    assert server.refused(question("?", url), status, code)["param"].endswith("0.image_url")


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 3), (90, 100)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_every_shape_and_mode_are_answered(server, size, mode):
    import base64
    import io

    from PIL import Image

    file = io.BytesIO()
    kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    Image.new(mode, size).save(file, kind)
    uri = f"data:image/x;base64,{base64.b64encode(file.getvalue()).decode()}"
    status, answer, _ = server.ask(question("?", uri, max_tokens=1))
    assert status == 200, answer


def test_tokens_are_limited(server):
    server.refused(question(max_tokens=101), 422, "invalid_value")
    server.refused(question(max_tokens=None, max_completion_tokens=101), 422, "invalid_value")
    long = question("word " * 3000)
    server.refused(long, 422, "context_length_exceeded")
    server.refused(question("w" * 250_000), 422, "invalid_value")


def test_a_full_queue_says_when_to_ask_again(server):
    done = []
    with slowed(server.engine, 0.03):
        for count in range(1, 4):
            threading.Thread(
                target=lambda: done.append(server.ask(question("Go on", max_tokens=30))[0])
            ).start()
            while sum(server.engine.load().values()) <= count:  # and the one lane
                time.sleep(0.01)
        status, answer, headers = server.ask(question("One more", data_uri(1)))
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert headers["retry-after"] == "1"
        assert answer["error"]["type"] == "rate_limit_error"
        while len(done) < 3:
            time.sleep(0.01)
    assert done == [200] * 3


def test_requests_under_way_are_limited_before_they_are_read(server, monkeypatch):
    monkeypatch.setattr("visistage.serve.service.Service.most", 0)
    server.refused(question(), 429, "too_many_requests")
    assert server.call("GET", "/health")[0] == 200


# --- images from elsewhere ------------------------------------------------------------------------


def test_an_image_is_fetched_from_a_host_on_the_list(server, host, monkeypatch):
    address = f"http://localhost:{host.server_port}/cat.png?size=1"
    asked = question("What?", address)
    error = server.refused(asked, 422, "image_not_fetched")
    assert "not public" in error["message"], "this machine's own address is private"
    assert host.RequestHandlerClass.asked == []
    monkeypatch.setattr(images, "is_public", lambda text: True)
    sent = server.ask(question("What?", data_uri(5)))[1]
    found = server.ask(asked)[1]
    assert found["choices"] == sent["choices"]
    name = f"localhost:{host.server_port}"
    assert host.RequestHandlerClass.asked == [("/cat.png?size=1", name)]


@pytest.mark.parametrize(
    ("path", "status", "why"),
    [
        ("/away", 422, "302 (a redirect, which is not followed)"),
        ("/none", 422, "404"),
        ("/slow", 422, "longer than"),
        ("/large", 413, "more than 300000 bytes"),
    ],
)
def test_what_is_not_an_image_there_is_refused(server, host, monkeypatch, path, status, why):
    monkeypatch.setattr(images, "is_public", lambda text: True)
    monkeypatch.setattr(images, "FETCH_SECONDS", 0.3)
    before = len(host.RequestHandlerClass.asked)
    found, answer, _ = server.ask(question("?", f"http://localhost:{host.server_port}{path}"))
    assert found == status
    assert why in answer["error"]["message"]
    assert len(host.RequestHandlerClass.asked) == before + 1, "the redirect was not followed"


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/a.png",
        "http://images.example:8080/a.png",
        "http://images.example.evil.example/a.png",
        "http://evilimages.example/a.png",
        "http://127.0.0.1/a.png",
        "http://[::1]/a.png",
        "http://2130706433/a.png",
        "http://169.254.169.254/latest/meta-data",
    ],
)
def test_other_hosts_are_refused(server, url, monkeypatch):
    monkeypatch.setattr(images, "_connect", lambda *_: pytest.fail("looked up"))
    server.refused(question("?", url), 422, "image_host_not_allowed")


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example\\@evil.example/a.png",
        "http://images.example@evil.example/a.png",
        "http://evil.example\\.images.example/",
        "http://images.example /a.png",
        "http://images.example/\r\nX: 1",
        "http://images.example:port/",
        "http://images.ex\u0430mple/",
        "http://[images.example/",
        "http://",
        "http:///a.png",
        "//images.example/a.png",
    ],
)
def test_addresses_that_parsers_may_read_differently_are_refused(server, url):
    server.refused(question("?", url), 422, "invalid_image_url")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::", False),
        ("2002:a00:1::", False),
    ],
)
def test_private_addresses_are_known_in_every_dress(address, public):
    assert is_public(address) is public


def test_one_private_address_of_several_is_enough(server, monkeypatch):
    both = [(0, 0, 0, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("connected"))
    with pytest.raises(images.RequestError, match="not public"):
        image_bytes(ImageAddress("http://images.example/a.png", "p"), ("images.example",), 10)


# --- several bundles ------------------------------------------------------------------------------


def test_bundles_are_loaded_on_demand_and_the_idle_one_makes_room(bundles):
    served = {"pruned": bundles(PLAN), "dense": bundles("dense"), "late": bundles("scope:keep=5")}
    weights = {name: bundle.manifest.weight_bytes for name, bundle in served.items()}
    limit = sum(weights.values()) - min(weights.values()) // 2  # all but one
    with serving(served, lanes=1, memory_limit=limit) as server:

        def ask(model, **fields):
            return server.ask(question("Why?", data_uri(1), model=model, **fields))

        def loaded():
            found = server.call("GET", "/v1/models")[1]["data"]
            return [model["id"] for model in found if model["visistage"]["loaded"]]

        assert loaded() == ["pruned"]
        answers = {name: ask(name)[1] for name in ("dense", "pruned")}
        assert loaded() == ["pruned", "dense"]
        assert answers["dense"]["model"] == "dense"
        assert ask("late")[0] == 200
        assert loaded() == ["pruned", "late"], "dense was asked longest ago"
        assert ask("dense")[1]["choices"] == answers["dense"]["choices"]
        assert loaded() == ["dense", "late"]
        server.refused(question(), 404, "model_not_found")  # which one?
        busy = [server.service.pool.borrow(name) for name in ("dense", "late")]
        for loan in busy:
            loan.__enter__()
        assert ask("pruned")[0] == 503
        for loan in busy:
            loan.__exit__(None, None, None)
        assert ask("pruned")[0] == 200


def test_a_limit_that_holds_no_bundle_is_told_at_once(bundles):
    with pytest.raises(CapacityError, match="--memory-limit"):
        EnginePool({"toy": bundles(PLAN)}, ServeOptions(memory_limit=1000))


def test_an_engine_whose_thread_ended_is_loaded_again(bundles):
    with serving({"toy": bundles(PLAN)}, lanes=1) as server:
        first = server.engine
        first.close()
        assert server.ask(question())[0] == 200
        assert server.engine is not first


# --- anything at all ------------------------------------------------------------------------------

JUNK = (
    *(None, True, False, 0, 1, -1, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, "", "x", "\ud800"),
    *([], [[]], {}, {"": None}, {"type": "text"}, [None], ["text"], "data:", "\x00", "<image>"),
    *({"url": 5}, {"role": "user"}, "</s>", [0.1] * 20, {"include_usage": 1}, "é" * 300),
)


def changed(value, draw):
    """A copy of a value with something in it replaced, left out, doubled or added."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        other = dict(value)
        how = draw.random()
        if how < 0.6:
            other[key] = changed(value[key], draw)
        elif how < 0.75:
            del other[key]
        else:
            other[draw.choice(KNOWN)] = draw.choice(JUNK)
        return other
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], changed(value[at], draw), *value[at + draw.randrange(2) :]]
    if isinstance(value, str) and value and draw.random() < 0.5:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice(["", "\0", "\ud83d", ",", "=", "%", "日"]) + value[at + 1 :]
    return draw.choice(JUNK)


def test_no_body_whatsoever_makes_the_server_fail(server):
    draw, statuses = random.Random(7), {}
    whole = question(
        *("What?", data_uri(picture(1, 8, 8))),
        **{"model": "toy", "stream": False, "stop": ["x"], "seed": 3, "temperature": 0.5},
        **{"top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "n": 1},
        **{"visistage": True, "user": "me", "max_tokens": 2, "logprobs": True},
        **{"top_logprobs": 1, "logit_bias": {"7": 1}, "response_format": {"type": "text"}},
    )
    for at in range(600):
        body = whole
        for _ in range(1 + at % 3):
            body = changed(body, draw)
        data = json.dumps(body).encode()
        if at % 5 == 0:  # and no JSON at all
            place = draw.randrange(len(data) + 1)
            data = data[:place] + draw.randbytes(draw.randrange(4)) + data[place + 1 :]
        status, answer, _ = server.ask(data)
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500, (data, answer)
        if status != 200 and not isinstance(answer, bytes):
            assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert statuses[200] > 20
    assert {400, 422} <= set(statuses)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}', b"1" * 5000]
)
def test_what_is_no_json_object_is_400(server, body):
    server.refused(body, 400, "invalid_json")


def test_no_request_of_any_route_makes_the_server_fail(server):
    draw = random.Random(11)
    paths = ["/", "/metrics", "/v1/models", "/v1/models/%ff", "/v1/models/../x", CHAT, "/health"]
    paths += ["//", "/%00", "/v1/models/" + "x" * 3000, "/?a=%", "*", "http://other/", "/ready/"]
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"):
        for path in paths:
            body = draw.randbytes(30) if method in ("POST", "PUT") else None
            assert server.call(method, path, body)[0] < 500, (method, path)


def test_bytes_that_are_no_http_end_their_own_connection_only(server):
    draw = random.Random(13)
    starts = (b"", b"GET / HTTP/1.1\r\n", b"POST " + CHAT.encode() + b" HTTP/1.1\r\n")
    for at in range(60):
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            linger = struct.pack("ii", 1, 0)  # end with a reset, as a broken network does
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.sendall(starts[at % 3] + draw.randbytes(draw.randrange(1, 400)))
    assert server.ask(question())[0] == 200
    assert server.idle()
