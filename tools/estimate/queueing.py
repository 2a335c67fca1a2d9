"""Callers, queue and lanes of an engine, simulated event by event.

A replica does one thing at a time, as ``runtime.engine`` does: a prompt that a lane is free for,
in a number of calls, between which answers under way get a token once they have waited for
``gap_ms``; else one token of every answer. Callers come at random times (Poisson), each to the
replica with the fewest questions, or are so many, each of whom asks again once he is answered.
Plain Python, no clock: times are those of the costs. ``bench.capacity`` holds it against an engine.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

REQUESTS = 4000
"""Questions that a simulation asks, of which the first tenth only warms it up."""

MOST_REPLICAS = 1024


@dataclass(frozen=True)
class ServingCosts:
    """Milliseconds of what a replica does.

    Attributes:
        encode_ms: the vision encoder, for an image that is new.
        prefill_ms: the decoder, for a new image and a question, up to the first token.
        question_ms: the same where the image is known.
        calls: calls of a prefill, between which answers may get a token.
        step_ms: one token of 1, 2, ... answers at once.
        prepare_ms: decoding and preprocessing of an image, beside what the replica does.
    """

    encode_ms: float
    prefill_ms: float
    question_ms: float
    calls: int
    step_ms: tuple[float, ...]
    prepare_ms: float = 0.0

    @property
    def lanes(self) -> int:
        """Answers that are written at once."""
        return len(self.step_ms)


@dataclass(frozen=True)
class Traffic:
    """Questions a second, questions about each image, and tokens of each answer."""

    rate: float
    questions_per_image: float = 1.0
    tokens: int = 32


@dataclass(frozen=True)
class ServiceLevel:
    """The outcome: milliseconds at the median and the 95th percentile, and busy time's share."""

    replicas: int
    first_token_p50_ms: float
    first_token_p95_ms: float
    token_p50_ms: float
    token_p95_ms: float
    utilisation: float
    answers_per_second: float


@dataclass(eq=False)
class Arrival:
    """A question: when it came, from when a replica may take it, whether its image is new, and what
    is left of its answer.
    """

    arrival: float
    ready: float
    new_image: bool
    left: int
    last: float = 0.0


@dataclass
class Replica:
    """One engine; ``clock`` is when it finishes what it does."""

    costs: ServingCosts
    gap_ms: float
    encodes: bool = True
    clock: float = 0.0
    busy: float = 0.0
    stepped: float = 0.0
    ended: int = 0
    waiting: deque[Arrival] = field(default_factory=deque)
    running: list[Arrival] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def load(self) -> int:
        """Questions that it has."""
        return len(self.waiting) + len(self.running)

    def advance(self, until: float) -> None:
        """Work until a time, or until nothing is left."""
        while self.clock < until and self.load:
            self.work()

    def work(self) -> None:
        """Let a question in if there is a lane, and write a token of every answer."""
        free = self.waiting and len(self.running) < self.costs.lanes
        if free and (self.waiting[0].ready <= self.clock or not self.running):
            self._prefill(self.waiting.popleft())
        if self.running:
            self._step()

    def _spend(self, ms: float) -> None:
        self.clock += ms
        self.busy += ms

    def _prefill(self, question: Arrival) -> None:
        costs = self.costs
        self.clock = max(self.clock, question.ready)
        if question.new_image and self.encodes:
            self._spend(costs.encode_ms)
            self._step_if_due()
        whole = costs.prefill_ms if question.new_image else costs.question_ms
        for _ in range(costs.calls):
            self._spend(whole / costs.calls)
            self._step_if_due()
        self.firsts.append(self.clock - question.arrival)
        question.last, question.left = self.clock, question.left - 1
        if question.left:
            self.running.append(question)
        else:
            self.ended += 1

    def _step_if_due(self) -> None:
        if self.running and self.clock - self.stepped > self.gap_ms:
            self._step()

    def _step(self) -> None:
        self._spend(self.costs.step_ms[len(self.running) - 1])
        self.stepped = self.clock
        for question in self.running:
            self.gaps.append(self.clock - question.last)
            question.last, question.left = self.clock, question.left - 1
        going = [question for question in self.running if question.left]
        self.ended += len(self.running) - len(going)
        self.running = going


def arrivals(traffic: Traffic, requests: int, seed: int = 0) -> list[tuple[float, bool]]:
    """Return when questions come, in milliseconds, and whether each is about a new image."""
    chance = random.Random(seed)
    at, asked = 0.0, []
    for _ in range(requests):
        at += chance.expovariate(traffic.rate) * 1e3
        asked.append((at, chance.random() < 1 / traffic.questions_per_image))
    return asked


