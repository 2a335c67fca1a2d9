"""Questions to one bundle or several, in turns: what each took, and in which of its parts.

Every repetition brings new pixels and a new question (cold), then a second question on the same
image (again): a repetition on pixels or words of an earlier one would measure a cache. Bundles take
turns within a repetition, in alternating order, so that whatever else the machine does falls on all
of them alike. The first repetitions warm up and count nowhere.

Answers do not end by themselves here: all have the same number of tokens, else a model that says
less would look faster.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from ...graphs.chain.executor import observed
from ...graphs.commands import rebuild_command
from ...graphs.errors import PromptError
from ...graphs.parts import PROBE, SERVE, VISION, step_name
from ...graphs.plan.call_cost import GraphCall
from ...graphs.progress import Advance, no_advance

if TYPE_CHECKING:
    from ...graphs.config import ModelConfig
    from ...graphs.families.family import ImageLayout
    from ...runtime.session import Session

Result = TypeVar("Result")

FIRST_TOKEN = "first_token"
IMAGE_SIZE = (640, 480)
NOISE_GRID = (20, 15)
FIRST_QUESTION = "What can be seen in part {number} of this picture?"
SECOND_QUESTION = "And what colour is the thing in part {number}?"


@dataclass(frozen=True)
class Settings:
    """Amounts to measure.

    repetitions: that count; warm_up: that do not; tokens: of every answer, at least 2.
    """

    repetitions: int = 20
    warm_up: int = 3
    tokens: int = 32

    def check(self) -> None:
        """Raise PromptError for a number that measures nothing."""
        for name, least in (("repetitions", 1), ("warm_up", 0), ("tokens", 2)):
            value = getattr(self, name)
            if value < least:
                raise PromptError(
                    f"--{name.replace('_', '-')} is {value}: it must be at least {least}"
                    + (", for a later token's time" if name == "tokens" else "")
                )


def timed_ms(run: Callable[[], Any]) -> float:
    """Call ``run``; return the milliseconds that it took."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def repeated(run: Callable[[], Result], times: int, seconds: float = math.inf) -> list[Result]:
    """Call ``run`` up to ``times`` times, at least once, and not again after ``seconds``."""
    stop = time.perf_counter() + seconds
    results = [run()]
    while len(results) < times and time.perf_counter() < stop:
        results.append(run())
    return results


@dataclass(frozen=True)
class Spread:
    """Median and two percentiles of ``n`` measurements.

    Percentiles are measurements that took place (nearest rank): the 99th of 20 is the largest.
    """

    n: int
    median: float
    p90: float
    p99: float
    least: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up at least one value."""
        ranked = sorted(values)
        n = len(ranked)
        middle = (ranked[(n - 1) // 2] + ranked[n // 2]) / 2
        p90, p99 = (ranked[math.ceil(share * n) - 1] for share in (0.90, 0.99))
        return cls(n, middle, p90, p99, ranked[0])


@dataclass(frozen=True)
class ProfilePrompt:
    """An image as JPEG, a question about it, and a second one."""

    image: bytes
    first: str
    second: str


def image_layout(config: ModelConfig) -> ImageLayout:
    """Return what the images of ``prompts`` become."""
    width, height = IMAGE_SIZE
    return config.layout(height, width)


def prompts(seed: int = 0) -> Iterator[ProfilePrompt]:
    """Yield prompts without end, the same for the same seed; no image or question comes twice.

    Images are soft noise, compressed as a camera would: decoding them is part of the time.
    """
    random = np.random.default_rng(seed)
    number = 100  # three digits each: as many tokens
    while True:
        noise = random.integers(0, 256, (NOISE_GRID[1], NOISE_GRID[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(IMAGE_SIZE, Image.Resampling.BICUBIC)
        data = io.BytesIO()
        image.save(data, "JPEG", quality=90)
        yield ProfilePrompt(
            data.getvalue(),
            FIRST_QUESTION.format(number=number),
            SECOND_QUESTION.format(number=number),
        )
        number = 100 + (number - 99) % 900


@dataclass(frozen=True)
class TimedCall:
    """One call and when it took place, in seconds of ``time.perf_counter``."""

    call: GraphCall
    start: float
    stop: float

    @property
    def ms(self) -> float:
        """Milliseconds that it took, the host's part included."""
        return (self.stop - self.start) * 1e3


@contextmanager
def timed_calls(executor: Any) -> Iterator[list[TimedCall]]:
    """Note every call of ``executor`` with its rows, slots and times until the block ends."""
    events: list[TimedCall] = []

    def note(method: str, given: tuple, result: Any, start: float, stop: float) -> None:
        call = _graph_call(method, given)
        if call.rows == 1 and step_name(call.graph) in executor.manifest.graphs:
            call = replace(call, graph=step_name(call.graph))
        events.append(TimedCall(call, start, stop))

    with observed(executor, note):
        yield events


def _graph_call(method: str, given: tuple) -> GraphCall:
    """Return what a method of ``graphs.chain.executor.Executor`` runs with these arguments."""
    if method == "append":
        stage, _, _, order, slot_order = given[:5]
        return GraphCall(f"stage{stage}", order.shape[1], slot_order.shape[1])
    if method == "serve":
        stage, _, positions = given[:3]
        return GraphCall(f"{SERVE}{stage}", positions.shape[1], 0)
    if method == "select":
        edge, feeds = given
        rows = feeds["text_order"].shape[1] if "text_queries" in feeds else 0
        return GraphCall(f"select{edge}", rows, feeds["slot_order"].shape[1])
    if method == "probe":
        return GraphCall(PROBE, 0, given[3].shape[1])
    return GraphCall(VISION, 0, 0)


