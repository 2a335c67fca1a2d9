"""Thousands of requests to one server, some of them broken or given up; none lost, none mixed up.

    python -m visistage.bench.soak [--requests 10000] [--callers 8]

Callers ask ``visistage serve`` about many images, whole or in streams, go away in the middle, and
send bodies that are no requests. Every answer is compared with that of a session asked alone, so an
answer about another's image is noticed. At the end no question may be under way, and the server's
memory may not have grown since the first 500 requests.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import click
import psutil

from .. import runtime
from .peer_models import PeerCheckpoint, bundle
from .record import dry_option, save

SERIES = 3000
"""Held-out scenes that nothing else uses."""

IMAGES = 60
WARM_REQUESTS = 500
PATIENCE_SECONDS = 60
ABORTED, BROKEN = 0.12, 0.08
"""Shares of the requests that are given up, and that are no requests."""


@dataclass(frozen=True)
class SoakQuestion:
    """The body of a request without ``stream``, and the answer that it must get."""

    body: dict
    expected: str


@dataclass
class SoakTally:
    """What became of the requests, and the first of them that went wrong."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, outcome: str, why: str = "") -> None:
        """Count an outcome; with a reason it is one that must not be."""
        self.outcomes[outcome] += 1
        if why and len(self.wrong) < 10:
            self.wrong.append(f"{outcome}: {why[:300]}")


def questions(subject: PeerCheckpoint, session: runtime.Session) -> list[SoakQuestion]:
    """Return questions about scenes, of each image two, and what a session answers to them."""
    scenes = list(subject.scenes(2 * IMAGES, SERIES))
    found = []
    for number, scene in enumerate(scenes):
        image = scenes[number // 2].image
        file = io.BytesIO()
        image.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": scene.question},
        ]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 16}
        found.append(SoakQuestion(body, session.infer(image, scene.question, max_tokens=16).text))
    return found


class SoakCaller:
    """A caller on a connection of its own for each request."""

    def __init__(self, port: int, every: list[SoakQuestion], tally: SoakTally, seed: int):
        self.port, self.every, self.tally = port, every, tally
        self.draw = random.Random(seed)

    def call(self) -> None:
        """Send one request, and see what becomes of it."""
        asked, fate = self.draw.choice(self.every), self.draw.random()
        stream = self.draw.random() < 0.5
        data = json.dumps({**asked.body, "stream": stream}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        with contextlib.closing(connection):
            try:
                if fate < ABORTED:
                    self._send(connection, data)
                    time.sleep(self.draw.random() * 0.1)
                    self.tally.note("aborted")
                elif fate < ABORTED + BROKEN:
                    self._break(connection, data)
                else:
                    self._ask(connection, data, stream, asked.expected)
            except (OSError, http.client.HTTPException) as error:
                self.tally.note("lost", repr(error))

    def _send(self, connection: http.client.HTTPConnection, data: bytes) -> None:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", data, headers)

    def _break(self, connection: http.client.HTTPConnection, data: bytes) -> None:
        place = self.draw.randrange(len(data))
        broken = data[:place] + self.draw.randbytes(3) + data[place + self.draw.randrange(9) :]
        self._send(connection, broken)
        response = connection.getresponse()
        text = response.read().decode()
        # One that still is a request is answered, about an image that may be another.
        failed = response.status >= 500
        self.tally.note("failed" if failed else "broken", text if failed else "")

    def _ask(
        self, connection: http.client.HTTPConnection, data: bytes, stream: bool, expected: str
    ) -> None:
        self._send(connection, data)
        response = connection.getresponse()
        text = response.read().decode()
        if response.status == 429:
            self.tally.note("busy")
            return
        if response.status != 200:
            self.tally.note("failed", text)
            return
        if stream:
            events = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
            pieces = (event["choices"][0]["delta"].get("content", "") for event in events)
            said = "".join(pieces).strip()
        else:
            said = json.loads(text)["choices"][0]["message"]["content"]
        good = said == expected
        self.tally.note("answered" if good else "wrong", "" if good else f"{said} for {expected}")


def metric(port: int, name: str) -> float:
    """Return the value of one of a server's metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        found = re.search(rf"^{name}{{.*}} (\S+)$", connection.getresponse().read().decode(), re.M)
    return float(found[1]) if found else 0.0


def soak(
    port: int, process: psutil.Process, every: list[SoakQuestion], requests: int, callers: int
) -> dict:
    """Send the requests; return what became of them, and of the server's memory."""
    tally, turns, lock = SoakTally(), count(), threading.Lock()
    resident: list[int] = []

    def work(seed: int) -> None:
        caller = SoakCaller(port, every, tally, seed)
        while True:
            with lock:
                number = next(turns)
                if number == WARM_REQUESTS:
                    resident.append(process.memory_info().rss)
            if number >= requests:
                return
            caller.call()

    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    time.sleep(1)
    resident.append(process.memory_info().rss)
    return {
        "requests": requests,
        "callers": callers,
        "seconds": seconds,
        "outcomes": dict(tally.outcomes),
        "wrong": tally.wrong,
        "cancelled": metric(port, "visistage_cancelled_total"),
        "left": metric(port, "visistage_running") + metric(port, "visistage_waiting"),
        "resident_bytes": resident,
        "growth": resident[-1] / resident[0] - 1,
    }


@click.command()
@click.option("--model", default="demo", show_default=True, help="A demo model.")
@click.option("--requests", type=click.IntRange(1), default=10_000, show_default=True)
@click.option("--callers", type=click.IntRange(1), default=8, show_default=True)
@dry_option
def main(model, requests, callers, dry) -> None:
    """Serve, ask, and fail if anything was lost, wrong or left."""
    subject = PeerCheckpoint.named(model)
    path = bundle("visipruner", "fp32", "cpu", subject)
    with runtime.load(path) as session:
        every = questions(subject, session)
    command = [sys.executable, "-m", "visistage", "serve", str(path), "--port", "0", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rpartition(":")[2])
            found = soak(port, psutil.Process(server.pid), every, requests, callers)
        finally:
            server.terminate()
    save(f"soak-{model}", [{"key": "machine", "model": model}, {"key": "soak", **found}], dry=dry)
    if found["wrong"] or found["left"] or server.returncode:
        raise SystemExit(f"{found['wrong']}, {found['left']} left, exit {server.returncode}")


if __name__ == "__main__":
    main()
