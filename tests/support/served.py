"""A server on a real socket, in a thread of the tests' process, and what asks it."""

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

from PIL import Image
from visistage.runtime.engine import Engine
from visistage.serve.options import ServeOptions
from visistage.serve.pool import EnginePool
from visistage.serve.run import DrainingServer, listen, server_config
from visistage.serve.service import Service
from visistage.tests.support.asking import picture

CHAT = "/v1/chat/completions"


@dataclass
class Running:
    """A server that runs: its parts, and its port."""

    service: Service
    server: DrainingServer
    port: int

    @property
    def engine(self) -> Engine:
        return next(iter(self.service.pool.loaded().values()))

    def call(self, method, path, body=None, **headers) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or bytes) and headers of an answer; ``body`` is JSON unless it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            names.setdefault("content-type", "application/json")
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, body, names)
            response = connection.getresponse()
            data = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
        plain = found.get("content-type", "").startswith("application/json")
        return response.status, json.loads(data) if plain and data else data, found

    def ask(self, body, **headers) -> tuple[int, Any, dict[str, str]]:
        return self.call("POST", CHAT, body, **headers)

    def refused(self, body, status, code, **headers) -> dict[str, Any]:
        """The error object of a question that is refused so."""
        found, answer, _ = self.ask(body, **headers)
        assert (found, answer["error"]["code"]) == (status, code), answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return answer["error"]

    def idle(self, seconds=10) -> bool:
        """Whether no question is waiting or being answered, now or soon."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load = self.engine.load()
            if not load["waiting"] + load["running"] + self.service.active:
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def serving(bundles, **options):
    """Serve bundles by name until the block ends."""
    chosen = ServeOptions(port=0, threads=1, **options)
    listener = listen(chosen)
    service = Service(EnginePool(bundles, chosen), chosen)
    service.load_first()
    for engine in service.pool.loaded().values():
        engine.eos = frozenset()  # a toy's answers end anywhere
    server = DrainingServer(server_config(service), service)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield Running(service, server, listener.getsockname()[1])
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        service.close()


def data_uri(pixels=0, kind="PNG") -> str:
    """The data URI of an image, or of a random one by its seed."""
    file = io.BytesIO()
    pixels = picture(pixels) if isinstance(pixels, int) else pixels
    Image.fromarray(pixels).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def question(text="Why?", *urls, **fields) -> dict[str, Any]:
    """The body of a question about images, with what else it holds."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*images, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 5, **fields}


@contextlib.contextmanager
def slowed(engine, seconds=0.02):
    """Every token of an engine takes ``seconds`` longer while the block runs."""
    step = engine._step

    def slow():
        time.sleep(seconds)
        step()

    engine._step = slow
    try:
        yield
    finally:
        engine._step = step