@dataclass(frozen=True)
class TimedAnswer:
    """One answer. Times in ms; ``graphs`` up to the first token, ``steps`` by graph per token.

    later: tokens after the first; start, stop: seconds of ``time.perf_counter``, from the call to
    the last token.
    """

    later: int
    preprocess: float
    graphs: dict[str, float]
    first_token: float
    per_token: float
    steps: dict[str, float]
    total: float
    start: float
    stop: float
    events: tuple[TimedCall, ...]

    @property
    def host(self) -> float:
        """Milliseconds until the first token that no graph and no preprocessing accounts for."""
        return self.first_token - self.preprocess - sum(self.graphs.values())

    @property
    def step_host(self) -> float:
        """The same of one later token."""
        return self.per_token - sum(self.steps.values())

    @property
    def prefill(self) -> tuple[TimedCall, ...]:
        """Calls until the first token: all but those of later tokens, one of every stage each."""
        return self.events[: len(self.events) - self.later * len(self.steps)]


@dataclass
class TimedSeries:
    """The questions that one bundle answered: on new images, and again on the same ones."""

    cold: list[TimedAnswer] = field(default_factory=list)
    again: list[TimedAnswer] = field(default_factory=list)

    def spreads(self) -> dict[str, dict[str, Spread]]:
        """Return every quantity of both kinds of question, as a prompt meets them."""
        return {"cold": _spreads(self.cold), "again": _spreads(self.again)}

    def calls(self) -> tuple[list[GraphCall], list[GraphCall], list[GraphCall]]:
        """Return the calls of a cold prefill, of a second one, and of one later token.

        Of the last repetition; a plan that decides per prompt may have made others before.
        """
        cold, again = self.cold[-1], self.again[-1]
        cold_calls, again_calls = ([e.call for e in answer.prefill] for answer in (cold, again))
        return cold_calls, again_calls, [e.call for e in cold.events[-len(cold.steps) :]]

    def call_ms(self) -> dict[GraphCall, float]:
        """Return the calls of a cold prefill and of a later token with their median times."""
        cold, _, step = self.calls()
        every = [event for answer in self.cold for event in answer.events]
        return {
            call: Spread.of([event.ms for event in every if event.call == call]).median
            for call in dict.fromkeys([*cold, *step])
        }


def measure_bundles(
    sessions: Mapping[str, Session], settings: Settings, advance: Advance = no_advance
) -> dict[str, TimedSeries]:
    """Ask every session the same; return their series by name.

    Raises:
        VisistageError: whatever a session refuses, such as more tokens than its context has.
    """
    series = {name: TimedSeries() for name in sessions}
    source = prompts()
    order = list(sessions)
    for repetition in range(settings.warm_up + settings.repetitions):
        prompt = next(source)
        for name in order if repetition % 2 else reversed(order):
            cold, again = time_questions(sessions[name], prompt, settings.tokens)
            if repetition >= settings.warm_up:
                series[name].cold.append(cold)
                series[name].again.append(again)
        advance(1)
    return series


def time_questions(
    session: Session, prompt: ProfilePrompt, tokens: int
) -> tuple[TimedAnswer, TimedAnswer]:
    """Ask both questions of one prompt; answers end by their length alone."""
    with _endless(session):
        cold = _ask(session, prompt.image, prompt.first, tokens)
        return cold, _ask(session, prompt.image, prompt.second, tokens)


def _ask(session: Session, image: bytes, text: str, tokens: int) -> TimedAnswer:
    with timed_calls(session.executor) as events:
        start = time.perf_counter()
        answer = session.infer(image, text, max_tokens=tokens)
        stop = time.perf_counter()
    steps = session.executor.reset_elapsed()
    timings, later = answer.timings, len(answer.tokens) - 1
    if timings.per_token_ms is None:
        raise PromptError(
            f"{session.bundle.path} ended its answer ({answer.text!r}) after one token by a stop "
            "string, so later tokens cannot be timed. Remove it from the checkpoint's "
            f"generation_config.json and build again: {rebuild_command(session.bundle.manifest)}"
        )
    return TimedAnswer(
        later=later,
        preprocess=timings.preprocess_ms,
        graphs=timings.graphs_ms,
        first_token=timings.first_token_ms,
        per_token=timings.per_token_ms,
        steps={name: ms / later for name, ms in steps.items()},
        total=timings.total_ms,
        start=start,
        stop=stop,
        events=tuple(events),
    )


@contextmanager
def _endless(session: Session) -> Iterator[None]:
    """Let no token end an answer until the block ends."""
    eos, session.eos = session.eos, frozenset()
    try:
        yield
    finally:
        session.eos = eos


def _spreads(questions: Sequence[TimedAnswer]) -> dict[str, Spread]:
    """Sum up every quantity; a graph that a prompt did not need took no time."""
    graphs = list(dict.fromkeys(name for q in questions for name in q.graphs))
    steps = list(dict.fromkeys(name for q in questions for name in q.steps))
    columns: dict[str, list[float]] = {"preprocess": [q.preprocess for q in questions]}
    columns |= {name: [q.graphs.get(name, 0.0) for q in questions] for name in graphs}
    columns["host"] = [q.host for q in questions]
    columns[FIRST_TOKEN] = [q.first_token for q in questions]
    columns["per_token"] = [q.per_token for q in questions]
    columns |= {f"step.{name}": [q.steps.get(name, 0.0) for q in questions] for name in steps}
    columns["step.host"] = [q.step_host for q in questions]
    columns["total"] = [q.total for q in questions]
    return {name: Spread.of(values) for name, values in columns.items()}