def simulate_callers(
    costs: ServingCosts, callers: int, requests: int, tokens: int, *, gap_ms: float
) -> list[float]:
    """Return the milliseconds to the first token of questions about new images, by so many callers
    at one replica, each of whom asks the next question once he is answered.
    """
    replica = Replica(costs, gap_ms)
    asked = 0
    while True:
        for _ in range(min(callers - (asked - replica.ended), requests - asked)):
            ready = replica.clock + costs.prepare_ms
            replica.waiting.append(Arrival(replica.clock, ready, True, tokens))
            asked += 1
        if not replica.load:
            return replica.firsts
        replica.work()


def simulated_firsts(
    costs: ServingCosts, traffic: Traffic, requests: int, *, gap_ms: float, seed: int = 0
) -> list[float]:
    """Return the milliseconds to the first token of each question at one replica."""
    (server,) = _served(costs, traffic, 1, 0, requests, gap_ms, seed)
    return server.firsts


def simulate(
    costs: ServingCosts,
    traffic: Traffic,
    replicas: int,
    *,
    gap_ms: float,
    encoders: int = 0,
    requests: int = REQUESTS,
    seed: int = 0,
) -> ServiceLevel:
    """Simulate callers over some replicas.

    Args:
        costs: of one replica.
        traffic: of all of them together.
        replicas: engines; with ``encoders``, those that run the decoder.
        gap_ms: as ``runtime.engine`` takes it.
        encoders: machines that encode images, one after another, before a replica gets them; 0:
            replicas encode their own.
        requests: questions that are asked.
        seed: of the arrivals.
    """
    servers = _served(costs, traffic, replicas, encoders, requests, gap_ms, seed)
    end = max(server.clock for server in servers)
    firsts = [ms for server in servers for ms in server.firsts[len(server.firsts) // 10 :]]
    gaps = [ms for server in servers for ms in server.gaps[len(server.gaps) // 10 :]]
    return ServiceLevel(
        replicas,
        percentile(firsts, 50),
        percentile(firsts, 95),
        percentile(gaps, 50),
        percentile(gaps, 95),
        sum(server.busy for server in servers) / (end * replicas),
        requests / end * 1e3,
    )


def _served(
    costs: ServingCosts,
    traffic: Traffic,
    replicas: int,
    encoders: int,
    requests: int,
    gap_ms: float,
    seed: int,
) -> list[Replica]:
    """Return replicas that answered all questions."""
    servers = [Replica(costs, gap_ms, encodes=not encoders) for _ in range(replicas)]
    free = [0.0] * encoders
    asked = []
    for at, new in arrivals(traffic, requests, seed):
        ready = at + costs.prepare_ms
        if new and encoders:
            first = min(range(encoders), key=free.__getitem__)
            free[first] = ready = max(ready, free[first]) + costs.encode_ms
        asked.append((ready, at, new))
    for ready, arrival, new in sorted(asked):
        for server in servers:
            server.advance(ready)
        chosen = min(servers, key=lambda server: server.load)
        chosen.clock = max(chosen.clock, ready) if not chosen.load else chosen.clock
        chosen.waiting.append(Arrival(arrival, ready, new, traffic.tokens))
    for server in servers:
        server.advance(float("inf"))
    return servers


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` per cent of some lie; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))] if ordered else 0.0


def replicas_needed(
    costs: ServingCosts, traffic: Traffic, p95_ms: float, *, gap_ms: float, encoders: int = 0
) -> ServiceLevel | None:
    """Return the fewest replicas whose first tokens keep ``p95_ms``; None: no number does.

    A larger number never does worse, so it is doubled until it serves, and then halved to.
    """

    def served(count: int) -> ServiceLevel:
        return simulate(costs, traffic, count, gap_ms=gap_ms, encoders=encoders)

    count, best = 1, None
    while best is None and count <= MOST_REPLICAS:
        found = served(count)
        if found.first_token_p95_ms <= p95_ms:
            best = found
        elif found.utilisation < 0.05:
            return None  # hardly anybody waits, and it is still too slow
        else:
            count *= 2
    if best is None:
        return None
    low = count // 2
    while low + 1 < best.replicas:
        middle = (low + best.replicas) // 2
        found = served(middle)
        if found.first_token_p95_ms <= p95_ms:
            best = found
        else:
            low = middle
    return best


def encoders_needed(
    costs: ServingCosts, traffic: Traffic, p95_ms: float, *, gap_ms: float, most: int
) -> tuple[int, ServiceLevel] | None:
    """Return machines that encode, and replicas apart from them, fewer than ``most`` together.

    None where encoding apart saves no machine.
    """
    images = traffic.rate / traffic.questions_per_image
    least = max(1, int(images * costs.encode_ms / 1e3) + 1)
    best = None
    for encoders in range(least, most):
        found = replicas_needed(costs, traffic, p95_ms, gap_ms=gap_ms, encoders=encoders)
        if found is not None and encoders + found.replicas < most:
            best, most = (encoders, found), encoders + found.replicas
        if best is not None and encoders >= most - 1:
            break
    return best
